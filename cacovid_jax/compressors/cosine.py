"""Cosine similarities in full float32, at the price of the input's type.

Axes: n and m rows, D width.
"""

import jax
import jax.numpy as jnp

# Shorter rows count as rows of zeros, which are similar to nothing.
_SHORTEST = 1e-6


def matrix(x, y=None):
  """Returns float32[..., n, m], the cosines of rows x f[..., n, D] and y.

  A row of zeros has cosine 0 to all, itself included.

  Args:
    x: float[..., n, D].
    y: float[..., m, D] of the same type; None for x.
  """
  y = x if y is None else y
  products = dot(x, jnp.swapaxes(y, -1, -2))
  scale = inverse_norm(x)[..., :, None] * inverse_norm(y)[..., None, :]
  return products * scale


def dot(x, y):
  """Returns the float32 matrix product of x and y, nothing rounded before.

  The products of two bfloat16 numbers fit into float32: rows of that type are
  multiplied as they are, several times faster than rows of float32.
  """
  if x.dtype == y.dtype and x.dtype in (jnp.bfloat16, jnp.float16):
    return jnp.matmul(x, y, preferred_element_type=jnp.float32)
  return jnp.matmul(
    x.astype(jnp.float32),
    y.astype(jnp.float32),
    precision=jax.lax.Precision.HIGHEST,
  )


def inverse_norm(x):
  """Returns float32[...], one over the norms of rows x float[..., D]."""
  norm = jnp.linalg.norm(x.astype(jnp.float32), axis=-1)
  return 1.0 / jnp.maximum(norm, _SHORTEST)
