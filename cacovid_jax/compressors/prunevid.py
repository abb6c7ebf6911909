"""PruneVID: merge in time what is static, merge in space, ask the question.

Frames are clustered into segments. In a segment the places of the grid that
stay alike become one token each; then every set of tokens, static ones of a
segment and the others of a frame, is clustered and replaced by cluster means.
The second stage, option `llm_stage=True`, acts inside the language model: of
every set it keeps the tokens that any later token looks at most, and forgets
the others in the layers before, too.
Paper: https://arxiv.org/abs/2412.16117 (section 3)

A row stands at its cluster's central token, static rows in the first frame of
their segment. Ties go to the earlier token instead of to noise.

Axes: T frames, P tokens of a frame, N = T * P, D width, K kept tokens.
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
class PruneVID(layerwise.TwoStages):
  """The means of clusters of static and of other tokens.

  An exact budget is split over the sets in proportion to their sizes. The
  method's own rounding gives each int(share * size) and leaves sets of up to
  14 tokens alone, so that static videos end with fewer tokens. The second
  stage shares its budget over the sets in the same ways.

  Attributes:
    frame_share: clusters of frames, over frames; the paper's gamma.
    threshold: mean cosine above which a place is static; the paper's tau.
    cluster_share: the paper's beta, for its own rounding; None for the ratio.
    num_neighbours: of the density, for frames and for tokens.
  """

  name: str = "prunevid"
  llm_stage: bool = False
  llm_layer: int = 10
  llm_keep: float = base.number(0.4, 0, 1, open_low=True)
  attention_fn: str = "after_video"
  drop_from_caches: bool = True
  frame_share: float = base.number(0.25, 0, 1, open_low=True)
  threshold: float = base.number(0.8, -1)
  cluster_share: float | None = base.number(None, 0, 1, open_low=True)
  num_neighbours: int = base.number(7, 1, whole=True)

  def choose(self, inputs, num_keep, ratio):
    """Returns the means, static rows in the first frame of their segment."""
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
    count = segments.of_kind(count, sets.kind)
    centre, means = jax.vmap(self._merge)(sets.tokens, count, sets.kind)
    return selection_ops.collect_parts(
      means, centre, num_keep, frames.dtype, home=sets.home
    )

  def reference_rows(self, grid, ratio):
    """Returns a bound of the rows: no way to split the frames gives more."""
    T, H, W = grid
    count = self._own_counts(H * W, ratio)
    return T * int(np.max(count + count[::-1]))

  def step(self, state, *, layer, keep):
    """Returns the tokens of each set that the text attends to most."""
    del layer
    sets = sets_of_static_and_frames(state.entered, state.grid)
    return layerwise.keep_by_text_attention(
      state,
      keep,
      jnp.take(sets, state.row, mode="clip"),
      num_sets=2 * state.grid[0],
      share=None if self.exact_budget else self.llm_keep,
    )

  def _merge(self, x, count, kind):
    found = clustering.from_distances(
      diversity.squared_distances(x),
      count,
      num_neighbours=self.num_neighbours,
      # A set that gets no row is no set.
      sets=jnp.where(count > 0, kind, segments.NOWHERE),
    )
    return found.centre, similarity.segment_mean(x, found.centre, len(x))

  def _own_counts(self, size, ratio):
    """Returns int32[size + 1], clusters of a set by its number of tokens."""
    share = ratio if self.cluster_share is None else self.cluster_share
    return np.array(
      [n if n <= _SMALL else max(int(share * n), 1) for n in range(size + 1)],
      np.int32,
    )


def mean_cosine(frames, first):
  """Returns float32[T, P], a place's mean cosine over pairs of its segment.

  Of w unit vectors it is (|sum|^2 - w) / (w (w - 1)); -inf for one frame.
  `first` int32[T] is the first frame of each frame's segment.
  """
  T, P, _ = frames.shape
  unit = similarity.unit(frames)
  member = segments.together(first)
  total = similarity.pooled(unit.reshape(T, -1), member).reshape(unit.shape)
  # Tokens of zeros have similarity 0, and a norm of 0 instead of 1.
  own = jnp.square(unit).sum(axis=-1)
  own = jnp.where(member[..., None], own[None], 0).sum(axis=1)
  pairs = member.sum(axis=-1) * (member.sum(axis=-1) - 1)
  mean = (jnp.square(total).sum(axis=-1) - own) / jnp.maximum(pairs, 1)[:, None]
  return jnp.where(pairs[:, None] > 0, mean, -jnp.inf)[first]


def sets_of_static_and_frames(selection: base.Selection, grid):
  """Returns int32[K] sets of merged rows, 2 * T in all.

  A row that stands for tokens of one frame belongs to that frame's set; one
  that stands for several frames to set T + first of them: PruneVID's dynamic
  and static tokens. Padding goes to set 2 * T.
  """
  T, H, W = grid
  size = selection.index.shape[0]
  frame = jnp.arange(T * H * W, dtype=jnp.int32) // (H * W)
  group = jnp.where(selection.assign < 0, size, selection.assign)
  first = jax.ops.segment_min(frame, group, size + 1)[:size]
  last = jax.ops.segment_max(frame, group, size + 1)[:size]
  sets = jnp.where(last > first, T + first, first)
  return jnp.where(selection.mask, sets, 2 * T)
