"""The adaptive retention ratio on a fixed ladder of rungs (METHOD.md 4).

Letters: T frames, H W token grid, K tokens a combination keeps, R rungs.

The paper halves and doubles a real number. Here the ratio lives on a few
rungs, since each distinct K is a compiled program; a move goes to the rung
nearest to half or twice the ratio (on a log scale) and always at least one
rung on. On the default ladder that is the paper's schedule, except that 0.12
steps down to 0.08 where the paper goes to 0.06.

A small grid raises or drops rungs. Where videos of several grids share a
program (`BucketLadder`), each has a ladder of its own, as data.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from cacovid_jax import errors
from cacovid_jax.models import token_grid
from cacovid_jax.policy import sampling


@dataclasses.dataclass(frozen=True, kw_only=True)
class RatioConfig:
  """Bounds of the mean token-mode reward at which the ratio moves."""

  adaptive: bool = True
  rungs: tuple[float, ...] = (0.01, 0.02, 0.04, 0.08, 0.12)
  start: float = 0.02
  low: float = 0.125
  high: float = 0.875


@dataclasses.dataclass(frozen=True)
class Ladder:
  """The rungs of a run; a hashable constant of its programs.

  Attributes:
    ratios: rising retention ratios.
    plans: one `sampling.Plan` per rung.
    num_keep: K per rung, rising.
    start: rung at which every video starts.
    down, up: rung reached from each rung.
    low, high: see `RatioConfig`.
  """

  ratios: tuple[float, ...]
  plans: tuple[sampling.Plan, ...]
  num_keep: tuple[int, ...]
  start: int
  down: tuple[int, ...]
  up: tuple[int, ...]
  low: float
  high: float

  def __len__(self):
    return len(self.ratios)

  @property
  def num_combinations(self) -> int:
    """G."""
    return self.plans[0].num_combinations


class Rungs(struct.PyTreeNode):
  """ONE video's ladder at the R places of a `BucketLadder`, as data.

  Attributes:
    ratios: f32[R]; a place without a rung of this video's repeats another.
    down: i32[R] place reached from each place,
    up: upwards.
    start: i32[].
    plans: `sampling.BucketPlan` with a leading axis R.
  """

  ratios: Any
  down: Any
  up: Any
  start: Any
  plans: sampling.BucketPlan


@dataclasses.dataclass(frozen=True)
class BucketLadder:
  """The ladders of all grids in a bucket; a hashable constant of its programs.

  Its places are the ratios of the config. A video's rungs lie at the places of
  their ratios, one that its grid raised lies at the first; so the program of a
  place has room for every rung up to it, whatever the video.

  Attributes:
    bucket: that the grids lie in.
    ratios: rising retention ratios, one per place.
    num_keep: largest K of any grid per place.
    sizes: of the sampler, for all places.
    config: rungs and bounds.
    sampling_config: sizes of the combination space.
    fixed: the ratio of a ladder of one rung, or None.
  """

  bucket: token_grid.Bucket
  ratios: tuple[float, ...]
  num_keep: tuple[int, ...]
  sizes: sampling.Sizes
  config: RatioConfig
  sampling_config: sampling.SamplingConfig
  fixed: float | None

  def __len__(self):
    return len(self.ratios)

  @property
  def num_combinations(self) -> int:
    """G."""
    return self.sampling_config.num_combinations

  @property
  def low(self) -> float:
    return self.config.low

  @property
  def high(self) -> float:
    return self.config.high

  def rungs(self, grid: tuple[int, int, int]) -> Rungs:
    """Returns the Rungs of a video (T, H, W), NumPy arrays."""
    return _rungs(self, tuple(grid))


@functools.lru_cache(maxsize=1024)
def _rungs(ladder: BucketLadder, grid) -> Rungs:
  own = make_ladder(
    grid, ladder.sampling_config, ladder.config, fixed=ladder.fixed
  )
  places = [
    ladder.ratios.index(ratio) if ratio in ladder.ratios else 0
    for ratio in own.ratios
  ]
  # A place that no rung has is never reached; anything will do.
  nearest = [int(np.searchsorted(places, j)) for j in range(len(ladder))]
  nearest = [min(rung, len(own) - 1) for rung in nearest]
  plans = [
    sampling.in_bucket(own.plans[rung], ladder.bucket, ladder.sizes)
    for rung in nearest
  ]
  return Rungs(
    ratios=np.array([own.ratios[rung] for rung in nearest], np.float32),
    down=np.array([places[own.down[rung]] for rung in nearest], np.int32),
    up=np.array([places[own.up[rung]] for rung in nearest], np.int32),
    start=np.int32(places[own.start]),
    plans=jax.tree.map(lambda *leaves: np.stack(leaves), *plans),
  )


def make_bucket_ladder(
  bucket: token_grid.Bucket,
  sampling_config: sampling.SamplingConfig,
  config: RatioConfig,
  *,
  fixed: float | None = None,
) -> BucketLadder:
  """Returns the ladders of a bucket's grids; arguments as of `make_ladder`."""
  if fixed is None:
    _check(config)
  ratios = config.rungs if fixed is None else (float(fixed),)
  up_to = [
    sampling.largest_sizes(bucket, ratios[: place + 1], sampling_config)
    for place in range(len(ratios))
  ]
  return BucketLadder(
    bucket=bucket,
    ratios=tuple(ratios),
    num_keep=tuple(sizes.num_keep for sizes in up_to),
    sizes=up_to[-1],
    config=config,
    sampling_config=sampling_config,
    fixed=fixed,
  )


def make_ladder(
  grid: tuple[int, int, int],
  sampling_config: sampling.SamplingConfig,
  config: RatioConfig,
  *,
  fixed: float | None = None,
) -> Ladder:
  """Returns the ladder of one token grid.

  Args:
    grid: (T, H, W).
    sampling_config: sizes of the combination space.
    config: rungs and bounds.
    fixed: a ratio for a ladder of this one rung, which is never left. A
      fixed ratio that the grid does not allow is an error; the rungs of an
      adaptive ladder are raised to what it allows (`sampling.ladder`).
  """
  if fixed is not None:
    plans, start = (sampling.plan(grid, fixed, sampling_config),), 0
    ratios = (plans[0].ratio,)
  else:
    _check(config)
    plans = sampling.ladder(grid, config.rungs, sampling_config)
    ratios = tuple(plan.ratio for plan in plans)
    # The start may itself be a rung that the grid raised or dropped.
    start = min(
      range(len(ratios)),
      key=lambda j: abs(math.log(ratios[j] / config.start)),
    )
  return Ladder(
    ratios=ratios,
    plans=plans,
    num_keep=tuple(plan.num_keep for plan in plans),
    start=start,
    down=tuple(_moved(ratios, j, 0.5) for j in range(len(ratios))),
    up=tuple(_moved(ratios, j, 2.0) for j in range(len(ratios))),
    low=config.low,
    high=config.high,
  )


def next_rung(ladder, rung, mean_reward, rungs=None):
  """Returns the rung i32[] of a video's next iteration.

  Args:
    ladder: Ladder or BucketLadder.
    rung: i32[], this iteration's rung.
    mean_reward: f32[], mean token-mode reward of the memory so far.
    rungs: the video's own, of a BucketLadder.
  """
  moves = ladder if rungs is None else rungs
  down = jnp.asarray(moves.down, jnp.int32)[rung]
  up = jnp.asarray(moves.up, jnp.int32)[rung]
  moved = jnp.where(mean_reward >= ladder.high, down, rung)
  return jnp.where(mean_reward <= ladder.low, up, moved)


def _moved(ratios: Sequence[float], rung: int, factor: float) -> int:
  """Returns the rung nearest to `factor` times this one, or the last."""
  beyond = [
    j
    for j, ratio in enumerate(ratios)
    if (ratio - ratios[rung]) * (factor - 1) > 0
  ]
  target = math.log(ratios[rung] * factor)
  return min(
    beyond, key=lambda j: abs(math.log(ratios[j]) - target), default=rung
  )


def _check(config: RatioConfig) -> None:
  rungs = list(config.rungs)
  if not rungs or sorted(set(rungs)) != rungs:
    raise errors.UserError(f"ratio.rungs={tuple(rungs)} must rise, none twice")
  if rungs[0] <= 0 or rungs[-1] > 1:
    raise errors.UserError(f"ratio.rungs={tuple(rungs)} must lie in (0, 1]")
  if config.start not in rungs:
    raise errors.UserError(
      f"ratio.start={config.start} is no rung; choose one of {tuple(rungs)}"
    )
  if not 0 <= config.low < config.high <= 1:
    raise errors.UserError(
      f"ratio.low={config.low} and ratio.high={config.high} must satisfy"
      " 0 <= low < high <= 1"
    )
