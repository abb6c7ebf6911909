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
from cacovid_jax.evals.report import charts, viewer

COMPRESSOR_COLUMNS = (
  "method", "ratio", "status", "minimum_ratio", "kept_tokens",
  "equivalent_ratio", "selection_ms", "rule_ms", "reads_ms", "accuracy",
  "ci_low", "ci_high", "vs_cacovid", "vs_low", "vs_high", "seeds", "forced",
  "options", "note",
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
  """Returns a Markdown table; columns in `numbers` are aligned to the right.

  A bar in a cell does not end it.
  """
  rules = ["---:" if i in numbers else "---" for i in range(len(head))]
  escaped = ([cell.replace("|", "\\|") for cell in row] for row in rows)
  return "\n".join(f"| {' | '.join(row)} |" for row in [head, rules, *escaped])


def _write(workdir, names, text, columns, rows, chart) -> None:
  contents = (text, as_csv(columns, rows), chart)
  for name, content in zip(names, contents, strict=True):
    files.write(pathlib.Path(workdir, name), content)


def write_compressors(workdir: str | os.PathLike, out, costs) -> None:
  """Writes `COMPRESSOR_FILES`; costs: label -> ratio -> `latency.Cost`."""
  rows = compressor_rows(out, costs)
  ratios = {row["ratio"] for row in rows}
  shown = min(ratios, key=lambda r: (abs(float(r) - viewer.SHOWN_RATIO), r))
  title = f"{out['benchmark']}, {float(shown):.0%} of the tokens"
  chart = charts.over_time(out, shown, totals(costs)).file(title)
  text = compressor_markdown(out, rows)
  _write(workdir, COMPRESSOR_FILES, text, COMPRESSOR_COLUMNS, rows, chart)


def totals(costs) -> dict[str, dict[str, float]]:
  """Returns label -> ratio -> milliseconds, of each `latency.Cost`."""
  return {
    label: {ratio: cost.total for ratio, cost in row.items()}
    for label, row in costs.items()
  }


def compressor_rows(out: Mapping[str, Any], costs) -> list[dict[str, Any]]:
  """Returns one dict of `COMPRESSOR_COLUMNS` per method and ratio."""
  paired = _paired(out)
  found = []
  for group, suffix in (("methods", ""), ("oracles", " (oracle)")):
    for label, cells in out[group].items():
      for ratio, cell in cells.items():
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
          row["selection_ms"] = round(cost.total, 4)
          row["rule_ms"], row["reads_ms"] = cost
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
  vanilla = out["vanilla"]
  grid = " x ".join(map(str, out["grid"]))
  seeds = ", ".join(map(str, out["seeds"]))
  parts = [
    f"# Compressors on {out['benchmark']}, {out['split']} split",
    f"{vanilla['n']} questions about {out['num_clips']} clips of {grid} tokens."
    f" Accuracies in per cent; all {vanilla['kept_tokens']} tokens:"
    f" {_interval(vanilla['accuracy'], *vanilla['ci95'], scale=100)}."
    " Brackets: 95 % intervals, clustered by clip. Difference: to"
    f" {results.REFERENCE}, paired by question, in points. Methods that draw"
    f" are means over seeds {seeds}. Milliseconds: choosing the tokens of one"
    " video, with what is read for it alone (the policy's scores, a prefill);"
    " inside the language model, the time beyond answering from as many tokens"
    " chosen before it.",
  ]
  head = ("method", "kept", "equivalent ratio", "ms", "accuracy", "difference")
  for ratio in dict.fromkeys(row["ratio"] for row in rows):
    found = [row for row in rows if row["ratio"] == ratio]
    # What could not be run stands last.
    found.sort(key=lambda r: (r["accuracy"] is None, -(r["accuracy"] or 0)))
    table = as_markdown(head, map(_compressor_cells, found), range(1, 4))
    parts += [f"## {float(ratio):.0%} of the tokens", table]
  notes = {row["method"]: row["note"] for row in rows if row["note"]}
  parts += _listed(
    [
      *(f"{name}: {note}" for name, note in notes.items()),
      *(
        f"{row['method']} at {float(row['ratio']):.0%}: left its rule to stay"
        f" within the budget, for {row['forced']:.0%} of the questions"
        for row in rows
        if row["forced"]
      ),
    ]
  )
  return _joined(parts)


def _listed(lines) -> list[str]:
  """Returns the part of a page that lists these lines; none for none."""
  return ["\n".join(f"- {line}" for line in lines)] if lines else []


def _joined(parts) -> str:
  return "\n\n".join(parts) + "\n"


def _compressor_cells(row) -> list[str]:
  if row["status"] != "ok":
    return [row["method"], "", "", "", row["status"], ""]
  kept, time = row["kept_tokens"], row["selection_ms"]
  return [
    row["method"],
    f"{kept:g}" if kept == int(kept) else f"{kept:.1f}",
    f"{row['equivalent_ratio']:.4f}",
    "" if time is None else f"{time:.2f}" if time >= 0.01 else "< 0.01",
    _accuracy(row, scale=100),
    _difference(row, scale=100),
  ]


def _interval(mean, low, high, scale=1, form="{:.1f}") -> str:
  mean, low, high = (form.format(scale * value) for value in (mean, low, high))
  return f"{mean} [{low}, {high}]"


def _difference(row, scale=1) -> str:
  """Returns the difference of a row to the reference, in points."""
  if row["vs_cacovid"] is None:
    return ""
  values = row["vs_cacovid"], row["vs_low"], row["vs_high"]
  return _interval(*values, scale=scale, form="{:+.1f}")


def write_main(workdir: str | os.PathLike, out: Mapping[str, Any]) -> None:
  """Writes `MAIN_FILES` of the main table, of its results.json."""
  rows = main_rows(out)
  text, chart = main_markdown(out, rows), charts.averages(out, rows)
  _write(workdir, MAIN_FILES, text, MAIN_COLUMNS, rows, chart)


def main_rows(out: Mapping[str, Any]) -> list[dict[str, Any]]:
  """Returns one dict of `MAIN_COLUMNS` per row, in per cent, vanilla first.

  Accuracies of the table are averages over its benchmarks.
  """
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
  asked = out["average"]["benchmarks"]
  titles = {name: title for name, (title, _) in paper.BENCHMARKS.items()}
  counts = ", ".join(
    f"{titles[name]} {out['benchmarks'][name]['vanilla']['n']} questions"
    for name in asked
  )
  parts = [
    f"# Main table of {out['model'] or 'a model that the paper has not'}",
    f"{counts}. Accuracies in per cent; average: mean of"
    f" {len(asked)} benchmarks. Brackets: 95 % intervals, clips drawn within"
    " every benchmark. Difference: to cacovid, paired by question, in points.",
  ]
  if out["absent"]:
    absent = ", ".join(titles[name] for name in out["absent"])
    parts.append(
      f"**Absent: {absent}.** The averages are not the paper's averages."
    )
  parts += ["## All tokens", _drift(out, rows[0])]
  parts += _listed(
    [
      f"{titles[name]}: {line}"
      for name in asked
      for line in evaluation.caveats(out["benchmarks"][name])
    ]
  )
  columns = map(paper.column_title, paper.COLUMNS)
  head = ["method", *columns, "average", "of vanilla", "difference", "paper",
          "reproduced"]  # fmt: skip
  for ratio in out["ratios"]:
    found = [_main_cells(row) for row in rows if row["ratio"] == ratio]
    parts += [f"## {float(ratio):.0%} of the tokens", as_markdown(head, found)]
  return _joined(parts)


def _drift(out, vanilla) -> str:
  """Returns own answers from all tokens beside the paper's."""
  columns = out["drift"]["columns"]
  names = (*paper.COLUMNS, paper.AVERAGE)
  own = {**vanilla, paper.AVERAGE: vanilla["accuracy"]}
  rows = [["ours", *(number(own[name]) for name in names)]]
  for key, form in (("paper", "{:.1f}"), ("difference", "{:+.1f}")):
    if columns:
      known = {name: form.format(columns[name][key]) for name in columns}
      rows.append([key, *(known.get(name, "") for name in names)])
  head = ["", *map(paper.column_title, paper.COLUMNS), "average"]
  return (
    f"{as_markdown(head, rows, range(1, len(head)))}\n\nAverage"
    f" {_accuracy(vanilla)}. Reproduced: {_word(vanilla['reproduced'])}."
  )


def _accuracy(row, scale=1) -> str:
  return _interval(row["accuracy"], row["ci_low"], row["ci_high"], scale=scale)


def _main_cells(row) -> list[str]:
  if row["status"] != "ok":
    scores, average = [""] * len(paper.COLUMNS), row["status"]
  else:
    scores = [number(row[column]) for column in paper.COLUMNS]
    average = _accuracy(row)
  share = row["of_vanilla"]
  return [
    row["method"],
    *scores,
    average,
    "" if share is None else f"{share:.1f} %",
    _difference(row),
    number(row["paper"]),
    _word(row["reproduced"]),
  ]


def number(value: float | None) -> str:
  """Returns a number with one decimal; "" if it is unknown."""
  return "" if value is None else f"{value:.1f}"


def _word(reproduced) -> str:
  return {True: "yes", False: "no", None: ""}.get(reproduced, reproduced)


def write_efficiency(workdir: str | os.PathLike, out: Mapping[str, Any]):
  """Writes `EFFICIENCY_FILES` of the table of times, of its results.json."""
  text, chart = efficiency_markdown(out), charts.first_token(out)
  columns, rows = EFFICIENCY_COLUMNS, out["rows"]
  _write(workdir, EFFICIENCY_FILES, text, columns, rows, chart)


def efficiency_markdown(out: Mapping[str, Any]) -> str:
  """Returns the table as text, in the order it was measured."""
  grid = " x ".join(map(str, out["grid"]))
  commits = " and ".join(commit[:12] for commit in out["git_commits"])
  whole = out["rows"][0].get("prefill_ms")
  head = ("method", "ratio", "tokens", "compression", "prefill", "both",
          "of vanilla", "first token", "TFLOP", "cache MiB",
          "paper: compression", "prefill")  # fmt: skip
  cells = [_efficiency_cells(row, whole) for row in out["rows"]]
  notes = {row["method"]: row["note"] for row in out["rows"] if "note" in row}
  parts = [
    f"# Efficiency of {out['size']}",
    f"One prompt of {out['prompt_rows']} tokens, {grid} of them of the video,"
    f" {out['dtype']}, on {out['host']['device']} ({out['host']['backend']}),"
    f" jax {out['packages']['jax']}, commit {commits}. Medians of"
    f" {out['repeats']} runs, milliseconds. Tower {out['tower_ms']:.1f}"
    f" ({out['tower_tflops']:.3g} TFLOP), making the prompt"
    f" {out['embed_ms']:.2f}; both are in the time to the first token.",
    as_markdown(head, cells, range(1, len(head))),
    *_listed([f"{name}: {note}" for name, note in notes.items()]),
  ]
  if out["paper"]:
    parts.append(f"The paper's column: {out['paper']}, its own accelerator.")
  return _joined(parts)


def _efficiency_cells(row, whole) -> list[str]:
  name, ratio = row["method"], f"{row['ratio']:.0%}"
  if row["status"] != "ok":
    return [name, ratio, row["status"], *[""] * 9]
  names = ("compression_ms", "prefill_ms", "total_ms", "first_token_ms",
           "paper_compression_ms", "paper_prefill_ms")  # fmt: skip
  *own, first, reported, prefill = (_milliseconds(row.get(n)) for n in names)
  return [
    name,
    ratio,
    f"{row['kept_tokens']:g}",
    *own,
    f"{row['total_ms'] / whole:.0%}" if whole else "",
    first,
    f"{row['prefill_tflops']:.3g}",
    f"{row['kv_mib']:.3g}",
    reported,
    prefill,
  ]


def _milliseconds(value) -> str:
  if value is None:
    return ""
  return f"{value:.1f}" if value >= 10 or value == 0 else f"{value:.2f}"
