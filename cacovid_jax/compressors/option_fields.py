"""Dataclass fields for the options of a compressor, which check themselves.

The check gets the method's name, the option's name and its value, and raises a
`UserError` of one line.
"""

import dataclasses
import numbers

from cacovid_jax import errors


def number(default, low, high=None, *, whole=False, open_low=False):
  """Returns the field of an option that is a number between `low` and `high`.

  Args:
    default: always allowed, None as well.
    low: least value, or with `open_low` the bound that it must exceed.
    high: largest value; None for no bound.
    whole: True if it must be an integer.
    open_low: see `low`.
  """
  kind = numbers.Integral if whole else numbers.Real

  def check(method, name, value):
    right = isinstance(value, kind) and not isinstance(value, bool)
    right = right and (value > low if open_low else value >= low)
    if right and (high is None or value <= high):
      return
    allowed = f"{'above' if open_low else 'at least'} {low}"
    if high is not None:
      allowed += f" and at most {high}"
    noun = "an integer" if whole else "a number"
    raise errors.UserError(
      f"{method}: {name} is {value!r}; give {noun} {allowed}"
    )

  return dataclasses.field(default=default, metadata={"check": check})


def choice(default, *others):
  """Returns the field of an option that is one of the values given."""
  allowed = (default, *others)

  def check(method, name, value):
    if value not in allowed:
      *first, last = map(repr, allowed)
      raise errors.UserError(
        f"{method}: {name} is {value!r}; use {', '.join(first)} or {last}"
      )

  return dataclasses.field(default=default, metadata={"check": check})
