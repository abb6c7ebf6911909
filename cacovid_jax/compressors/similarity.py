"""Cosine similarities of tokens, in float32; a token of zeros has none.

Axes: T frames, P tokens of a frame, D width.
"""

import jax
import jax.numpy as jnp

# Below this norm a token counts as zero; no division by zero follows.
_TINY = 1e-12


def unit(x: jax.Array) -> jax.Array:
  """Returns float32[..., D], each vector of x float[..., D] over its norm."""
  x = x.astype(jnp.float32)
  norm = jnp.linalg.norm(x, axis=-1, keepdims=True)
  return x / jnp.maximum(norm, _TINY)


def adjacent(frames: jax.Array) -> jax.Array:
  """Returns float32[T - 1, ...] cosines of neighbours along the first axis.

  Args:
    frames: float[T, ..., D]; each vector is compared with the one at the same
      place of the next frame.
  """
  x = frames.astype(jnp.float32)
  norm = jnp.maximum(jnp.linalg.norm(x, axis=-1), _TINY)
  product = jnp.sum(x[1:] * x[:-1], axis=-1)
  return product / norm[1:] / norm[:-1]


def settled(cosines: jax.Array) -> jax.Array:
  """Returns cosines rounded to 16 binary places, for ranking.

  Cosines of equal tokens differ in their last bits, by how a device sums and
  what else is in its program; such bits must not decide which token wins.
  """
  return jnp.round(cosines * 65536.0) / 65536.0


def pooled(x: jax.Array, member: jax.Array) -> jax.Array:
  """Returns float32[..., g, D], the sum of the tokens of each group.

  A product with zeros and ones: exact in whatever dtype the tokens have, sums
  in float32, and unlike a scatter in an order that does not change.

  Args:
    x: float[..., n, D] tokens.
    member: bool[..., g, n], True where a token belongs to a group.
  """
  return jnp.matmul(
    member.astype(x.dtype),
    x,
    precision=jax.lax.Precision.HIGHEST,
    preferred_element_type=jnp.float32,
  )
