"""What the efficiency table is written as: Markdown, CSV, a picture."""

import csv
import io
import os

import matplotlib.figure

from experiments import table_files

NAMES = ("table.md", "table.csv", "prefill.png", "results.json")
# Facts of results.json's rows that the table leaves out.
_HIDDEN = ("git_commit",)
COLUMNS = (
  "method", "ratio", "status", "kept_tokens", "rule_ms", "reads_ms",
  "compression_ms", "prefill_ms", "total_ms", "first_token_ms",
  "prefill_tflops", "kv_mib", "paper_compression_ms", "paper_prefill_ms",
  "note",
)  # fmt: skip


def write(workdir, out):
  """Writes all files but results.json, each all or nothing."""
  table_files.write_text(workdir / "table.md", markdown(out))
  table_files.write_text(workdir / "table.csv", as_csv(out))
  plot(workdir / "prefill.png", out)


def as_csv(out) -> str:
  """Returns the rows as CSV; unknown values are empty."""
  text = io.StringIO()
  writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
  writer.writeheader()
  for row in out["rows"]:
    writer.writerow({k: v for k, v in row.items() if k not in _HIDDEN})
  return text.getvalue()


def markdown(out) -> str:
  """Returns the table as text, in the order it was measured."""
  grid = " x ".join(map(str, out["grid"]))
  packages = out["packages"]
  commits = " and ".join(commit[:12] for commit in out["git_commits"])
  vanilla = out["rows"][0]
  parts = [
    f"# Efficiency of {out['size']}",
    f"One prompt of {out['prompt_rows']} tokens, {grid} of them of the video,"
    f" {out['dtype']}, on {out['host']['device']} ({out['host']['backend']}),"
    f" jax {packages['jax']}, commit {commits}. Medians of"
    f" {out['repeats']} runs, milliseconds. Tower {out['tower_ms']:.1f}"
    f" ({out['tower_tflops']:.3g} TFLOP), making the prompt"
    f" {out['embed_ms']:.2f}; both are in the time to the first token.",
    _table(out["rows"], vanilla),
  ]
  notes = {row["method"]: row["note"] for row in out["rows"] if "note" in row}
  if notes:
    parts.append("\n".join(f"- {name}: {note}" for name, note in notes.items()))
  if out["paper"]:
    parts.append(f"The paper's column: {out['paper']}, its own accelerator.")
  return "\n\n".join(parts) + "\n"


def _table(rows, vanilla):
  lines = [
    "| method | ratio | tokens | compression | prefill | both | of vanilla |"
    " first token | TFLOP | cache MiB | paper: compression | prefill |",
    "| --- | ---: |" + " ---: |" * 10,
  ]
  for row in rows:
    name, ratio = row["method"], f"{row['ratio']:.0%}"
    if row["status"] != "ok":
      reason = row["status"].replace("|", "\\|")
      lines.append(f"| {name} | {ratio} | {reason} |" + " |" * 9)
      continue
    whole = vanilla.get("prefill_ms")
    share = f"{row['total_ms'] / whole:.0%}" if whole else ""
    cells = [
      name,
      ratio,
      f"{row['kept_tokens']:g}",
      _milliseconds(row["compression_ms"]),
      _milliseconds(row["prefill_ms"]),
      _milliseconds(row["total_ms"]),
      share,
      _milliseconds(row["first_token_ms"]),
      f"{row['prefill_tflops']:.3g}",
      f"{row['kv_mib']:.3g}",
      _milliseconds(row.get("paper_compression_ms")),
      _milliseconds(row.get("paper_prefill_ms")),
    ]
    lines.append("| " + " | ".join(cells) + " |")
  return "\n".join(lines)


def _milliseconds(value):
  if value is None:
    return ""
  return f"{value:.1f}" if value >= 10 or value == 0 else f"{value:.2f}"


def plot(path, out):
  """Draws the milliseconds to the first token, one bar per row, by part."""
  rows = [row for row in out["rows"] if row["status"] == "ok"]
  shared = out["tower_ms"] + out["embed_ms"]
  height = 1.4 + 0.3 * len(rows)
  figure = matplotlib.figure.Figure(figsize=(9, height), layout="constrained")
  axes = figure.add_subplot()
  names = [f"{row['method']}, {row['ratio']:.0%}" for row in rows]
  left = [0.0] * len(rows)
  for label, colour, values in (
    ("tower and prompt", "#c7ccd1", [shared] * len(rows)),
    ("choosing tokens", "#e08a1e", [row["compression_ms"] for row in rows]),
    ("prefill", "#0b5fa5", [row["prefill_ms"] for row in rows]),
  ):
    axes.barh(names, values, left=left, color=colour, label=label, height=0.7)
    left = [a + b for a, b in zip(left, values, strict=True)]
  axes.invert_yaxis()
  axes.set_xlabel("milliseconds to the first token")
  axes.set_title(
    f"{out['size']}, {out['dtype']}, {out['host']['device']}", loc="left"
  )
  axes.legend(frameon=False, loc="lower right")
  axes.spines[["top", "right"]].set_visible(False)
  partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
  # Without the version and date that files of matplotlib carry.
  figure.savefig(partial, dpi=150, format="png", metadata={"Software": None})
  os.replace(partial, path)
