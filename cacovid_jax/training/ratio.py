"""The adaptive retention ratio on a fixed ladder of rungs (METHOD.md 4).

Letters: T frames, H W token grid, K tokens a combination keeps.

The paper halves and doubles a real number. Here the ratio lives on a few
rungs, since each distinct K is a compiled program; a move goes to the rung
nearest to half or twice the ratio (on a log scale) and always at least one
rung on. On the default ladder that is the paper's schedule, except that 0.12
steps down to 0.08 where the paper goes to 0.06.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax.numpy as jnp

from cacovid_jax import errors
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


def next_rung(ladder: Ladder, rung, mean_reward):
  """Returns the rung i32[] of a video's next iteration.

  Args:
    ladder: the rungs.
    rung: i32[], this iteration's rung.
    mean_reward: f32[], mean token-mode reward of the memory so far.
  """
  down = jnp.asarray(ladder.down, jnp.int32)[rung]
  up = jnp.asarray(ladder.up, jnp.int32)[rung]
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
