"""Mistakes that a user can mend, and how entry points report them."""

import logging
import re
import sys
from collections.abc import Callable, Sequence

from absl import app, flags
from absl import logging as absl_logging


class UserError(Exception):
  """A user's mistake; the message is one line naming the thing and the mend."""


def run(main: Callable[[Sequence[str]], int | None]) -> None:
  """Runs an absl `main`; a `UserError` ends it with one line and exit code 2.

  `--config.a.b=value` sets a key of the config (see `config.define_flag`).
  """

  def guarded(argv):
    quiet()
    try:
      return main(argv)
    except UserError as error:
      print(f"error: {one_line(error)}", file=sys.stderr)
      return 2

  app.run(guarded, flags_parser=_parse_flags)


def quiet() -> None:
  """Silences what libraries tell below a warning, unless --verbosity asks.

  Orbax alone tells a page about every checkpoint. Our own words stay.
  """
  if not flags.FLAGS["verbosity"].present:
    absl_logging.set_verbosity(absl_logging.WARNING)
  logging.getLogger("cacovid_jax").setLevel(logging.INFO)


def one_line(error: Exception) -> str:
  """Returns the message of an error, line breaks turned into spaces."""
  return " ".join(str(error).split())


def _parse_flags(argv):
  """Parses absl flags; a mistake is one line and exit code 2, no usage text."""
  argv = [_override_flag(argument) for argument in argv]
  try:
    return flags.FLAGS(argv)
  except flags.Error as error:
    print(f"error: {one_line(error)} (--help lists the flags)", file=sys.stderr)
    sys.exit(2)


def _override_flag(argument):
  """Returns `--config_override=a.b=v` for `--config.a.b=v`; else no change."""
  return re.sub(r"^--?config\.(?=[^=]+=)", "--config_override=", argument)
