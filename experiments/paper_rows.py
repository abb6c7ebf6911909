"""The README's table: what the paper reports, and the command for each row.

Commands are run as they stand, one after another and each in a folder of its
own: weights, benchmarks and policies lie where the configs expect them.
"""

import pathlib

from cacovid_jax.evals import paper, results
from experiments import table_flags

_NOT_RUN = "not run: needs the weights"
_BASE = "the base model's"
_TRAINED = "the paper's policy"
EFFICIENCY = "python -m experiments.efficiency_table --table_size=ov-7b"


def markdown() -> str:
  """Returns all tables, one line per row, without a line break at the end."""
  titles = [paper.column_title(column) for column in paper.COLUMNS]
  head = ["paper row", "of the command's `table.csv`", *titles,
          "average (of vanilla)", "ours", "checkpoint"]  # fmt: skip
  lines = [*_commands(), "", _line(head), _line(["---"] * len(head))]
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
          f"`{place(row)}`",
          *scores,
          f"{row.average:.1f} ({row.share:g} %)",
          _NOT_RUN,
          _TRAINED if row.method == "cacovid" else _BASE,
        ]
      )
    )
  return "\n".join([*lines, "", *_efficiency()])


def place(row: paper.Row) -> str:
  """Returns how the row of a table.csv begins: method and ratio."""
  return f"{row.method},{results.ratio_key(row.ratio)}"


def command(model: str) -> str:
  """Returns what fills every row of a model; key of `paper.MODELS`."""
  base = paper.MODELS[model].config
  trained = pathlib.PurePosixPath(table_flags.BASES[base]).stem
  return (
    f"python -m experiments.main_table --base={base}"
    f" --table_policy=workdirs/{trained} --table_data=datasets"
  )


def without_policy(model: str) -> str:
  """Returns what fills the rows of a model that need no trained policy."""
  base = paper.MODELS[model].config
  methods = [
    row.method
    for row in paper.ROWS
    if row.model == model and row.method not in (paper.VANILLA, "cacovid")
  ]
  # Where the paper has vanilla alone, any other row goes with it.
  methods = list(dict.fromkeys(methods)) or ["uniform"]
  return (
    f"python -m experiments.main_table --base={base} --table_data=datasets"
    f" --table_methods={','.join(methods)}"
    f" --table_workdir=workdirs/main_table_{base}_no_policy"
  )


def _commands() -> list[str]:
  head = ["command", "rows it fills"]
  lines = [_line(head), _line(["---"] * len(head))]
  for key, model in paper.MODELS.items():
    lines.append(_line([f"`{command(key)}`", f"all of {model.name}"]))
    rest = f"{model.name}, vanilla and others without a policy"
    lines.append(_line([f"`{without_policy(key)}`", rest]))
  return lines


def _efficiency() -> list[str]:
  head = ["paper row, milliseconds", "of its `table.csv`", "paper", "ours"]
  lines = [
    _line(["command", "rows it fills"]),
    _line(["---"] * 2),
    _line([f"`{EFFICIENCY}`", "all milliseconds"]),
    "",
    _line(head),
    _line(["---"] * len(head)),
  ]
  name = paper.MODELS[paper.EFFICIENCY_MODEL].name
  share, ratio = f"{paper.EFFICIENCY_RATIO:.0%}", paper.EFFICIENCY_RATIO
  titles = {row.method: row.title for row in paper.ROWS}
  for title, where, value in (
    ("prefill of all tokens", "vanilla,1.0`: `prefill_ms",
     paper.VANILLA_PREFILL_MS),
    (f"prefill at {share}", f"cacovid,{ratio}`: `prefill_ms",
     paper.PREFILL_MS),
    *(
      (f"{titles[method]}'s choice at {share}",
       f"{method},{ratio}`: `compression_ms", value)
      for method, value in paper.COMPRESSION_MS.items()
    ),
  ):  # fmt: skip
    cells = [f"{name}, {title}", f"`{where}`", f"{value:.1f}"]
    lines.append(_line([*cells, "not measured: needs an accelerator"]))
  return lines


def _line(cells) -> str:
  return f"| {' | '.join(cells)} |"
