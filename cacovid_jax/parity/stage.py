"""One compared stage of a parity check, as every golden checker reports it."""

from typing import NamedTuple

import numpy as np


class Stage(NamedTuple):
  """How far one intermediate lies from its golden value."""

  name: str
  max_abs_error: float
  tolerance: float
  ok: bool


def compare(name, actual, expected, tolerance):
  """Returns the `Stage` of two arrays; a zero tolerance asks for equality.

  A wrong shape or a value that is not finite is an infinite error.
  """
  actual, expected = np.asarray(actual), np.asarray(expected)
  if actual.shape != expected.shape:
    return Stage(name, float("inf"), tolerance, False)
  if not expected.size:
    return Stage(name, 0.0, tolerance, True)
  # Equal infinities (a score that was masked out) do not differ.
  with np.errstate(invalid="ignore"):
    difference = actual.astype(np.float64) - expected.astype(np.float64)
  difference = np.where(actual == expected, 0.0, difference)
  error = float(np.abs(difference).max())
  if not np.isfinite(error):
    error = float("inf")
  return Stage(name, error, tolerance, error <= tolerance)
