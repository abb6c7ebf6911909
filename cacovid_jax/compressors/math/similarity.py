"""Cosines and sums of tokens, in full float32 at the price of their type.

A token of zeros is similar to nothing, itself included.
"""

import jax
import jax.numpy as jnp

# Largest matrix of all pairs that is held: 14188 tokens. A batch holds one of
# them for each video.
MATRIX_BYTES = 768 * 2**20
# Below this norm a token counts as zeros; no division by zero follows.
_LEAST_NORM = 1e-6


def unit(x: jax.Array) -> jax.Array:
  """Returns float32[..., D], x float[..., D] at norm 1; zeros stay zeros."""
  x = x.astype(jnp.float32)
  return x / norm(x)[..., None]


def inverse_norm(x: jax.Array) -> jax.Array:
  """Returns float32[...], one over the norms of tokens x float[..., D]."""
  return 1.0 / norm(x.astype(jnp.float32))


def norm(x):
  """Returns [...], norms of x float[..., D], not below a least one."""
  return jnp.maximum(jnp.linalg.norm(x, axis=-1), _LEAST_NORM)


def between(x, y=None, *, split: bool = False) -> jax.Array:
  """Returns float32[..., n, m] in [-1, 1], the cosines of tokens x and y.

  Of x float[..., n, D] and y float[..., m, D], None for x, multiplied in the
  type that they have and divided by their norms afterwards. `split` multiplies
  float32 of norm 1 by `split_dot` on NVIDIA GPUs, a few times faster, with an
  error of about 1e-6 instead of 1e-7.
  """
  y = x if y is None else y
  if split and not _exact_in_float32(x, y):
    columns = jnp.swapaxes(unit(y), -1, -2)
    cosines = jax.lax.platform_dependent(
      unit(x), columns, cuda=split_dot, default=dot
    )
  else:
    products = dot(x, jnp.swapaxes(y, -1, -2))
    scale = inverse_norm(x)[..., :, None] * inverse_norm(y)[..., None, :]
    cosines = products * scale
  return jnp.clip(cosines, -1.0, 1.0)


def symmetric(x: jax.Array) -> jax.Array:
  """Returns float32[..., n, n] of float[..., n, D], symmetric to the last bit.

  A matrix unit may round x_i . x_j and x_j . x_i differently, which would let
  an edge of a graph lead in one direction only.
  """
  cosines = between(x, split=True)
  return jnp.maximum(cosines, jnp.swapaxes(cosines, -1, -2))


def adjacent(frames: jax.Array) -> jax.Array:
  """Returns float32[T - 1, ...], cosines to the next, of float[T, ..., D]."""
  x = frames.astype(jnp.float32)
  length = norm(x)
  product = jnp.sum(x[1:] * x[:-1], axis=-1)
  return product / length[1:] / length[:-1]


def settled(cosines: jax.Array) -> jax.Array:
  """Returns cosines rounded to 16 binary places, for ranking.

  The last bits depend on the device and the rest of its program; they must not
  decide which token wins.
  """
  return jnp.round(cosines * 65536.0) / 65536.0


def dot(x: jax.Array, y: jax.Array) -> jax.Array:
  """Returns the float32 matrix product of x and y, nothing rounded before.

  The products of two bfloat16 numbers fit into float32, several times faster.
  """
  if _exact_in_float32(x, y):
    return jnp.matmul(x, y, preferred_element_type=jnp.float32)
  x, y = x.astype(jnp.float32), y.astype(jnp.float32)
  return jnp.matmul(x, y, precision=jax.lax.Precision.HIGHEST)


def split_dot(x: jax.Array, y: jax.Array) -> jax.Array:
  """Returns `dot` of x and y, as three products of bfloat16.

  Each number is split in two, and the product of the small parts left out: an
  error of 2^-16 of a product at most, in sums 1e-7 of the norms. A GPU, whose
  matrix unit has no product of full precision, takes a quarter of the time.
  """

  def halves(x):
    x = x.astype(jnp.float32)
    # A plain cast there and back is simplified away by the compiler.
    high = jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
    return high.astype(jnp.bfloat16), (x - high).astype(jnp.bfloat16)

  (x_high, x_low), (y_high, y_low) = halves(x), halves(y)
  return (dot(x_high, y_low) + dot(x_low, y_high)) + dot(x_high, y_high)


def pooled(x: jax.Array, member: jax.Array) -> jax.Array:
  """Returns float32[..., g, D], sums of float[..., n, D] over bool[..., g, n].

  A product, exact in whatever type the tokens have, fast on accelerators, and
  unlike a scatter in an order that does not change.
  """
  return dot(member.astype(x.dtype), x)


def segment_sum(features, assign, num_rows: int):
  """Returns float32[..., K, D], the sum of the tokens of each row.

  Of float[..., N, D] and the row of each token, int32[..., N]; those outside
  [0, K) count nowhere.
  """
  return pooled(features, _members(assign, num_rows))


def segment_mean(features, assign, num_rows: int):
  """Returns float32[..., K, D], as `segment_sum`; means, of none zeros."""
  count = segment_count(assign, num_rows)[..., None]
  return segment_sum(features, assign, num_rows) / jnp.maximum(count, 1.0)


def segment_count(assign, num_rows: int):
  """Returns float32[..., K], the number of tokens of each row."""
  return _members(assign, num_rows).sum(axis=-1, dtype=jnp.float32)


def _members(assign, num_rows):
  rows = jnp.arange(num_rows, dtype=assign.dtype)
  return assign[..., None, :] == rows[:, None]


def _exact_in_float32(x, y):
  return x.dtype == y.dtype and x.dtype in (jnp.bfloat16, jnp.float16)
