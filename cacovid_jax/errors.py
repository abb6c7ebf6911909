"""Mistakes that a user can mend, and how entry points report them."""

import functools
import logging
import sys
from collections.abc import Callable, Sequence
from typing import Any

from absl import app, flags
from absl import logging as absl_logging

from cacovid_jax import terminal


class UserError(Exception):
  """A user's mistake; the message is one line naming the thing and the mend."""


def run(main: Callable, parse: Callable[[Sequence[str]], Any]) -> None:
  """Runs a `main`; a `UserError` ends it with one line and exit code 2.

  It takes what `parse` makes of the command line; its result is the exit code.
  """

  def guarded(function, *args):
    try:
      return function(*args)
    except UserError as error:
      terminal.tell(f"error: {one_line(error)}", error=True)
      sys.exit(2)

  def parsed(argv):
    found = guarded(parse, argv)
    # Orbax alone tells a page about every checkpoint. Our own words stay.
    if not flags.FLAGS["verbosity"].present:
      absl_logging.set_verbosity(absl_logging.WARNING)
    logging.getLogger("cacovid_jax").setLevel(logging.INFO)
    absl_logging.get_absl_handler().addFilter(terminal.clean_record)
    return found

  app.run(functools.partial(guarded, main), flags_parser=parsed)


def one_line(error: Exception) -> str:
  """Returns the message of an error, line breaks turned into spaces.

  Nothing that steers a terminal is left in it.
  """
  return " ".join(terminal.plain(str(error)).split())
