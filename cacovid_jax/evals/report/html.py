"""report.html and the page of an answer: one file each, without any network.

Everything is in it: charts are inline SVG, frames are data URIs, the one script
is allowed by its hash and reads its numbers from JSON in the page. Without
scripts the page still shows every table, chart and frame. All text of the data
set and of models is escaped.
"""

import base64
import functools
import hashlib
import importlib.resources
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jinja2
import markupsafe

from cacovid_jax import files
from cacovid_jax.evals import results
from cacovid_jax.evals.report import charts, issues, svg, viewer
from cacovid_jax.inference import methods as methods_lib

_SCRIPTS = ("tables.js", "groups.js", "viewer.js")
# Groups with an order of their own; others by name.
_GROUP_ORDER = {"short": 0, "medium": 1, "long": 2}
_GROUP_TITLES = {"category": "kind of question", "duration": "length of clip"}


def write(path: str | os.PathLike, *content) -> None:
  """Writes the report that `render` makes of `content`, all or nothing."""
  files.write(path, render(*content))


def render(
  out: Mapping[str, Any],
  examples: Sequence[viewer.Example],
  curves: Sequence[Mapping[str, Any]] = (),
  times: Mapping[str, Mapping[str, float]] | None = None,
) -> str:
  """Returns the HTML text of the report.

  Args:
    out: results.json.
    examples: see `viewer.choose`.
    curves: lines of a training run's metrics.jsonl.
    times: method -> ratio as in `out` -> milliseconds to choose the tokens of
      one video, where they were measured.
  """
  rows = {**out["methods"], **out["oracles"]}
  ratios = list(next(iter(rows.values())))
  shown = min(ratios, key=lambda r: (abs(float(r) - viewer.SHOWN_RATIO), r))
  facets = _facets(out)
  return _page(
    "report.html.jinja",
    {"groups": _group_data(out, facets), "viewer": viewer.data(examples)},
    out=out,
    ratios=ratios,
    shown=shown,
    rows=_rows(out, ratios),
    reference=results.REFERENCE,
    cards=_cards(out, ratios),
    ratio_chart=_chart(charts.over_ratio(out, ratios), len(ratios) > 1),
    time_chart=_chart(charts.over_time(out, shown, times or {})),
    reward_chart=_chart(charts.rewards(curves)),
    facets=[_group_table(out, facet, shown) for facet in facets],
    differences=_differences(out, ratios),
    issues=issues.listed(out),
    clips=viewer.clips(examples),
    num_right=sum(bool(example.said.right) for example in examples),
  )


def render_answers(
  facts: Mapping[str, Any],
  rows: Sequence[Sequence[str]],
  examples: Sequence[viewer.Example],
) -> str:
  """Returns the HTML text of a page about one question.

  Args:
    facts: `question`, `clip`, `lead` and `note` in words, `columns` of the
      table, and `provenance` as in results.json.
    rows: the table's cells, in words; the first column is its name.
    examples: what is shown frame by frame.
  """
  return _page(
    "answer.html.jinja",
    {"viewer": viewer.data(examples)},
    facts=facts,
    rows=rows,
    clips=viewer.clips(examples),
  )


def _page(template: str, data: Mapping[str, Any], **values) -> str:
  """Returns a page with its style, its script and the script's data."""
  script = "".join(map(_source, _SCRIPTS))
  digest = hashlib.sha256(script.encode()).digest()
  page = _templates().get_template(template)
  return page.render(
    **values,
    style=markupsafe.Markup(_source("page.css")),
    script=markupsafe.Markup(script),
    script_hash=base64.b64encode(digest).decode("ascii"),
    data=json_block(data),
  )


def json_block(value: Any) -> markupsafe.Markup:
  """Returns JSON that can stand in a <script> element, whatever it holds."""
  text = json.dumps(
    value, ensure_ascii=False, allow_nan=False, separators=(",", ":")
  )
  for character in "<>&\u2028\u2029":
    text = text.replace(character, f"\\u{ord(character):04x}")
  return markupsafe.Markup(text)


def _source(name: str) -> str:
  folder = importlib.resources.files(__package__) / "templates"
  return (folder / name).read_text(encoding="utf-8")


@functools.cache
def _templates() -> jinja2.Environment:
  environment = jinja2.Environment(
    loader=jinja2.FunctionLoader(_source),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
  )
  environment.filters |= {
    "percent": _percent,
    "points": _points,
    "options": _options,
    "breakable": _breakable,
    "grids": grid_words,
  }
  return environment


def grid_words(grid: Sequence[Any]) -> str:
  """Returns the `grid` of results.json in words."""
  sign = " \N{MULTIPLICATION SIGN} "
  if not isinstance(grid[0], Mapping):
    return f"{sign.join(map(str, grid))} tokens a clip (time, rows, columns)"
  common = sorted(grid, key=lambda entry: -entry["clips"])
  listed = [
    f"{sign.join(map(str, entry['grid']))} ({entry['clips']} clips)"
    for entry in common[:4]
  ]
  if len(common) > 4:
    listed.append(f"{len(common) - 4} more")
  return (
    f"{len(common)} grids of tokens (time, rows, columns): {', '.join(listed)}"
  )


def _percent(value: float, digits: int = 1) -> str:
  return f"{100 * value:.{digits}f}"


def _points(value: float) -> str:
  """Returns a difference in percentage points, with a true minus sign."""
  return f"{100 * value:+.1f}".replace("-", "\N{MINUS SIGN}")


def _options(spec: str) -> str:
  """Returns the options of a method's spec, as "layer = 3"."""
  name, _, query = spec.partition("?")
  return query.replace("&", ", ").replace("=", " = ") or name


def _breakable(name: str) -> markupsafe.Markup:
  """Returns a name, escaped, that may be broken behind underscores."""
  return markupsafe.escape(name).replace("_", markupsafe.Markup("_<wbr>"))


def _cards(out, ratios):
  """Returns (title, figure, note) of the figures on top."""
  vanilla, name = out["vanilla"], results.REFERENCE
  note = f"all {_number(vanilla['kept_tokens'])} video tokens"
  cards = [("vanilla", f"{_percent(vanilla['accuracy'])} %", note)]
  for ratio in ratios:
    cell = out["methods"].get(name, {}).get(ratio)
    if cell and cell["status"] == "ok":
      note = f"{_number(cell['kept_tokens'])} tokens"
      if cell["of_vanilla"] is not None:
        note += f", {_percent(cell['of_vanilla'])} % of vanilla"
      title = f"{name} at {_percent(float(ratio), 0)} %"
      cards.append((title, f"{_percent(cell['accuracy'])} %", note))
  return cards


def _chart(chart, wanted=True) -> markupsafe.Markup | None:
  """Returns a chart as markup, None if there is nothing in it."""
  return chart.page() if wanted and chart.series else None


def _number(value) -> str:
  return f"{value:g}" if value == int(value) else f"{value:.1f}"


def _rows(out, ratios):
  """Returns the rows of the main table, best of the methods marked."""
  differences = {
    (entry["method"], entry["ratio"]): entry
    for entry in out["paired"]
    if entry["vs"] == results.REFERENCE
  }
  best = {
    ratio: max(
      (row[ratio].get("accuracy", -1) for row in out["methods"].values()),
      default=-1,
    )
    for ratio in ratios
  }
  rows = []
  for oracle, group in ((False, out["methods"]), (True, out["oracles"])):
    for name, row in group.items():
      cells, first = [dict(row[ratio]) for ratio in ratios], row[ratios[0]]
      for ratio, cell in zip(ratios, cells, strict=True):
        if cell["status"] == "ok":
          cell["best"] = not oracle and cell["accuracy"] == best[ratio]
          cell["difference"] = differences.get((name, ratio))
      facts = {"options": first.get("options"), "note": first.get("note", "")}
      rows.append({"name": name, "oracle": oracle, "cells": cells, **facts})
  return rows


def _differences(out, ratios):
  """Returns, per ratio, differences to the reference on one scale.

  Places are per cent of the scale's width; the reference itself stands against
  vanilla.
  """
  entries = [e for e in out["paired"] if e["ratio"] in ratios]
  if not entries:
    return None
  ends = [end for entry in entries for end in entry["ci95"]]
  ticks = svg.nice_ticks(100 * min(0, *ends), 100 * max(0, *ends), 4)
  low, high = ticks[0], ticks[-1]

  def place(value):
    return round(100 * (100 * value - low) / (high - low), 2)

  by_ratio = {ratio: [] for ratio in ratios}
  for entry in entries:
    start, end = entry["ci95"]
    to_vanilla = entry["vs"] == methods_lib.VANILLA
    by_ratio[entry["ratio"]].append(
      {
        "name": entry["method"] + " against vanilla" * to_vanilla,
        "to_vanilla": to_vanilla,
        "mean": entry["mean"],
        "ci95": entry["ci95"],
        "left": place(start),
        "width": round(place(end) - place(start), 2),
        "dot": place(entry["mean"]),
      }
    )
  for rows in by_ratio.values():
    rows.sort(key=lambda row: (row["to_vanilla"], -row["mean"], row["name"]))
  found = [{"ratio": r, "rows": rows} for r, rows in by_ratio.items() if rows]
  marks = [(f"{tick:g}".replace("-", "−"), place(tick / 100)) for tick in ticks]
  return {"ratios": found, "ticks": marks, "zero": place(0)}


class _Facet(NamedTuple):
  """One way to group the questions."""

  key: str  # `category`, `duration`, or a name in `by_group`.
  title: str  # In words.
  names: Sequence[str]  # Of its groups.
  counts: Sequence[int]  # Questions in each.

  def groups(self, cell) -> list[float | None]:
    """Returns the accuracies of a cell in each group."""
    by_name = _groups(cell, self.key)
    return [by_name.get(name, {}).get("accuracy") for name in self.names]


def _facets(out: Mapping[str, Any]) -> list[_Facet]:
  """Returns the ways in which results.json groups the questions."""
  vanilla, found = out["vanilla"], []
  for key in ["category", "duration", *vanilla.get("by_group", {})]:
    by_name = _groups(vanilla, key)
    if names := sorted(by_name, key=_group_place):
      counts = [by_name[name]["n"] for name in names]
      title = _GROUP_TITLES.get(key, key.replace("_", " "))
      found.append(_Facet(key, title, names, counts))
  return found


def _group_table(out, facet: _Facet, ratio: str) -> dict[str, Any]:
  """Returns a facet's groups and the accuracies of every row in them."""
  rows = [("vanilla", facet.groups(out["vanilla"]))]
  for name, row in {**out["methods"], **out["oracles"]}.items():
    rows.append((name, facet.groups(row[ratio])))
  return {"facet": facet, "rows": rows}


def _group_data(out, facets: Sequence[_Facet]) -> dict[str, Any]:
  """Returns all accuracies by method, ratio and facet, ready for JSON."""
  return {
    "facets": [facet._asdict() for facet in facets],
    "vanilla": [facet.groups(out["vanilla"]) for facet in facets],
    "values": {
      name: {
        ratio: [facet.groups(cell) for facet in facets]
        for ratio, cell in row.items()
        if cell["status"] == "ok"
      }
      for name, row in {**out["methods"], **out["oracles"]}.items()
    },
  }


def _groups(cell, key):
  if key in _GROUP_TITLES:
    return cell.get(f"by_{key}", {})
  return cell.get("by_group", {}).get(key, {})


def _group_place(name: str):
  # Lengths in seconds are numbers in a string.
  number = float(name) if name.isdecimal() else 0.0
  return _GROUP_ORDER.get(name, len(_GROUP_ORDER)), number, name
