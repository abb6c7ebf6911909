"""Accuracy with intervals, when several questions share one clip.

Questions about one clip are not independent, so the bootstrap draws whole
clips. Values are float per question: 0 or 1, or a mean over evaluation seeds.
Everything is vectorised NumPy and depends on nothing but its arguments.

Letters: Q questions, C clips, R bootstrap replicates.
"""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

REPLICATES = 10_000


@dataclasses.dataclass(frozen=True)
class Estimate:
  """A mean with a 95 % interval; fractions, not per cent."""

  mean: float
  low: float
  high: float
  count: int


def accuracy(
  correct: Sequence[float],
  clips: Sequence[str],
  *,
  replicates: int = REPLICATES,
  seed: int = 0,
) -> Estimate:
  """Returns the mean of `correct` [Q], interval clustered by `clips` [Q]."""
  correct = _values(correct, clips)
  weights, inverse = _weights(tuple(clips), replicates, seed)
  draws = _resampled(correct, inverse, weights)
  return _estimate(float(correct.mean()), draws, len(correct))


def paired_difference(
  correct: Sequence[float],
  reference: Sequence[float],
  clips: Sequence[str],
  *,
  replicates: int = REPLICATES,
  seed: int = 0,
) -> Estimate:
  """Returns mean(correct - reference), paired by question.

  Both methods see the same resampled clips, so what makes a clip hard for
  both cancels.

  Args:
    correct: float[Q] of the method.
    reference: float[Q] of what it is compared with, same questions in order.
    clips: clip of each question.
    replicates: R, number of bootstrap replicates.
    seed: of the resampling.
  """
  difference = _values(correct, clips) - _values(reference, clips)
  return accuracy(difference, clips, replicates=replicates, seed=seed)


def ratio_of_means(
  correct: Sequence[float],
  reference: Sequence[float],
  clips: Sequence[str],
  *,
  replicates: int = REPLICATES,
  seed: int = 0,
) -> Estimate | None:
  """Returns mean(correct) / mean(reference): the share of vanilla kept.

  None if the reference is never right.
  """
  correct, reference = _values(correct, clips), _values(reference, clips)
  if reference.mean() == 0:
    return None
  weights, inverse = _weights(tuple(clips), replicates, seed)
  top = _resampled(correct, inverse, weights)
  bottom = _resampled(reference, inverse, weights)
  usable = bottom > 0
  return _estimate(
    float(correct.mean() / reference.mean()),
    top[usable] / bottom[usable],
    len(correct),
  )


def _values(values, clips) -> np.ndarray:
  values = np.asarray(values, np.float64)
  if values.ndim != 1 or not len(values):
    raise ValueError(f"expected float[Q] with Q > 0, got {values.shape}")
  if len(values) != len(clips):
    raise ValueError(f"{len(values)} values but {len(clips)} clips")
  return values


@functools.lru_cache(maxsize=4)
def _weights(clips: tuple[str, ...], replicates: int, seed: int):
  """Returns how often each replicate drew each clip, and clip of question.

  Cached: a report draws from the same clips a hundred times.
  """
  names, inverse = np.unique(np.asarray(clips), return_inverse=True)
  rng = np.random.default_rng(seed)
  share = np.full(len(names), 1.0 / len(names))
  weights = rng.multinomial(len(names), share, size=replicates)
  return weights.astype(np.float64), inverse


def _resampled(values, inverse, weights) -> np.ndarray:
  """Returns float64[R], the mean over questions of each replicate."""
  num_clips = weights.shape[1]
  sums = np.bincount(inverse, values, minlength=num_clips)
  counts = np.bincount(inverse, minlength=num_clips)
  return (weights @ sums) / (weights @ counts)


def _estimate(mean, draws, count) -> Estimate:
  low, high = np.quantile(draws, [0.025, 0.975])
  # With one clip, or one answer, rounding may push a bound past the mean.
  return Estimate(mean, min(float(low), mean), max(float(high), mean), count)


def overlap_by_chance(total: int, special: int, drawn: int) -> float:
  """Returns P(at least one special) when `drawn` of `total` are drawn.

  Hypergeometric: 1 - C(total - special, drawn) / C(total, drawn).
  """
  if not 0 <= special <= total or not 0 <= drawn <= total:
    raise ValueError(f"{special} special and {drawn} drawn of {total}")
  miss = 1.0
  for i in range(drawn):
    miss *= max(total - special - i, 0) / (total - i)
  return 1.0 - miss


def clip_weights(
  clips: Sequence[str], replicates: int = REPLICATES, seed: int = 0
) -> np.ndarray:
  """Returns float64[R, C]: how often each replicate drew each clip.

  Clips are in the order of `np.unique`.
  """
  return _weights(tuple(clips), replicates, seed)[0]


def interval(mean: float, draws: np.ndarray) -> Estimate:
  """Returns an estimate whose interval is that of float64[R] draws."""
  return _estimate(mean, draws, len(draws))
