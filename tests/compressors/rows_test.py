"""Ranks, shares of a budget, and rows collected from marks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cacovid_jax.compressors import rows
from tests.compressors import naive


def test_rank_counts_what_comes_before():
  np.testing.assert_array_equal(
    rows.rank(jnp.array([[2.0, 5.0, 2.0, 7.0], [0.0, 0.0, 0.0, 0.0]])),
    [[2, 1, 3, 0], [0, 1, 2, 3]],
  )


def test_rank_leaves_out_what_is_not_there():
  values = jnp.array([2.0, 5.0, -jnp.inf, 7.0])
  valid = jnp.array([True, False, True, True])
  np.testing.assert_array_equal(rows.rank(values, valid), [1, 4, 2, 0])


_apportion = jax.jit(rows.apportion)


@pytest.mark.parametrize("seed", range(40))
def test_shares_equal_largest_remainder(seed):
  rng = np.random.default_rng(seed)
  most = rng.integers(0, 30, 8)
  most[0] += 1
  weights = [most, rng.random(8) + 0.01, rng.random(8) ** 8 + 1e-3][seed % 3]
  for total in {0, 1, int(most.sum()) // 3, int(most.sum()) - 1, most.sum()}:
    found = _apportion(total, jnp.asarray(weights), most)
    np.testing.assert_array_equal(
      found, naive.apportion(int(total), weights.tolist(), most.tolist())
    )


@pytest.mark.parametrize("seed", range(20))
def test_no_set_goes_without(seed):
  rng = np.random.default_rng(seed)
  sizes = rng.integers(0, 40, 8) * rng.integers(0, 2, 8)
  sizes[seed % 8] = 1
  for total in {1, 3, 8, int(sizes.sum()) // 2, int(sizes.sum())}:
    if total > sizes.sum():
      continue
    found = np.asarray(_apportion(total, sizes, sizes, sizes > 0))
    np.testing.assert_array_equal(
      found, naive.shares_of_sets(sizes.tolist(), int(total))
    )
    assert (found <= sizes).all()
    if total >= (sizes > 0).sum():
      assert (found[sizes > 0] > 0).all()


def test_equal_remainders_go_to_the_first():
  most = jnp.full(4, 9)
  np.testing.assert_array_equal(_apportion(6, jnp.ones(4), most), [2, 2, 1, 1])


def test_a_share_at_its_limit_leaves_the_rest_to_the_others():
  found = _apportion(10, jnp.array([100.0, 1.0, 1.0]), jnp.array([4, 9, 9]))
  np.testing.assert_array_equal(found, [4, 3, 3])


def test_collect_takes_marked_tokens_and_remembers_who_joined():
  values = jnp.arange(12.0).reshape(6, 2)
  kept = jnp.array([False, True, False, False, True, True])
  into = jnp.array([4, 1, 6, 1, 4, 5])
  out = rows.collect(values, kept, into, 4)
  naive.check_valid(out, 6, 3)
  np.testing.assert_array_equal(out.index, [1, 4, 5, 6])
  np.testing.assert_array_equal(out.features[:3], values[jnp.array([1, 4, 5])])
  np.testing.assert_array_equal(out.assign, [1, 0, -1, 0, 1, 2])
  np.testing.assert_array_equal(out.mass, [2, 2, 1, 0])


def test_anchored_leaves_lonely_tokens_alone():
  out = rows.anchored(
    jnp.array([[10.0], [3.0]]),
    jnp.array([[4.0], [0.0]]),
    jnp.array([2, 0]),
    0.6,
  )
  np.testing.assert_allclose(out, [[0.6 * 10 + 0.4 * 2], [3.0]], rtol=1e-6)
