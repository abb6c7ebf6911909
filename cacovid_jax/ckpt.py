"""Looks after checkpoints: `python -m cacovid_jax.ckpt doctor WORKDIR`.

Lists every step of a run with its size and whether each byte of it is as it was
written. Exits with 1 if the newest step is damaged or a step is kept aside as
bad, 0 otherwise; nothing is changed.
"""

import pathlib

import rich.console
import rich.table

from cacovid_jax import command, errors
from cacovid_jax.training import checkpointing

COMMAND = command.Command(__doc__, {}, config="none", num_arguments=2)


def main(args):
  """Prints the table of verdicts; returns the exit code."""
  if len(args.arguments) != 2 or args.arguments[0] != "doctor":
    raise errors.UserError("usage: python -m cacovid_jax.ckpt doctor WORKDIR")
  workdir = pathlib.Path(args.arguments[1])
  if not workdir.is_dir():
    raise errors.UserError(f"no directory {workdir}: give a workdir of a run")
  nested = workdir / "checkpoints"
  directory = nested if nested.is_dir() else workdir
  verdicts = checkpointing.doctor(directory)
  if not verdicts:
    raise errors.UserError(f"no checkpoints in {directory}")
  table = rich.table.Table(title=str(directory))
  for column in ("step", "entry", "verdict", "MB", "config"):
    table.add_column(column)
  for verdict in verdicts:
    table.add_row(
      str(verdict.step),
      verdict.name,
      verdict.reason,
      f"{verdict.num_bytes / 1e6:.1f}",
      (verdict.manifest or {}).get("config_hash", ""),
    )
  console = rich.console.Console()
  console.print(table)
  damaged = [
    verdict.name
    for verdict in verdicts
    if not verdict.ok and (verdict.name.isdigit() or ".bad" in verdict.name)
  ]
  if damaged:
    console.print(f"damaged: {', '.join(damaged)}")
  return 1 if damaged else 0


if __name__ == "__main__":
  COMMAND.run(main)
