"""FastVID: salient tokens of every frame, and anchors that merge the rest.

Frames are cut into segments where neighbours are unlike. Most of a frame's
budget goes to salient tokens, the rest, per segment, to anchors: density peaks
of every fourth frame from its end, which take in the segment's other tokens.
Paper: https://arxiv.org/abs/2503.11187
"""

import dataclasses

import jax
import jax.numpy as jnp

from cacovid_jax.compressors import base, budgets, selection_ops
from cacovid_jax.compressors.math import clustering, segments, similarity
from cacovid_jax.models import token_grid
from cacovid_jax.policy import diversity


@dataclasses.dataclass(frozen=True, kw_only=True)
class FastVID(base.Compressor, name="fastvid"):
  """Salient tokens unchanged and anchors merged; frames share evenly."""

  requires: frozenset[str] = frozenset(["vision_attention"])
  note: str = (
    "fallback: received attention and mean features stand in for SigLIP's"
    " pooling head, which the checkpoints lack"
  )
  # Segments that there are at least, the paper's c; also where neighbouring
  # frames have a cosine below the threshold one ends.
  num_segments: int = base.number(8, 1, whole=True)
  threshold: float = base.number(0.9, -1)
  # Part of a frame's budget for anchors, d, and frames between those with some,
  # p; least weight of an anchor among the tokens it takes in.
  context_share: float = base.number(0.4, 0, 1)
  anchor_stride: int = base.number(4, 1, whole=True)
  anchor_weight: float = base.number(0.6, 0, 1)
  num_neighbours: int = base.number(7, 1, whole=True)

  def choose(self, inputs, num_keep, ratio):
    features, frames = inputs.features, inputs.frames
    T, P, _ = frames.shape
    shares = budgets.evenly(num_keep, T)
    wanted = [int(share * self.context_share) for share in shares]
    cosine = similarity.adjacent(frames.mean(axis=1, dtype=jnp.float32))
    first = segments.first_frames(
      segments.unlike_neighbours(cosine, self.num_segments, self.threshold)
    )
    num_salient, num_anchors = _counts(
      jnp.array(shares), jnp.array(wanted), first, P, self.anchor_stride
    )
    attention = inputs.frame_attention
    salient = selection_ops.rank(attention) < num_salient[:, None]

    def peaks(x, taken):
      squared, sets = diversity.squared_distances(x), jnp.where(taken, -1, 0)
      return clustering.from_distances(
        squared, 1, num_neighbours=self.num_neighbours, sets=sets
      ).rank

    rank = jax.vmap(peaks)(frames, salient)
    anchor = (~salient & (rank < num_anchors[:, None])).reshape(-1)
    salient = salient.reshape(-1)
    num_rows = max(sum(wanted), 1)
    anchors = token_grid.first(anchor, num_rows)
    # The anchor of a token's segment with the best cosine.
    segment = jnp.repeat(first, P)
    reach = segment[:, None] == jnp.append(segment, -1)[anchors]
    near = similarity.between(features, features[anchors])
    joined = jnp.argmax(jnp.where(reach, near, -jnp.inf), axis=-1)
    kept = salient | anchor
    joined = jnp.where(kept | ~reach.any(axis=-1), num_rows, joined)
    count = similarity.segment_count(joined, num_rows)
    weight = jnp.maximum(1.0 / (count + 1), self.anchor_weight)[:, None]
    own = features[jnp.minimum(anchors, T * P - 1)].astype(jnp.float32)
    merged = selection_ops.anchored(own, features, joined, weight)
    merged = merged.astype(features.dtype)
    values = features.at[anchors].set(merged, mode="drop")
    into = jnp.append(anchors, T * P)[joined]
    into = jnp.where(kept, jnp.arange(T * P), into)
    return selection_ops.collect(
      values[None], into[None], num_keep, features.dtype
    )

  def reference_rows(self, grid, ratio):
    """Returns how many are kept if each frame's count is cut off."""
    T, H, W = grid
    return T * int(ratio * (H * W))


def _counts(shares, wanted, first, size, stride):
  """Returns int32[T] salient tokens and int32[T] anchors of each frame.

  Of `shares` int32[T] tokens a frame, `wanted` int32[T] are anchors; those of a
  segment are split evenly over its anchor frames. What does not fit into P =
  `size` becomes salient tokens, of all frames in proportion to their room.
  """
  T = first.shape[0]
  place = jnp.arange(T)
  same = first[:, None] == first[None, :]
  last = jnp.where(same, place[None, :], 0).max(axis=-1)
  holds = (last - place) % stride == 0
  num_frames = (same & holds[None, :]).sum(axis=-1)
  before = (same & holds[None, :] & (place[None, :] < place[:, None])).sum(-1)
  total = jnp.where(same, wanted[None, :], 0).sum(axis=-1)
  anchors = total // num_frames + (before < total % num_frames)
  salient = shares - wanted
  anchors = jnp.where(holds, jnp.minimum(anchors, size - salient), 0)
  room = size - salient - anchors
  left = shares.sum() - salient.sum() - anchors.sum()
  more = budgets.largest_remainder_on_device(room, left, high=room)
  return salient + more, anchors
