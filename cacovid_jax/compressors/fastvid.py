"""FastVID: salient tokens of every frame, and anchors that merge the rest.

Frames are cut into segments where neighbours are unlike. Most of a frame's
budget goes to salient tokens. The rest is gathered, per segment, on every
fourth frame counted from its end: the density peaks there are anchors and take
in the other tokens of the segment.
Paper: https://arxiv.org/abs/2503.11187

The published method reads SigLIP's pooling head, for frame embeddings and for
the saliency of tokens. The video models' checkpoints do not hold that head:
here mean features stand for the embedding, and the attention that a token
receives in the tower's last layer for its saliency. `COMPRESSOR.note` says so
wherever the method is listed.

Axes: T frames, P tokens of a frame, N = T * P, D width, K kept tokens, A
anchors.
"""

import jax
import jax.numpy as jnp

from cacovid_jax.compressors import (
  base,
  budgets,
  checks,
  dpc_knn,
  rows,
  similarity,
  windows,
)
from cacovid_jax.policy import diversity

_FALLBACK = (
  "fallback: received attention and mean features stand in for SigLIP's"
  " pooling head, which the checkpoints lack"
)


def compress(
  features,
  *,
  grid,
  num_keep,
  text=None,
  aux=None,
  rng=None,
  num_segments=8,
  threshold=0.9,
  context_share=0.4,
  anchor_stride=4,
  anchor_weight=0.6,
  num_neighbours=7,
):
  """Returns salient tokens unchanged and anchors merged.

  Args:
    features: float[N, D] video tokens.
    grid: static (T, H, W).
    num_keep: K, static; frames share it evenly, the first K mod T of them get
      one more, before the part for anchors moves to the anchors' frames.
    text: unused.
    aux: with `vision_attention` float32[N].
    rng: unused.
    num_segments: segments that there are at least; the paper's c.
    threshold: cosine of neighbouring frames below which a segment ends.
    context_share: part of a frame's budget for anchors; the paper's d.
    anchor_stride: frames between frames with anchors; the paper's p.
    anchor_weight: least weight of an anchor among the tokens it takes in.
    num_neighbours: of the density.
  """
  del text, rng
  for name, value in (
    ("num_segments", num_segments),
    ("anchor_stride", anchor_stride),
    ("num_neighbours", num_neighbours),
  ):
    checks.number("fastvid", name, value, 1, whole=True)
  checks.number("fastvid", "threshold", threshold, -1)
  checks.number("fastvid", "context_share", context_share, 0, 1)
  checks.number("fastvid", "anchor_weight", anchor_weight, 0, 1)
  T, H, W = grid
  P = H * W
  shares = budgets.evenly(num_keep, T)
  wanted = [int(share * context_share) for share in shares]
  frames = features.reshape(T, P, -1)
  vectors = frames.mean(axis=1, dtype=jnp.float32)
  first = windows.first_frames(
    segment_starts(similarity.adjacent(vectors), num_segments, threshold)
  )
  num_salient, num_anchors = _counts(
    jnp.array(shares), jnp.array(wanted), first, P, anchor_stride
  )
  attention = aux.vision_attention.astype(jnp.float32).reshape(T, P)
  salient = rows.rank(attention) < num_salient[:, None]
  peaks = jax.vmap(
    lambda x, others: (
      dpc_knn.from_distances(
        diversity.squared_distances(x),
        1,
        num_neighbours=num_neighbours,
        valid=others,
      ).rank
    )
  )(frames, ~salient)
  anchor = (~salient & (peaks < num_anchors[:, None])).reshape(-1)
  salient = salient.reshape(-1)

  bound = sum(wanted)
  own_place = jnp.arange(T * P)
  if not bound:
    into = jnp.where(salient, own_place, T * P)
    return rows.collect(features, salient, into, num_keep)
  (anchors,) = jnp.nonzero(anchor, size=bound, fill_value=T * P)
  segment = jnp.repeat(first, P)
  joined = _nearest(features, anchors, segment)
  joins = ~(salient | anchor) & (joined < bound)
  member = joins & (joined[None, :] == jnp.arange(bound)[:, None])
  count = member.sum(axis=-1)
  others = similarity.pooled(features, member)
  own = features[jnp.minimum(anchors, T * P - 1)].astype(jnp.float32)
  weight = jnp.maximum(1.0 / (count + 1), anchor_weight)[:, None]
  merged = rows.anchored(own, others, count, weight)
  values = features.at[anchors].set(merged.astype(features.dtype), mode="drop")
  into = jnp.append(anchors, T * P)[jnp.where(joins, joined, bound)]
  into = jnp.where(salient | anchor, own_place, into)
  return rows.collect(values, salient | anchor, into, num_keep)


def segment_starts(cosine, num_segments, threshold):
  """Returns bool[T], True where a segment begins.

  Args:
    cosine: float32[T - 1] of neighbouring frames.
    num_segments: the num_segments - 1 lowest cosines end a segment.
    threshold: so do all below it.
  """
  cuts = (rows.rank(-cosine) < num_segments - 1) | (cosine < threshold)
  return jnp.concatenate([jnp.ones(1, bool), cuts])


def _counts(shares, wanted, first, size, stride):
  """Returns int32[T] salient tokens and int32[T] anchors of each frame.

  A segment's anchors are split evenly over its anchor frames, the earlier ones
  get one more. What does not fit into a frame becomes salient tokens, of all
  frames in proportion to their room, so that the sum stays.

  Args:
    shares: int32[T] tokens of each frame.
    wanted: int32[T] how many of them are anchors.
    first: int32[T], the first frame of each frame's segment.
    size: P, static.
    stride: frames between anchor frames, static.
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

  Args:
    features: float[N, D] video tokens.
    anchors: int32[A] tokens, N behind the last.
    segment: int32[N], the segment of each token.

  Returns:
    int32[N], index into `anchors`; A where the segment has none.
  """
  num_video = features.shape[0]
  near = similarity.between(features, features[anchors])
  own = jnp.append(segment, -1)[anchors]
  reach = (anchors < num_video) & (segment[:, None] == own[None, :])
  near = jnp.where(reach, near, -jnp.inf)
  joined = jnp.argmax(near, axis=-1)
  return jnp.where(reach.any(axis=-1), joined, anchors.shape[0])


def reference_rows(grid, ratio):
  """Returns how many tokens are kept if each frame's count is cut off."""
  T, H, W = grid
  return T * int(ratio * (H * W))


COMPRESSOR = base.Compressor(
  name="fastvid",
  function=compress,
  needs=frozenset(["vision_attention"]),
  reference_rows=reference_rows,
  note=_FALLBACK,
)
