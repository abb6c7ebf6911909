"""What the main table is written as: Markdown, CSV, a picture."""

import csv
import io
import os

import matplotlib.figure

from cacovid_jax.evals import evaluation, paper, results
from experiments import table_files

NAMES = ("table.md", "table.csv", "accuracy.png", "results.json",
         "timings.json")  # fmt: skip
_FACTS = (
  "method", "ratio", "status", "accuracy", "ci_low", "ci_high", "of_vanilla",
  "vs_cacovid", "vs_low", "vs_high", "paper", "difference", "reproduced",
)  # fmt: skip
COLUMNS = (*_FACTS, *paper.COLUMNS)


def write(workdir, out):
  """Writes all files but results.json, each all or nothing."""
  found = rows(out)
  table_files.write_text(workdir / "table.md", markdown(out, found))
  table_files.write_text(workdir / "table.csv", as_csv(found))
  plot(workdir / "accuracy.png", out, found)


def rows(out) -> list[dict]:
  """Returns one dict of `COLUMNS` per row, in per cent; None is unknown.

  Accuracies of the table are averages over its benchmarks.
  """
  average = out["average"]
  complete = not out["absent"]
  paired = {
    (entry["method"], entry["ratio"]): entry
    for entry in average["paired"]
    if entry["vs"] == results.REFERENCE
  }
  cells = [(paper.VANILLA, "1.00", _vanilla(out))]
  for ratio in out["ratios"]:
    # In the order that they were asked for, which JSON does not keep.
    for method in average["methods"]:
      cells.append((method, ratio, average["methods"][method][ratio]))
  found = []
  for method, ratio, cell in cells:
    row = dict.fromkeys(COLUMNS)
    row |= {"method": method, "ratio": ratio, "status": cell["status"]}
    reported = (cell.get("paper") or {}).get(paper.AVERAGE)
    row["paper"] = reported
    if cell["status"] == "ok":
      row["accuracy"] = 100 * cell["accuracy"]
      row["ci_low"], row["ci_high"] = (100 * v for v in cell["ci95"])
      if cell.get("of_vanilla") is not None:
        row["of_vanilla"] = 100 * cell["of_vanilla"]
      row["reproduced"] = cell["reproduced"]
      for column in paper.COLUMNS:
        if column in cell["columns"]:
          row[column] = 100 * cell["columns"][column]
      if reported is not None and complete:
        row["difference"] = row["accuracy"] - reported
    entry = paired.get((method, ratio))
    if entry:
      row["vs_cacovid"] = 100 * entry["mean"]
      row["vs_low"], row["vs_high"] = (100 * v for v in entry["ci95"])
    found.append(
      {
        name: round(value, 4) if isinstance(value, float) else value
        for name, value in row.items()
      }
    )
  return found


def _vanilla(out):
  reported = {
    name: entry["paper"] for name, entry in out["drift"]["columns"].items()
  }
  return out["average"]["vanilla"] | {
    "status": "ok", "of_vanilla": 1.0, "paper": reported,
  }  # fmt: skip


def as_csv(found) -> str:
  """Returns the rows as CSV; unknown values are empty."""
  text = io.StringIO()
  writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
  writer.writeheader()
  writer.writerows(found)
  return text.getvalue()


def markdown(out, found) -> str:
  """Returns the table as text: drift first, then a part per ratio."""
  asked = out["average"]["benchmarks"]
  counts = ", ".join(
    f"{paper.BENCHMARKS[name][0]}"
    f" {out['benchmarks'][name]['vanilla']['n']} questions"
    for name in asked
  )
  lines = [
    f"# Main table of {out['model'] or 'a model that the paper has not'}",
    f"{counts}. Accuracies in per cent; average: mean of"
    f" {len(asked)} benchmarks. Brackets: 95 % intervals, clips drawn within"
    " every benchmark. Difference: to cacovid, paired by question, in points.",
  ]
  if out["absent"]:
    titles = ", ".join(paper.BENCHMARKS[name][0] for name in out["absent"])
    lines.append(
      f"**Absent: {titles}.** The averages are not the paper's averages."
    )
  lines += ["## All tokens", _drift(out, found[0])]
  caveats = [
    f"- {paper.BENCHMARKS[name][0]}: {line}"
    for name in asked
    for line in evaluation.caveats(out["benchmarks"][name])
  ]
  if caveats:
    lines.append("\n".join(caveats))
  for ratio in out["ratios"]:
    lines.append(f"## {float(ratio):.0%} of the tokens")
    lines.append(_table([row for row in found if row["ratio"] == ratio]))
  return "\n\n".join(lines) + "\n"


def _titles():
  return [paper.column_title(column) for column in paper.COLUMNS]


def _line(cells):
  return f"| {' | '.join(cells)} |"


def _drift(out, vanilla):
  """Returns own answers from all tokens beside the paper's."""
  columns = out["drift"]["columns"]
  names = (*paper.COLUMNS, paper.AVERAGE)
  own = {**vanilla, paper.AVERAGE: vanilla["accuracy"]}
  lines = [
    _line(["", *_titles(), "average"]),
    _line(["---", *["---:"] * len(names)]),
    _line(["ours", *(_percent(own[name]) for name in names)]),
  ]
  if columns:
    for title, key, form in (
      ("paper", "paper", "{:.1f}"),
      ("difference", "difference", "{:+.1f}"),
    ):
      cells = [
        form.format(columns[name][key]) if name in columns else ""
        for name in names
      ]
      lines.append(_line([title, *cells]))
  low, high = _percent(vanilla["ci_low"]), _percent(vanilla["ci_high"])
  return "\n".join(lines) + (
    f"\n\nAverage {_percent(vanilla['accuracy'])} [{low}, {high}]."
    f" Reproduced: {_word(vanilla['reproduced'])}."
  )


def _table(found):
  head = ["method", *_titles(), "average", "of vanilla", "difference", "paper",
          "reproduced"]  # fmt: skip
  lines = [_line(head), _line(["---"] * len(head))]
  for row in found:
    reported = "" if row["paper"] is None else f"{row['paper']:.1f}"
    if row["status"] != "ok":
      reason = row["status"].replace("|", "\\|")
      blank = [""] * len(paper.COLUMNS)
      lines.append(_line([row["method"], *blank, reason, "", "", reported, ""]))
      continue
    share = row["of_vanilla"]
    difference = ""
    if row["vs_cacovid"] is not None:
      difference = (
        f"{row['vs_cacovid']:+.1f} [{row['vs_low']:+.1f},"
        f" {row['vs_high']:+.1f}]"
      )
    lines.append(
      _line(
        [
          row["method"],
          *(_percent(row[column]) for column in paper.COLUMNS),
          f"{_percent(row['accuracy'])} [{_percent(row['ci_low'])},"
          f" {_percent(row['ci_high'])}]",
          "" if share is None else f"{share:.1f} %",
          difference,
          reported,
          _word(row["reproduced"]),
        ]
      )
    )
  return "\n".join(lines)


def _percent(value):
  return "" if value is None else f"{value:.1f}"


def _word(reproduced):
  return {True: "yes", False: "no"}.get(reproduced, reproduced)


def plot(path, out, found):
  """Draws the averages over the ratio, the paper's as open points."""
  figure = matplotlib.figure.Figure(figsize=(8, 5.2), layout="constrained")
  axes = figure.add_subplot()
  vanilla = found[0]["accuracy"]
  axes.axhline(vanilla, color="#9aa0a6", linestyle="--", linewidth=1)
  names = list(dict.fromkeys(row["method"] for row in found[1:]))
  for name in names:
    mine = [row for row in found if row["method"] == name]
    known = [row for row in mine if row["accuracy"] is not None]
    strong = name == results.REFERENCE
    (line,) = axes.plot(
      [100 * float(row["ratio"]) for row in known],
      [row["accuracy"] for row in known],
      marker="o",
      linewidth=2.4 if strong else 1.2,
      label=name,
      zorder=3 if strong else 2,
    )
    reported = [row for row in mine if row["paper"] is not None]
    axes.plot(
      [100 * float(row["ratio"]) for row in reported],
      [row["paper"] for row in reported],
      "o",
      markerfacecolor="none",
      color=line.get_color(),
    )
  axes.set_xlabel("video tokens kept (%)")
  axes.set_ylabel(f"average of {len(out['average']['benchmarks'])} (%)")
  axes.set_title(
    f"{out['model'] or 'main table'}; open points: the paper", loc="left"
  )
  axes.legend(frameon=False, fontsize=8, ncols=2)
  axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
  axes.spines[["top", "right"]].set_visible(False)
  partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
  # Without the version and date that files of matplotlib carry.
  figure.savefig(partial, dpi=150, format="png", metadata={"Software": None})
  os.replace(partial, path)
