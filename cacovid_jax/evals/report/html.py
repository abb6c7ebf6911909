"""report.html and the page of an answer: one file each, without any network.

Everything is in it: charts are inline SVG, frames are data URIs, the one script
is allowed by its hash and reads its numbers from JSON in the page. Without
scripts the page still shows every table, chart and frame. All text of the data
set and of models is escaped.
"""

import base64
import dataclasses
import functools
import hashlib
import importlib.resources
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import markupsafe

from cacovid_jax import files
from cacovid_jax.evals import results
from cacovid_jax.evals.report import charts, issues, svg, viewer
from cacovid_jax.inference import methods as methods_lib

_STYLE = "page.css"
_SCRIPTS = ("tables.js", "groups.js", "viewer.js")
# Groups with an order of their own; others by name.
_GROUP_ORDER = {"short": 0, "medium": 1, "long": 2}
_GROUP_TITLES = {"category": "kind of question", "duration": "length of clip"}


def write(
  path: str | os.PathLike,
  out: Mapping[str, Any],
  examples: Sequence[viewer.Example],
  curves: Sequence[Mapping[str, Any]] = (),
  times: Mapping[str, Mapping[str, float]] | None = None,
) -> None:
  """Writes the report, all or nothing.

  Args:
    path: of the HTML file.
    out: results.json.
    examples: see `viewer.choose`.
    curves: lines of a training run's metrics.jsonl.
    times: method -> ratio as in `out` -> milliseconds to choose the tokens of
      one video, where they were measured.
  """
  files.write(path, render(out, examples, curves, times))


def render(
  out: Mapping[str, Any],
  examples: Sequence[viewer.Example],
  curves: Sequence[Mapping[str, Any]] = (),
  times: Mapping[str, Mapping[str, float]] | None = None,
) -> str:
  """Returns the HTML text of the report; arguments as of `write`."""
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
  return (
    _templates()
    .get_template(template)
    .render(
      **values,
      style=markupsafe.Markup(_source(_STYLE)),
      script=markupsafe.Markup(script),
      script_hash=base64.b64encode(digest).decode("ascii"),
      data=json_block(data),
    )
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
    "grids": results.grid_words,
  }
  return environment


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
  vanilla = out["vanilla"]
  cards = [
    (
      "vanilla",
      f"{_percent(vanilla['accuracy'])} %",
      f"all {_number(vanilla['kept_tokens'])} video tokens",
    )
  ]
  row = out["methods"].get(results.REFERENCE, {})
  for ratio in ratios:
    cell = row.get(ratio)
    if cell and cell["status"] == "ok":
      note = f"{_number(cell['kept_tokens'])} tokens"
      if cell["of_vanilla"] is not None:
        note += f", {_percent(cell['of_vanilla'])} % of vanilla"
      title = f"{results.REFERENCE} at {_percent(float(ratio), 0)} %"
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
      cells = []
      for ratio in ratios:
        cell = dict(row[ratio])
        if cell["status"] == "ok":
          cell["best"] = not oracle and cell["accuracy"] == best[ratio]
          cell["difference"] = differences.get((name, ratio))
        cells.append(cell)
      rows.append(
        {
          "name": name,
          "oracle": oracle,
          "cells": cells,
          "options": row[ratios[0]].get("options"),
          "note": row[ratios[0]].get("note", ""),
        }
      )
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

  by_ratio = []
  for ratio in ratios:
    found = []
    for entry in entries:
      if entry["ratio"] != ratio:
        continue
      start, end = entry["ci95"]
      to_vanilla = entry["vs"] == methods_lib.VANILLA
      name = f"{entry['method']} against vanilla" if to_vanilla else None
      found.append(
        {
          "name": name or entry["method"],
          "to_vanilla": to_vanilla,
          "mean": entry["mean"],
          "ci95": entry["ci95"],
          "left": place(start),
          "width": round(place(end) - place(start), 2),
          "dot": place(entry["mean"]),
        }
      )
    found.sort(key=lambda row: (row["to_vanilla"], -row["mean"], row["name"]))
    if found:
      by_ratio.append({"ratio": ratio, "rows": found})
  marks = [(f"{tick:g}".replace("-", "−"), place(tick / 100)) for tick in ticks]
  return {"ratios": by_ratio, "ticks": marks, "zero": place(0)}


@dataclasses.dataclass(frozen=True)
class _Facet:
  """One way to group the questions.

  Attributes:
    key: `category`, `duration`, or a name in `by_group`.
    title: in words.
    names: of its groups.
    counts: questions in each.
  """

  key: str
  title: str
  names: Sequence[str]
  counts: Sequence[int]


def _facets(out: Mapping[str, Any]) -> list[_Facet]:
  """Returns the ways in which results.json groups the questions."""
  vanilla = out["vanilla"]
  keys = ["category", "duration", *vanilla.get("by_group", {})]
  found = []
  for key in keys:
    by_name = _groups(vanilla, key)
    names = sorted(by_name, key=_group_place)
    if names:
      counts = [by_name[name]["n"] for name in names]
      title = _GROUP_TITLES.get(key, key.replace("_", " "))
      found.append(_Facet(key, title, names, counts))
  return found


def _group_table(
  out: Mapping[str, Any], facet: _Facet, ratio: str
) -> dict[str, Any]:
  """Returns a facet's groups and the accuracies of every row in them."""
  rows = [("vanilla", _group_values(out["vanilla"], facet))]
  for group in ("methods", "oracles"):
    rows += [
      (name, _group_values(row[ratio], facet))
      for name, row in out[group].items()
    ]
  return {"facet": facet, "rows": rows}


def _group_data(
  out: Mapping[str, Any], facets: Sequence[_Facet]
) -> dict[str, Any]:
  """Returns all accuracies by method, ratio and facet, ready for JSON."""
  vanilla = [_group_values(out["vanilla"], facet) for facet in facets]
  values = {}
  for group in ("methods", "oracles"):
    for name, row in out[group].items():
      values[name] = {
        ratio: [_group_values(cell, facet) for facet in facets]
        for ratio, cell in row.items()
        if cell["status"] == "ok"
      }
  return {
    "facets": [dataclasses.asdict(facet) for facet in facets],
    "vanilla": vanilla,
    "values": values,
  }


def _groups(cell, key):
  if key in _GROUP_TITLES:
    return cell.get(f"by_{key}", {})
  return cell.get("by_group", {}).get(key, {})


def _group_values(cell, facet) -> list[float | None]:
  by_name = _groups(cell, facet.key)
  return [by_name.get(name, {}).get("accuracy") for name in facet.names]


def _group_place(name: str):
  # Lengths in seconds are numbers in a string.
  number = float(name) if name.isdecimal() else 0.0
  return _GROUP_ORDER.get(name, len(_GROUP_ORDER)), number, name
