"""Accuracy with intervals, when several questions share one clip.

Questions about one clip are not independent, so the bootstrap draws whole
clips. Values are 0 or 1, or a mean over evaluation seeds. The macro mean of
some benchmarks, the unweighted mean of their categories' means, is formed anew
in every bootstrap replicate.

Letters: Q questions, C clips, R bootstrap replicates, M categories.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

REPLICATES = 10_000


class Estimate(NamedTuple):
  """A mean with a 95 % interval; fractions, not per cent."""

  mean: float
  low: float
  high: float


@dataclasses.dataclass(frozen=True)
class Strata:
  """Categories whose unweighted mean is the number that is reported."""

  of: tuple[str, ...]  # Category of each question [Q], each one among `names`.
  names: tuple[str, ...]  # Of all M categories; one without questions counts 0.

  def __post_init__(self):
    unknown = sorted(set(self.of) - set(self.names))
    if unknown:
      raise ValueError(f"{unknown} are none of {self.names}")

  def places(self) -> np.ndarray:
    """Returns int[Q], the category of each question as a place in `names`."""
    place = {name: i for i, name in enumerate(self.names)}
    return np.array([place[name] for name in self.of])


def mean(values: Sequence[float], strata: Strata | None = None) -> float:
  """Returns the mean of `values` [Q], or their macro mean."""
  values = np.asarray(values, np.float64)
  if strata is None:
    return float(values.mean())
  places, size = strata.places(), len(strata.names)
  sums = np.bincount(places, values, minlength=size)
  counts = np.bincount(places, minlength=size)
  return float((sums / np.maximum(counts, 1)).mean())


def draws(
  correct: Sequence[float],
  clips: Sequence[str],
  *,
  strata: Strata | None = None,
  replicates: int = REPLICATES,
  seed: int = 0,
) -> np.ndarray:
  """Returns float64[R], the mean or macro mean of each bootstrap replicate.

  A category that a replicate happens to draw no clip of is left out of that
  replicate's mean; one without any questions is 0 in all of them.

  Args:
    correct: float[Q].
    clips: clip of each question.
    strata: for the macro mean; None takes the mean over questions.
  """
  values = _values(correct, clips)
  weights, inverse = _weights(tuple(clips), replicates, seed)
  num_clips = weights.shape[1]
  if strata is None:
    sums = np.bincount(inverse, values, minlength=num_clips)
    counts = np.bincount(inverse, minlength=num_clips)
    return (weights @ sums) / (weights @ counts)
  size = len(strata.names)
  cell = inverse * size + strata.places()  # Of a table float[C, M].
  sums = np.bincount(cell, values, minlength=num_clips * size)
  counts = np.bincount(cell, minlength=num_clips * size)
  top = weights @ sums.reshape(num_clips, size)
  bottom = weights @ counts.reshape(num_clips, size)
  drawn = bottom > 0
  means = np.divide(top, bottom, out=np.zeros_like(top), where=drawn)
  present = len(set(strata.of))
  return means.sum(axis=1) / drawn.sum(axis=1) * (present / size)


def interval(mean: float, draws: np.ndarray) -> Estimate:
  """Returns an estimate whose interval is that of float64[R] draws."""
  low, high = np.quantile(draws, [0.025, 0.975])
  # With one clip, or one answer, rounding may push a bound past the mean.
  return Estimate(mean, min(float(low), mean), max(float(high), mean))


def ratio(
  mean: float, draws: np.ndarray, other: float, other_draws: np.ndarray
) -> Estimate | None:
  """Returns mean / other, of both with their draws; None where other is 0."""
  if other == 0:
    return None
  usable = other_draws > 0
  return interval(mean / other, draws[usable] / other_draws[usable])


def accuracy(
  correct: Sequence[float],
  clips: Sequence[str],
  *,
  strata: Strata | None = None,
  **options,
) -> Estimate:
  """Returns the mean, its interval clustered by clip; arguments of `draws`."""
  sampled = draws(correct, clips, strata=strata, **options)
  return interval(mean(correct, strata), sampled)


def paired_difference(
  correct: Sequence[float],
  reference: Sequence[float],
  clips: Sequence[str],
  **options,
) -> Estimate:
  """Returns mean(correct - reference), paired by question.

  Both see the same resampled clips: what makes a clip hard for both cancels.
  """
  difference = _values(correct, clips) - _values(reference, clips)
  return accuracy(difference, clips, **options)


def ratio_of_means(
  correct: Sequence[float],
  reference: Sequence[float],
  clips: Sequence[str],
  *,
  strata: Strata | None = None,
  **options,
) -> Estimate | None:
  """Returns mean(correct) / mean(reference); None if that is never right."""
  top, bottom = (
    (mean(values, strata), draws(values, clips, strata=strata, **options))
    for values in (correct, reference)
  )
  return ratio(*top, *bottom)


def _values(values, clips) -> np.ndarray:
  values = np.asarray(values, np.float64)
  if values.ndim != 1 or not len(values):
    raise ValueError(f"expected float[Q] with Q > 0, got {values.shape}")
  if len(values) != len(clips):
    raise ValueError(f"{len(values)} values but {len(clips)} clips")
  return values


@functools.lru_cache(maxsize=4)
def _weights(clips: tuple[str, ...], replicates: int, seed: int):
  """Returns (float[R, C] how often a clip was drawn, int[Q] clip)."""
  # Cached: a report draws from the same clips a hundred times.
  names, inverse = np.unique(np.asarray(clips), return_inverse=True)
  rng = np.random.default_rng(seed)
  share = np.full(len(names), 1.0 / len(names))
  weights = rng.multinomial(len(names), share, size=replicates)
  return weights.astype(np.float64), inverse


def overlap_by_chance(total: int, special: int, drawn: int) -> float:
  """Returns P(at least one special) when `drawn` of `total` are drawn."""
  if not 0 <= special <= total or not 0 <= drawn <= total:
    raise ValueError(f"{special} special and {drawn} drawn of {total}")
  return 1.0 - math.comb(total - special, drawn) / math.comb(total, drawn)
