"""Mistakes that a user can mend, and how entry points report them."""

import contextlib
import errno
import functools
import logging
import os
import re
import sys
import tempfile
import traceback
from collections.abc import Callable, Collection, Iterator, Sequence
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
# JAX's errors of the device: by class, for this module does without JAX.
_OF_DEVICE = ("JaxRuntimeError", "XlaRuntimeError")
_NO_ROOM = re.compile("RESOURCE_EXHAUSTED|out of memory", re.I)
_CANNOT = re.compile(
  "^UNIMPLEMENTED|cudnn|ampere arch|unsupported.*(d|data |element )type"
  "|must be .*(fp|float)16",
  re.I,
)
_ASKED = re.compile(r"allocat\D{1,24}(\d[\d.]*) ?(\w+)", re.I)
_LESS = (
  "spread the weights by config.mesh.model, or ask less at once"
  " (docs/troubleshooting.md, Memory)"
)


class UserError(Exception):
  """A user's mistake; the message is one line naming the thing and the mend."""


class TakenError(UserError):
  """Another process is at work there, and is not waited for."""


def run(main: Callable, parse: Callable[[Sequence[str]], Any]) -> None:
  """Runs a `main`; whatever ends it is one line.

  It takes what `parse` makes of the command line; its result is the exit code.
  That is 2 after a `UserError`, an `OSError` or where the device has no room or
  no such operation, 70 after anything else. What is no `UserError` leaves its
  traceback in a file that the line names: `LOG` of the workdir, or one among
  the temporary files.
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


@contextlib.contextmanager
def during(what: str, less: str = _LESS) -> Iterator[None]:
  """Notes on errors of the device in which stage they came, and what to lower.

  The innermost stage counts. `less` is the remedy where memory runs out.
  """
  try:
    yield
  except Exception as error:
    if _of_device(error) and not hasattr(error, "stage"):
      error.stage = what, less
    raise


def no_room(error: Exception) -> bool:
  """Returns whether an error, of JAX or PyTorch, is that of a full device."""
  return isinstance(error, RuntimeError) and bool(_NO_ROOM.search(str(error)))


def _of_device(error: Exception) -> str:
  """Returns what happened on the device and what to do; "" for other errors."""
  what, less = getattr(error, "stage", ("computing", _LESS))
  if type(error).__name__ in _OF_DEVICE and no_room(error):
    found = _ASKED.search(str(error))
    asked = " ".join(found.groups()) if found else "more"
    if found and found[2] == "bytes":
      asked = f"{float(found[1]) / 2**30:.3g} GiB"
    return (
      f"the device is out of memory while {what} ({asked} asked for); {less}"
    )
  if isinstance(error, RuntimeError) and _CANNOT.search(str(error)):
    reason = one_line(error)[:200]
    return (
      f"this device cannot do what is asked while {what}: {reason}; set"
      " config.model.backend=xla, or another config.model.dtype"
    )
  return ""


def told(error: BaseException, workdir=None) -> tuple[str, int]:
  """Returns (what ended a command in one line, its exit code), see `run`."""
  if isinstance(error, UserError):
    return one_line(error), 2
  foreseen = isinstance(error, OSError) or _of_device(error)
  code = 2 if foreseen else os.EX_SOFTWARE
  return f"{_told(error, workdir)}{_log(workdir)}", code


def check(fine: bool, message: str) -> None:
  """Stops with a `UserError` unless something is fine."""
  if not fine:
    raise UserError(message)


def check_known(what: str, name: str, known: Collection[str]) -> None:
  """Stops with a `UserError` that says what there is unless a name is known."""
  check(name in known, f"no {what} {name!r}; there are {', '.join(known)}")


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
  if told := _of_device(error):
    return told
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
