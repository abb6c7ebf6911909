"""Looks after the checkpoints of a run.

python -m cacovid_jax.ckpt doctor WORKDIR
python -m cacovid_jax.ckpt upgrade WORKDIR

`doctor` lists every step with its size and whether each byte of it is as it was
written. Exits with 1 if the newest step is damaged or a step is kept aside as
bad, 0 otherwise; nothing is changed.

`upgrade` gives a workdir of an earlier version the keys of today's configs: its
config.json and the manifests of its steps, which then resume. The files as they
were stay beside the new ones, with `.before` in their names.
"""

import os
import pathlib

import msgspec
import rich.table

from cacovid_jax import command, errors, files, schema, terminal
from cacovid_jax import config as config_lib
from cacovid_jax.data import left_out
from cacovid_jax.remote import mirror as remote
from cacovid_jax.training import checkpointing

COMMAND = command.Command(__doc__, {}, config="none", num_arguments=2)


def main(args):
  """Runs what the command line says; returns the exit code."""
  commands = {"doctor": doctor, "upgrade": upgrade}
  words = args.arguments
  if len(words) != 2 or words[0] not in commands:
    raise errors.UserError(
      "usage: python -m cacovid_jax.ckpt doctor WORKDIR, or upgrade WORKDIR"
    )
  with remote.mirrored(words[1]) as folder:
    workdir = pathlib.Path(folder)
    if not os.path.isdir(workdir):
      raise errors.UserError(f"no directory {workdir}: give a workdir of a run")
    return commands[words[0]](workdir)


def upgrade(workdir: pathlib.Path) -> int:
  """Writes config.json and manifests under today's keys, with backups."""
  path = workdir / "config.json"
  old = config_lib.read_json(path)
  new = config_lib.upgraded(old)
  if config_lib.dumps(new) == config_lib.dumps(old):
    terminal.tell(f"{workdir}: has today's keys already")
    return 0
  # A step knows the config with the number of steps of its one epoch.
  known = {}
  if "total_steps" in old and not old.total_steps:
    known = {"total_steps": _one_epoch(workdir, old)}
  before = config_lib.config_hash(config_lib.replace(old, known), before=True)
  now = config_lib.config_hash(config_lib.replace(new, known))
  with files.claim(workdir / "train", "trainer", what=workdir):
    done = checkpointing.rehash(workdir / "checkpoints", {before: now})
    files.write(workdir / "config.before.json", path.read_bytes())
    # Last, so that an upgrade that was cut off goes on when given again.
    config_lib.save(new, path)
  terminal.tell(f"{workdir}: config.json, {len(done)} checkpoints upgraded")
  return 0


class _LeftOut(msgspec.Struct):
  questions: schema.Count


def _one_epoch(workdir, config) -> int:
  """Returns the steps of an epoch, of the questions that the run began with."""
  found = schema.read(workdir / left_out.FILE, _LeftOut, "restore it")
  return -(-found.questions // config.videos_per_step)


def doctor(workdir: pathlib.Path) -> int:
  """Prints the table of verdicts; returns the exit code."""
  nested = workdir / "checkpoints"
  directory = nested if nested.is_dir() else workdir
  verdicts = checkpointing.doctor(directory)
  errors.check(verdicts, f"no checkpoints in {directory}")
  columns = ("step", "entry", "verdict", "MB", "config")
  table = rich.table.Table(*columns, title=str(directory))
  for verdict in verdicts:
    size = f"{verdict.num_bytes / 1e6:.1f}"
    digest = (verdict.manifest or {}).get("config_hash", "")
    name, reason = verdict.name, verdict.reason
    table.add_row(str(verdict.step), name, reason, size, digest)
  console = terminal.Console()
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
