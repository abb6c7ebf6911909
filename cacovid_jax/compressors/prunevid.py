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

from cacovid_jax import errors
from cacovid_jax.compressors import (
  base,
  checks,
  dpc_knn,
  layerwise,
  rows,
  similarity,
  windows,
)
from cacovid_jax.policy import diversity

# Sets of no more tokens than this are left as they are, as published.
_SMALL = 14
_FRAME_SHARE = 0.25
_THRESHOLD = 0.8


def compress(
  features,
  *,
  grid,
  num_keep,
  text=None,
  aux=None,
  rng=None,
  ratio=None,
  rounding="exact",
  frame_share=_FRAME_SHARE,
  threshold=_THRESHOLD,
  cluster_share=None,
  num_neighbours=7,
  llm_stage=False,
  llm_layer=None,
  llm_keep=None,
):
  """Returns the means of clusters of static and of other tokens.

  Args:
    features: float[N, D] video tokens.
    grid: static (T, H, W).
    num_keep: K, static.
    text: unused.
    aux: unused.
    rng: unused.
    ratio: retention ratio behind K, for the reference rounding.
    rounding: "exact" splits K over the sets in proportion to their sizes;
      "reference" gives each int(cluster_share * size) and leaves sets of up
      to 14 tokens alone, so that static videos end with fewer tokens.
    frame_share: clusters of frames, over frames; the paper's gamma.
    threshold: mean cosine above which a place is static; the paper's tau.
    cluster_share: the paper's beta, for the reference rounding; None for the
      ratio.
    num_neighbours: of the density, for frames and for tokens.
    llm_stage: whether `PruneVID` goes on inside the language model.
    llm_layer: of `PruneVID`.
    llm_keep: of `PruneVID`.
  """
  del text, aux, rng, llm_stage, llm_layer, llm_keep
  checks.number("prunevid", "frame_share", frame_share, 0, 1, open_low=True)
  checks.number("prunevid", "threshold", threshold, -1)
  checks.number("prunevid", "num_neighbours", num_neighbours, 1, whole=True)
  T, H, W = grid
  P = H * W
  frames = features.reshape(T, P, -1)
  vectors = frames.mean(axis=1, dtype=jnp.float32)
  labels = dpc_knn.cluster(
    vectors, max(int(frame_share * T), 1), num_neighbours=num_neighbours
  ).label
  first = windows.first_frames(segment_starts(labels))
  closeness = mean_cosine(frames, first)
  static = closeness > threshold
  if rounding == "exact":
    static = windows.keep_apart(static, closeness, first, num_keep)
  sets = windows.sets(frames, static, first)
  if rounding == "exact":
    count = windows.shares(sets.sizes, num_keep)
  else:
    count = jnp.array(_reference_counts(P, ratio, cluster_share))[sets.sizes]
  count = windows.of_kind(count, sets.kind)
  found, means = jax.vmap(
    lambda x, count, kind: _merge(x, count, kind, num_neighbours)
  )(sets.tokens, count, sets.kind)
  start = jnp.arange(T, dtype=jnp.int32)[:, None] * P
  centre = jnp.where(found.centre < P, found.centre + start, T * P).reshape(-1)
  return rows.collect(
    means.reshape(features.shape),
    centre == jnp.arange(T * P),
    centre[sets.home.reshape(-1)],
    num_keep,
    dtype=features.dtype,
  )


def _merge(x, count, kind, num_neighbours):
  # A set that gets no row is no set.
  found = dpc_knn.from_distances(
    diversity.squared_distances(x),
    count,
    num_neighbours=num_neighbours,
    sets=jnp.where(count > 0, kind, windows.NOWHERE),
  )
  return found, dpc_knn.means(x, found)


def segment_starts(labels):
  """Returns bool[T], True where a segment begins, of cluster labels int32[T].

  A label's longest runs stay if they are longer than one frame, all of them if
  several are. A stretch of other frames joins the longer of the runs beside
  it, the left one on ties; runs on the left count the frames that joined them.
  """
  T = labels.shape[0]
  place = jnp.arange(T, dtype=jnp.int32)
  begins = jnp.concatenate([jnp.ones(1, bool), labels[1:] != labels[:-1]])
  first = windows.first_frames(begins)
  same_run = first[:, None] == first[None, :]
  length = same_run.sum(axis=-1, dtype=jnp.int32)
  same_label = labels[:, None] == labels[None, :]
  longest = jnp.where(same_label, length[None, :], 0).max(axis=-1)
  stays = (length == longest) & (length > 1)
  # The next frame that stays, T if there is none.
  behind = jax.lax.cummin(jnp.where(stays, place, T), reverse=True)
  beside = jnp.minimum(behind, T - 1)
  right_length = jnp.where(behind < T, length[beside], 0)
  right_label = jnp.where(behind < T, labels[beside], 0)

  def frame(carry, now):
    label, run, stayed = carry
    stays, own, right_label, right_length = now
    # Within a stretch the first frame's choice holds for the others.
    starts_stretch = ~stays & stayed
    goes_right = starts_stretch & (right_length > run)
    new = jnp.where(stays, own, jnp.where(goes_right, right_label, label))
    run = jnp.where(new == label, run + 1, 1)
    return (new, run, stays), new

  # Before frame 0 there is a run of no length with a label of its own; if
  # nothing stays, all frames keep it.
  initial = (jnp.int32(-1), jnp.int32(0), jnp.bool_(True))
  _, new = jax.lax.scan(
    frame, initial, (stays, labels, right_label, right_length)
  )
  return jnp.concatenate([jnp.ones(1, bool), new[1:] != new[:-1]])


def mean_cosine(frames, first):
  """Returns float32[T, P], a place's mean cosine over pairs of its segment.

  Of w unit vectors it is (|sum|^2 - w) / (w (w - 1)); -inf for one frame.

  Args:
    frames: float[T, P, D] video tokens.
    first: int32[T], the first frame of each frame's segment.
  """
  T, P, _ = frames.shape
  unit = similarity.unit(frames)
  member = windows.together(first)
  total = similarity.pooled(unit.reshape(T, -1), member).reshape(unit.shape)
  # Tokens of zeros have similarity 0, and a norm of 0 instead of 1.
  own = jnp.square(unit).sum(axis=-1)
  own = jnp.where(member[..., None], own[None], 0).sum(axis=1)
  pairs = member.sum(axis=-1) * (member.sum(axis=-1) - 1)
  mean = (jnp.square(total).sum(axis=-1) - own) / jnp.maximum(pairs, 1)[:, None]
  return jnp.where(pairs[:, None] > 0, mean, -jnp.inf)[first]


def _reference_counts(size, ratio, cluster_share):
  """Returns int32[size + 1], clusters of a set by its number of tokens."""
  share = ratio if cluster_share is None else cluster_share
  checks.number("prunevid", "cluster_share", share, 0, 1, open_low=True)
  return np.array(
    [n if n <= _SMALL else max(int(share * n), 1) for n in range(size + 1)],
    np.int32,
  )


def reference_rows(grid, ratio, cluster_share=None):
  """Returns a bound of the rows: no way to split the frames gives more."""
  T, H, W = grid
  count = _reference_counts(H * W, ratio, cluster_share)
  return T * int(np.max(count + count[::-1]))


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class PruneVID(layerwise.TwoStages):
  """Both stages; the second one shares its budget over the sets by size."""

  llm_layer: int = 10
  llm_keep: float = 0.4
  look: str = "after_video"
  drop_from_caches: bool = True

  def step(self, seen, *, layer, keep, grid):
    """Returns the tokens of each set that the text attends to most."""
    del layer
    sets = layerwise.sets_of_static_and_frames(seen.entered, grid)
    return layerwise.keep_by_text_attention(
      seen,
      keep,
      jnp.take(sets, seen.row, mode="clip"),
      num_sets=2 * grid[0],
      share=None if self.exact_budget else self.llm_keep,
    )


def _configure(compressor, *, llm_stage=False, **options):
  """Returns the method with both stages if that is asked for."""
  if llm_stage is False:
    for name in ("llm_layer", "llm_keep"):
      if name in options:
        raise errors.UserError(
          f"prunevid: {name} is an option of the stage in the language model;"
          " give llm_stage=True with it"
        )
    return compressor
  before = dataclasses.replace(COMPRESSOR, configure=None)
  return PruneVID(name="prunevid", before=before).with_options(
    exact_budget=compressor.exact_budget, llm_stage=llm_stage, **options
  )


COMPRESSOR = base.Compressor(
  name="prunevid",
  function=compress,
  reference_rows=reference_rows,
  configure=_configure,
)
