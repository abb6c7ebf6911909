"""One compared stage of a parity check, as every golden checker reports it."""

import tokenize
import zipfile
import zlib
from typing import NamedTuple

import numpy as np

from cacovid_jax import errors

# Raised for an archive, or the head of an array in it, that is damaged.
_UNREADABLE = (OSError, ValueError, TypeError, EOFError, LookupError)
_UNREADABLE += (RuntimeError, MemoryError, zlib.error, zipfile.BadZipFile)
_UNREADABLE += (tokenize.TokenError,)


class Stage(NamedTuple):
  """How far one intermediate lies from its golden value."""

  name: str
  max_abs_error: float
  tolerance: float
  ok: bool


def compare(name, actual, expected, tolerance=0.0, relative=0.0):
  """Returns the `Stage` of two arrays; without tolerances they must be equal.

  Allowed at each entry is tolerance + relative * |expected|; the stage tells
  the entry that is closest to that, or furthest beyond. A wrong shape or one
  value that is not finite is an infinite error.
  """
  actual, expected = np.asarray(actual), np.asarray(expected)
  if actual.shape != expected.shape:
    return Stage(name, float("inf"), tolerance, False)
  if not expected.size:
    return Stage(name, 0.0, tolerance, True)
  mine, theirs = (x.astype(np.float64).reshape(-1) for x in (actual, expected))
  # Equal infinities (a score that was masked out) do not differ.
  with np.errstate(invalid="ignore"):
    error = np.where(mine == theirs, 0.0, np.abs(mine - theirs))
  error = np.where(np.isfinite(error), error, np.inf)
  allowed = np.full(error.shape, tolerance, np.float64)
  if relative:
    allowed += relative * np.abs(theirs)
  worst = np.argmax(np.where(error > 0, error / np.maximum(allowed, 1e-300), 0))
  largest, most = float(error[worst]), float(allowed[worst])
  return Stage(name, largest, most, bool((error <= allowed).all()))


def read(path):
  """Returns {name: array} of a golden .npz file."""
  try:
    with np.load(path, allow_pickle=False) as file:
      found = dict(file)
      for name, array in found.items():
        if np.asarray(array).dtype.kind not in "biufU":
          raise ValueError(f"{name} holds no numbers")
      return found
  except _UNREADABLE as error:
    raise errors.UserError(
      f"{path} cannot be read ({errors.one_line(error)}); make the golden file"
      " again"
    ) from error
