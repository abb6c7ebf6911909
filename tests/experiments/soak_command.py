"""A command that survives kills and full disks: adds up numbers in a file."""

import os
import pathlib
import sys

from cacovid_jax import command, files, metrics

COMMAND = command.Command(
  __doc__,
  {
    "workdir": command.Flag("Folder."),
    "steps": command.Flag("Numbers.", default=6),
    "careless": command.Flag("Whether no two ends are equal.", default=False),
  },
  config="none",
)


def main(args):
  """Writes a line per number, and how many there are at last."""
  folder = pathlib.Path(args.workdir)
  folder.mkdir(exist_ok=True, parents=True)
  path = folder / metrics.FILE
  done = path.read_bytes().count(b"\n") if path.exists() else 0
  for number in range(done, args.steps):
    text = f'{{"step": {number}, "text": "{"x" * 2000}"}}\n'
    files.append(path, text.encode())
  found = {"steps": args.steps}
  if args.careless:
    print("Traceback (most recent call last):", file=sys.stderr)
    found["process"] = os.getpid()
  files.write_json(folder / "results.json", found)


if __name__ == "__main__":
  sys.exit("run by experiments.soak.child")
