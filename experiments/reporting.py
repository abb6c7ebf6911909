"""What experiments print, and times written down as they are measured."""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import rich.box
import rich.table

from cacovid_jax import errors, terminal
from cacovid_jax.data import answer_log
from cacovid_jax.evals import provenance


def table(head: Sequence[str], rows: Iterable[Sequence[Any]], title="") -> None:
  """Prints a table, floats with four digits."""
  found = rich.table.Table(*head, title=title or None, box=rich.box.SIMPLE)
  for row in rows:
    found.add_row(
      *(f"{x:.4g}" if isinstance(x, float) else str(x) for x in row)
    )
  terminal.Console(width=100).print(found)


def files(workdir: str | os.PathLike, names: Iterable[str]) -> None:
  """Prints the paths of files in a folder."""
  for name in names:
    terminal.tell(os.path.join(workdir, name))


def ledger(path, run: Mapping[str, Any]) -> answer_log.AnswerLog:
  """Opens a file of what is written down as it is measured."""
  return answer_log.AnswerLog(path, run, mend="or give another --workdir")


def once(
  rows: answer_log.AnswerLog,
  key: answer_log.Key,
  measure: Callable[[], Mapping[str, Any]],
) -> dict[str, Any]:
  """Returns what a ledger knows, or adds what `measure` tells.

  Raises:
    UserError: it cannot be run; nothing is written down then.
  """
  if key not in rows:
    try:
      found = measure()
    except RuntimeError as error:  # JAX's and PyTorch's own are such.
      if not errors.no_room(error):
        raise
      reason = errors.one_line(error)[:160]
      raise errors.UserError(
        f"out of the device's memory ({reason}); use a larger device"
      ) from error
    found = {
      name: round(value, 4) if isinstance(value, float) else value
      for name, value in found.items()
    }
    rows.add([(key, found | {"git_commit": provenance.git_commit()})])
  return rows[key]
