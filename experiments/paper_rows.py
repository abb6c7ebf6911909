"""The README's table: what the paper reports, and the command for each row."""

from cacovid_jax.evals import paper

_NOT_RUN = "not run: needs the weights"
_BASE = "the base model's"
_TRAINED = "the paper's policy"


def markdown() -> str:
  """Returns both tables, one line per row, without a line break at the end."""
  titles = [paper.column_title(column) for column in paper.COLUMNS]
  head = ["paper row", "command", *titles, "average (of vanilla)", "ours",
          "checkpoint"]  # fmt: skip
  lines = [_line(head), _line(["---"] * len(head))]
  for row in paper.ROWS:
    vanilla = row.method == paper.VANILLA
    where = "all tokens" if vanilla else f"{row.ratio:.0%}"
    scores = [
      f"{row.scores[column]:.1f}" if column in row.scores else ""
      for column in paper.COLUMNS
    ]
    lines.append(
      _line(
        [
          f"{paper.MODELS[row.model].name}, {row.title}, {where}",
          f"`{command(row)}`",
          *scores,
          f"{row.average:.1f} ({row.share:g} %)",
          _NOT_RUN,
          _TRAINED if row.method == "cacovid" else _BASE,
        ]
      )
    )
  return "\n".join([*lines, "", *_efficiency()])


def command(row: paper.Row) -> str:
  """Returns what fills a row; vanilla is part of every run."""
  words = [f"main_table --base={row.model}"]
  if row.method != paper.VANILLA:
    words.append(f"--table_methods={row.method} --table_ratios={row.ratio:.2f}")
  return " ".join(words)


def _efficiency() -> list[str]:
  head = ["paper row, milliseconds", "command", "paper", "ours"]
  lines = [_line(head), _line(["---"] * len(head))]
  name = paper.MODELS[paper.EFFICIENCY_MODEL].name
  ratio = f"{paper.EFFICIENCY_RATIO:.0%}"
  base = "efficiency_table --table_size=ov-7b"
  titles = {row.method: row.title for row in paper.ROWS}
  for title, more, value in (
    ("prefill of all tokens", "", paper.VANILLA_PREFILL_MS),
    (f"prefill at {ratio}", "", paper.PREFILL_MS),
    *(
      (f"{titles[method]}'s choice at {ratio}",
       f" --table_methods={method}", value)
      for method, value in paper.COMPRESSION_MS.items()
    ),
  ):  # fmt: skip
    cells = [f"{name}, {title}", f"`{base}{more}`", f"{value:.1f}"]
    lines.append(_line([*cells, "not measured: needs an accelerator"]))
  return lines


def _line(cells) -> str:
  return f"| {' | '.join(cells)} |"
