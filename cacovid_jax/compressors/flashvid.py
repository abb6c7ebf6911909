"""FlashVID (https://arxiv.org/abs/2602.08024): the part before the LLM.

Most of the budget goes, frame by frame, to tokens that differ from each other
and that the vision tower attends to. The tokens left form trees through time:
within a segment, a token hangs on the token of the previous frame that it
resembles most. Trees become their means, which density peak clustering brings
down to what is left of the budget. To meet it exactly (ours), the weakest links
are cut, and frames share the budget of trees by how many begin in them.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from cacovid_jax.compressors import base, budgets, layerwise, selection_ops
from cacovid_jax.compressors.math import (
  clustering,
  max_min,
  segments,
  similarity,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlashVID(layerwise.TwoStages, name="flashvid"):
  """Diverse tokens that are attended to, and means of trees.

  A mean has the place of the first token of the tree that is the centre of its
  cluster, and counts every token alike. The second part keeps 30 % of what
  entered, 1.25 times the budget, by the attention of the last token.
  """

  requires: frozenset[str] = frozenset(["vision_attention"])
  # Share of K that is picked, rounded down, of frames evenly.
  diverse_share: float = base.number(0.7, 0, 1)
  link_above: float = 0.8  # A token joins a tree above this cosine.
  # There are so many segments at least, cut where the mean features of
  # neighbouring frames are least similar, and wherever below this cosine.
  num_segments: int = base.number(8, 1, whole=True)
  cut_below: float = 0.9

  def choose(self, inputs, num_keep, ratio):
    frames = inputs.frames
    T, P, _ = frames.shape
    # 0.7 * 10 may be a rounding error below 7.
    num_diverse = math.floor(self.diverse_share * num_keep + 1e-9)
    num_merged = num_keep - num_diverse

    diverse = pick_diverse(frames, inputs.frame_attention, num_diverse)
    cosine = similarity.adjacent(frames.astype(jnp.float32).mean(axis=1))
    cut = segments.unlike_neighbours(
      similarity.settled(cosine), self.num_segments, self.cut_below
    )
    parent = link(frames, ~diverse, cut, self.link_above, T * P - num_keep)
    root = ~diverse & (parent < 0)
    total, size = tree_sums(frames, ~diverse, parent)

    num_trees = root.sum(axis=-1, dtype=jnp.int32)
    some = num_trees > 0
    low = (some & (some.sum() <= num_merged)).astype(jnp.int32)
    counts = budgets.largest_remainder_on_device(
      num_trees.astype(jnp.float32), num_merged, low=low, high=num_trees
    )
    means = total / jnp.maximum(size, 1.0)[..., None]
    sets = jnp.where(root, 0, segments.NOWHERE)
    centre = jax.vmap(
      lambda x, count, sets: clustering.cluster(x, count, sets=sets).centre
    )(means, counts, sets)
    # Frames without budget drop their trees.
    root &= counts[:, None] > 0

    place = jnp.arange(P)
    joins = jnp.where(root, centre, P)
    merged = similarity.segment_sum(total, joins, P)
    count = similarity.segment_sum(size[..., None], joins, P)
    merged = (merged / jnp.maximum(count, 1.0)).astype(frames.dtype)
    values = jnp.where(diverse[..., None], frames, merged)
    into = jnp.where(diverse, place, joins)
    return selection_ops.collect(
      values, into, num_keep, frames.dtype, home=roots_of(parent)
    )


def pick_diverse(frames, attention, num_keep):
  """Returns bool[T, P] with `num_keep` True, in every frame max-min diverse.

  Tokens are as far from others as their cosine distance times the attention
  that they receive, float32[T, P], not negative.
  """
  T, P = attention.shape
  count = budgets.evenly(num_keep, T)
  most = max(count)
  if not most:
    return jnp.zeros([T, P], bool)
  # Only ratios matter within a frame; the largest becomes 1.
  largest = attention.max(axis=-1, keepdims=True)
  attention = attention / jnp.where(largest > 0, largest, 1.0)
  distance = (1.0 - similarity.between(frames)) * attention[:, None, :]
  pick = functools.partial(max_min.max_min_of_matrix, num_keep=most)
  picks = jax.vmap(pick)(distance)
  # The picks of a smaller budget are the first ones of a larger.
  picks = jnp.where(jnp.arange(most) < jnp.array(count)[:, None], picks, P)
  return (picks[..., None] == jnp.arange(P)).any(axis=1)


def link(frames, free, cut, threshold, most):
  """Returns int32[T, P], the token of the frame before that each hangs on.

  Only tokens that are `free` bool[T, P] hang on or are hung on, with a cosine
  above the threshold; those of frames `cut` bool[T] hang on none, -1. No more
  than `most`, static, are made, the strongest; of equal ones, the first.
  """
  T, P = free.shape
  if T == 1 or not most:
    return jnp.full([T, P], -1, jnp.int32)
  likeness = similarity.settled(similarity.between(frames[1:], frames[:-1]))
  likeness = jnp.where(free[:-1, None, :], likeness, -jnp.inf)
  parent = jnp.argmax(likeness, axis=-1).astype(jnp.int32)
  best = likeness.max(axis=-1)
  linked = free[1:] & ~cut[1:, None] & (best > threshold)
  rank = selection_ops.rank(jnp.where(linked, best, -jnp.inf).reshape(-1))
  linked &= (rank < most).reshape(linked.shape)
  parent = jnp.where(linked, parent, -1)
  return jnp.concatenate([jnp.full([1, P], -1, jnp.int32), parent])


def tree_sums(frames, free, parent):
  """Returns (float32[T, P, D], float32[T, P]): sums and sizes of trees.

  Of each free token and all that hang on it. Arguments are as of `link`.
  """
  P = parent.shape[1]
  free = free.astype(jnp.float32)
  tokens = frames.astype(jnp.float32) * free[..., None]

  def add(later, frame):
    (total, size, hangs_on), (tokens, free, parent) = later, frame
    # A product instead of a scatter: its sums are reproducible on a GPU.
    total = tokens + similarity.segment_sum(total, hangs_on, P)
    size = free + similarity.segment_sum(size, hangs_on, P)
    return (total, size, parent), (total, size)

  nothing = jax.tree.map(jnp.zeros_like, (tokens[0], free[0], parent[0]))
  _, sums = jax.lax.scan(add, nothing, (tokens, free, parent), reverse=True)
  return sums


def roots_of(parent):
  """Returns int32[N], the root of each token's tree, of parents int32[T, P]."""
  T, P = parent.shape
  token = jnp.arange(T * P, dtype=jnp.int32).reshape(T, P)
  before = jnp.arange(T, dtype=jnp.int32)[:, None] * P - P
  root = jnp.where(parent < 0, token, parent + before).reshape(-1)
  # Every round doubles how far a token looks.
  for _ in range((T - 1).bit_length()):
    root = root[root]
  return root
