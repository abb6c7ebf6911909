"""Cosines against float64, with zeros and in half precision."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cacovid_jax.compressors import cosine
from tests.compressors import selections


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_cosines_are_exact_for_the_rows_given(dtype):
  rng = np.random.default_rng(0)
  x = jnp.asarray(50 * rng.normal(size=(2, 7, 96)), dtype).at[1, 3].set(0)
  y = jnp.asarray(rng.normal(size=(2, 4, 96)), dtype)
  for other in (y, None):
    second = x if other is None else other
    expected = selections.unit(x) @ np.swapaxes(selections.unit(second), 1, 2)
    out = cosine.matrix(x, other)
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, expected, atol=5e-7)


def test_zeros_resemble_nothing():
  x = jnp.zeros([3, 4]).at[0].set(1.0)
  np.testing.assert_allclose(
    cosine.matrix(x), [[1, 0, 0], [0, 0, 0], [0, 0, 0]], atol=1e-6
  )


def test_half_precision_products_are_not_upcast():
  # A product of float32 copies would be several times slower.
  x = jax.ShapeDtypeStruct([6, 8], jnp.bfloat16)
  (dot,) = [
    e
    for e in jax.make_jaxpr(lambda x: cosine.dot(x, x.T))(x).jaxpr.eqns
    if e.primitive.name == "dot_general"
  ]
  assert {v.aval.dtype for v in dot.invars} == {jnp.bfloat16.dtype}
  assert dot.outvars[0].aval.dtype == jnp.float32
