"""Selection at inference: which video tokens the LLM gets to see.

Half of the budget goes to the tokens that the policy ranks highest, shared out
between frames by the frame scores; the rest is spread evenly over the others.
Works on ONE video; callers `jax.vmap` it.

All budgets are numbers of the host (`Budget`). `select` compiles them in, with
the grid; `select_in_bucket` takes them as data, so that videos of different
grids and ratios share a program.

Axes: T frames, H W token grid, A = H*W, N = T*A video tokens, K kept tokens;
T_max, A_max, N_max, K_max those of a bucket.
Paper: https://arxiv.org/abs/2602.01649 (inference).
"""

import math
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from cacovid_jax import errors
from cacovid_jax.models import token_grid


def num_keep(grid, ratio):
  """Returns K = floor(r*T*H*W), in float64 and in this order of products.

  Raises:
    UserError: the ratio is outside (0, 1] or keeps no token.
  """
  num_frames, height, width = grid
  if not 0 < ratio <= 1:
    raise errors.UserError(f"retention ratio {ratio} is outside (0, 1]")
  kept = math.floor(ratio * num_frames * height * width)
  if kept < 1:
    total = num_frames * height * width
    raise errors.UserError(
      f"retention ratio {ratio} keeps no token of a {num_frames} x {height} x "
      f"{width} grid; use at least {math.ceil(1e6 / total) / 1e6}"
    )
  return kept


def most_kept(bucket, ratio):
  """Returns K_max: no grid in the bucket keeps more tokens at this ratio."""
  # Another order of the products may round to the next whole number.
  most = math.floor(ratio * bucket.tokens * (1 + 1e-12))
  return max(min(most, bucket.tokens), 1)


class Budget(NamedTuple):
  """The numbers of a video and a ratio; of the host, or data on a device.

  Attributes:
    grid: buckets.Grid.
    kept: K, int32[].
    num_important: how many of them the scores decide on, int32[].
    shared: what the frames' shares are multiplied by, float32[].
    frame_cap: most that a frame gets before the repair, int32[].
    low: least probability of a frame, float32[].
    high: largest probability of a frame, float32[].
    sharpness: what the largest frame gap is scaled to, float32[].
    places: int32[K_max], the evenly spread tokens by their place among those
      that are left; N_max where there is none.
  """

  grid: token_grid.Grid
  kept: Any
  num_important: Any
  shared: Any
  frame_cap: Any
  low: Any
  high: Any
  sharpness: Any
  places: Any


def budget(
  grid,
  ratio,
  *,
  bucket,
  num_keep_max=None,
  importance_ratio=0.5,
  max_frame_share=1.5,
  max_frame_ratio=None,
  frame_sharpness=3.0,
  min_frame_prob=0.5,
):
  """Returns the Budget of a video in a bucket, NumPy numbers for a device.

  Args:
    grid: (T, H, W) of the video.
    ratio: as for `select`, also the options that are not listed here.
    bucket: buckets.Bucket.
    num_keep_max: K_max, for a program that serves several ratios; None for
      the largest K of this ratio in the bucket.

  Raises:
    UserError: the grid does not fit, or `select` would refuse the numbers.
  """
  placed = token_grid.place(grid, bucket)
  if num_keep_max is None:
    num_keep_max = most_kept(bucket, ratio)
  exact = _exact_budget(
    grid,
    ratio,
    importance_ratio,
    max_frame_share,
    max_frame_ratio,
    frame_sharpness,
    min_frame_prob,
  )
  if exact.kept > num_keep_max:
    raise errors.UserError(
      f"retention ratio {ratio} keeps {exact.kept} tokens of a "
      f"{'x'.join(map(str, grid))} grid, more than the {num_keep_max} that the "
      "program has room for; raise num_keep_max"
    )
  places = np.full(num_keep_max, bucket.tokens, np.int32)
  places[: len(exact.places)] = exact.places
  return Budget(
    grid=placed,
    kept=np.int32(exact.kept),
    num_important=np.int32(exact.num_important),
    shared=np.float32(exact.shared),
    frame_cap=np.int32(exact.frame_cap),
    low=np.float32(exact.low),
    high=np.float32(exact.high),
    sharpness=np.float32(exact.sharpness),
    places=places,
  )


def select(
  scores,
  *,
  grid,
  ratio,
  importance_ratio=0.5,
  max_frame_share=1.5,
  max_frame_ratio=None,
  frame_sharpness=3.0,
  min_frame_prob=0.5,
):
  """Selects floor(r*T*H*W) video tokens.

  Args:
    scores: Scores(frame f32[T, 2], token f32[N, 2]), drop then keep.
    grid: (T, H, W), static.
    ratio: retention ratio r in (0, 1], static.
    importance_ratio: share of the budget that the scores decide on, in [0, 1].
    max_frame_share: a frame's cap is max_frame_share * ratio of its tokens,
    max_frame_ratio: unless given here as a share of its tokens.
    frame_sharpness: the largest frame gap is scaled to this before the softmax.
    min_frame_prob: least probability of a frame, in multiples of 1/T.

  Returns:
    int32[K] kept tokens, ascending.
  """
  exact = _exact_budget(
    grid,
    ratio,
    importance_ratio,
    max_frame_share,
    max_frame_ratio,
    frame_sharpness,
    min_frame_prob,
  )
  return _select(scores, exact, exact.kept)


def select_in_bucket(scores, budget):
  """Selects the tokens that `select` does, of a video inside a bucket.

  Args:
    scores: Scores(frame f32[T_max, 2], token f32[N_max, 2]), the video's own
      first; what stands behind them has no influence.
    budget: Budget, data; see `budget`.

  Returns:
    (int32[K_max], int32[]): kept tokens, ascending, then N_max; and K.
  """
  index = _select(scores, budget, budget.places.shape[0])
  return index, jnp.asarray(budget.kept, jnp.int32)


def _exact_budget(
  grid,
  ratio,
  importance_ratio,
  max_frame_share,
  max_frame_ratio,
  frame_sharpness,
  min_frame_prob,
):
  """Returns the Budget of a grid that fills its bucket, Python numbers."""
  num_frames, height, width = grid
  area = height * width
  kept = num_keep(grid, ratio)
  if not 0 <= importance_ratio <= 1:
    raise errors.UserError(
      f"importance ratio {importance_ratio} is outside [0, 1]"
    )
  # Host floats, multiplied in the written order: others round differently.
  if max_frame_ratio is None:
    max_frame_ratio = max_frame_share * ratio
  important = importance_ratio * ratio * height * width * num_frames
  num_important = min(math.floor(important), kept)
  if importance_ratio == 1:
    num_important = kept
  # In float64 on the host: float32 is off by one in places.
  unkept = num_frames * area - num_important
  spread = np.linspace(0, unkept - 1, kept - num_important)
  return Budget(
    grid=token_grid.as_grid(grid),
    kept=kept,
    num_important=num_important,
    shared=round(important),
    # No frame has more than its H*W tokens to give.
    frame_cap=min(
      math.floor(importance_ratio * height * width * max_frame_ratio), area
    ),
    low=min_frame_prob / num_frames,
    high=max_frame_ratio / (num_frames * ratio),
    sharpness=frame_sharpness,
    places=np.round(spread).astype(np.int32),
  )


def _select(scores, budget, num_keep_max):
  """Returns int32[K_max] of a Budget of either kind."""
  grid = budget.grid
  sizes = grid.bucket
  chex.assert_shape(scores.frame, (sizes.frames, 2))
  chex.assert_shape(scores.token, (sizes.tokens, 2))
  probs = frame_probs(
    _gap(scores.frame),
    low=budget.low,
    high=budget.high,
    sharpness=budget.sharpness,
    valid=grid.valid_frames,
  )
  budgets = jnp.round(probs * budget.shared).astype(jnp.int32)
  # The cap is applied last: it may be zero on a small grid.
  budgets = jnp.minimum(jnp.maximum(budgets, 1), budget.frame_cap)
  budgets = repair(
    budgets,
    budget.num_important,
    max_budget=sizes.frame_tokens,
    valid=grid.valid_frames,
  )
  # Behind all others in a frame's order.
  gap = grid.by_frame(_gap(scores.token), -jnp.inf)
  keep = grid.packed(_top_of_each_frame(gap, budgets), False)
  if budget.places.size:
    left = token_grid.fill(~keep, grid.valid_tokens, False)
    keep |= _spread(left, budget.places)
  (index,) = jnp.nonzero(keep, size=num_keep_max, fill_value=keep.shape[0])
  return index.astype(jnp.int32)


def frame_probs(gap, *, low, high, sharpness=3.0, valid=None):
  """Returns float32[T] shares of the budget, of frame gaps float32[T].

  Frames that are not valid, bool[T], get none; None for all.
  """
  if valid is None:
    valid = np.ones(gap.shape[0], bool)
  largest = token_grid.fill(jnp.abs(gap), valid, 0.0).max()
  scaled = gap / jnp.maximum(largest, 1e-38) * sharpness
  # Equal gaps, all zero above all, say nothing about the frames.
  upper = token_grid.fill(gap, valid, -jnp.inf).max()
  lower = token_grid.fill(gap, valid, jnp.inf).min()
  scaled = jnp.where(upper == lower, 0.0, scaled)
  scaled = token_grid.fill(scaled, valid, -jnp.inf)
  probs = jnp.clip(jax.nn.softmax(scaled), low, high)
  probs = token_grid.fill(probs, valid, 0.0)
  return probs / probs.sum()


def repair(budgets, total, *, max_budget, valid=None):
  """Changes budgets by single tokens until they sum to the total.

  While they sum to more, the largest gives one up; while to less, the smallest
  gets one; the first among equals. That levels the budgets from above or from
  below, so the level is looked up and no loop is needed.

  Args:
    budgets: int32[T], between 0 and max_budget.
    total: int, between 0 and T * max_budget.
    max_budget: static.
    valid: bool[T], the frames that are there, the first ones; None for all.

  Returns:
    int32[T], sums to total; zero for frames that are not valid.
  """
  if valid is None:
    valid = np.ones(budgets.shape[0], bool)
  budgets = token_grid.fill(budgets, valid, 0)
  levels = np.arange(max_budget + 1)
  # Too many: cut to the lowest level that still sums to enough, then take one
  # from the first frames on that level.
  cut = jnp.minimum(budgets[:, None], levels).sum(axis=0)
  level = jnp.argmax(cut >= total)
  on_level = budgets >= level
  take = on_level & (jnp.cumsum(on_level) <= cut[level] - total)
  fewer = jnp.minimum(budgets, level) - take
  # Too few: fill to the highest level that sums to no more than enough.
  fill = jnp.maximum(budgets[:, None], levels)
  fill = token_grid.fill(fill, valid[:, None], 0).sum(axis=0)
  level = max_budget - jnp.argmax((fill <= total)[::-1])
  on_level = token_grid.fill(budgets <= level, valid, False)
  give = on_level & (jnp.cumsum(on_level) <= total - fill[level])
  more = jnp.maximum(budgets, level) + give
  more = token_grid.fill(more, valid, 0)
  repaired = jnp.where(budgets.sum() > total, fewer, more)
  return jnp.where(budgets.sum() == total, budgets, repaired)


def _top_of_each_frame(gap, budgets):
  """Returns bool[T, H*W], the budgets int32[T] best of gap float32[T, H*W]."""
  order = jnp.argsort(-gap, axis=-1)
  rank = jnp.argsort(order, axis=-1)
  return rank < budgets[:, None]


def _spread(left, places):
  """Returns bool[N], True for the tokens of left bool[N] at int32 places."""
  if isinstance(places, np.ndarray):
    chosen = np.zeros(left.shape[0] + 1, bool)
    chosen[places] = True
    chosen = jnp.asarray(chosen[:-1])
  else:
    chosen = jnp.zeros(left.shape[0], bool).at[places].set(True, mode="drop")
  place = jnp.cumsum(left) - 1  # place of a token among the unkept
  return left & chosen[jnp.maximum(place, 0)]


def _gap(scores):
  """Returns float32[...], keep - drop, of scores float[..., 2]."""
  scores = scores.astype(jnp.float32)
  return scores[..., 1] - scores[..., 0]
