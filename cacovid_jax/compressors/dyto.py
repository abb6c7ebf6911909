"""Frames by temporal clustering, tokens by bipartite merging (DyTo,
https://arxiv.org/abs/2411.14401).

Representatives of TW-FINCH's second level (Sarfraz et al., CVPR 2019 and 2021)
enter with equal shares of the budget, met by merging pairs of a frame's tokens
again and again. Unlike in the publication the budget is met exactly, by other
frames where the representatives have too few tokens and fewer where they have
four times as many; frames are described by the mean of their tokens.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from cacovid_jax.compressors import base, selection_ops, simple
from cacovid_jax.compressors.math import clustering, similarity
from cacovid_jax.models import token_grid

# At most so many clusters give several frames each, so many in all.
_FEW_CLUSTERS = 6
_FEW_FRAMES = 12
_HEADS = 16
_SAME = 1e-6


@dataclasses.dataclass(frozen=True, kw_only=True)
class DyTo(base.Compressor, name="dyto"):
  """The merged tokens of representative frames, K in all."""

  max_frames: int = base.number(25, 1, whole=True)  # Unless K needs more.
  # Of merged tokens the largest value of each channel, as published, or mean.
  reduce: str = base.choice("max", "mean")

  def choose(self, inputs, num_keep, ratio):
    frames = inputs.frames
    num_frames, area, _ = frames.shape
    fewest, most = frame_bounds(inputs.grid, num_keep, self.max_frames)
    chosen = representatives(
      jnp.mean(frames.astype(jnp.float32), axis=1), fewest, most
    )
    frame = token_grid.first(chosen, most)
    num_chosen = chosen.sum()
    # Equal shares; what is left over goes to the first frames, one each.
    place = jnp.arange(most)
    counts = num_keep // num_chosen + (place < num_keep % num_chosen)
    counts = jnp.where(place < num_chosen, counts, 0)
    merge = functools.partial(
      merge_frame, fewest=min(num_keep // most, area), reduce=self.reduce
    )
    taken = frames[jnp.minimum(frame, num_frames - 1)]
    rows, into = jax.vmap(merge)(taken, counts)

    # Of frames that do not enter all tokens are dropped.
    values = frames.at[frame].set(rows, mode="drop")
    dropped = jnp.full([num_frames, area], area, jnp.int32)
    into = dropped.at[frame].set(into, mode="drop")
    return selection_ops.collect(values, into, num_keep, frames.dtype)


def frame_bounds(grid, num_keep: int, max_frames: int) -> tuple[int, int]:
  """Returns the fewest and the most frames that K tokens may come from."""
  area = grid[1] * grid[2]
  # Two mergings leave a quarter of a frame: no more frames than K has quarters
  # enter; but as many as hold K tokens must.
  half = area - area // 2
  quarter = half - half // 2
  fewest = math.ceil(num_keep / area)
  most = min(grid[0], max_frames, max(1, num_keep // quarter))
  return fewest, max(fewest, most)


def representatives(frames: jax.Array, fewest: int, most: int) -> jax.Array:
  """Returns bool[T], the frames float[T, D] that stand for their clusters.

  Of up to 6 clusters the first floor(12 / clusters) frames each, of more the
  middle one; of too many evenly spaced ones; to too few evenly spaced ones
  join.
  """
  num_frames = frames.shape[0]
  # Of level 2 or, if that is one cluster, level 1.
  labels, counts = tw_finch(frames, num_levels=2)
  label = jnp.where(counts[1] > 1, labels[1], labels[0])
  same = label[:, None] == label[None, :]
  length = same.sum(axis=-1)
  rank = (same & np.tri(num_frames, k=-1, dtype=bool)).sum(axis=-1)
  num_clusters = jnp.sum(rank == 0)
  middle = jnp.where(length > 2, length // 2, length - 1)
  chosen = jnp.where(
    num_clusters <= _FEW_CLUSTERS,
    rank < _FEW_FRAMES // num_clusters,
    rank == middle,
  )
  # Positions of the host in float64, for every count there may be.
  spaced = np.zeros([num_frames + 1, num_frames], bool)
  for n in range(1, num_frames + 1):
    places = np.round(np.linspace(0, n - 1, min(n, most))).astype(int)
    spaced[n, places] = True
  place = jnp.maximum(jnp.cumsum(chosen) - 1, 0)
  chosen &= jnp.asarray(spaced)[chosen.sum(), place]
  count = chosen.sum()
  short = jnp.maximum(fewest - count, 0)
  return chosen | simple.spread(~chosen, num_frames - count, short)


def tw_finch(points, *, num_levels: int) -> tuple[jax.Array, jax.Array]:
  """Clusters an even sequence float[T, D] by first neighbours.

  Every point is linked to its nearest one, by cosine distance times distance in
  time; linked points are a cluster, and clusters, by the means of their points
  and times, are the points of the next level.

  Returns the first point of each point's cluster, int32[num_levels, T], and the
  number of clusters of each level.
  """
  num_points = points.shape[0]
  points = points.astype(jnp.float32)
  slot = jnp.arange(num_points, dtype=jnp.int32)
  time = (slot + 1) / num_points
  label = slot
  labels, counts = [], []
  for _ in range(num_levels):
    mean = similarity.segment_mean(points, label, num_points)
    when = similarity.segment_mean(time[:, None], label, num_points)[:, 0]
    valid = label == slot
    nearest = _first_neighbours(mean, when, valid)
    merged = clustering.components_of_edges(slot, nearest, valid, num_points)
    label = merged[label]
    labels.append(label)
    counts.append(jnp.sum(label == slot))
  return jnp.stack(labels), jnp.stack(counts)


def _first_neighbours(mean, when, valid):
  """Returns int32[T], the nearest valid other point, itself if alone."""
  distance = 1.0 - similarity.symmetric(mean)
  # Closer directions float32 cannot tell apart: they are the same.
  distance = jnp.where(distance < _SAME, 0.0, distance)
  distance = distance * jnp.abs(when[:, None] - when[None, :])
  other = valid[None, :] & ~jnp.eye(valid.shape[0], dtype=bool)
  nearest = jnp.argmin(jnp.where(other, distance, jnp.inf), axis=-1)
  itself = jnp.arange(valid.shape[0])
  return jnp.where(other.any(axis=-1), nearest, itself).astype(jnp.int32)


def merge_frame(x, count, fewest: int, *, reduce: str = "max"):
  """Merges the tokens float[P, D] of one frame until `count` are left.

  In a step each token of the first half finds its best partner in the second
  half, and the pairs most alike are merged into the second one; then again, on
  the second. `count` int32[] is 0 or from `fewest`, static, at least 1, to P.

  Returns (float[P, D], int32[P]): rows where they are left, and for each token
  which row it went into.
  """
  area, width = x.shape
  heads = math.gcd(width, _HEADS)

  def metric(x):  # float32[n, D / heads], means over channel stretches.
    x = x.astype(jnp.float32).reshape(-1, heads, width // heads)
    return jnp.mean(x, axis=1)

  into = jnp.arange(area, dtype=jnp.int32)
  mass = jnp.ones([area], jnp.float32)
  out = x.astype(jnp.float32) if reduce == "mean" else x
  start = 0
  while area - start > fewest:
    n = area - start
    half = n // 2
    num_merged = jnp.clip(n - count, 0, half)
    a, b = out[start : start + half], out[start + half :]
    alike = similarity.between(metric(a), metric(b), split=True)
    best = jnp.argmax(alike, axis=-1).astype(jnp.int32)
    merged = selection_ops.rank(jnp.max(alike, axis=-1)) < num_merged
    group = jnp.where(merged, best, n - half)
    if reduce == "max":
      b = jnp.maximum(b, jax.ops.segment_max(a, group, n - half + 1)[:-1])
    else:
      of_a, of_b = mass[start : start + half], mass[start + half :]
      total = of_b + jax.ops.segment_sum(of_a, group, n - half + 1)[:-1]
      added = similarity.segment_sum(a * of_a[:, None], group, n - half)
      b = (b * of_b[:, None] + added) / total[:, None]
      mass = mass.at[start + half :].set(total)
    out = out.at[start + half :].set(b)
    step = jnp.arange(area, dtype=jnp.int32)
    moved = jnp.where(merged, start + half + best, step[start : start + half])
    into = step.at[start : start + half].set(moved)[into]
    start += half
  return out.astype(x.dtype), into
