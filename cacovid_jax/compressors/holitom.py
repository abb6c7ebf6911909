"""HoliTom before the language model: windows that save the most, then a choice.

Frames are cut into windows so that averaging the places that stay alike within
a window saves the most tokens. Of the others each frame keeps those that the
vision tower looks at; the averages of a window are clustered. All sets keep the
same share of their tokens. The paper's merging inside the model is left out.
Paper: https://arxiv.org/abs/2505.21334 (section on the outer merging)
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from cacovid_jax.compressors import base, selection_ops
from cacovid_jax.compressors.math import clustering, segments, similarity
from cacovid_jax.policy import diversity


@dataclasses.dataclass(frozen=True, kw_only=True)
class HoliTom(base.Compressor, name="holitom"):
  """Attended tokens unchanged, static ones merged in a window's first frame."""

  requires: frozenset[str] = frozenset(["vision_attention"])
  # Cosine of neighbouring frames above which a place stays alike; the paper
  # takes 0.65 to keep 10 %.
  threshold: float = base.number(0.8, -1)
  # Of a cluster's central token; the mean of the others has the rest.
  centre_weight: float = base.number(0.6, 0, 1)
  num_neighbours: int = base.number(7, 1, whole=True)

  def choose(self, inputs, num_keep, ratio):
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
      centre = clustering.from_distances(
        diversity.squared_distances(x),
        count[0],
        num_neighbours=self.num_neighbours,
        sets=jnp.where(static, 0, segments.NOWHERE),
      ).centre
      joins = jnp.where(centre == jnp.arange(P), -1, centre)
      merged = selection_ops.anchored(x, x, joins, self.centre_weight)
      into = jnp.where(dynamic, jnp.where(looked_at, place, P), centre)
      return jnp.where(dynamic[:, None], x, merged), into

    attention = inputs.frame_attention
    values, into = jax.vmap(frame)(sets.tokens, sets.kind, count, attention)
    return selection_ops.collect(
      values, into, num_keep, frames.dtype, home=sets.home
    )

  def reference_rows(self, grid, ratio):
    """Returns a bound of the rows: counts that are cut off sum to less."""
    # And what rounding in float32 may add to the sum.
    return math.floor(ratio * math.prod(grid) + 1e-3)


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
