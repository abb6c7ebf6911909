"""Tables as files: Markdown, CSV and an SVG chart, for every kind of table.

A table's rows are dicts; `None` is unknown. Three kinds: compressors on one
benchmark, the paper's main table over several, and milliseconds.
"""

import csv
import io
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from cacovid_jax import compressors, files
from cacovid_jax.evals import evaluation, paper, results
from cacovid_jax.evals.report import charts, html

COMPRESSOR_COLUMNS = (
  "method", "ratio", "status", "minimum_ratio", "kept_tokens",
  "equivalent_ratio", "selection_ms", "rule_ms", "reads_ms", "answer_ms",
  "first_token_ms", "accuracy", "ci_low", "ci_high", "vs_cacovid", "vs_low",
  "vs_high", "seeds", "forced", "options", "note", "kept_tokens_p95",
  "prompt_tokens",
)  # fmt: skip
COMPRESSOR_FILES = ("table.md", "table.csv", "accuracy_over_time.svg")
MAIN_COLUMNS = (
  "method", "ratio", "status", "accuracy", "ci_low", "ci_high", "of_vanilla",
  "vs_cacovid", "vs_low", "vs_high", "paper", "difference", "reproduced",
  *paper.COLUMNS,
)  # fmt: skip
MAIN_FILES = ("table.md", "table.csv", "accuracy.svg")
EFFICIENCY_COLUMNS = (
  "method", "ratio", "status", "kept_tokens", "rule_ms", "reads_ms",
  "compression_ms", "prefill_ms", "total_ms", "first_token_ms",
  "prefill_tflops", "kv_mib", "paper_compression_ms", "paper_prefill_ms",
  "note",
)  # fmt: skip
EFFICIENCY_FILES = ("table.md", "table.csv", "prefill.svg")

Rows = Sequence[Mapping[str, Any]]


def all_rows(variants: Mapping[str, str]) -> tuple[str, ...]:
  """Returns the specs of all methods, each before its variants by label."""
  rows = []
  for name in compressors.names():
    rows.append(name)
    rows += [
      f"{label}={spec}"
      for label, spec in variants.items()
      if spec.partition("?")[0] == name
    ]
  return tuple(rows)


def as_csv(columns: Sequence[str], rows: Rows) -> str:
  """Returns these columns of the rows as CSV; unknown values are empty."""
  text = io.StringIO()
  writer = csv.DictWriter(
    text, columns, extrasaction="ignore", lineterminator="\n"
  )
  writer.writeheader()
  writer.writerows(rows)
  return text.getvalue()


def as_markdown(
  head: Sequence[str], rows: Sequence[Sequence[str]], numbers: range = range(0)
) -> str:
  """Returns a Markdown table; columns in `numbers` are aligned to the right."""
  rules = ["---:" if i in numbers else "---" for i in range(len(head))]
  return "\n".join(map(_cells, [head, rules, *rows]))


def _cells(row: Sequence[str]) -> str:
  # A bar in a cell does not end it.
  escaped = (cell.replace("|", "\\|") for cell in row)
  return f"| {' | '.join(escaped)} |"


def _write(workdir, names, text, columns, rows, chart) -> None:
  contents = (text, as_csv(columns, rows), chart)
  for name, content in zip(names, contents, strict=True):
    files.write(pathlib.Path(workdir, name), content)


def _page(template: str, **values) -> str:
  """Returns Markdown of a template that takes these and what formats cells."""
  columns = list(map(paper.column_title, paper.COLUMNS))
  page = html.template(template).render(
    **values, cells=_cells, columns=columns, number=number,
    reference=results.REFERENCE, scores=_scores, table=as_markdown,
  )  # fmt: skip
  return page.strip() + "\n"


def write_compressors(workdir: str | os.PathLike, out, costs) -> None:
  """Writes `COMPRESSOR_FILES`; costs: label -> ratio -> `latency.Cost`."""
  rows = compressor_rows(out, costs)
  title = f"{out['benchmark']}, {out['split']}: a point for each share kept"
  chart = charts.over_time(out, totals(costs)).file(title)
  text = compressor_markdown(out, rows)
  _write(workdir, COMPRESSOR_FILES, text, COMPRESSOR_COLUMNS, rows, chart)


def totals(costs) -> dict[str, dict[str, float]]:
  """Returns label -> ratio -> milliseconds to the first token."""
  return {
    label: {ratio: cost.total for ratio, cost in row.items()}
    for label, row in costs.items()
  }


def compressor_rows(out: Mapping[str, Any], costs) -> list[dict[str, Any]]:
  """Returns one dict of `COMPRESSOR_COLUMNS` per method and ratio."""
  paired = _paired(out)
  cells = [
    (label, suffix, ratio, cell)
    for group, suffix in (("methods", ""), ("oracles", " (oracle)"))
    for label, row in out[group].items()
    for ratio, cell in row.items()
  ]
  found = []
  for label, suffix, ratio, cell in cells:
    row = {name: cell.get(name) for name in COMPRESSOR_COLUMNS}
    row |= {"method": label + suffix, "ratio": ratio}
    options = cell.get("options", {}).items()
    row["options"] = " ".join(f"{name}={value}" for name, value in options)
    row["note"] = cell.get("note", "")
    if cell["status"] == "ok":
      row["ci_low"], row["ci_high"] = cell["ci95"]
      row["seeds"] = len(cell.get("by_seed", [0]))
      row["forced"] = cell.get("forced", 0)
    row |= paired.get((label, ratio), {})
    if cost := costs.get(label, {}).get(ratio):
      row["selection_ms"] = round(cost.choosing, 4)
      row["rule_ms"], row["reads_ms"], row["answer_ms"], _ = cost
      row["first_token_ms"] = round(cost.total, 4)
    found.append(row)
  return found


def _paired(out, scale=1) -> dict[tuple[str, str], dict[str, float]]:
  """Returns (method, ratio) -> its difference to the reference, in columns."""
  found = {}
  for entry in out["paired"]:
    if entry["vs"] == results.REFERENCE:
      mean, low, high = (scale * v for v in (entry["mean"], *entry["ci95"]))
      row = {"vs_cacovid": mean, "vs_low": low, "vs_high": high}
      found[entry["method"], entry["ratio"]] = row
  return found


def compressor_markdown(out: Mapping[str, Any], rows: Rows) -> str:
  """Returns the table as text, one part per ratio, best accuracy first."""
  notes = {row["method"]: row["note"] for row in rows if row["note"]}
  return _page("compressors.md.jinja", out=out, rows=rows, notes=notes)


def write_main(workdir: str | os.PathLike, out: Mapping[str, Any]) -> None:
  """Writes `MAIN_FILES` of the main table, of its results.json."""
  rows = main_rows(out)
  text, chart = main_markdown(out, rows), charts.averages(out, rows)
  _write(workdir, MAIN_FILES, text, MAIN_COLUMNS, rows, chart)


def main_rows(out: Mapping[str, Any]) -> list[dict[str, Any]]:
  """Returns one dict of `MAIN_COLUMNS` per row, in per cent, vanilla first."""
  average = out["average"]
  paired = _paired(average, scale=100)
  known = {k: entry["paper"] for k, entry in out["drift"]["columns"].items()}
  vanilla = {"status": "ok", "of_vanilla": 1.0, "paper": known}
  cells = [(paper.VANILLA, "1.00", vanilla | average["vanilla"])] + [
    # In the order that they were asked for, which JSON does not keep.
    (method, ratio, row[ratio])
    for ratio in out["ratios"]
    for method, row in average["methods"].items()
  ]
  found = []
  for method, ratio, cell in cells:
    row = dict.fromkeys(MAIN_COLUMNS)
    row |= {"method": method, "ratio": ratio, "status": cell["status"]}
    row["paper"] = reported = (cell.get("paper") or {}).get(paper.AVERAGE)
    if cell["status"] == "ok":
      row["accuracy"] = 100 * cell["accuracy"]
      row["ci_low"], row["ci_high"] = (100 * v for v in cell["ci95"])
      if cell.get("of_vanilla") is not None:
        row["of_vanilla"] = 100 * cell["of_vanilla"]
      row["reproduced"] = cell["reproduced"]
      columns = cell["columns"]
      row |= {c: 100 * columns[c] for c in paper.COLUMNS if c in columns}
      if reported is not None and not out["absent"]:
        row["difference"] = row["accuracy"] - reported
    row |= paired.get((method, ratio), {})
    found.append(
      {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}
    )
  return found


def main_markdown(out: Mapping[str, Any], rows: Rows) -> str:
  """Returns the table as text: drift first, then a part per ratio."""
  asked, columns = out["average"]["benchmarks"], out["drift"]["columns"]
  titles = {name: title for name, (title, _) in paper.BENCHMARKS.items()}

  drift = [["ours", *_scores(rows[0]), number(rows[0]["accuracy"])]]
  for key, form in (("paper", "{:.1f}"), ("difference", "{:+.1f}")):
    if columns:
      known = {name: form.format(columns[name][key]) for name in columns}
      names = (*paper.COLUMNS, paper.AVERAGE)
      drift.append([key, *(known.get(name, "") for name in names)])
  return _page(
    "main_table.md.jinja",
    out=out,
    rows=rows,
    asked=asked,
    titles=titles,
    drift=drift,
    caveats=[
      f"{titles[name]}: {line}"
      for name in asked
      for line in evaluation.caveats(out["benchmarks"][name])
    ],
  )


def number(value: float | None) -> str:
  """Returns a number with one decimal; "" if it is unknown."""
  return "" if value is None else f"{value:.1f}"


def _scores(row: Mapping[str, float | None]) -> list[str]:
  return [number(row.get(column)) for column in paper.COLUMNS]


def write_efficiency(workdir: str | os.PathLike, out: Mapping[str, Any]):
  """Writes `EFFICIENCY_FILES` of the table of times, of its results.json."""
  text, chart = efficiency_markdown(out), charts.first_token(out)
  columns, rows = EFFICIENCY_COLUMNS, out["rows"]
  _write(workdir, EFFICIENCY_FILES, text, columns, rows, chart)


def efficiency_markdown(out: Mapping[str, Any]) -> str:
  """Returns the table as text, in the order it was measured."""
  notes = {row["method"]: row["note"] for row in out["rows"] if "note" in row}
  return _page("efficiency.md.jinja", out=out, notes=notes)


def paper_markdown() -> str:
  """Returns the tables of docs/paper_table.md, without a line break at the end.

  Commands are run as they stand, one after another and each in a folder of its
  own: weights, benchmarks and policies lie where the configs expect them.
  """
  names = {row.method: row.title for row in paper.ROWS}
  page = _page(
    "paper_table.md.jinja", paper=paper, command=paper_command, names=names
  )
  return page.strip()


def paper_command(model: str, *, trained: bool = True) -> str:
  """Returns the command that fills the rows of a model of `paper.MODELS`.

  Without `trained`, those that need no policy; where the paper has vanilla
  alone, another one with it.
  """
  config = paper.MODELS[model].config
  path, _, size = config.partition(":size=")
  name = f"{pathlib.PurePosixPath(path).stem}_{size}"
  command = f"python -m experiments.main_table --config={config}"
  if trained:
    return f"{command} --policy=workdirs/{name} --data=datasets"
  methods = dict.fromkeys(
    row.method
    for row in paper.ROWS
    if row.model == model
    and row.method not in (paper.VANILLA, results.REFERENCE)
  )
  return (
    f"{command} --data=datasets --methods={','.join(methods or ['uniform'])}"
    f" --workdir=workdirs/main_table_{name}_no_policy"
  )
