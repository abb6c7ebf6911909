"""Cosines against float64, in every way that they are computed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cacovid_jax.compressors import directions


def tokens(seed, dtype=jnp.float32):
  x = np.random.default_rng(seed).normal(size=[2, 40, 96]) + 0.5
  x[0, 3] = 0.0
  x[1, 5] = x[1, 4]
  return jnp.asarray(x, dtype)


def exact(a, b):
  a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
  norm = np.linalg.norm(a, axis=-1)[..., None]
  norm = norm * np.linalg.norm(b, axis=-1)[..., None, :]
  product = a @ b.swapaxes(-1, -2)
  return np.divide(product, norm, out=np.zeros_like(product), where=norm > 0)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_cosines_equal_float64_and_zeros_are_similar_to_nothing(dtype):
  a, b = tokens(0, dtype), tokens(1, dtype)
  found = jax.jit(directions.cosine)(a, b)
  assert found.dtype == jnp.float32
  np.testing.assert_allclose(found, exact(a, b), atol=1e-6)
  assert not np.any(found[0, 3]) and np.abs(found).max() <= 1.0


def test_products_of_split_numbers_are_as_good_as_float32():
  a, b = (directions.unit(tokens(seed)) for seed in (2, 3))
  expected = np.asarray(a, np.float64) @ np.asarray(b, np.float64).swapaxes(
    -1, -2
  )
  found = jax.jit(directions.split_products)(a, b)
  # 2^-16 / sqrt(96), the standard error of a row of 96, is 1.6e-6.
  np.testing.assert_allclose(found, expected, atol=3e-6)
  # One product of bfloat16 is not.
  rounded = a.astype(jnp.bfloat16).astype(jnp.float32)
  assert (
    np.abs(np.asarray(rounded @ b.swapaxes(-1, -2)) - expected).max() > 1e-5
  )


def test_symmetric_to_the_last_bit():
  found = np.asarray(jax.jit(directions.symmetric_cosine)(tokens(4)))
  np.testing.assert_array_equal(found, found.swapaxes(-1, -2))


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_lowers_for_accelerators(platform):
  traced = jax.jit(directions.symmetric_cosine).trace(tokens(5))
  text = traced.lower(lowering_platforms=(platform,)).as_text()
  assert ("bf16" in text) == (platform == "cuda")
