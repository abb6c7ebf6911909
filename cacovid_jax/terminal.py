"""What a terminal is shown: text, and nothing in it that steers the terminal.

Questions, answers, paths and errors may hold escape sequences, which recolour,
overwrite, retitle, or worse. All that is printed goes through `tell`, `Console`
or a log with `clean_record`.
"""

import contextlib
import logging
import re
import sys
from collections.abc import Iterable

import rich.console
import rich.segment

# Strings of ECMA-48 with their end: those that set titles and clipboards.
_BODY = r"[^\x07\x1b\x90\x98\x9c-\x9f]*(?:\x07|\x1b\\|\x9c)"
_STEERING = re.compile(
  rf"(?:\x1b[\]PX^_]|[\x90\x98\x9d-\x9f]){_BODY}"
  r"|(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]"  # Colours, moves of the cursor.
  r"|\x1b[ -/]*[0-~]?"
  r"|[\x00-\x08\x0b-\x1f\x7f-\x9f]"
  r"|[\u202a-\u202e\u2066-\u2069]"  # They show text in another order.
)


# Names by which paths are told: {the mirror of a workdir: its URL}.
NAMES: dict[str, str] = {}


def plain(text: str) -> str:
  """Returns a text without control characters, but for tabs and new lines.

  Paths that have a name in `NAMES` are told by it.
  Escape sequences go as a whole; half a surrogate pair, as of a file's name
  that is not UTF-8, is spelled out.
  """
  text = _STEERING.sub("", text)
  for path, name in list(NAMES.items()):
    text = text.replace(path, name)
  return text.encode("utf-8", "backslashreplace").decode("utf-8")


def tell(text: str, *, error: bool = False) -> None:
  """Prints one text, on standard error if asked, at once."""
  print(plain(text), file=sys.stderr if error else sys.stdout, flush=True)


def clean_record(record: logging.LogRecord) -> bool:
  """Makes a log's line `plain`; a filter of handlers that lets all pass."""
  with contextlib.suppress(Exception):  # Of others' logs; the handler tells.
    record.msg, record.args = plain(record.getMessage()), ()
  return True


class Console(rich.console.Console):
  """A console whose texts are `plain`: brackets and colons are no markup."""

  def __init__(self, **options):
    fixed = dict(markup=False, emoji=False, highlight=False)
    super().__init__(**fixed, **options)
    if not self.is_terminal and "width" not in options:
      self.width = 120  # A log has no width to keep to.

  def render(self, *args, **kwargs) -> Iterable[rich.segment.Segment]:
    """Yields the pieces of what is shown; rich's own controls stay."""
    for piece in super().render(*args, **kwargs):
      shown = piece.text if piece.control else plain(piece.text)
      yield piece._replace(text=shown)
