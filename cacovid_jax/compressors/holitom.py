"""HoliTom before the language model: windows that save the most, then a choice.

Frames are cut into windows so that averaging the places that stay alike within
a window saves the most tokens. Of the others each frame keeps those that the
vision tower looks at; the averages of a window are clustered. The merging
inside the language model that the paper adds is left out.
Paper: https://arxiv.org/abs/2505.21334 (section on the outer merging)

A row of averages stands in the first frame of its window. All sets keep the
same share of their tokens, which brings the sum to the budget.

Axes: T frames, P tokens of a frame, N = T * P, D width, K kept tokens.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from cacovid_jax.compressors import base, selection_ops
from cacovid_jax.compressors.math import clustering, segments, similarity
from cacovid_jax.policy import diversity


@dataclasses.dataclass(frozen=True, kw_only=True)
class HoliTom(base.Compressor):
  """Attended tokens unchanged and static tokens merged.

  An exact budget is split over the sets by largest remainder; the method's
  own rounding cuts off each set's count.

  Attributes:
    threshold: cosine of neighbouring frames above which a place stays alike;
      the paper takes 0.65 to keep 10 %.
    centre_weight: of a cluster's central token; the mean of the others has
      the rest.
    num_neighbours: of the density.
  """

  name: str = "holitom"
  requires: frozenset[str] = frozenset(["vision_attention"])
  threshold: float = base.number(0.8, -1)
  centre_weight: float = base.number(0.6, 0, 1)
  num_neighbours: int = base.number(7, 1, whole=True)

  def choose(self, inputs, num_keep, ratio):
    """Returns the rows of all windows and frames."""
    frames = inputs.frames
    T, P, _ = frames.shape
    cosine = similarity.adjacent(frames)
    first = segments.most_saved(cosine > self.threshold)
    closeness = least_cosine(cosine, first)
    static = closeness > self.threshold
    if self.exact_budget:
      static = segments.keep_apart(static, closeness, first, num_keep)
    sets = segments.sets(frames, static, first)
    if self.exact_budget:
      count = segments.shares(sets.sizes, num_keep)
    else:
      share = jnp.minimum(ratio * T * P / sets.sizes.sum(), 1.0)
      count = jnp.floor(share * sets.sizes).astype(jnp.int32)

    place = jnp.arange(P, dtype=jnp.int32)

    def frame(x, kind, count, attention):
      dynamic = kind == segments.DYNAMIC
      looked_at = selection_ops.rank(attention, dynamic) < count[1]
      static = (kind == segments.STATIC) & (count[0] > 0)
      merged, centre = self._merge(x, static, count[0])
      into = jnp.where(dynamic, jnp.where(looked_at, place, P), centre)
      return jnp.where(dynamic[:, None], x, merged), into

    values, into = jax.vmap(frame)(
      sets.tokens, sets.kind, count, inputs.frame_attention
    )
    return selection_ops.collect_parts(
      values, into, num_keep, frames.dtype, home=sets.home
    )

  def reference_rows(self, grid, ratio):
    """Returns a bound of the rows: counts that are cut off sum to less."""
    # What rounding in float32 may add to the sum.
    T, H, W = grid
    return math.floor(ratio * T * H * W + 1e-3)

  def _merge(self, x, valid, count):
    """Returns float32[P, D], merged at centres, and int32[P], centres or P."""
    found = clustering.from_distances(
      diversity.squared_distances(x),
      count,
      num_neighbours=self.num_neighbours,
      sets=jnp.where(valid, 0, segments.NOWHERE),
    )
    itself = found.centre == jnp.arange(len(x))
    joins = jnp.where(itself, -1, found.centre)
    merged = selection_ops.anchored(x, x, joins, self.centre_weight)
    return merged, found.centre


def least_cosine(cosine, first):
  """Returns float32[T, P], the least cosine of neighbours in a window.

  Of `cosine` float32[T - 1, P] and the first frame of each frame's window
  int32[T]; in a window of one frame it is -inf.
  """
  P = cosine.shape[1]
  to_last = jnp.concatenate([jnp.full([1, P], jnp.inf), cosine])
  begins = first == jnp.arange(first.shape[0])
  to_last = jnp.where(begins[:, None], jnp.inf, to_last)
  member = segments.together(first)
  least = jnp.where(member[..., None], to_last[None], jnp.inf).min(axis=1)
  return jnp.where(jnp.isinf(least), -jnp.inf, least)[first]
