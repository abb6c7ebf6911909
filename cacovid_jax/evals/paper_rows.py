"""The tables of docs/paper_table.md: the paper's rows and their commands.

Commands are run as they stand, one after another and each in a folder of its
own: weights, benchmarks and policies lie where the configs expect them.
"""

import pathlib

from cacovid_jax.evals import paper, results, tables

_EFFICIENCY = "python -m experiments.efficiency_table --size=ov-7b"


def markdown() -> str:
  """Returns all tables, one line per row, without a line break at the end."""
  commands, rows = [], []
  for key, model in paper.MODELS.items():
    rest = f"{model.name}, vanilla and others without a policy"
    commands.append([f"`{command(key)}`", f"all of {model.name}"])
    commands.append([f"`{command(key, trained=False)}`", rest])
  for row in paper.ROWS:
    kept = "all tokens" if row.method == paper.VANILLA else f"{row.ratio:.0%}"
    trained = row.method == results.REFERENCE
    rows.append(
      [
        f"{paper.MODELS[row.model].name}, {row.title}, {kept}",
        f"`{row.method},{results.ratio_key(row.ratio)}`",
        *(tables.number(row.scores.get(column)) for column in paper.COLUMNS),
        f"{row.average:.1f} ({row.share:g} %)",
        "not run: needs the weights",
        "the paper's policy" if trained else "the base model's",
      ]
    )
  name = paper.MODELS[paper.EFFICIENCY_MODEL].name
  ratio = paper.EFFICIENCY_RATIO
  names = {row.method: row.title for row in paper.ROWS}
  measured = [
    ("prefill of all tokens", "vanilla,1.0", "prefill_ms",
     paper.VANILLA_PREFILL_MS),
    (f"prefill at {ratio:.0%}", f"cacovid,{ratio}", "prefill_ms",
     paper.PREFILL_MS),
    *((f"{names[method]}'s choice at {ratio:.0%}", f"{method},{ratio}",
       "compression_ms", value)
      for method, value in paper.COMPRESSION_MS.items()),
  ]  # fmt: skip
  times = [
    [f"{name}, {title}", f"`{place}`: `{column}`", f"{value:.1f}",
     "not measured: needs an accelerator"]
    for title, place, column, value in measured
  ]  # fmt: skip
  titles = map(paper.column_title, paper.COLUMNS)
  head = ["paper row", "of the command's `table.csv`", *titles,
          "average (of vanilla)", "ours", "checkpoint"]  # fmt: skip
  head_times = ["paper row, milliseconds", "of its `table.csv`", "paper",
                "ours"]  # fmt: skip
  fills, last = ["command", "rows it fills"], "all milliseconds"
  return "\n\n".join(
    [
      tables.as_markdown(fills, commands),
      tables.as_markdown(head, rows),
      tables.as_markdown(fills, [[f"`{_EFFICIENCY}`", last]]),
      tables.as_markdown(head_times, times),
    ]
  )


def command(model: str, *, trained: bool = True) -> str:
  """Returns the command that fills the rows of a model.

  Args:
    model: key of `paper.MODELS`.
    trained: all rows; else those that need no trained policy, and where the
      paper has vanilla alone, another one with it.
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
