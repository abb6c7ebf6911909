"""Directions of tokens, and how alike they are, as weights of a graph.

Axes: n and m tokens, D width.
"""

import jax
import jax.numpy as jnp

# Below this a token counts as all zeros and is similar to nothing.
_LEAST_NORM = 1e-6


def unit(x: jax.Array) -> jax.Array:
  """Returns float32[..., D], x float[..., D] at norm 1; zeros stay zeros."""
  x = x.astype(jnp.float32)
  norm = jnp.linalg.norm(x, axis=-1, keepdims=True)
  return x / jnp.maximum(norm, _LEAST_NORM)


def cosine(a: jax.Array, b: jax.Array) -> jax.Array:
  """Returns float32[..., n, m] in [-1, 1] of a f[..., n, D], b f[..., m, D].

  A token of zeros has similarity 0 to every token, itself included.
  """
  if a.dtype == b.dtype == jnp.bfloat16:
    # Products of two bfloat16 are exact in float32, so the matrix unit's fast
    # path loses nothing; norms are divided out afterwards.
    products = _products(a, b) / _norm(a)[..., :, None]
    products = products / _norm(b)[..., None, :]
  else:
    products = jax.lax.platform_dependent(
      unit(a), unit(b), cuda=split_products, default=_products
    )
  return jnp.clip(products, -1.0, 1.0)


def symmetric_cosine(x: jax.Array) -> jax.Array:
  """Returns float32[..., n, n] of x f[..., n, D], symmetric to the last bit.

  A matrix unit may round x_i . x_j and x_j . x_i differently, which would let
  a graph have an edge in one direction only.
  """
  products = cosine(x, x)
  return jnp.maximum(products, jnp.swapaxes(products, -1, -2))


def split_products(a: jax.Array, b: jax.Array) -> jax.Array:
  """Returns float32[..., n, m] products of rows of norm 1, or 0, in float32.

  Each number is split in two of bfloat16, and the product of the small parts
  left out: an error of 2^-16 of a product at most, and of the many in a row
  most cancels, 1e-7 at the widths of language models. Three products of
  bfloat16 take a quarter of the time that one of float32 takes on a GPU, whose
  matrix unit has none of full precision.
  """
  (a_high, a_low), (b_high, b_low) = _halves(a), _halves(b)
  small = _products(a_high, b_low) + _products(a_low, b_high)
  return small + _products(a_high, b_high)


def _halves(x):
  # A plain cast there and back is simplified away by the compiler.
  high = jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
  return high.astype(jnp.bfloat16), (x - high).astype(jnp.bfloat16)


def _norm(x):
  norm = jnp.linalg.norm(x.astype(jnp.float32), axis=-1)
  return jnp.maximum(norm, _LEAST_NORM)


def _products(a, b):
  return jnp.einsum(
    "...nd,...md->...nm",
    a,
    b,
    precision=jax.lax.Precision.HIGHEST,
    preferred_element_type=jnp.float32,
  )
