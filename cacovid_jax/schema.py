"""What data must be: JSON and values, held against types as msgspec has them.

Whatever is wrong with them is one line: the file, the key, the value there, and
what it must be. A type is a class, a dataclass, `msgspec.Struct` or one of the
ranges below; of a `Struct` or a dataclass, keys that it lacks are left out.
"""

import json
import os
import re
import reprlib
import stat
import types
import typing
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import msgspec
import numpy as np

from cacovid_jax import errors


def within(kind: type, low=None, high=None, above=None) -> Any:
  """Returns the type of numbers of a kind from `low`, or `above` it, to `high`.

  NaN is in no range.
  """
  return Annotated[kind, msgspec.Meta(ge=low, le=high, gt=above)]


def one_of(*values) -> Any:
  """Returns the type of these values."""
  return Literal[values]


# Far above what anything here is asked for, and below what overflows.
MOST = 2**31 - 1
Count = within(int, 1, MOST)
Size = within(int, 0, MOST)
Share = within(float, high=1, above=0)  # A part of something, not nothing.
Fraction = within(float, 0, 1)
Weight = within(float, 0, 1e9)
Positive = within(float, high=1e9, above=0)
Text = Annotated[str, msgspec.Meta(pattern=r"^[^\0]*$")]  # Of paths, too.

_WORDS = {
  "int": "a whole number", "float": "a number", "str": "a text",
  "bool": "true or false", "array": "a list", "object": "an object",
}  # fmt: skip
_SIGNS = {" >= ": " at least ", " <= ": " at most ", " > ": " above "}
# The last ones come from numbers, depth and half a surrogate pair in a text.
_UNFIT = (msgspec.ValidationError, OverflowError, RecursionError, ValueError)
_FAULT = re.compile(r"(.*?)(?: - at `(?:key in )?\$(.*)`)?", re.DOTALL)


def _refuse(name):
  raise ValueError(f"{name} is no number")


def read(
  path, kind=dict, mend="copy it again", most_bytes=2**28, constant=_refuse
) -> Any:
  """Returns what a JSON file holds, of a type; `mend` ends the errors.

  `constant` makes a value of "NaN", "Infinity" and "-Infinity", as of `parse`.
  """
  try:
    size, told = _size(path, mend), f"above {most_bytes}; {mend}"
    errors.check(size <= most_bytes, f"{path}: {size} bytes, {told}")
    with open(path, "rb") as file:
      text = file.read()
  except FileNotFoundError:
    raise errors.UserError(f"{path} is missing; {mend}") from None
  except OSError as error:
    told = f"{path}: not readable ({error.strerror}); {mend}"
    raise errors.UserError(told) from error
  return parse(text, kind, path, mend, constant)


def _size(path, mend):
  """Returns the bytes of a file; a pipe is waited for, a device never ends."""
  status = os.stat(path)
  told = _joined(f"{path}: not readable (it is no file)", mend)
  errors.check(stat.S_ISREG(status.st_mode), told)
  return status.st_size


def parse(
  text: str | bytes, kind=dict, where="", mend="", constant=_refuse
) -> Any:
  """Returns what JSON says, of a type; `where` begins the errors.

  NaN and infinities, which are no JSON, are refused, or left to `constant`.
  """
  try:
    value = json.loads(text, parse_constant=constant)
  except (ValueError, RecursionError) as error:
    reason = errors.one_line(error)
    told = _joined(f"{where}: not readable as JSON ({reason})", mend)
    raise errors.UserError(told) from error
  return fit(value, kind, where, mend)


def lines(path, kind=dict, mend="") -> Iterator[Any]:
  """Yields what the lines of a file hold, each JSON of a type."""
  try:
    _size(path, mend)
    with open(path, "rb") as file:
      for number, line in enumerate(file, start=1):
        yield parse(line, kind, f"{path} line {number}", mend)
  except OSError as error:
    told = f"{path}: not readable ({error.strerror})"
    raise errors.UserError(_joined(told, mend)) from error


def fit(value, kind, where="", mend="", key="") -> Any:
  """Returns a value as a type has it, or a UserError; `key` is its name."""
  if isinstance(value, np.generic):
    value = value.item()
  try:
    return msgspec.convert(value, kind)
  except _UNFIT as error:
    fault, path = _FAULT.fullmatch(str(error)).groups()
    told = _told(fault, f"{key}{path or ''}".lstrip("."), value, path, kind)
    told = f"{where}: {told}" if where else told
    raise errors.UserError(_joined(told, mend)) from error


def _joined(told, mend):
  return f"{told}; {mend}" if mend else told


def _told(fault, key, value, path, kind):
  """Returns what is wrong at a key in a value of another type."""
  missing = re.fullmatch(r"Object missing required field `(.*)`", fault)
  if missing:
    return f"{key or 'it'} lacks {missing[1]}"
  needs = "another value"  # Of a choice, or a number beyond floats.
  if fault.startswith("Expected "):
    needs = re.sub(r", got .*", "", fault.removeprefix("Expected "))
  needs = re.sub("`(.*?)`", lambda found: _named(found[1]), needs)
  for sign, words in _SIGNS.items():
    needs = needs.replace(sign, words)
  at = path
  if typing.get_origin(kind) is tuple and re.fullmatch(r"\[\d+\]", path or ""):
    kind, path = typing.get_args(kind)[0], ""
  needs = needs if path else _in_words(kind) or needs
  try:
    for name, place in re.findall(r"\.([^.\[]+)|\[(\d+)\]", at or ""):
      value = value[name or int(place)]
    return f"{key or 'it'} is {reprlib.repr(value)}; it must be {needs}"
  except (LookupError, TypeError, ValueError):
    return f"{key or 'it'} must be {needs}"


def _named(text):
  return " or ".join(_WORDS.get(name, name) for name in text.split(" | "))


def _in_words(kind):
  """Returns what a range or a choice asks for, "" for any other type."""
  if kind is type(None):
    return "null"
  origin, parts = typing.get_origin(kind), typing.get_args(kind)
  if origin is Literal:
    empty = ", or empty" * ("" in parts)
    return f"one of {', '.join(filter(None, map(str, parts)))}{empty}"
  if origin in (typing.Union, types.UnionType):
    found = list(map(_in_words, parts))
    return " or ".join(found) if all(found) else ""
  if origin is not Annotated:
    return ""
  of, meta = parts
  if of is str:
    return "a text without NUL"
  bounds = {"above": meta.gt, "at least": meta.ge, "at most": meta.le}
  told = (
    f"{word} {x:g}" if isinstance(x, float) else f"{word} {x}"
    for word, x in bounds.items()
    if x is not None
  )
  return f"{_WORDS[of.__name__]} {' and '.join(told)}"
