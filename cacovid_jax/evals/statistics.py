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
class Sample:
  """Questions in an order, which that of values float[Q] follows."""

  clips: Sequence[str]  # Of each question.
  # Category of each question and all M of them, for a macro mean; one without
  # questions counts 0. Without names, means are over questions.
  categories: Sequence[str] = ()
  names: Sequence[str] = ()
  replicates: int = REPLICATES  # R.
  seed: int = 0

  def __post_init__(self):
    unknown = sorted(set(self.categories) - set(self.names))
    if unknown:
      raise ValueError(f"{unknown} are none of {self.names}")

  @functools.cached_property
  def _places(self) -> np.ndarray:
    """int[Q], the category of each question as a place in `names`."""
    places = {name: place for place, name in enumerate(self.names)}
    return np.array([places[name] for name in self.categories])

  def mean(self, values: Sequence[float]) -> float:
    """Returns the mean, or the macro mean."""
    values, size = np.asarray(values, np.float64), len(self.names)
    if not size:
      return float(values.mean())
    sums = np.bincount(self._places, values, minlength=size)
    counts = np.bincount(self._places, minlength=size)
    return float((sums / np.maximum(counts, 1)).mean())

  def draws(self, values: Sequence[float]) -> np.ndarray:
    """Returns float64[R], the mean or macro mean of each bootstrap replicate.

    A category that a replicate happens to draw no clip of is left out of that
    replicate's mean; one without any questions is 0 in all of them.
    """
    values, size = self._checked(values), len(self.names)
    weights, inverse = _weights(tuple(self.clips), self.replicates, self.seed)
    num_clips = weights.shape[1]
    if not size:
      sums = np.bincount(inverse, values, minlength=num_clips)
      counts = np.bincount(inverse, minlength=num_clips)
      return (weights @ sums) / (weights @ counts)
    cell = inverse * size + self._places  # Of a table float[C, M].
    sums = np.bincount(cell, values, minlength=num_clips * size)
    counts = np.bincount(cell, minlength=num_clips * size)
    top = weights @ sums.reshape(num_clips, size)
    bottom = weights @ counts.reshape(num_clips, size)
    drawn = bottom > 0
    means = np.divide(top, bottom, out=np.zeros_like(top), where=drawn)
    present = len(set(self.categories))
    return means.sum(axis=1) / drawn.sum(axis=1) * (present / size)

  def accuracy(self, values: Sequence[float]) -> Estimate:
    """Returns the mean, its interval clustered by clip."""
    draws = self.draws(values)
    return interval(self.mean(values), draws)

  def difference(
    self, values: Sequence[float], reference: Sequence[float]
  ) -> Estimate:
    """Returns mean(values - reference), paired by question."""
    # Of the same resampled clips: what makes one hard for both cancels.
    return self.accuracy(self._checked(values) - self._checked(reference))

  def share(
    self, values: Sequence[float], reference: Sequence[float]
  ) -> Estimate | None:
    """Returns mean(values) / mean(reference); None if that is never right."""
    of, to = self.mean(values), self.mean(reference)
    return ratio(of, self.draws(values), to, self.draws(reference))

  def _checked(self, values) -> np.ndarray:
    values = np.asarray(values, np.float64)
    if values.ndim != 1 or not len(values):
      raise ValueError(f"expected float[Q] with Q > 0, got {values.shape}")
    if len(values) != len(self.clips):
      raise ValueError(f"{len(values)} values but {len(self.clips)} clips")
    return values


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
