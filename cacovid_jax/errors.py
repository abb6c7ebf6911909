"""Mistakes that a user can mend, and how entry points report them."""

import sys
from collections.abc import Callable, Sequence

from absl import app


class UserError(Exception):
  """A user's mistake; the message is one line naming the thing and the mend."""


def run(main: Callable[[Sequence[str]], None]) -> None:
  """Runs an absl `main`; a `UserError` ends it with one line and exit code 2."""

  def guarded(argv):
    try:
      return main(argv)
    except UserError as error:
      print(f"error: {error}", file=sys.stderr)
      return 2

  app.run(guarded)
