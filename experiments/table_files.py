"""What a table of compressors is written as: CSV, Markdown, a picture."""

import csv
import dataclasses
import os

import matplotlib.figure
import matplotlib.ticker

from cacovid_jax.evals import results

_SHOWN_RATIO = 0.1

COLUMNS = (
  "method", "ratio", "status", "minimum_ratio", "kept_tokens",
  "equivalent_ratio", "selection_ms", "rule_ms", "reads_ms", "accuracy",
  "ci_low", "ci_high", "vs_cacovid", "vs_low", "vs_high", "seeds", "forced",
  "options", "note",
)  # fmt: skip


def rows(out, times):
  """Returns one dict of `COLUMNS` per method and ratio; None is unknown."""
  paired = {
    (entry["method"], entry["ratio"]): entry
    for entry in out["paired"]
    if entry["vs"] == results.REFERENCE
  }
  found = []
  for group in ("methods", "oracles"):
    for label, cells in out[group].items():
      for ratio, cell in cells.items():
        row = dict.fromkeys(COLUMNS)
        row |= {
          "method": label + (" (oracle)" if group == "oracles" else ""),
          "ratio": ratio,
          "status": cell["status"],
          "options": " ".join(
            f"{name}={value}" for name, value in cell.get("options", {}).items()
          ),
          "note": cell.get("note", ""),
        }
        for name in ("minimum_ratio", "kept_tokens", "equivalent_ratio",
                     "accuracy"):  # fmt: skip
          row[name] = cell.get(name)
        if cell["status"] == "ok":
          row["ci_low"], row["ci_high"] = cell["ci95"]
          row["seeds"] = len(cell.get("by_seed", [0]))
          row["forced"] = cell.get("forced", 0)
        difference = paired.get((label, ratio))
        if difference:
          row["vs_cacovid"] = difference["mean"]
          row["vs_low"], row["vs_high"] = difference["ci95"]
        cost = times.get(label, {}).get(ratio)
        if cost:
          row["selection_ms"] = round(cost.total, 4)
          row["rule_ms"], row["reads_ms"] = cost
        found.append(row)
  return found


def write_csv(path, rows):
  """Writes the rows, all or nothing; unknown values are empty."""
  lines = []
  writer = csv.DictWriter(_Lines(lines), COLUMNS, lineterminator="\n")
  writer.writeheader()
  writer.writerows(rows)
  write_text(path, "".join(lines))


@dataclasses.dataclass(frozen=True)
class _Lines:
  """A file that keeps its lines."""

  lines: list[str]

  def write(self, text):
    self.lines.append(text)


def write_markdown(path, out, rows):
  """Writes `markdown`, all or nothing."""
  write_text(path, markdown(out, rows))


def markdown(out, rows):
  """Returns the table as text, one part per ratio, best accuracy first."""
  vanilla = out["vanilla"]
  low, high = vanilla["ci95"]
  grid = " x ".join(map(str, out["grid"]))
  seeds = ", ".join(map(str, out["seeds"]))
  parts = [
    f"# Compressors on {out['benchmark']}, {out['split']} split",
    f"{vanilla['n']} questions about {out['num_clips']} clips of {grid} tokens."
    f" Accuracies in per cent; all {vanilla['kept_tokens']} tokens:"
    f" {_percent(vanilla['accuracy'])} [{_percent(low)}, {_percent(high)}]."
    " Brackets: 95 % intervals, clustered by clip. Difference: to"
    f" {results.REFERENCE}, paired by question, in points. Methods that draw"
    f" are means over seeds {seeds}. Milliseconds: choosing the tokens of one"
    " video, with what is read for it alone (the policy's scores, a prefill);"
    " inside the language model, the time beyond answering from as many tokens"
    " chosen before it.",
  ]
  for ratio in dict.fromkeys(row["ratio"] for row in rows):
    lines = [
      "| method | kept | equivalent ratio | ms | accuracy | difference |",
      "| --- | ---: | ---: | ---: | --- | --- |",
    ]
    found = [row for row in rows if row["ratio"] == ratio]
    found.sort(key=_rank)
    for row in found:
      lines.append("| " + " | ".join(_cells(row)) + " |")
    parts += [f"## {float(ratio):.0%} of the tokens", "\n".join(lines)]
  notes = {row["method"]: row["note"] for row in rows if row["note"]}
  lines = [f"- {name}: {note}" for name, note in notes.items()]
  lines += [
    f"- {row['method']} at {float(row['ratio']):.0%}: left its rule to stay"
    f" within the budget, for {row['forced']:.0%} of the questions"
    for row in rows
    if row["forced"]
  ]
  if lines:
    parts.append("\n".join(lines))
  return "\n\n".join(parts) + "\n"


def _rank(row):
  """Sorts by accuracy, best first, and behind it what could not be run."""
  failed = row["accuracy"] is None
  return failed, 0 if failed else -row["accuracy"]


def _cells(row):
  if row["status"] != "ok":
    reason = row["status"].replace("|", "\\|")
    return [row["method"], "", "", "", reason, ""]
  kept = row["kept_tokens"]
  accuracy = (
    f"{_percent(row['accuracy'])} [{_percent(row['ci_low'])},"
    f" {_percent(row['ci_high'])}]"
  )
  difference = ""
  if row["vs_cacovid"] is not None:
    difference = (
      f"{100 * row['vs_cacovid']:+.1f} [{100 * row['vs_low']:+.1f},"
      f" {100 * row['vs_high']:+.1f}]"
    )
  time = row["selection_ms"]
  return [
    row["method"],
    f"{kept:g}" if kept == int(kept) else f"{kept:.1f}",
    f"{row['equivalent_ratio']:.4f}",
    "" if time is None else f"{time:.2f}" if time >= 0.01 else "< 0.01",
    accuracy,
    difference,
  ]


def _percent(value):
  return f"{100 * value:.1f}"


def plot(path, out, rows):
  """Draws accuracy over the milliseconds of choosing, at the shown ratio."""
  ratios = {row["ratio"] for row in rows}
  shown = min(ratios, key=lambda r: (abs(float(r) - _SHOWN_RATIO), r))
  found = [
    row for row in rows
    if row["ratio"] == shown and row["selection_ms"] is not None
  ]  # fmt: skip
  figure = matplotlib.figure.Figure(figsize=(10, 6.4), layout="constrained")
  axes = figure.add_subplot()
  # A time of nothing has no place on a logarithmic axis.
  floor = min(
    (r["selection_ms"] for r in found if r["selection_ms"]), default=1
  )
  points = []
  for row in found:
    x, y = max(row["selection_ms"], floor), 100 * row["accuracy"]
    strong = row["method"] == results.REFERENCE
    colour = "#0b5fa5" if strong else "#5f6670"
    low, high = 100 * row["ci_low"], 100 * row["ci_high"]
    axes.vlines(x, low, high, color=colour, alpha=0.3, linewidth=1)
    axes.plot(x, y, "o", color=colour, markersize=7 if strong else 5)
    points.append((x, y, row["method"], colour, strong))
  axes.set_xscale("log")
  vanilla = 100 * out["vanilla"]["accuracy"]
  axes.axhline(vanilla, color="#9aa0a6", linestyle="--", linewidth=1)
  axes.annotate(
    f"all tokens, {vanilla:.1f}", (0, vanilla), xytext=(4, 3),
    xycoords=("axes fraction", "data"), textcoords="offset points",
    color="#6b7076", fontsize=9,
  )  # fmt: skip
  _name_points(figure, axes, points)
  axes.set_xlabel("milliseconds to choose the tokens of one video")
  axes.set_ylabel("accuracy (%)")
  axes.set_title(
    f"{out['benchmark']}, {float(shown):.0%} of the tokens", loc="left"
  )
  axes.xaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
  axes.xaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
  axes.xaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
  axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
  axes.set_axisbelow(True)
  axes.spines[["top", "right"]].set_visible(False)
  partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
  # Without the version and date that files of matplotlib carry.
  figure.savefig(partial, dpi=150, format="png", metadata={"Software": None})
  os.replace(partial, path)


def _name_points(figure, axes, points):
  """Writes each name beside its point, where no earlier name stands."""
  figure.canvas.draw()
  taken = [axes.transData.transform(point[:2]) for point in points]
  taken = [(x - 5, y - 5, x + 5, y + 5) for x, y in taken]
  for x, y, name, colour, strong in sorted(points, key=lambda p: -p[4]):
    left, middle = axes.transData.transform((x, y))
    width, height = 6.6 * len(name), 12
    best = None
    for step in range(24):
      for sign in (1, -1):
        for side in (8, -8 - width):
          shift = sign * step * 5
          box = (
            left + side, middle + shift - height / 2,
            left + side + width, middle + shift + height / 2,
          )  # fmt: skip
          overlap = sum(_overlap(box, other) for other in taken)
          cost = (overlap, abs(shift) + (side < 0))
          if best is None or cost < best[0]:
            best = (cost, side, shift, box)
    _, side, shift, box = best
    taken.append(box)
    pixel = 72 / figure.dpi
    arrow = dict(arrowstyle="-", color=colour, alpha=0.4, linewidth=0.7)
    axes.annotate(
      name, (x, y), xytext=(side * pixel, shift * pixel),
      textcoords="offset points", va="center", color=colour, fontsize=9,
      fontweight="bold" if strong else "normal",
      arrowprops=arrow if abs(shift) > 10 else None,
    )  # fmt: skip


def _overlap(a, b):
  """Returns the area that two boxes (left, bottom, right, top) share."""
  width = min(a[2], b[2]) - max(a[0], b[0])
  height = min(a[3], b[3]) - max(a[1], b[1])
  return max(width, 0) * max(height, 0)


def write_text(path, text):
  """Writes a file so that a reader sees the old one or the new one."""
  partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
  partial.write_text(text, encoding="utf-8")
  os.replace(partial, path)
