"""Values of a config as texts: what a command line says, by type."""

import ast
import contextlib
import math

from cacovid_jax import errors

_WORDS = {"true": True, "false": False, "none": None, "null": None}


def parse(text, like, *, name="value", kind=None):
  """Returns the value that `text` writes, of the type of what it replaces.

  That is "3e-4", "true", "a word", "(1, 2)" or "1,2"; "none" empties any field
  that holds neither a text nor a truth value. Where `like` is None, `kind` is
  the type to read, as of a placeholder; without both the text is read as the
  Python literal it looks like.
  """
  if like is not None:
    kind = type(like)
  if kind in (None, type(None)):
    return literal(text)
  if kind is str:
    return None if like is None and text.lower() == "none" else text
  word = _WORDS.get(text.strip().lower(), text)
  if word is None and kind is not bool:
    return None
  if kind in (tuple, list):
    return _parse_sequence(text, like or (), name, kind)
  if kind is bool and isinstance(word, bool):
    return word
  with contextlib.suppress(ValueError):
    if kind is int:
      return _parse_int(text)
    if kind is float and not math.isnan(value := float(text)):
      return value
  expected = {bool: "true or false", int: "a whole number", float: "a number"}
  told = expected.get(kind, f"a {kind.__name__}")
  text = text if len(text) <= 100 else f"{text[:100]}..."
  raise errors.UserError(f"{name}={text} is not {told} (it is {like!r} now)")


def _parse_int(text):
  try:
    return int(text)
  except ValueError:
    value = float(text)  # "1e4" is the whole number 10000.
    if not value.is_integer():
      raise
    return int(value)


def literal(text, words=_WORDS):
  """Returns the literal or the word that a text reads as, else the text."""
  word = text.strip().lower()
  if word in words:
    return words[word]
  try:
    return ast.literal_eval(text)
  except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
    return text


def _parse_sequence(text, like, name, kind):
  """Returns a sequence; its items have the type of those of `like`.

  One of sequences, such as "((16, 196), (32, 196))", is read as it is written.
  """
  body = text.strip()
  whole = literal(body) if body[:2] in ("((", "[[", "([", "[(") else ()
  if isinstance(whole, (tuple, list)) and whole:
    return kind(whole)
  if body[:1] + body[-1:] in ("()", "[]"):
    body = body[1:-1]
  items = [item.strip() for item in body.split(",")]
  if items[-1] == "":  # A trailing comma, or nothing at all.
    items.pop()
  if not like:
    return kind(literal(item) for item in items)
  # One float among whole numbers makes all of them numbers.
  first = next((item for item in like if isinstance(item, float)), like[0])
  if isinstance(first, str):
    items = [item.strip("'\"") for item in items]
  return kind(parse(item, first, name=name) for item in items)
