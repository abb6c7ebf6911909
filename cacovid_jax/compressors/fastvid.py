"""FastVID: salient tokens of every frame, and anchors that merge the rest.

Frames are cut into segments where neighbours are unlike. Most of a frame's
budget goes to salient tokens. The rest is gathered, per segment, on every
fourth frame counted from its end: the density peaks there are anchors and take
in the other tokens of the segment.
Paper: https://arxiv.org/abs/2503.11187

The published method reads SigLIP's pooling head, for frame embeddings and for
the saliency of tokens. The video models' checkpoints do not hold that head:
here mean features stand for the embedding, and the attention that a token
receives in the tower's last layer for its saliency; see `FastVID.note`.

Axes: T frames, P tokens of a frame, N = T * P, D width, K kept tokens, A
anchors.
"""

import dataclasses

import jax
import jax.numpy as jnp

from cacovid_jax.compressors import base, budgets, selection_ops
from cacovid_jax.compressors.math import clustering, segments, similarity
from cacovid_jax.policy import diversity


@dataclasses.dataclass(frozen=True, kw_only=True)
class FastVID(base.Compressor):
  """Salient tokens unchanged and anchors merged.

  Frames share the budget evenly, the first K mod T of them get one more,
  before the part for anchors moves to the anchors' frames.

  Attributes:
    num_segments: segments that there are at least; the paper's c.
    threshold: cosine of neighbouring frames below which a segment ends.
    context_share: part of a frame's budget for anchors; the paper's d.
    anchor_stride: frames between frames with anchors; the paper's p.
    anchor_weight: least weight of an anchor among the tokens it takes in.
    num_neighbours: of the density.
  """

  name: str = "fastvid"
  requires: frozenset[str] = frozenset(["vision_attention"])
  note: str = (
    "fallback: received attention and mean features stand in for SigLIP's"
    " pooling head, which the checkpoints lack"
  )
  num_segments: int = base.number(8, 1, whole=True)
  threshold: float = base.number(0.9, -1)
  context_share: float = base.number(0.4, 0, 1)
  anchor_stride: int = base.number(4, 1, whole=True)
  anchor_weight: float = base.number(0.6, 0, 1)
  num_neighbours: int = base.number(7, 1, whole=True)

  def choose(self, inputs, num_keep, ratio):
    """Returns salient tokens and anchors of all frames."""
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
      return clustering.from_distances(
        diversity.squared_distances(x),
        1,
        num_neighbours=self.num_neighbours,
        sets=jnp.where(taken, -1, 0),
      ).rank

    rank = jax.vmap(peaks)(frames, salient)
    anchor = (~salient & (rank < num_anchors[:, None])).reshape(-1)
    salient = salient.reshape(-1)
    num_rows = max(sum(wanted), 1)
    (anchors,) = jnp.nonzero(anchor, size=num_rows, fill_value=T * P)
    joined = _nearest(features, anchors, jnp.repeat(first, P))
    kept = salient | anchor
    joined = jnp.where(kept, len(anchors), joined)
    values = self._merge(features, anchors, joined)
    into = jnp.append(anchors, T * P)[joined]
    into = jnp.where(kept, jnp.arange(T * P), into)
    return selection_ops.collect(values, kept, into, num_keep)

  def reference_rows(self, grid, ratio):
    """Returns how many tokens are kept if each frame's count is cut off."""
    T, H, W = grid
    return T * int(ratio * (H * W))

  def _merge(self, features, anchors, joined):
    """Returns float[N, D] with the anchors merged; see `_nearest`."""
    count = similarity.segment_count(joined, len(anchors))
    own = features[jnp.minimum(anchors, len(features) - 1)].astype(jnp.float32)
    weight = jnp.maximum(1.0 / (count + 1), self.anchor_weight)[:, None]
    merged = selection_ops.anchored(own, features, joined, weight)
    return features.at[anchors].set(merged.astype(features.dtype), mode="drop")


def _counts(shares, wanted, first, size, stride):
  """Returns int32[T] salient tokens and int32[T] anchors of each frame.

  Of `shares` int32[T] tokens a frame, `wanted` int32[T] are anchors; those of a
  segment are split evenly over its anchor frames, the first ones get one more.
  What does not fit into a frame of P = `size` becomes salient tokens, of all
  frames in proportion to their room, so that the sum stays.
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


def _nearest(features, anchors, segment):
  """Returns int32[N], the anchor of a token's segment with the best cosine.

  That is a place in `anchors` int32[A], tokens with N behind the last; A where
  the token's segment int32[N] has none.
  """
  num_video = features.shape[0]
  near = similarity.between(features, features[anchors])
  own = jnp.append(segment, -1)[anchors]
  reach = (anchors < num_video) & (segment[:, None] == own[None, :])
  near = jnp.where(reach, near, -jnp.inf)
  joined = jnp.argmax(near, axis=-1)
  return jnp.where(reach.any(axis=-1), joined, anchors.shape[0])
