"""VisionZip: tokens that the vision tower looks at, and a few that sum up.

Dominant tokens receive the most attention in the tower's last layer and stay
as they are. Of the others, every s-th is contextual: it takes in those that
are nearest to it in that layer's keys. After projector and pooling, as in all
ports to LLaVA-OneVision.
Paper: https://arxiv.org/abs/2412.04467

Axes: P tokens of a frame, D width, d dk widths of keys, c contextual tokens.
"""

import dataclasses

import jax
import jax.numpy as jnp

from cacovid_jax.compressors import allocators, base, budgets, selection_ops
from cacovid_jax.compressors.math import similarity


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionZip(allocators.FrameShared):
  """Dominant tokens unchanged and contextual tokens merged.

  For an allocator a frame's tokens are in the order of their attention;
  without one frames share evenly, the first K mod T get one more.

  Attributes:
    scope: "frame", or "video" for one competition over all tokens, as in the
      ports to Qwen2.5-VL.
    dominant_share: of a frame's budget that goes to dominant tokens; the paper
      keeps 54 dominant and 10 contextual tokens, and multiples of that.
    contextual_reduce: "sum" adds the mean of the tokens taken in to the
      contextual token, which about doubles its norm, as published; "mean" is
      the mean over all of them, itself included.
  """

  name: str = "visionzip"
  requires: frozenset[str] = frozenset(["vision_attention", "vision_keys"])
  scope: str = base.choice("frame", "video")
  dominant_share: float = base.number(54 / 64, 0, 1)
  contextual_reduce: str = base.choice("sum", "mean")

  def choose(self, inputs, num_keep, ratio):
    """Returns the tokens of all frames, or of the video as one."""
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
      merged = merge(x, contexts, joined, self.contextual_reduce)
      # Behind the last contextual token there is nowhere to write.
      values = x.at[contexts].set(merged.astype(x.dtype), mode="drop")
      into = jnp.append(contexts, size)[joined]
      return values, jnp.where(kept, jnp.arange(size), into)

    values, into = jax.vmap(part)(
      features.reshape(num_parts, size, -1),
      attention,
      inputs.vision_keys.reshape(num_parts, size, -1),
      dominant,
      counts - dominant,
    )
    return selection_ops.collect_parts(values, into, num_keep, features.dtype)

  def reference_rows(self, grid, ratio):
    """Returns how many tokens are kept if each frame's count is cut off."""
    T, H, W = grid
    if self.scope == "video":
      return int(ratio * T * H * W)
    return T * int(ratio * (H * W))


def split(attention, keys, num_dominant, num_contextual, max_contextual):
  """Returns the parts that tokens of one frame play.

  Args:
    attention: float32[P] attention that each token receives.
    keys: float32[P, dk].
    num_dominant: int32[].
    num_contextual: int32[]; both together at most P.
    max_contextual: c, static bound of the contextual tokens, at least 1.

  Returns:
    kept bool[P], True for dominant and contextual tokens; contexts int32[c],
    the contextual ones, P behind the last; joined int32[P], which of them a
    token goes into, c for those that are kept or if there are none.
  """
  size = attention.shape[0]
  dominant = selection_ops.rank(attention) < num_dominant
  # The others in order of their index: every step-th is contextual.
  place = jnp.cumsum(~dominant) - 1
  step = (size - num_dominant) // jnp.maximum(num_contextual, 1)
  step = jnp.maximum(step, 1)
  context = ~dominant & (place % step == 0) & (place // step < num_contextual)
  (contexts,) = jnp.nonzero(context, size=max_contextual, fill_value=size)
  kept = dominant | context
  near = similarity.between(keys, keys[contexts])
  near = jnp.where(contexts < size, near, -jnp.inf)
  joined = jnp.argmax(near, axis=-1)
  apart = kept | (num_contextual == 0)
  return kept, contexts, jnp.where(apart, max_contextual, joined)


def merge(x, contexts, joined, contextual_reduce):
  """Returns float32[c, D], the contextual tokens with what they took in."""
  own = x[contexts].astype(jnp.float32)
  others = similarity.segment_sum(x, joined, len(contexts))
  count = similarity.segment_count(joined, len(contexts))[:, None]
  if contextual_reduce == "sum":
    return own + others / jnp.maximum(count, 1)
  return (own + others) / (1 + count)
