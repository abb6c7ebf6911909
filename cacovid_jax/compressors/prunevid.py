"""PruneVID: merge in time what is static, merge in space, ask the question.

Frames are clustered into segments. In a segment the places of the grid that
stay alike become one token each; then every set of tokens, static ones of a
segment and the others of a frame, is clustered and replaced by cluster means.
With `llm_stage=True` a second stage inside the language model keeps the tokens
of every set that any later token looks at most. Ties go to the earlier token.
Paper: https://arxiv.org/abs/2412.16117 (section 3)
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from cacovid_jax.compressors import base, layerwise, selection_ops
from cacovid_jax.compressors.math import clustering, segments, similarity
from cacovid_jax.policy import diversity

# Sets of no more tokens than this are left as they are, as published.
_SMALL = 14


@dataclasses.dataclass(frozen=True, kw_only=True)
class PruneVID(layerwise.TwoStages, name="prunevid"):
  """The means of clusters of static and of other tokens.

  A mean stands at its cluster's central token, static ones in the first frame
  of their segment. An exact budget is split over the sets in proportion to
  their sizes. The method's own rounding gives each int(share * size) and leaves
  sets of up to 14 tokens alone, so that static videos end with fewer tokens.
  """

  llm_stage: bool = False
  llm_layer: int = 10
  llm_keep: float = base.number(0.4, 0, 1, open_low=True)
  attention_fn: str = "after_video"
  drop_from_caches: bool = True
  # Clusters of frames, over frames; the paper's gamma.
  frame_share: float = base.number(0.25, 0, 1, open_low=True)
  # Mean cosine above which a place is static; the paper's tau.
  threshold: float = base.number(0.8, -1)
  # The paper's beta, for its own rounding; None for the ratio.
  cluster_share: float | None = base.number(None, 0, 1, open_low=True)
  num_neighbours: int = base.number(7, 1, whole=True)

  def choose(self, inputs, num_keep, ratio):
    frames = inputs.frames
    T, P, _ = frames.shape
    labels = clustering.cluster(
      frames.mean(axis=1, dtype=jnp.float32),
      max(int(self.frame_share * T), 1),
      num_neighbours=self.num_neighbours,
    ).label
    first = segments.first_frames(segments.runs_of_labels(labels))
    closeness = mean_cosine(frames, first)
    static = closeness > self.threshold
    if self.exact_budget:
      static = segments.keep_apart(static, closeness, first, num_keep)
    sets = segments.sets(frames, static, first)
    if self.exact_budget:
      count = segments.shares(sets.sizes, num_keep)
    else:
      count = jnp.array(self._own_counts(P, ratio))[sets.sizes]

    def frame(x, count, kind):
      centre = clustering.from_distances(
        diversity.squared_distances(x),
        count,
        num_neighbours=self.num_neighbours,
        # A set that gets no row is no set.
        sets=jnp.where(count > 0, kind, segments.NOWHERE),
      ).centre
      return centre, similarity.segment_mean(x, centre, P)

    static = sets.kind == segments.STATIC
    count = jnp.where(static, count[:, :1], count[:, 1:])
    centre, means = jax.vmap(frame)(sets.tokens, count, sets.kind)
    return selection_ops.collect(
      means, centre, num_keep, frames.dtype, home=sets.home
    )

  def reference_rows(self, grid, ratio):
    """Returns a bound of the rows: no way to split the frames gives more."""
    T, H, W = grid
    count = self._own_counts(H * W, ratio)
    return T * int(np.max(count + count[::-1]))

  def step(self, state, *, layer, keep):
    """Returns the tokens of each set that the text attends to most."""
    sets = sets_of_static_and_frames(state.entered, state.grid)
    return layerwise.keep_by_text_attention(
      state,
      keep,
      jnp.take(sets, state.row, mode="clip"),
      num_sets=2 * state.grid[0],
      share=None if self.exact_budget else self.llm_keep,
    )

  def _own_counts(self, size, ratio):
    """Returns int32[size + 1], clusters of a set by its number of tokens."""
    share = ratio if self.cluster_share is None else self.cluster_share
    every = np.arange(size + 1, dtype=np.int32)
    shared = np.maximum((share * every).astype(np.int32), 1)
    return np.where(every <= _SMALL, every, shared)


def mean_cosine(frames, first):
  """Returns float32[T, P], a place's mean cosine over pairs of its segment.

  Of w unit vectors it is (|sum|^2 - w) / (w (w - 1)); -inf for one frame.
  """
  T, P, _ = frames.shape
  unit = similarity.unit(frames)
  member = segments.together(first)
  total = similarity.pooled(unit.reshape(T, -1), member).reshape(unit.shape)
  # Tokens of zeros have similarity 0, and a norm of 0 instead of 1.
  own = jnp.square(unit).sum(axis=-1)
  own = jnp.where(member[..., None], own[None], 0).sum(axis=1)
  length = member.sum(axis=-1, keepdims=True)
  pairs = length * (length - 1)
  mean = (jnp.square(total).sum(axis=-1) - own) / jnp.maximum(pairs, 1)
  return jnp.where(pairs > 0, mean, -jnp.inf)[first]


def sets_of_static_and_frames(selection: base.Selection, grid):
  """Returns int32[K] sets of merged rows: PruneVID's dynamic and static tokens.

  Rows of tokens of one frame are in its set, of several in set T + the first of
  them, padding in 2 * T.
  """
  T, H, W = grid
  size = selection.index.shape[0]
  frame = jnp.arange(T * H * W, dtype=jnp.int32) // (H * W)
  group = jnp.where(selection.assign < 0, size, selection.assign)
  first = jax.ops.segment_min(frame, group, size + 1)[:size]
  last = jax.ops.segment_max(frame, group, size + 1)[:size]
  sets = jnp.where(last > first, T + first, first)
  return jnp.where(selection.mask, sets, 2 * T)
