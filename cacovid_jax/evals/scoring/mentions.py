"""What the scorers of EgoSchema and NExT-QA share: which options are named.

Both look for `(X)`, `X ` and `X.`, then for an option's own words in answers of
more than five words, and guess where they find nothing.
"""

from collections.abc import Mapping

_MARKS = (",", ".", "!", "?", ";", ":", "'")
_FEW_WORDS = 5


def framed(text: str) -> str:
  """Returns the text without marks around it, between two spaces."""
  for mark in _MARKS:
    text = text.strip(mark)
  return f" {text} "


def places(text: str, forms: Mapping[str, str]) -> dict[str, int]:
  """Returns option letter -> where its form occurs last, if it does.

  Args:
    text: as `framed`.
    forms: letter -> what to look for.
  """
  found = {letter: text.rfind(form) for letter, form in forms.items()}
  return {letter: place for letter, place in found.items() if place >= 0}


def quoted(text: str, options: Mapping[str, str]) -> dict[str, int]:
  """Returns letter -> where an option's text stands last, whatever its case.

  Nothing in an answer of few words.
  """
  if len(text.split()) <= _FEW_WORDS:
    return {}
  lowered = {letter: option.lower() for letter, option in options.items()}
  return places(text.lower(), lowered)
