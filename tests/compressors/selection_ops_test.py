"""Ranks, and rows collected from marks."""

import jax.numpy as jnp
import numpy as np

from cacovid_jax.compressors import selection_ops
from tests.compressors import naive


def test_rank_counts_what_comes_before():
  np.testing.assert_array_equal(
    selection_ops.rank(jnp.array([[2.0, 5.0, 2.0, 7.0], [0.0, 0.0, 0.0, 0.0]])),
    [[2, 1, 3, 0], [0, 1, 2, 3]],
  )


def test_rank_leaves_out_what_is_not_there():
  values = jnp.array([2.0, 5.0, -jnp.inf, 7.0])
  valid = jnp.array([True, False, True, True])
  np.testing.assert_array_equal(selection_ops.rank(values, valid), [1, 4, 2, 0])


def test_before_is_a_total_order():
  values = jnp.array([2.0, 5.0, 2.0])
  np.testing.assert_array_equal(
    selection_ops.before(values), [[0, 1, 0], [0, 0, 0], [1, 1, 0]]
  )


def test_collect_takes_marked_tokens_and_remembers_who_joined():
  values = jnp.arange(12.0).reshape(6, 2)
  into = jnp.array([[4, 1, 6, 1, 4, 5]])
  out = selection_ops.collect(values[None], into, 4, values.dtype)
  naive.check_valid(out, 6, 3)
  np.testing.assert_array_equal(out.index, [1, 4, 5, 6])
  np.testing.assert_array_equal(out.features[:3], values[jnp.array([1, 4, 5])])
  np.testing.assert_array_equal(out.assign, [1, 0, -1, 0, 1, 2])
  np.testing.assert_array_equal(out.mass, [2, 2, 1, 0])


def test_anchored_leaves_lonely_tokens_alone():
  out = selection_ops.anchored(
    jnp.array([[10.0], [3.0]]),
    jnp.array([[9.0], [1.0], [3.0]]),
    jnp.array([-1, 0, 0]),
    0.6,
  )
  np.testing.assert_allclose(out, [[0.6 * 10 + 0.4 * 2], [3.0]], rtol=1e-6)


def test_ranks_are_those_of_every_pair_compared():
  rng = np.random.default_rng(0)
  draws = rng.integers(-3, 4, (40, 9)).astype(np.float32)
  draws[draws == 3], draws[draws == -3] = -np.inf, -0.0
  there = rng.random(draws.shape) < 0.7

  def compared(values, there):
    return [
      sum(
        there[j] and (values[j] > own or (values[j] == own and j < i))
        for j in range(len(values))
      )
      if there[i]
      else len(values)
      for i, own in enumerate(values)
    ]

  every = np.ones_like(there)
  expected = [compared(*pair) for pair in zip(draws, every, strict=True)]
  np.testing.assert_array_equal(selection_ops.rank(draws), expected)
  expected = [compared(*pair) for pair in zip(draws, there, strict=True)]
  np.testing.assert_array_equal(selection_ops.rank(draws, there), expected)
