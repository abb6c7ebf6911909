"""Checks that all readers share: of a row's fields, and of clips.

A reader turns a `Row` of a file into a `Question`, or raises `RowError` or
`LeftOutError`; `tables` decides what becomes of it.
"""

import collections
import functools
import math
import os
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, NamedTuple

from cacovid_jax import errors
from cacovid_jax.data import question as question_lib
from cacovid_jax.data import video

MAX_TEXT = 100_000
MAX_LOOKED_AT = 50_000  # Files, for a clip that lies in another folder.
NO_OPTIONS = "a multiple choice question without options"


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

  def identity(
    self, field: str, numbers: type | tuple[type, ...] = int, *, required=True
  ) -> str:
    """Returns a text that may be written as a number of these types."""
    value = self.entry.get(field)
    if isinstance(value, numbers) and _is_number(value):
      return str(value)
    return self.text(field, required=required)

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


def _is_number(value) -> bool:
  fits = isinstance(value, (int, float)) and not isinstance(value, bool)
  return fits and math.isfinite(value)


def check_options(value, field: str = "options") -> list[str]:
  """Returns a list of texts, numbers as they are written; of None, none."""
  if value is None:
    return []
  if not isinstance(value, (list, tuple)):
    raise RowError(field, f"a list is needed, not {type(value).__name__}")
  value = [str(x) if _is_number(x) else x for x in value]
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
  told = f"{root}: no such folder; give the media root that holds the clips"
  errors.check(root is None or os.path.isdir(root), told)


def find_missing(
  names: Iterable[str],
  root,
  *,
  on_missing: str = "count",
  mend: str = "count them as wrong with on_missing=count",
) -> dict[str, int]:
  """Returns the clips that are missing below `root`: path -> questions lost.

  Links that lead out of the root are refused, and count as missing.

  Args:
    names: of the clips, one for each question.
    root: media root.
    on_missing: "raise" refuses them; "skip" does if no clip is there; "count"
      never does.
    mend: what else the command can do, by its own flags.
  """

  counts, faults = collections.Counter(names), {}
  for name in sorted(counts):
    try:
      if not os.path.isfile(video.safe_path(root, name)):
        faults[name] = ""
    except video.VideoError as error:
      faults[name] = error.detail
  missing = {name: counts[name] for name in faults}
  none_left = on_missing == "skip" and len(missing) == len(counts)
  if missing and (on_missing == "raise" or none_left):
    # Those first of which it is not enough to fetch them.
    first = sorted(missing, key=lambda name: not faults[name])[:5]
    notes = {name: f" (refused: {faults[name]})" for name in first}
    lost = [name for name in first if not faults[name]]
    notes |= dict.fromkeys(lost, "") | _elsewhere(root, lost)
    told = ", ".join(name + notes[name] for name in first)
    raise errors.UserError(
      f"{root}: {len(missing)} of {len(counts)} clips are missing"
      f" ({sum(missing.values())} of {counts.total()} questions), first:"
      f" {told}; download them, correct the media root, or {mend}"
    )
  return missing


def _elsewhere(root, names: Iterable[str]) -> dict[str, str]:
  """Returns notes on clips that lie in another folder below or beside a root.

  Those of the first folder that has any, if one is found soon.
  """
  wanted, seen = {os.path.basename(name): name for name in names}, 0
  for top in (root, os.path.dirname(os.path.abspath(root))):
    for folder, _, inside in os.walk(top):
      if found := [name for name in sorted(wanted) if name in inside]:
        places = {wanted[name]: os.path.join(folder, name) for name in found}
        return {name: f" (there is {place})" for name, place in places.items()}
      seen += len(inside) + 1
      if seen > MAX_LOOKED_AT:
        return {}
  return {}
