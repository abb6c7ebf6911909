"""Checks that all readers share: of a row's fields, and of clips.

A reader turns a `Row` of a file into a `Question`, or raises `RowError` or
`LeftOutError`; `tables` decides what becomes of it.
"""

import collections
import functools
import os
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, NamedTuple

from cacovid_jax import errors
from cacovid_jax.data import question as question_lib
from cacovid_jax.data import video

MAX_TEXT = 100_000
NO_OPTIONS = "a multiple choice question without options"

# "A. text", "A) text", "(A) text", "A: text" at the start of an option.
_LETTER = re.compile(r"^\s*\(?([A-Z])[.):]\s*")
# The same in running text, of one letter.
_INLINE = r"(?:(?<=\s)|^)\(?{}[.):]\s*"
# "B", "(B)", "B." or "B)", and then perhaps the option itself.
_ANSWER = re.compile(
  r"(?:\(([A-Z])\)|([A-Z])(?:[.)]|(?![^\W_])))\s*(.*)", re.DOTALL
)


class RowError(Exception):
  """A row is unfit; its arguments are the field and the reason."""


class LeftOutError(Exception):
  """A row is sound, and not among what is read; the text names its kind."""


class Row(NamedTuple):
  """A row of a file; methods return a checked field or raise `RowError`."""

  entry: dict[str, Any]
  file: str = ""  # Without its folder and ending.
  number: int = 0  # In its file, from 1.
  places: Callable[..., str] | None = None  # See `places`.

  def text(self, field: str, *, required: bool = True) -> str:
    """Returns a text field; "" where an optional one is missing."""
    value = self.entry.get(field)
    if value is None:
      if required:
        raise RowError(field, "missing")
      return ""
    if not isinstance(value, str):
      raise RowError(field, f"a text is needed, not {type(value).__name__}")
    if required and not value.strip():
      raise RowError(field, "empty")
    if len(value) > MAX_TEXT:
      raise RowError(field, f"above {MAX_TEXT} characters")
    check_unicode(value, field)
    return value

  def identity(self, field: str, numbers: type | tuple[type, ...] = int) -> str:
    """Returns a text that may be written as a number of these types."""
    value = self.entry.get(field)
    if isinstance(value, numbers) and not isinstance(value, bool):
      return str(value)
    return self.text(field)

  def integer(self, field: str) -> int:
    """Returns a whole number; a text or float that spells one will do."""
    value = self.entry.get(field)
    if value is None:
      raise RowError(field, "missing")
    try:
      if not isinstance(value, bool) and int(value) == float(value):
        return int(value)
    except (TypeError, ValueError, OverflowError):
      pass
    raise RowError(field, f"{str(value)[:40]!r} is not a whole number")

  def choices(self, field: str, *, most: int) -> list[str]:
    """Returns the texts of `check_choices`."""
    return check_choices(self.entry.get(field), field, most)

  def letter_at(self, field: str, num_options: int) -> str:
    """Returns the letter of an option that is counted from 0."""
    index = self.integer(field)
    if not 0 <= index < num_options:
      told = f"{index} is not one of the {num_options} options, from 0"
      raise RowError(field, told)
    return question_lib.LETTERS[index]

  def clip(self, field: str, *patterns: str, name: str = "") -> str:
    """Returns the path of the clip that a field names, or `name` instead.

    `patterns` are places to look in before the reader's common ones.
    """
    clean = relative(name or self.text(field), field)
    return self.places(clean, patterns) if self.places else clean


def check_one_of(value: str, field: str, allowed: Collection[str]) -> str:
  """Returns a value that is one of some texts."""
  if value not in allowed:
    raise RowError(field, f"{value[:40]!r} is none of {', '.join(allowed)}")
  return value


def check_unicode(value: str, field: str) -> None:
  """Refuses half a surrogate pair, which JSON spells; no tokenizer takes it."""
  try:
    value.encode()
  except UnicodeEncodeError:
    raise RowError(field, "holds half a surrogate pair") from None


def check_options(value, field: str = "options") -> list[str]:
  """Returns a list of texts; an empty one for None."""
  if value is None:
    return []
  if not isinstance(value, (list, tuple)):
    raise RowError(field, f"a list is needed, not {type(value).__name__}")
  for option in value:
    if not isinstance(option, str) or not option.strip():
      raise RowError(field, f"{option!r} is not a text")
    check_unicode(option, field)
  if len(value) > len(question_lib.LETTERS):
    raise RowError(field, f"{len(value)} are more than there are letters")
  return list(value)


def check_choices(value, field: str, most: int) -> list[str]:
  """Returns the options of a multiple choice question, 2 to `most` texts."""
  found = check_options(value, field)
  if len(found) < 2:
    raise RowError(field, NO_OPTIONS)
  if len(found) > most:
    told = f"{len(found)} options; the benchmark has {most} at most"
    raise RowError(field, told)
  return found


def strip_letters(options: Sequence[str]) -> tuple[str, ...]:
  """Returns the options without "A. ", "B. ", ... if all carry theirs."""
  bare = []
  for letter, option in zip(question_lib.LETTERS, options, strict=False):
    match = _LETTER.match(option)
    if match is None or match.group(1) != letter:
      return tuple(options)
    bare.append(option[match.end() :])
  return tuple(bare)


def lettered(given: Sequence[str], field: str) -> tuple[str, ...]:
  """Returns the options without their letters, which all must carry."""
  found = strip_letters(given)
  if found == tuple(given):
    starts = ", ".join(repr(option[:12]) for option in given)
    raise RowError(
      field,
      f"the options must begin by A., B., C., ... without a hole, not {starts}",
    )
  return found


def inline_options(problem: str) -> list[str]:
  """Returns the options that stand in the text itself, one after the other."""
  marks, position = [], 0
  for letter in question_lib.LETTERS:
    mark = re.compile(_INLINE.format(letter)).search(problem, position)
    if mark is None:
      break
    marks.append(mark)
    position = mark.end()
  starts = [mark.start() for mark in marks]
  return [
    problem[mark.end() : end].strip()
    for mark, end in zip(marks, [*starts[1:], len(problem)], strict=False)
  ]


def letter(answer: str, options: Sequence[str], field: str) -> str:
  """Returns the letter of an answer "B", "(B)", "B." or "B)".

  The option's own text may stand behind it, as in "B. A rope"; any other text
  is no answer, so that "Banana" is not taken for B.
  """
  match, shown = _ANSWER.fullmatch(answer.strip()), repr(answer[:40])
  found = match and (match.group(1) or match.group(2))
  allowed = question_lib.LETTERS[: len(options)]
  if not found or found not in allowed:
    raise RowError(field, f"{shown} is not one of the letters {allowed}")
  option, rest = options[allowed.index(found)], match.group(3)
  if rest and _plain(rest) != _plain(option):
    told = f"{shown} is not {found} with its option {option[:40]!r}"
    raise RowError(field, told)
  return found


def _plain(text: str) -> str:
  return " ".join(text.split()).rstrip(". ").casefold()


def letter_of(answer: str, options: Sequence[str], field: str) -> str:
  """Returns the letter of the first option that reads as the answer."""
  if answer not in options:
    raise RowError(field, f"{answer[:40]!r} is none of the options")
  return question_lib.LETTERS[list(options).index(answer)]


def relative(value: str, field: str) -> str:
  """Returns the media path without "./"; refuses what leaves the root."""
  path = re.sub(r"^(\./)+", "", value.strip())
  if reason := video.unsafe(path):
    raise RowError(field, f"{value[:80]!r}: {reason}")
  return path


def places(root, patterns: Sequence[str]) -> Callable[..., str]:
  """Returns a function that gives a clip's place; each is looked for once.

  It takes a name, and patterns that go before those given here. A place is a
  pattern such as "data/{}.mp4" with the name, the best where the clip lies, or
  the first of all; without a root none is looked for.
  """
  check_root(root)

  @functools.cache
  def place(name: str, first: Sequence[str] = ()) -> str:
    every = [one.replace("{}", name) for one in (*first, *patterns)]
    looked_at = every if root is not None and len(every) > 1 else ()
    there = (one for one in looked_at if os.path.isfile(f"{root}/{one}"))
    return next(there, every[0])

  return place


def check_root(root) -> None:
  """Refuses a media root that is no folder; None is none."""
  if root is not None and not os.path.isdir(root):
    raise errors.UserError(
      f"{root}: no such folder; give the media root that holds the clips"
    )


def find_missing(
  names: Iterable[str],
  root,
  *,
  on_missing: str = "count",
  mend: str = "count them as wrong with on_missing=count",
) -> dict[str, int]:
  """Returns the clips that are missing below `root`: path -> questions lost.

  Args:
    names: of the clips, one for each question.
    root: media root.
    on_missing: "raise" refuses them; "skip" does if no clip is there; "count"
      never does.
    mend: what else the command can do, by its own flags.
  """

  def is_there(name):
    try:
      return os.path.isfile(video.safe_path(root, name))
    except video.VideoError:
      return False

  counts = collections.Counter(names)
  missing = {n: lost for n, lost in sorted(counts.items()) if not is_there(n)}
  none_left = on_missing == "skip" and len(missing) == len(counts)
  if missing and (on_missing == "raise" or none_left):
    raise errors.UserError(
      f"{root}: {len(missing)} of {len(counts)} clips are missing"
      f" ({sum(missing.values())} of {counts.total()} questions), first:"
      f" {', '.join(list(missing)[:5])}; download them, correct the media root,"
      f" or {mend}"
    )
  return missing
