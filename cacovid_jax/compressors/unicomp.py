"""Uniqueness (UniComp, https://arxiv.org/abs/2512.03575).

What a token tells that others do not is one minus its cosine to them. Frames
that hardly differ from the first of their group are fused; the budget goes to
fused frames by their uniqueness; in each, tokens are visited by falling
uniqueness, and a token that is kept stands for the ones near it. Neither
attention nor the question plays a part.

The budget is met exactly, which the publication leaves open: fused frames
must have room for it (of a video that hardly changes, the frames that differ
most from their group start groups of their own), and where too few tokens are
left unsuppressed, suppressed ones return in the order of the visit.

Axes: T frames, P = H * W tokens of a frame, N video tokens, D width, K rows.
"""

import dataclasses

import jax
import jax.numpy as jnp

from cacovid_jax import errors
from cacovid_jax.compressors import base, budgets, selection_ops
from cacovid_jax.compressors.math import similarity


@dataclasses.dataclass(frozen=True, kw_only=True)
class UniComp(base.Compressor):
  """Unique tokens of fused frames, averaged with those near them.

  A row has the place of its token in the first frame of its group. It is the
  mean of that token and the mean of the tokens that it suppressed, each of
  them the mean over the frames of the group.

  Attributes:
    frame_threshold: largest cosine distance between the mean features of a
      frame and the first one of its group.
    token_threshold: largest cosine distance at which a kept token suppresses
      another one of its frame.
    temperature: what uniqueness is divided by where frames share the budget.
  """

  name: str = "unicomp"
  frame_threshold: float = 0.005
  token_threshold: float = 0.2
  temperature: float = base.number(1.0, 0, open_low=True)

  def __post_init__(self):
    super().__post_init__()
    for name in ("frame_threshold", "token_threshold"):
      if not 0.0 <= getattr(self, name) <= 2.0:
        raise errors.UserError(
          f"unicomp: {name} {getattr(self, name)} is no cosine distance; give"
          " 0 to 2"
        )

  def choose(self, inputs, num_keep, ratio):
    """Returns the rows of all groups of frames."""
    features = inputs.features
    T, H, W = inputs.grid
    P = H * W
    head = fuse(
      features.reshape(T, P, -1).astype(jnp.float32).mean(axis=1),
      self.frame_threshold,
      least=-(-num_keep // P),
    )
    is_head = head == jnp.arange(T)
    fused = base.segment_mean(features.reshape(T, -1), head, T)
    fused = fused.reshape(T, P, -1)

    unique = uniqueness(similarity.between(fused.mean(axis=1)), is_head)
    share = jnp.where(is_head, unique / self.temperature, -jnp.inf)
    # A fused frame gets a token at least, if there are enough.
    least = is_head & (is_head.sum() <= num_keep)
    counts = budgets.largest_remainder_on_device(
      jax.nn.softmax(share),
      num_keep,
      low=least.astype(jnp.int32),
      high=jnp.where(is_head, P, 0),
    )
    keeper = jax.vmap(
      lambda x, count: visit_tokens(x, count, self.token_threshold)
    )(fused, counts)  # [T, P]

    place = jnp.arange(P)
    near = keeper[:, None, :] == place[:, None]
    near &= ~jnp.eye(P, dtype=bool)
    num_near = near.sum(axis=-1)[..., None]
    around = similarity.pooled(fused, near)
    around = around / jnp.maximum(num_near, 1)
    values = jnp.where(num_near > 0, (fused + around) / 2, fused)

    into = jnp.where(keeper < 0, P, keeper)
    home = head[:, None] * P + place
    return selection_ops.collect_parts(
      values, into, num_keep, features.dtype, home
    )


def fuse(vectors, threshold, least):
  """Returns int32[T], the first frame of the group that each frame joins.

  Args:
    vectors: float32[T, D], one of each frame.
    threshold: largest cosine distance of a frame to the first of its group.
    least: static, at least as many groups are made: where the threshold gives
      fewer, the frames that are farthest from their first one start groups.
  """
  T = vectors.shape[0]
  distance = 1.0 - similarity.between(vectors)
  frame = jnp.arange(T, dtype=jnp.int32)

  def join(head, t):
    far = distance[head, t]
    head = jnp.where(far > threshold, t, head)
    return head, (head, far)

  _, (head, far) = jax.lax.scan(join, jnp.int32(0), frame)
  starts = (head == frame).at[0].set(True)
  far = similarity.settled(far)
  order = jnp.argsort(jnp.where(starts, jnp.inf, -far))
  place = jnp.zeros([T], jnp.int32).at[order].set(frame)
  starts |= place < least - starts.sum()
  return jax.lax.cummax(jnp.where(starts, frame, 0))


def uniqueness(cosines, valid=None):
  """Returns float32[n], one minus the mean cosine of a row to the others.

  Args:
    cosines: float32[n, n] of the rows.
    valid: bool[n], the rows that are there; None for all. A single row has
      uniqueness 0.
  """
  n = cosines.shape[0]
  if valid is None:
    valid = jnp.ones([n], bool)
  others = valid & ~jnp.eye(n, dtype=bool)
  distance = jnp.where(others, 1.0 - cosines, 0.0)
  return distance.sum(axis=-1) / jnp.maximum(others.sum(axis=-1), 1)


def visit_tokens(x, count, threshold):
  """Returns int32[P], the kept token that each joins; itself if it is kept.

  Tokens are visited by falling uniqueness, of equals the first one first. A
  token that is not suppressed yet stays, and suppresses all later ones within
  the threshold. The first `count` of those that stay are kept; then, if they
  are fewer, suppressed ones in the order of the visit.

  Args:
    x: float[P, D] tokens of a frame.
    count: int32[], at most P.
    threshold: largest cosine distance of suppression.

  Returns:
    -1 where a token is dropped: it stayed too late, or is suppressed by one
    that did.
  """
  P = x.shape[0]
  place = jnp.arange(P, dtype=jnp.int32)
  cosines = similarity.between(x)
  order = jnp.argsort(-similarity.settled(uniqueness(cosines)))
  near = 1.0 - cosines[order][:, order] <= threshold
  near &= place[None, :] > place[:, None]

  def look(joins, step):
    i, near_i = step
    # What joined another token is suppressed, and suppresses nothing.
    free = joins == place
    return jnp.where(near_i & free & free[i], i, joins), None

  joins, _ = jax.lax.scan(look, place, (place, near))
  stays = joins == place
  rank = jnp.where(
    stays,
    jnp.cumsum(stays) - 1,
    stays.sum() + jnp.cumsum(~stays) - 1,
  )
  kept = rank < count
  joins = jnp.where(kept, place, jnp.where(kept[joins], joins, -1))
  # From places in the visit back to tokens.
  token = jnp.where(joins < 0, -1, order[joins])
  return jnp.zeros([P], jnp.int32).at[order].set(token.astype(jnp.int32))
