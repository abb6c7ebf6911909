r"""What survives harm, counted: the table of docs/reliability.md.

python -m experiments.soak --workdir=workdirs/soak               # everything
python -m experiments.soak --section=kill,flip --count=50 --seed=1

  kill         a tiny training or evaluation is killed and given again, until it
               ends; its end state is compared with that of one left alone
  flip         single bytes of a checkpoint, of answers and of metrics change
  fuzz         clips, tables and texts are damaged and read
  decode       frames of generated clips, and of --clips, against a decode of
               the whole stream
  concurrency  eight evaluations with kills on one cache of features
  memory       what a training of many steps takes
  disk         full disks; for a real one, make --workdir a small tmpfs

WORKDIR/counts.jsonl   what was done, by seed: given again, it goes on
WORKDIR/table.md       a row per section, kind of harm and commit
WORKDIR/failed/        inputs that were handled wrongly

Harm depends on --seed and its number alone. Exit code 1 tells of faults, which
are printed as they come.
"""

import glob
import time
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from cacovid_jax import command, errors, files, terminal
from cacovid_jax import progress as progress_lib
from cacovid_jax.data import answer_log
from cacovid_jax.evals import tables
from experiments import reporting
from experiments.soak import flips, ground, harms, inputs

_HEAD = ("section", "kind", "count", "faults", "seed", "seconds", "commit",
         "date")  # fmt: skip


class _Section(NamedTuple):
  """One kind of proof."""

  count: int  # To reach.
  # (ground, random generator, number, most) -> kind, count, faults, told; of
  # that number, each counting up to `most`. None if there is nothing left.
  run: Callable[..., dict[str, Any] | None]


SECTIONS = {
  "kill": _Section(500, harms.kill),
  "flip": _Section(2000, flips.flip),
  "fuzz": _Section(100_000, inputs.fuzz),
  "decode": _Section(10**6, inputs.decode),
  "concurrency": _Section(8, harms.concurrency),
  "memory": _Section(1000, harms.memory),
  "disk": _Section(100, harms.disk),
}
COMMAND = command.Command(
  __doc__,
  {
    "section": command.Flag("Which, comma-separated.", default=tuple(SECTIONS)),
    "seed": command.Flag("Of all harm.", default=0, least=0),
    "count": command.Flag(
      "In all, of each section; 0 for its own number.", default=0, least=0
    ),
    "workdir": command.Flag("Folder of everything.", default="workdirs/soak"),
    "clips": command.Flag("Further clips to decode, a pattern.", default=""),
  },
  config="none",
)


def main(args) -> int:
  """Does the harm that the command line asks for; returns the exit code."""
  for name in args.section:
    errors.check_known("section", name, SECTIONS)
  clips = sorted(glob.glob(args.clips, recursive=True))
  if args.clips and not clips:
    raise errors.UserError(f"--clips={args.clips}: there is no such file")
  where = ground.Ground(args.workdir, clips)
  path = where.workdir / "counts.jsonl"
  with reporting.ledger(path, {"experiment": "soak"}) as rows:
    for name in args.section:
      soak(name, where, rows, args.seed, args.count or SECTIONS[name].count)
    text = table(rows)
  files.write(where.workdir / "table.md", text)
  terminal.tell(text.rstrip())
  return int(any(row["faults"] for row in rows.values()))


def soak(name: str, where, rows, seed: int, count: int) -> None:
  """Does a section's harm up to a count; what the ledger holds is done."""
  number, done, faults = 0, 0, 0
  with progress_lib.Progress(count, description=name) as progress:
    while done < count:
      key = answer_log.Key(name, 1.0, seed, str(number))
      row = rows.get(key) or _measured(name, where, rows, key, count - done)
      if row is None:
        break
      done, faults = done + row["count"], faults + row["faults"]
      progress.update(done, {"faults": row["faults"]}, note=row["kind"])
      number += 1


def _measured(name, where, rows, key, most) -> dict[str, Any] | None:
  """Returns a new row of the ledger."""
  number = int(key.question)
  rng = np.random.default_rng([key.seed, zlib.crc32(name.encode()), number])
  start = time.monotonic()
  found = SECTIONS[name].run(where, rng, number, most)
  if found is None:
    return None
  for fault in found["told"]:
    terminal.tell(f"{name} {number}: {fault}")
  found["seconds"] = time.monotonic() - start
  found["date"] = time.strftime("%Y-%m-%d")
  return reporting.once(rows, key, lambda: found)


def table(rows) -> str:
  """Returns Markdown of what a ledger holds, newest commits last."""
  groups = {}
  for key, row in rows.items():
    group = key.method, row["kind"], key.seed, row["git_commit"]
    sums = groups.setdefault(group, [0, 0, 0.0, ""])
    for place, field in enumerate(("count", "faults", "seconds")):
      sums[place] += row[field]
    sums[3] = row["date"]
  cells = [
    [name, kind, str(count), str(faults), str(seed), f"{seconds:.0f}",
     commit[:12], date]
    for (name, kind, seed, commit), (count, faults, seconds, date)
    in groups.items()
  ]  # fmt: skip
  return tables.as_markdown(_HEAD, cells, range(2, 6)) + "\n"


if __name__ == "__main__":
  COMMAND.run(main)
