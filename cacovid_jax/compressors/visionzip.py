"""VisionZip: tokens that the vision tower looks at, and a few that sum up.

Dominant tokens receive the most attention in the tower's last layer and stay as
they are. Of the others, every s-th is contextual: it takes in those that are
nearest to it in that layer's keys, after projector and pooling. Paper:
https://arxiv.org/abs/2412.04467
"""

import dataclasses

import jax
import jax.numpy as jnp

from cacovid_jax.compressors import allocators, base, budgets, selection_ops
from cacovid_jax.compressors.math import similarity
from cacovid_jax.models import token_grid


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionZip(allocators.FrameShared, name="visionzip"):
  """Dominant tokens unchanged, contextual ones merged; frames share evenly."""

  requires: frozenset[str] = frozenset(["vision_attention", "vision_keys"])
  # "video" is one competition over all tokens, as in the ports to Qwen2.5-VL.
  scope: str = base.choice("frame", "video")
  # Of a frame's budget; the paper keeps 54 dominant and 10 contextual tokens.
  dominant_share: float = base.number(54 / 64, 0, 1)
  # "sum" adds the mean of the tokens taken in to the contextual token, as
  # published; "mean" is the mean over all of them.
  contextual_reduce: str = base.choice("sum", "mean")

  def choose(self, inputs, num_keep, ratio):
    features = inputs.features
    num_parts = inputs.grid[0] if self.scope == "frame" else 1
    attention = inputs.frame_attention.reshape(num_parts, -1)
    size = attention.shape[1]
    if self.allocator is None:
      counts = budgets.evenly(num_keep, num_parts)
      most, counts = max(counts), jnp.array(counts)
    else:
      order = jnp.argsort(-attention)
      counts = allocators.frame_counts(self.allocator, inputs, order, num_keep)
      most = min(num_keep, size)
    # By the budget of a frame, how many of its tokens are dominant; the largest
    # budget has the most contextual ones.
    dominant = [int(k * self.dominant_share) for k in range(most + 1)]
    max_contextual = max(most - dominant[-1], 1)
    dominant = jnp.array(dominant)[counts]

    def part(x, attention, keys, num_dominant, num_contextual):
      kept, contexts, joined = split(
        attention, keys, num_dominant, num_contextual, max_contextual
      )
      own = x[contexts].astype(jnp.float32)
      others = similarity.segment_sum(x, joined, max_contextual)
      number = similarity.segment_count(joined, max_contextual)[:, None]
      if self.contextual_reduce == "sum":
        merged = own + others / jnp.maximum(number, 1)
      else:
        merged = (own + others) / (1 + number)
      # Behind the last contextual token there is nowhere to write.
      values = x.at[contexts].set(merged.astype(x.dtype), mode="drop")
      into = jnp.append(contexts, size)[joined]
      return values, jnp.where(kept, jnp.arange(size), into)

    x = features.reshape(num_parts, size, -1)
    keys = inputs.vision_keys.reshape(num_parts, size, -1)
    values, into = jax.vmap(part)(
      x, attention, keys, dominant, counts - dominant
    )
    return selection_ops.collect(values, into, num_keep, features.dtype)

  def reference_rows(self, grid, ratio):
    """Returns how many tokens are kept if each frame's count is cut off."""
    T, H, W = grid
    if self.scope == "video":
      return int(ratio * T * H * W)
    return T * int(ratio * (H * W))


def split(attention, keys, num_dominant, num_contextual, max_contextual):
  """Returns the parts that tokens of one frame play.

  That is kept bool[P], True for dominant and contextual tokens; contexts
  int32[c], the contextual ones, P behind the last; joined int32[P], which of
  them a token goes into, c for those that are kept or if there are none. Of
  attention float32[P], keys float32[P, dk] and the numbers int32[].
  """
  size = attention.shape[0]
  dominant = selection_ops.rank(attention) < num_dominant
  # The others in order of their index: every step-th is contextual.
  place = jnp.cumsum(~dominant) - 1
  step = (size - num_dominant) // jnp.maximum(num_contextual, 1)
  step = jnp.maximum(step, 1)
  context = ~dominant & (place % step == 0) & (place // step < num_contextual)
  contexts = token_grid.first(context, max_contextual)
  kept = dominant | context
  near = similarity.between(keys, keys[contexts])
  near = jnp.where(contexts < size, near, -jnp.inf)
  joined = jnp.argmax(near, axis=-1)
  apart = kept | (num_contextual == 0)
  return kept, contexts, jnp.where(apart, max_contextual, joined)
