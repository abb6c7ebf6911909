"""The retention ratio of each video, on a fixed ladder of rungs (METHOD.md 4).

Letters: T frames, H W token grid, K tokens a combination keeps, R rungs.

The paper halves and doubles a real number. Here the ratio lives on a few
rungs, since each distinct K is a compiled program; a move goes to the rung
nearest to half or twice the ratio (on a log scale) and always at least one
rung on. On the default ladder that is the paper's schedule, except that 0.12
steps down to 0.08 where the paper goes to 0.06. A small grid raises or drops
rungs: each video has the ladder of its own grid, as data.

Beyond the paper, for one policy of all budgets: each video's rung is drawn from
a range, once for all of its iterations. Its memory then holds combinations of
one ratio: old and new scores are of that ratio, as a policy that reads the
ratio needs, and rewards are standardised among answers from as many tokens; of
several ratios, advantages would mostly tell large budgets from small ones.
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

from cacovid_jax import config_limits, errors
from cacovid_jax.models import token_grid
from cacovid_jax.policy import sampling


@dataclasses.dataclass(frozen=True, kw_only=True)
class RatioConfig:
  """Rungs, and bounds of the mean token-mode reward at which they change."""

  adaptive: bool = True  # Or the one rung is never left.
  rungs: tuple[float, ...] = (0.01, 0.02, 0.04, 0.08, 0.12)
  start: float = 0.02
  low: float = 0.125
  high: float = 0.875
  # (low, high): each video is trained at one of the rungs in it, drawn evenly;
  # empty draws none.
  range: tuple[float, ...] = ()


class Rungs(struct.PyTreeNode):
  """ONE video's ladder at the R places of a `Ladder`, as data."""

  ratios: Any  # f32[R]; a place without a rung of this video's repeats another.
  # i32[R], place reached from each place; where rungs are drawn, the video's
  # own rung that a drawn place stands for.
  down: Any
  up: Any  # i32[R], upwards.
  start: Any  # i32[].
  # With a leading axis R; None where the ladder has the plans of all videos.
  plans: sampling.SamplingPlan | None


@dataclasses.dataclass(frozen=True)
class Ladder:
  """The ladders of all grids in a bucket; a hashable constant of its programs.

  Its places are the ratios of the config, less those that the one grid of a run
  does not allow. A video's rungs lie at the places of their ratios, one that
  its grid raised lies at the first; so the program of a place has room for
  every rung up to it, whatever the video.
  """

  # (T, H, W) of all videos, or the bucket that they lie in.
  grid: tuple[int, int, int] | token_grid.GridBucket
  ratios: tuple[float, ...]  # Rising retention ratios, one per place.
  num_keep: tuple[int, ...]  # Largest K of any grid per place.
  # Of one grid one per place, of exact shape, so that draws do not depend on
  # the other places; empty in a bucket.
  plans: tuple[sampling.SamplingPlan, ...]
  # Of the sampler, for all places of a bucket; None for one grid.
  shape: sampling.PlanShape | None
  config: RatioConfig
  sampler: Any  # How combinations are drawn.

  def __len__(self):
    return len(self.ratios)

  @property
  def drawn(self) -> bool:
    """Whether a video's rung is drawn, and never left."""
    return bool(self.config.range)

  @property
  def num_combinations(self) -> int:
    """G."""
    return sum(self.sampler.modes)

  @property
  def bucket(self) -> token_grid.GridBucket:
    """Sizes that every video's grid lies in."""
    if isinstance(self.grid, token_grid.GridBucket):
      return self.grid
    return token_grid.TokenGrid.of(self.grid).bucket

  @property
  def largest(self) -> tuple[int, int, int]:
    """(T, H, W) of all videos, or one that fills the bucket."""
    if self.plans:
      return self.grid
    return self.bucket.frames, 1, self.bucket.tokens // self.bucket.frames

  def place(self, grid: tuple[int, int, int]) -> token_grid.TokenGrid:
    """Returns the grid of a video, full where all have this one."""
    return token_grid.TokenGrid.of(grid, None if self.plans else self.grid)

  def rungs(self, grid: tuple[int, int, int]) -> Rungs:
    """Returns the Rungs of a video (T, H, W), NumPy arrays."""
    return _rungs(self, tuple(grid))

  def within(self, moves: int) -> list[int]:
    """Returns the places so few moves from the start of a video of `largest`.

    In a bucket, a smaller grid may have raised its start.
    """
    rungs = self.rungs(self.largest)
    found = set(map(int, rungs.up)) if self.drawn else {int(rungs.start)}
    for _ in range(moves):
      found |= {
        int(to[place]) for to in (rungs.down, rungs.up) for place in found
      }
    return sorted(found)


@functools.lru_cache(maxsize=1024)
def _rungs(ladder: Ladder, grid) -> Rungs:
  ratios, ours = _own_ratios(grid, ladder.config), ladder.ratios
  places = [ours.index(ratio) if ratio in ours else 0 for ratio in ratios]
  # A place that no rung has is never reached; anything will do.
  nearest = np.searchsorted(places, np.arange(len(ladder)))
  nearest = np.minimum(nearest, len(ratios) - 1)

  def moves(factor):
    moved = nearest
    if not ladder.drawn:
      moved = [_moved(ratios, rung, factor) for rung in nearest]
    return np.array([places[rung] for rung in moved], np.int32)

  # The start may itself be a rung that the grid raised or dropped.
  away = [abs(math.log(ratio / ladder.config.start)) for ratio in ratios]
  plans, placed = None, ladder.place(grid)
  if not ladder.plans:
    given = ladder.sampler, ladder.shape
    own = [sampling.plan(placed, ratios[j], *given) for j in nearest]
    plans = jax.tree.map(lambda *leaves: np.stack(leaves), *own)
  return Rungs(
    ratios=np.array([ratios[j] for j in nearest], np.float32),
    down=moves(0.5),
    up=moves(2.0),
    start=np.int32(places[int(np.argmin(away))]),
    plans=plans,
  )


def make_ladder(grid, sampler, config: RatioConfig, *, fixed=None) -> Ladder:
  """Returns the ladder of a run, for one grid (T, H, W) or those of a bucket.

  A `fixed` ratio is the one rung, which is never left; one that a grid does not
  allow is an error, while adaptive rungs are raised to what it allows.
  """
  if fixed is None:
    config = _checked(config)
  else:
    only = float(fixed)
    config = RatioConfig(adaptive=False, rungs=(only,), start=only)
  if isinstance(grid, token_grid.GridBucket):
    ratios, plans = tuple(config.rungs), ()
    most = functools.partial(sampling.largest_shape, grid, config=sampler)
    shapes = [most(ratios[: place + 1]) for place in range(len(ratios))]
  else:
    ratios = _own_ratios(grid, config)
    plans = tuple(sampling.plan(grid, r, sampler) for r in ratios)
    shapes = [plan.shape for plan in plans]
  num_keep = tuple(one.num_keep for one in shapes)
  shape = None if plans else shapes[-1]
  return Ladder(grid, ratios, num_keep, plans, shape, config, sampler)


def first_rung(ladder: Ladder, rungs: Rungs, rng):
  """Returns a video's first rung i32[], drawn by its key if rungs are drawn."""
  if not ladder.drawn:
    return rungs.start
  # No iteration has this number: the draws of combinations have other keys.
  rng = jax.random.fold_in(rng, np.uint32(2**32 - 1))
  return jnp.asarray(rungs.up)[jax.random.randint(rng, (), 0, len(ladder))]


def next_rung(ladder: Ladder, rungs: Rungs, rung, mean_reward):
  """Returns a video's next rung i32[]; rewards are of token mode so far."""
  down, up = jnp.asarray(rungs.down)[rung], jnp.asarray(rungs.up)[rung]
  moved = jnp.where(mean_reward >= ladder.config.high, down, rung)
  return jnp.where(mean_reward <= ladder.config.low, up, moved)


def _own_ratios(grid, config: RatioConfig) -> tuple[float, ...]:
  """Returns the ratios of one grid's rungs."""
  if not config.adaptive and not config.range:
    return config.rungs
  return sampling.allowed_ratios(grid, config.rungs)


def _moved(ratios: Sequence[float], rung: int, factor: float) -> int:
  """Returns the rung nearest to `factor` times this one, or the last."""
  here, places = ratios[rung], range(len(ratios))
  beyond = [j for j in places if (ratios[j] - here) * (factor - 1) > 0]
  target = math.log(here * factor)
  return min(
    beyond, key=lambda j: abs(math.log(ratios[j]) - target), default=rung
  )


def _checked(config: RatioConfig) -> RatioConfig:
  """Returns the config, with those rungs alone that a range holds."""
  config_limits.check({"ratio": dataclasses.asdict(config)})
  rungs, low, high = tuple(config.rungs), config.low, config.high
  if not rungs or tuple(sorted(set(rungs))) != rungs:
    raise errors.UserError(f"ratio.rungs={rungs} must rise, none twice")
  if config.range:
    return _in_range(config)
  told = f"ratio.start={config.start} is no rung; choose one of {rungs}"
  errors.check(config.start in rungs, told)
  if low >= high:
    raise errors.UserError(f"ratio.low={low} must be below ratio.high={high}")
  return config


def _in_range(config: RatioConfig) -> RatioConfig:
  """Returns the config of rungs that are drawn; UserError if it has none."""
  told = f"config.ratio.range={config.range}"
  if config.adaptive:
    raise errors.UserError(
      f"{told} draws a video's ratio and ratio.adaptive=True moves it; set"
      " config.ratio.adaptive=False, or leave the range empty"
    )
  if len(config.range) != 2 or config.range[0] > config.range[1]:
    raise errors.UserError(f"{told}: give (low, high), low at most high")
  low, high = config.range
  inside = tuple(ratio for ratio in config.rungs if low <= ratio <= high)
  told = f"{told} holds none of ratio.rungs={config.rungs}; give rungs in it"
  errors.check(inside, told)
  return dataclasses.replace(config, rungs=inside)
