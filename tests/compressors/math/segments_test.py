"""Windows of frames, and how their sets share a budget."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cacovid_jax.compressors.math import segments
from tests.compressors import naive, quick

_shares = quick.jit(jax.vmap(segments.shares, in_axes=(0, None)))


@pytest.mark.parametrize("num_keep", [1, 3, 8, 40])
def test_no_set_goes_without(num_keep):
  rng = np.random.default_rng(num_keep)
  sizes = rng.integers(0, 40, [20, 4, 2]) * rng.integers(0, 2, [20, 4, 2])
  sizes[:, 0, 0] = 40
  for own, found in zip(sizes, _shares(sizes, num_keep), strict=True):
    own, found = own.reshape(-1), np.asarray(found).reshape(-1)
    np.testing.assert_array_equal(
      found, naive.shares_of_sets(own.tolist(), num_keep)
    )
    assert (found <= own).all()
    if num_keep >= (own > 0).sum():
      assert (found[own > 0] > 0).all()


def test_windows_by_their_starts():
  first = segments.first_frames(jnp.array([True, False, False, True, True]))
  np.testing.assert_array_equal(first, [0, 0, 0, 3, 4])
  expected = np.zeros([5, 5], bool)
  expected[0, :3] = expected[3, 3] = expected[4, 4] = True
  np.testing.assert_array_equal(segments.together(first), expected)


def test_static_tokens_of_a_window_become_one():
  frames = jnp.arange(12.0).reshape(3, 2, 2)
  static = jnp.array([[True, False], [True, False], [False, False]])
  found = segments.sets(frames, static, jnp.array([0, 0, 2]))
  np.testing.assert_array_equal(
    found.kind,
    [
      [segments.STATIC, segments.DYNAMIC],
      [segments.NOWHERE, segments.DYNAMIC],
      [segments.DYNAMIC, segments.DYNAMIC],
    ],
  )
  np.testing.assert_array_equal(found.home, [[0, 1], [0, 3], [4, 5]])
  np.testing.assert_array_equal(found.sizes, [[1, 1], [0, 1], [0, 2]])
  np.testing.assert_allclose(found.tokens[0, 0], [2.0, 3.0])
  np.testing.assert_array_equal(found.tokens[1:, 1], frames[1:, 1])
