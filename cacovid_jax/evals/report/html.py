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
from typing import Any

import jinja2
import markupsafe

from cacovid_jax import files
from cacovid_jax.evals import results
from cacovid_jax.evals.report import charts, svg, viewer

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
    times: method -> ratio as in `out` -> milliseconds from the frames of one
      video to the first token, where they were measured.
  """
  methods, rows = out["methods"].values(), {**out["methods"], **out["oracles"]}
  ratios = list(next(iter(rows.values())))
  shown = min(ratios, key=lambda r: (abs(float(r) - viewer.SHOWN_RATIO), r))
  groups = _groups(out)
  return page(
    "report.html.jinja",
    examples,
    {"groups": groups},
    out=out,
    ratios=ratios,
    shown=shown,
    best={
      r: max((row[r].get("accuracy", -1) for row in methods), default=-1)
      for r in ratios
    },
    to_reference={
      (entry["method"], entry["ratio"]): entry
      for entry in out["paired"]
      if entry["vs"] == results.REFERENCE
    },
    reference=results.REFERENCE,
    ratio_chart=charts.over_ratio(out, ratios),
    time_chart=charts.over_time(out, times or {}),
    reward_chart=charts.rewards(curves),
    groups=groups,
    ticks=_scale(out, ratios),
    cells=[
      {"name": name, "ratio": ratio, "status": "ok", **cell}
      for name, row in {"vanilla": {1: out["vanilla"]}, **rows}.items()
      for ratio, cell in row.items()
    ],
    num_right=sum(bool(example.said.right) for example in examples),
  )


def page(
  name: str,
  examples: Sequence[viewer.Example],
  data: Mapping[str, Any] | None = None,
  **values: Any,
) -> str:
  """Returns a page with its style, its script and the script's `data`."""
  script = "".join(map(_source, _SCRIPTS))
  digest = hashlib.sha256(script.encode()).digest()
  return template(name).render(
    **values,
    clips=examples,
    frames=viewer.frames(examples),
    style=markupsafe.Markup(_source("page.css")),
    script=markupsafe.Markup(script),
    script_hash=base64.b64encode(digest).decode("ascii"),
    data=json_block({**(data or {}), "viewer": viewer.data(examples)}),
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


def template(name: str) -> jinja2.Template:
  """Returns a template for HTML or Markdown."""
  return _environment().get_template(name)


@functools.cache
def _environment() -> jinja2.Environment:
  environment = jinja2.Environment(
    loader=jinja2.FunctionLoader(_source),
    autoescape=lambda name: ".html" in name,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
  )
  environment.filters |= {
    # Names may be broken behind underscores.
    "breakable": lambda name: markupsafe.escape(name).replace(
      "_", markupsafe.Markup("_<wbr>")
    ),
    "grids": grid_words,
    "line": lambda text: " ".join(text.split()),
    "number": lambda value: f"{value:g}" if value % 1 == 0 else f"{value:.1f}",
    "percent": lambda value, digits=1: f"{100 * value:.{digits}f}",
    "points": lambda value: f"{100 * value:+.1f}".replace("-", "−"),
    "share": lambda ratio: f"{100 * float(ratio):g} %",
    "words": _words,
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


def _words(value: Any) -> str:
  """Returns a JSON value as a person would write it."""
  if isinstance(value, Mapping):
    return ", ".join(f"{key}: {_words(part)}" for key, part in value.items())
  if isinstance(value, (list, tuple)):
    return ": ".join(map(_words, value))
  return str(value)


def _scale(out, ratios) -> list[float]:
  """Returns ticks in points for all paired differences; none for none."""
  entries = [entry for entry in out["paired"] if entry["ratio"] in ratios]
  ends = [100 * end for entry in entries for end in entry["ci95"]]
  return svg.nice_ticks(min(0, *ends), max(0, *ends), 4) if ends else []


def _groups(out: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the ways to group the questions, and accuracies in the groups.

  These are lists by way and group: vanilla's, and by method and ratio `values`.
  """

  def groups(cell, key):
    if key in _GROUP_TITLES:
      return cell.get(f"by_{key}", {})
    return cell.get("by_group", {}).get(key, {})

  def accuracies(cell):
    return [
      [groups(cell, f["key"]).get(n, {}).get("accuracy") for n in f["names"]]
      for f in facets
    ]

  vanilla, facets = out["vanilla"], []
  for key in ["category", "duration", *vanilla.get("by_group", {})]:
    by_name = groups(vanilla, key)
    if names := sorted(by_name, key=_group_place):
      title = _GROUP_TITLES.get(key, key.replace("_", " "))
      counts = [by_name[name]["n"] for name in names]
      facet = {"key": key, "title": title, "names": names, "counts": counts}
      facets.append(facet)
  values = {
    name: {r: accuracies(c) for r, c in row.items() if c["status"] == "ok"}
    for name, row in {**out["methods"], **out["oracles"]}.items()
  }
  return {"facets": facets, "vanilla": accuracies(vanilla), "values": values}


def _group_place(name: str):
  # Lengths in seconds are numbers in a string.
  number = float(name) if name.isdecimal() else 0.0
  return _GROUP_ORDER.get(name, len(_GROUP_ORDER)), number, name
