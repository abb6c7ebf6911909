"""Checks of the options that a user gives a method."""

import numbers

from cacovid_jax import errors


def number(method, name, value, low, high=None, *, whole=False, open_low=False):
  """Refuses a value that is no number between `low` and `high`.

  Args:
    method: what tables call the method.
    name: the option.
    value: what was given.
    low: least value, or with `open_low` the bound that it must exceed.
    high: largest value; None for no bound.
    whole: True if it must be an integer.
    open_low: see `low`.

  Raises:
    UserError: naming the option, its value, and what it may be.
  """
  kind = numbers.Integral if whole else numbers.Real
  right = isinstance(value, kind) and not isinstance(value, bool)
  if right:
    right = value > low if open_low else value >= low
  if right and high is not None:
    right = value <= high
  if not right:
    allowed = f"{'above' if open_low else 'at least'} {low}"
    if high is not None:
      allowed += f" and at most {high}"
    noun = "an integer" if whole else "a number"
    raise errors.UserError(
      f"{method}: {name} is {value!r}; give {noun} {allowed}"
    )


def choice(method, name, value, allowed):
  """Refuses a value that is not one of the strings `allowed`."""
  if value not in allowed:
    listed = " or ".join(repr(one) for one in allowed)
    raise errors.UserError(f"{method}: {name} is {value!r}; use {listed}")
