"""Mistakes that a user can mend, and how entry points report them."""

import errno
import functools
import logging
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from absl import app, flags
from absl import logging as absl_logging

from cacovid_jax import terminal

# Shows the traceback of what is no `UserError`, as Python does.
TRACEBACK = "CACOVID_TRACEBACK"
LOG = "error.log"

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_ROOM = "free some space and go on: what was written before is still there"
_MENDS = dict.fromkeys(FULL, _ROOM) | {
  errno.EMFILE: "raise the limit of open files (ulimit -n)",
  errno.ENAMETOOLONG: "give a shorter one",
}
_MOST = 2000  # Characters of a line.


class UserError(Exception):
  """A user's mistake; the message is one line naming the thing and the mend."""


def run(main: Callable, parse: Callable[[Sequence[str]], Any]) -> None:
  """Runs a `main`; whatever ends it is one line.

  It takes what `parse` makes of the command line; its result is the exit code.
  That is 2 after a `UserError` or an `OSError`, 70 after anything else. What is
  no `UserError` leaves its traceback in a file that the line names: `LOG` of
  the workdir, or one among the temporary files.
  """

  def guarded(function, args):
    try:
      return function(args)
    except Exception as error:
      if os.environ.get(TRACEBACK) and not isinstance(error, UserError):
        raise
      line, code = told(error, getattr(args, "workdir", None))
      terminal.tell(f"error: {line}", error=True)
      sys.exit(code)

  def parsed(argv):
    found = guarded(parse, argv)
    # Orbax alone tells a page about every checkpoint. Our own words stay.
    if not flags.FLAGS["verbosity"].present:
      absl_logging.set_verbosity(absl_logging.WARNING)
    logging.getLogger("cacovid_jax").setLevel(logging.INFO)
    absl_logging.get_absl_handler().addFilter(terminal.clean_record)
    return found

  app.run(functools.partial(guarded, main), flags_parser=parsed)


def told(error: BaseException, workdir=None) -> tuple[str, int]:
  """Returns (what ended a command in one line, its exit code), see `run`."""
  if isinstance(error, UserError):
    return one_line(error), 2
  code = 2 if isinstance(error, OSError) else os.EX_SOFTWARE
  return f"{_told(error, workdir)}{_log(workdir)}", code


def check(fine: bool, message: str) -> None:
  """Stops with a `UserError` unless something is fine."""
  if not fine:
    raise UserError(message)


def one_line(error: BaseException) -> str:
  """Returns the message of an error, line breaks turned into spaces.

  Nothing that steers a terminal is left in it, nor the middle of a long one.
  """
  line = " ".join(terminal.plain(str(error)).split())
  half = _MOST // 2
  return line if len(line) <= _MOST else f"{line[:half]} ... {line[-half:]}"


def mend_of(error: OSError) -> str:
  """Returns what to do about what a disk or a path refuses."""
  usual = "see to its folder and permissions, or choose another place"
  return _MENDS.get(error.errno, usual)


def _told(error: BaseException, workdir) -> str:
  """Returns what happened, where and, if it is known, what to do."""
  if not isinstance(error, OSError):
    return f"{type(error).__name__}: {one_line(error)[:500]}"
  path = error.filename or workdir or "a file"
  return f"{path}: {error.strerror or one_line(error)}; {mend_of(error)}"


def _log(workdir) -> str:
  """Writes down the traceback; returns the line's end, which says where."""
  text = f"{' '.join(sys.argv)}\n{traceback.format_exc()}\n"
  for directory in (workdir, None):
    try:
      if directory is None:
        handle, path = tempfile.mkstemp(".log", "cacovid_jax-")
        os.close(handle)
      else:
        path = os.path.join(directory, LOG)
      with open(path, "a", encoding="utf-8", errors="backslashreplace") as file:
        file.write(text)
    except (OSError, ValueError):  # NUL is in no path.
      continue
    return f" (full log: {path})"
  return f" (no room for a log; {TRACEBACK}=1 shows more)"
