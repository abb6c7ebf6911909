"""One command in a process of its own that tells which places it reaches.

python -m experiments.soak.child MARKS LIMIT MODULE ARGUMENTS...

In the folder MARKS a file of a place's name appears when it is reached; it gets
a line with seconds and bytes of memory when it is left. No file may grow above
LIMIT bytes, if not 0: what a full disk does, where none can be mounted.
"""

import functools
import importlib
import pathlib
import resource
import sys
import time

# Module of a command -> place -> the function that it is.
PLACES = {
  "cacovid_jax.train": {
    "validation": "cacovid_jax.evals.evaluator:Evaluator.run",
    "export": "cacovid_jax.policy.loading:save",
    "metrics": "cacovid_jax.metrics:MetricsWriter.write_scalars",
  },
  "cacovid_jax.evaluate": {"report": "cacovid_jax.evals.report.html:write"},
}


def main(marks: str, limit: str, module: str, *arguments: str) -> None:
  """Runs a command; its exit code is the process's."""
  for place, name in PLACES.get(module, {}).items():
    _mark(name, pathlib.Path(marks, place))
  if int(limit):
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
  sys.argv = [module, *arguments]
  found = importlib.import_module(module)
  found.COMMAND.run(found.main)


def _mark(name: str, path: pathlib.Path) -> None:
  """Makes the function "module:attribute" tell when it runs."""
  module, _, attribute = name.partition(":")
  *owners, last = attribute.split(".")
  owner = functools.reduce(getattr, owners, importlib.import_module(module))
  function = getattr(owner, last)

  @functools.wraps(function)
  def marked(*args, **options):
    path.touch()
    start = time.monotonic()
    result = function(*args, **options)
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    with path.open("a") as file:
      seconds = time.monotonic() - start
      file.write(f"{seconds} {pages * resource.getpagesize()}\n")
    return result

  setattr(owner, last, marked)


if __name__ == "__main__":
  main(*sys.argv[1:])
