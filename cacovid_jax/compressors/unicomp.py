"""Uniqueness (UniComp, https://arxiv.org/abs/2512.03575).

What a token tells that others do not is one minus its cosine to them. Frames
that hardly differ from the first of their group are fused and share the budget
by their uniqueness; in each, tokens are visited by falling uniqueness, and one
that is kept stands for those near it. To meet the budget exactly (ours), there
are enough fused frames, and suppressed tokens return in the order of the visit.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from cacovid_jax.compressors import base, budgets, selection_ops
from cacovid_jax.compressors.math import similarity


@dataclasses.dataclass(frozen=True, kw_only=True)
class UniComp(base.Compressor, name="unicomp"):
  """Unique tokens of fused frames, averaged with those near them.

  A row, in the first frame of its group, is the mean of its token and the mean
  of those that it suppressed.
  """

  # Largest cosine distances: of a frame's mean features to those of the first
  # one of its group, and of a kept token to one that it suppresses.
  frame_threshold: float = base.number(0.005, 0, 2)
  token_threshold: float = base.number(0.2, 0, 2)
  # What uniqueness is divided by where frames share the budget.
  temperature: float = base.number(1.0, 0, open_low=True)

  def choose(self, inputs, num_keep, ratio):
    frames = inputs.frames
    T, P, _ = frames.shape
    vectors = frames.astype(jnp.float32).mean(axis=1)
    head = fuse(vectors, self.frame_threshold, least=-(-num_keep // P))
    is_head = head == jnp.arange(T)
    means = similarity.segment_mean(frames.reshape(T, -1), head, T)
    fused = means.reshape(frames.shape)

    unique = uniqueness(similarity.between(fused.mean(axis=1)), is_head)
    share = jnp.where(is_head, unique / self.temperature, -jnp.inf)
    # A fused frame gets a token at least, if there are enough.
    low = (is_head & (is_head.sum() <= num_keep)).astype(jnp.int32)
    counts = budgets.largest_remainder_on_device(
      jax.nn.softmax(share), num_keep, low=low, high=jnp.where(is_head, P, 0)
    )
    visit = functools.partial(visit_tokens, threshold=self.token_threshold)
    keeper = jax.vmap(visit)(fused, counts)  # [T, P]

    place = jnp.arange(P)
    joins = jnp.where(keeper == place, -1, keeper)
    values = selection_ops.anchored(fused, fused, joins, 0.5)
    into = jnp.where(keeper < 0, P, keeper)
    home = head[:, None] * P + place
    return selection_ops.collect(values, into, num_keep, frames.dtype, home)


def fuse(vectors, threshold, least):
  """Returns int32[T], the first frame of the group that each frame joins.

  Frames float32[T, D] are within the threshold of the first of their group.
  Where that gives fewer than `least` groups, static, the farthest start groups.
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
  far = jnp.where(starts, -jnp.inf, similarity.settled(far))
  starts |= selection_ops.rank(far) < least - starts.sum()
  return jax.lax.cummax(jnp.where(starts, frame, 0))


def uniqueness(cosines, valid=True):
  """Returns float32[n], one minus the mean cosine float32[n, n] to the others.

  Only to those that are `valid` bool[n]; 0 if there is no other.
  """
  others = ~jnp.eye(cosines.shape[0], dtype=bool) & valid
  distance = jnp.where(others, 1.0 - cosines, 0.0)
  return distance.sum(axis=-1) / jnp.maximum(others.sum(axis=-1), 1)


def visit_tokens(x, count, threshold):
  """Returns int32[P], the kept token that each joins; itself if it is kept.

  Tokens float[P, D] are visited by falling uniqueness. One that is not
  suppressed yet stays, and suppresses all later ones within the threshold. The
  first `count` of those that stay are kept; then, if they are fewer, suppressed
  ones in the order of the visit. Dropped are (-1) those that stay too late, or
  are suppressed by one that does.
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
  stays = (joins == place).astype(jnp.int32)
  kept = selection_ops.rank(stays) < count
  joins = jnp.where(kept, place, jnp.where(kept[joins], joins, -1))
  # From places in the visit back to tokens.
  token = jnp.where(joins < 0, -1, order[joins])
  return jnp.zeros([P], jnp.int32).at[order].set(token.astype(jnp.int32))
