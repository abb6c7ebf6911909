"""Selection at inference: which video tokens the LLM gets to see.

Half of the budget goes to the tokens that the policy ranks highest, shared out
between frames by the frame scores; the rest is spread evenly over the others.
Without `by_frame`, which departs from the paper, the whole clip is ranked at
once. Works on ONE video; callers `jax.vmap` it. All numbers are of the host
(`Budget`): constants of a full grid's program, in a bucket data.

Axes: T frames, H W token grid, A = H*W, N = T*A video tokens, K kept tokens;
T_max, A_max, N_max, K_max those of a bucket.
Paper: https://arxiv.org/abs/2602.01649 (inference).
"""

import dataclasses
import math
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from cacovid_jax import errors
from cacovid_jax.models import token_grid
from cacovid_jax.policy import network


def num_keep(grid, ratio):
  """Returns K = floor(r*T*H*W), float64 in this order; UserError if none."""
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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Budget:
  """The numbers of a video and a ratio; a pytree."""

  grid: token_grid.TokenGrid
  kept: Any  # K, int32[].
  num_important: Any  # How many of them the scores decide on, int32[].
  shared: Any  # What the frames' shares are multiplied by, float32[].
  frame_cap: Any  # Most that a frame gets before the repair, int32[].
  low: Any  # Least probability of a frame, float32[].
  high: Any  # Largest probability of a frame, float32[].
  sharpness: Any  # What the largest frame gap is scaled to, float32[].
  # bool[N_max], True at the place, among the tokens that the scores leave, of
  # an evenly spread one.
  spread: Any
  num_keep_max: int = dataclasses.field(metadata=dict(static=True))  # K_max.
  # Whether frames have budgets of their own.
  by_frame: bool = dataclasses.field(metadata=dict(static=True))


def budget(
  grid,
  ratio,
  *,
  bucket=None,
  num_keep_max=None,
  by_frame=True,
  importance_ratio=0.5,
  max_frame_share=1.5,
  max_frame_ratio=None,
  frame_sharpness=3.0,
  min_frame_prob=0.5,
):
  """Returns the Budget of a video; UserError if a number is out of its range.

  Args:
    grid: (T, H, W).
    ratio: retention ratio r in (0, 1]; floor(r*T*H*W) tokens are kept.
    bucket: GridBucket that the grid is data in; None for its own.
    num_keep_max: K_max of a program of several ratios; None for this ratio's.
    by_frame: False to rank tokens over the clip, whatever the frame scores.
    importance_ratio: share of the budget that the scores decide on, in [0, 1].
    max_frame_share: a frame's cap is max_frame_share * ratio of its tokens,
    max_frame_ratio: unless given here as a share of its tokens.
    frame_sharpness: the largest frame gap is scaled to this before the softmax.
    min_frame_prob: least probability of a frame, in multiples of 1/T.
  """
  num_frames, height, width = grid
  kept = num_keep(grid, ratio)
  grid = token_grid.TokenGrid.of(grid, bucket)
  if num_keep_max is None:
    num_keep_max = kept if bucket is None else most_kept(bucket, ratio)
  if kept > num_keep_max:
    raise errors.UserError(
      f"retention ratio {ratio} keeps {kept} tokens of a {num_frames}x{height}x"
      f"{width} grid, more than the {num_keep_max} that the program has room "
      "for; raise num_keep_max"
    )
  share = importance_ratio
  if not 0 <= share <= 1:
    raise errors.UserError(f"importance ratio {share} is outside [0, 1]")
  # Host floats, multiplied in the written order: others round differently.
  if max_frame_ratio is None:
    max_frame_ratio = max_frame_share * ratio
  important = share * ratio * height * width * num_frames
  exact = kept if share == 1 else math.floor(important)
  num_important = min(exact, kept)
  unkept = num_frames * height * width - num_important
  # In float64 on the host: float32 is off by one in places.
  places = np.round(np.linspace(0, unkept - 1, kept - num_important))
  spread = np.zeros(grid.bucket.tokens, bool)
  spread[places.astype(int)] = True
  # No frame has more than its H*W tokens to give.
  frame_cap = math.floor(share * height * width * max_frame_ratio)
  return Budget(
    grid=grid,
    kept=np.int32(kept),
    num_important=np.int32(num_important),
    shared=np.float32(round(important)),
    frame_cap=np.int32(min(frame_cap, height * width)),
    low=np.float32(min_frame_prob / num_frames),
    high=np.float32(max_frame_ratio / (num_frames * ratio)),
    sharpness=np.float32(frame_sharpness),
    spread=spread,
    num_keep_max=num_keep_max,
    by_frame=by_frame,
  )


def select(scores, budget):
  """Returns int32[K_max] kept tokens, ascending, N_max behind the K.

  In a bucket the Scores are f32[T_max, 2] and f32[N_max, 2], the video's own
  first; what stands behind them has no influence.
  """
  grid, sizes = budget.grid, budget.grid.bucket
  chex.assert_shape(scores.frame, (sizes.frames, 2))
  chex.assert_shape(scores.token, (sizes.tokens, 2))
  valid, gap = grid.valid_frames, network.keep_gap(scores.frame)
  bounds = dict(low=budget.low, high=budget.high, sharpness=budget.sharpness)
  probs = frame_probs(gap, **bounds, valid=valid)
  budgets = jnp.round(probs * budget.shared).astype(jnp.int32)
  # The cap is applied last: it may be zero on a small grid.
  budgets = jnp.minimum(jnp.maximum(budgets, 1), budget.frame_cap)
  most = sizes.frame_tokens
  budgets = repair(budgets, budget.num_important, max_budget=most, valid=valid)
  # Behind all others in a frame's order, and in the clip's.
  gap = grid.by_frame(network.keep_gap(scores.token), -jnp.inf)
  ranked = gap if budget.by_frame else gap.reshape(1, -1)
  best = budgets[:, None] if budget.by_frame else budget.num_important
  rank = jnp.argsort(jnp.argsort(-ranked, axis=-1), axis=-1)
  rank = rank.reshape(gap.shape)  # [T, H*W]
  keep = grid.packed(rank < best, False)
  left = token_grid.fill(~keep, grid.valid_tokens, False)
  place = jnp.cumsum(left) - 1  # Of a token among those that are left.
  keep |= left & jnp.asarray(budget.spread)[jnp.maximum(place, 0)]
  return token_grid.first(keep, budget.num_keep_max)


def mass_left(scores, sizes):
  """Returns float32[S]: what the best K tokens leave out, for S sizes K.

  The mass of a token is its share of the softmax of keep - drop over the clip,
  as of a group's tokens in training; ours, not the paper's.

  Args:
    scores: Scores of a full grid.
    sizes: int[S], of 0 to N.
  """
  mass = jax.nn.softmax(network.keep_gap(scores.token))
  # Summed from the smallest on: nothing is left behind all N.
  left = jnp.append(jnp.cumsum(jnp.sort(mass))[::-1], 0.0)
  return left[np.asarray(sizes)]


def frame_probs(gap, *, low, high, sharpness=3.0, valid=None):
  """Returns float32[T] shares of the budget, of frame gaps float32[T].

  Frames that are not valid, bool[T], get none; None for all.
  """
  valid = np.ones(gap.shape[0], bool) if valid is None else valid
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
  """Returns budgets int32[T] changed by single tokens until they sum to total.

  While they sum to more, the largest gives one up; while to less, the smallest
  gets one; the first among equals. That levels the budgets from above or from
  below, so the level is looked up. Budgets lie between 0 and the static
  max_budget. Frames that are not valid, bool[T], come last and get zero.
  """
  valid = np.ones(budgets.shape[0], bool) if valid is None else valid
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
