"""report.html: one file that shows an evaluation, without any network.

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
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import markupsafe

from cacovid_jax.evals import (
  charts,
  groups,
  plots,
  results,
  runner,
  troubles,
  viewer,
)
from cacovid_jax.evals import examples as examples_lib

_STYLE = "page.css"
_SCRIPTS = ("tables.js", "groups.js", "viewer.js")


def write(
  path: str | os.PathLike,
  out: Mapping[str, Any],
  examples: Sequence[examples_lib.Example],
  curves: Sequence[Mapping[str, Any]] = (),
  times: Mapping[str, Mapping[str, float]] | None = None,
) -> None:
  """Writes the report, all or nothing.

  Args:
    path: of the HTML file.
    out: results.json.
    examples: see `examples.choose`.
    curves: lines of a training run's metrics.jsonl.
    times: method -> ratio as in `out` -> milliseconds to choose the tokens of
      one video, where they were measured.
  """
  write_page(path, render(out, examples, curves, times))


def write_page(path: str | os.PathLike, text: str) -> None:
  """Writes an HTML file so that a reader sees the old one or the new one."""
  path = pathlib.Path(path)
  partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
  partial.write_text(text, encoding="utf-8")
  os.replace(partial, path)


def render(
  out: Mapping[str, Any],
  examples: Sequence[examples_lib.Example],
  curves: Sequence[Mapping[str, Any]] = (),
  times: Mapping[str, Mapping[str, float]] | None = None,
) -> str:
  """Returns the HTML text of the report; arguments as of `write`."""
  rows = {**out["methods"], **out["oracles"]}
  ratios = list(next(iter(rows.values())))
  shown = min(
    ratios, key=lambda r: (abs(float(r) - examples_lib.SHOWN_RATIO), r)
  )
  facets = groups.facets(out)
  return _page(
    "report.html.jinja",
    {"groups": groups.data(out, facets), "viewer": viewer.data(examples)},
    out=out,
    ratios=ratios,
    shown=shown,
    rows=_rows(out, ratios),
    reference=results.REFERENCE,
    cards=_cards(out, ratios),
    ratio_chart=charts.over_ratio(out, ratios),
    time_chart=charts.over_time(out, shown, times or {}),
    reward_chart=charts.rewards(curves),
    facets=[groups.table(out, facet, shown) for facet in facets],
    differences=_differences(out, ratios),
    troubles=troubles.listed(out),
    clips=viewer.clips(examples),
    num_right=sum(bool(example.said.right) for example in examples),
  )


def render_answers(
  facts: Mapping[str, Any],
  rows: Sequence[Sequence[str]],
  examples: Sequence[examples_lib.Example],
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
  folder = importlib.resources.files("cacovid_jax.evals") / "templates"
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
  environment.filters["percent"] = _percent
  environment.filters["points"] = _points
  environment.filters["options"] = _options
  environment.filters["breakable"] = _breakable
  environment.filters["ratio_key"] = lambda r: viewer.ratio_key(float(r))
  environment.filters["grids"] = results.grid_words
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
  ticks = plots.nice_ticks(100 * min(0, *ends), 100 * max(0, *ends), 5)
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
      to_vanilla = entry["vs"] == runner.VANILLA
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
