"""Selection at inference: which video tokens the LLM gets to see.

Half of the budget goes to the tokens that the policy ranks highest, shared out
between frames by the frame scores; the rest is spread evenly over the others.
Works on ONE video; callers `jax.vmap` it.

Axes: T frames, H W token grid, N = T*H*W video tokens, K kept tokens.
Paper: https://arxiv.org/abs/2602.01649 (inference).
"""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np

from cacovid_jax import errors


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
  num_frames, height, width = grid
  area = height * width
  chex.assert_shape(scores.frame, (num_frames, 2))
  chex.assert_shape(scores.token, (num_frames * area, 2))
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
  # No frame has more than its H*W tokens to give.
  frame_cap = min(
    math.floor(importance_ratio * height * width * max_frame_ratio), area
  )

  probs = frame_probs(
    _gap(scores.frame),
    low=min_frame_prob / num_frames,
    high=max_frame_ratio / (num_frames * ratio),
    sharpness=frame_sharpness,
  )
  budgets = jnp.round(probs * round(important)).astype(jnp.int32)
  # The cap is applied last: it may be zero on a small grid.
  budgets = jnp.minimum(jnp.maximum(budgets, 1), frame_cap)
  budgets = repair(budgets, num_important, max_budget=area)
  keep = _top_of_each_frame(_gap(scores.token).reshape(-1, area), budgets)
  keep = keep.reshape(-1)
  if num_important < kept:
    keep |= _spread(keep, num_important, kept - num_important)
  (index,) = jnp.nonzero(keep, size=kept, fill_value=keep.shape[0])
  return index.astype(jnp.int32)


def frame_probs(gap, *, low, high, sharpness=3.0):
  """Returns float32[T] shares of the budget, of frame gaps float32[T]."""
  scaled = gap / jnp.maximum(jnp.abs(gap).max(), 1e-38) * sharpness
  # Equal gaps, all zero above all, say nothing about the frames.
  scaled = jnp.where(gap.max() == gap.min(), 0.0, scaled)
  probs = jnp.clip(jax.nn.softmax(scaled), low, high)
  return probs / probs.sum()


def repair(budgets, total, *, max_budget):
  """Changes budgets by single tokens until they sum to the total.

  While they sum to more, the largest gives one up; while to less, the smallest
  gets one; the first among equals. That levels the budgets from above or from
  below, so the level is looked up and no loop is needed.

  Args:
    budgets: int32[T], between 0 and max_budget.
    total: static, between 0 and T * max_budget.
    max_budget: static.

  Returns:
    int32[T], sums to total.
  """
  levels = np.arange(max_budget + 1)
  # Too many: cut to the lowest level that still sums to enough, then take one
  # from the first frames on that level.
  cut = jnp.minimum(budgets[:, None], levels).sum(axis=0)
  level = jnp.argmax(cut >= total)
  on_level = budgets >= level
  take = on_level & (jnp.cumsum(on_level) <= cut[level] - total)
  fewer = jnp.minimum(budgets, level) - take
  # Too few: fill to the highest level that sums to no more than enough.
  fill = jnp.maximum(budgets[:, None], levels).sum(axis=0)
  level = max_budget - jnp.argmax((fill <= total)[::-1])
  on_level = budgets <= level
  give = on_level & (jnp.cumsum(on_level) <= total - fill[level])
  more = jnp.maximum(budgets, level) + give
  repaired = jnp.where(budgets.sum() > total, fewer, more)
  return jnp.where(budgets.sum() == total, budgets, repaired)


def _top_of_each_frame(gap, budgets):
  """Returns bool[T, H*W], the budgets int32[T] best of gap float32[T, H*W]."""
  order = jnp.argsort(-gap, axis=-1)
  rank = jnp.argsort(order, axis=-1)
  return rank < budgets[:, None]


def _spread(keep, num_kept, count):
  """Returns bool[N]: count tokens outside keep bool[N], equally spaced."""
  unkept = keep.shape[0] - num_kept
  chosen = np.zeros(unkept, bool)
  # On the host: float32 is off by one in places.
  chosen[np.round(np.linspace(0, unkept - 1, count)).astype(int)] = True
  place = jnp.cumsum(~keep) - 1  # place of a token among the unkept
  return ~keep & jnp.asarray(chosen)[jnp.maximum(place, 0)]


def _gap(scores):
  """Returns float32[...], keep - drop, of scores float[..., 2]."""
  scores = scores.astype(jnp.float32)
  return scores[..., 1] - scores[..., 0]
