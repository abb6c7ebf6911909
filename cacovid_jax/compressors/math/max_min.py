"""Max-min diverse subsets, and their sequential loop as one kernel.

Start from the item whose nearest neighbour is farthest, then add, again and
again, the item farthest from all picked ones. One kernel, on NVIDIA GPUs, holds
the distances to the nearest pick in registers and only reads the row of the
newest: separate kernels would be several launches a pick.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from cacovid_jax.compressors.math import similarity

# Rows of the distance matrix held at a time while the first token is sought.
_BLOCK = 256
# Items that a warp holds, eight in each thread: a frame's items need one warp,
# which has no other to wait for. Sixteen warps read a long row fast enough.
_WARP_ITEMS = 256
_MOST_WARPS = 16


def max_min_subset(features, *, num_keep: int, distances: str = "auto"):
  """Returns int32[K] distinct rows of features f[N, D], in picking order.

  Of `distances`, "matrix" holds all at once, "rows" computes those to a picked
  token when it is picked: less memory, and slower by far on an accelerator;
  "auto" holds them where they fit.
  """
  # A choice has no derivative, and neither has the kernel.
  features = jax.lax.stop_gradient(features)
  num_tokens = features.shape[0]
  if distances == "auto":
    fits = 4 * num_tokens**2 <= similarity.MATRIX_BYTES
    distances = "matrix" if fits else "rows"
  if distances == "matrix":
    return max_min_of_matrix(1.0 - similarity.between(features), num_keep)
  inverse = similarity.inverse_norm(features)

  def distance_to(i):
    products = similarity.dot(features, features[i]) * (inverse * inverse[i])
    return 1.0 - jnp.clip(products, -1.0, 1.0)

  def nearest(i):
    return jnp.min(distance_to(i).at[i].set(jnp.inf))

  every = jnp.arange(num_tokens)
  first = _farthest(jax.lax.map(nearest, every, batch_size=_BLOCK))
  return max_min_loop(distance_to, first, num_tokens, num_keep)


def max_min_of_matrix(distances, num_keep: int) -> jax.Array:
  """Returns int32[K] distinct items, by their distances float32[N, N]."""
  itself = jnp.eye(distances.shape[0], dtype=bool)
  nearest = jnp.where(itself, jnp.inf, distances).min(axis=0)
  return max_min(distances, _farthest(nearest), num_keep)


def _farthest(nearest):
  """Returns int32[], the first item of the largest distance float32[N]."""
  # Two items that are nearest to each other have the same distance, but for
  # the rounding of float32, which must not decide between them.
  return jnp.argmax(similarity.settled(nearest)).astype(jnp.int32)


def max_min(distances, first, num_keep):
  """Returns `max_min_picks` on NVIDIA GPUs, else by `max_min_loop`."""

  def loop(distances, first):
    size = len(distances)
    return max_min_loop(lambda item: distances[item], first, size, num_keep)

  distances = jax.lax.stop_gradient(distances)
  kernel = functools.partial(max_min_picks, num_keep=num_keep)
  return jax.lax.platform_dependent(distances, first, cuda=kernel, default=loop)


def max_min_picks(distances, first, num_keep, interpret=False):
  """Returns int32[K] distinct items, each the farthest from all before it.

  Of distances float32[N, N], finite, and the first pick int32[]; equal to
  `max_min_loop`. `interpret` runs it one by one on any platform.
  """
  num_items = distances.shape[0]
  # Triton's arrays have powers of two as sizes; what is behind N is masked.
  size = pl.next_power_of_2(num_items)
  kernel = functools.partial(
    _max_min_kernel, num_items=num_items, num_keep=num_keep, size=size
  )
  return pl.pallas_call(
    kernel,
    out_shape=jax.ShapeDtypeStruct([num_keep], jnp.int32),
    interpret=interpret,
    # Names the backend too: Pallas has two for these GPUs.
    compiler_params=pltriton.CompilerParams(
      num_warps=min(max(size // _WARP_ITEMS, 1), _MOST_WARPS), num_stages=1
    ),
    name="max_min_picks",
  )(distances.reshape(-1), first.astype(jnp.int32).reshape(1))


def _max_min_kernel(
  distances_ref, first_ref, picked_ref, *, num_items, num_keep, size
):
  item = jax.lax.broadcasted_iota(jnp.int32, (size,), 0)
  inside = item < num_items

  def pick(m, state):
    best, last = state
    # By places, not by a slice: newer versions refuse one that ends behind N,
    # though what is there is masked.
    row = pltriton.load(
      distances_ref.at[last * num_items + item], mask=inside, other=-jnp.inf
    )
    best = jnp.where(item == last, -jnp.inf, jnp.minimum(best, row))
    # The largest, then the first place that has it: an argmax whose rule for
    # ties is written out.
    largest = jnp.max(best)
    last = jnp.min(jnp.where(best == largest, item, size)).astype(jnp.int32)
    picked_ref[m] = last
    return best, last

  first = first_ref[0]
  picked_ref[0] = first
  best = jnp.where(inside, jnp.inf, -jnp.inf).astype(jnp.float32)
  jax.lax.fori_loop(1, num_keep, pick, (best, first))


def max_min_loop(distance_to, first, num_items, num_keep):
  """Returns what `max_min_picks` does, on any platform.

  `distance_to` an item int32[] gives float32[N], distances of all to it.
  """
  item = jnp.arange(num_items, dtype=jnp.int32)

  def pick(m, state):
    picked, best, last = state
    # -inf survives the minimum, so a picked item is never picked again.
    best = jnp.minimum(best, distance_to(last))
    best = jnp.where(item == last, -jnp.inf, best)
    last = jnp.argmax(best).astype(jnp.int32)
    return picked.at[m].set(last), best, last

  first = first.astype(jnp.int32)
  picked = jnp.zeros([num_keep], jnp.int32).at[0].set(first)
  best = jnp.full([num_items], jnp.inf, jnp.float32)
  state = (picked, best, first)
  picked, _, _ = jax.lax.fori_loop(1, num_keep, pick, state)
  return picked
