"""Cosines against float64, in every way that they are computed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cacovid_jax.compressors.math import similarity
from tests.compressors import naive, quick, selections


def tokens(seed, dtype=jnp.float32, scale=1.0):
  x = np.random.default_rng(seed).normal(size=[2, 40, 96]) + 0.5
  x[0, 3] = 0.0
  x[1, 5] = x[1, 4]
  return jnp.asarray(scale * x, dtype)


def exact(x, y):
  return selections.unit(x) @ np.swapaxes(selections.unit(y), -1, -2)


_between = quick.jit(similarity.between, static_argnames="split")


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_cosines_equal_float64_whatever_the_type(dtype, split):
  x, y = tokens(0, dtype, scale=50.0), tokens(1, dtype)[:, :7]
  for other in (y, None):
    found = _between(x, other, split=split)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(
      found, exact(x, x if other is None else other), atol=5e-7
    )
    assert np.abs(found).max() <= 1.0


def test_zeros_resemble_nothing():
  x = jnp.zeros([3, 4]).at[0].set(1.0)
  one = [[1, 0, 0], [0, 0, 0], [0, 0, 0]]
  np.testing.assert_allclose(_between(x), one, atol=1e-6)
  np.testing.assert_array_equal(similarity.unit(x)[1:], 0.0)
  np.testing.assert_array_equal(similarity.adjacent(x), [0.0, 0.0])


def test_unit_has_norm_one_and_the_direction():
  x = tokens(6, scale=1e-3)
  found = similarity.unit(x)
  np.testing.assert_allclose(found, selections.unit(x), atol=5e-7)
  np.testing.assert_allclose(
    x * similarity.inverse_norm(x)[..., None], found, atol=5e-7
  )


def test_neighbours_equal_a_loop():
  x = tokens(7)
  found = similarity.adjacent(x)
  assert found.shape == (1, 40)
  for p in range(40):
    np.testing.assert_allclose(
      found[0, p], naive.cosine(x[0, p], x[1, p]), atol=5e-7
    )
  # A single frame has no neighbours.
  assert similarity.adjacent(x[:1]).shape == (0, 40)


def test_products_of_split_numbers_are_as_good_as_float32():
  a, b = (similarity.unit(tokens(seed)) for seed in (2, 3))
  b = jnp.swapaxes(b, -1, -2)
  expected = np.asarray(a, np.float64) @ np.asarray(b, np.float64)
  found = quick.jit(similarity.split_dot)(a, b)
  # 2^-16 / sqrt(96), the standard error of a row of 96, is 1.6e-6.
  np.testing.assert_allclose(found, expected, atol=3e-6)
  # One product of bfloat16 is not.
  rounded = a.astype(jnp.bfloat16).astype(jnp.float32)
  assert np.abs(np.asarray(rounded @ b) - expected).max() > 1e-5


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_products_are_not_upcast(dtype):
  # A product of float32 copies would be several times slower.
  x = jax.ShapeDtypeStruct([6, 8], dtype)
  (dot,) = [
    e
    for e in jax.make_jaxpr(lambda x: similarity.dot(x, x.T))(x).jaxpr.eqns
    if e.primitive.name == "dot_general"
  ]
  assert {v.aval.dtype for v in dot.invars} == {x.dtype}
  assert dot.outvars[0].aval.dtype == jnp.float32


def test_symmetric_to_the_last_bit():
  x = tokens(4)
  found = np.asarray(quick.jit(similarity.symmetric)(x))
  np.testing.assert_array_equal(found, found.swapaxes(-1, -2))
  np.testing.assert_allclose(found, exact(x, x), atol=5e-7)


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_split_products_are_for_nvidia_gpus(platform):
  for function, split in (
    (similarity.symmetric, True),
    (similarity.between, False),
  ):
    traced = quick.jit(function).trace(tokens(5))
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert ("bf16" in text) == (split and platform == "cuda")


def test_settled_numbers_are_near_and_few():
  x = jnp.linspace(-1.0, 1.0, 1001)
  found = np.asarray(similarity.settled(x))
  np.testing.assert_allclose(found, x, atol=2**-17)
  np.testing.assert_array_equal(found * 2**16, np.round(found * 2**16))
  assert similarity.settled(0.3 + 1e-7) == similarity.settled(0.3)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_pooled_sums_the_tokens_of_each_group(dtype):
  x = tokens(8, dtype)
  # Tokens may belong to several groups or none; the last group is empty.
  member = np.random.default_rng(8).random([2, 5, 40]) < 0.3
  member[:, 4] = False
  found = similarity.pooled(x, jnp.asarray(member))
  assert found.dtype == jnp.float32
  expected = member.astype(np.float64) @ np.asarray(x, np.float64)
  np.testing.assert_allclose(found, expected, atol=1e-5)
