"""A command that survives kills and full disks: adds up numbers in a file."""

import os
import pathlib
import sys

from cacovid_jax import command, errors, files, metrics

COMMAND = command.Command(
  __doc__,
  {
    "workdir": command.Flag("Folder."),
    "steps": command.Flag("Numbers.", default=6),
    "careless": command.Flag("Whether it forgets.", default=False),
  },
  config="none",
)


def main(args):
  """Writes a line per number, and their sum at last."""
  folder = pathlib.Path(args.workdir)
  folder.mkdir(exist_ok=True)
  try:
    path = folder / metrics.FILE
    done = path.read_bytes().count(b"\n") if path.exists() else 0
    if args.careless:
      done = 0
    for number in range(done, args.steps):
      text = f'{{"step": {number}, "text": "{"x" * 2000}"}}\n'
      files.append(path, text.encode())
    files.write_json(folder / "results.json", {"steps": args.steps})
  except OSError as error:
    if args.careless:
      raise
    raise errors.UserError(f"{folder}: {os.strerror(error.errno)}") from error


if __name__ == "__main__":
  sys.exit("run by experiments.soak.child")
