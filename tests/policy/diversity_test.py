"""Density peaks against the rule written as NumPy loops."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cacovid_jax.policy import diversity

peaks = functools.partial(jax.jit, static_argnums=1)(diversity.density_peaks)


def peaks_by_a_loop(z, num_keep):
  """The rule of METHOD.md 2.2, word by word, in float64."""
  z = np.asarray(z, np.float64)
  n, width = z.shape
  distance = np.zeros((n, n))
  for i in range(n):
    for j in range(n):
      distance[i, j] = np.linalg.norm(z[i] - z[j]) / np.sqrt(width)
  density = np.exp(-np.sort(distance**2, axis=-1)[:, :4].mean(axis=-1))
  score = np.zeros(n)
  for i in range(n):
    denser = distance[i, density > density[i]]
    score[i] = density[i] * (denser.min() if len(denser) else distance.max())
  return np.sort(np.argsort(-score)[:num_keep])


@pytest.mark.parametrize(("n", "width"), [(2, 3), (3, 1), (25, 8), (49, 16)])
def test_equals_a_loop(n, width):
  rng = np.random.default_rng(n)
  z = rng.standard_normal((n, width)).astype(np.float32) + 3.0
  for num_keep in {n // 2, n}:
    index = peaks(jnp.asarray(z), num_keep)
    np.testing.assert_array_equal(index, peaks_by_a_loop(z, num_keep))


def test_one_token_is_kept():
  index = peaks(jnp.ones((1, 4)), 1, jax.random.key(0))
  np.testing.assert_array_equal(index, [0])


def test_keeps_one_token_of_every_cluster():
  rng = np.random.default_rng(0)
  centres = 10.0 * np.eye(4, 6)
  z = np.repeat(centres, 5, axis=0) + 0.1 * rng.standard_normal((20, 6))
  index = peaks(jnp.asarray(z, jnp.float32), 4)
  np.testing.assert_array_equal(np.asarray(index) // 5, [0, 1, 2, 3])


def test_a_common_shift_far_from_zero_changes_nothing():
  z = jax.random.normal(jax.random.key(0), (30, 8))
  near = peaks(z, 7)
  far = peaks(z + 300.0, 7)
  np.testing.assert_array_equal(near, far)


def test_noise_decides_between_equal_tokens_only():
  z = jnp.eye(16)  # All distances, hence all densities, are equal.
  drawn = {tuple(peaks(z, 1, jax.random.key(i)).tolist()) for i in range(8)}
  assert len(drawn) > 1
  z = jax.random.normal(jax.random.key(0), (30, 8))
  np.testing.assert_array_equal(peaks(z, 7, jax.random.key(1)), peaks(z, 7))


def test_vmap_equals_a_loop_and_half_precision_is_taken():
  z = jax.random.normal(jax.random.key(0), (3, 20, 8)).astype(jnp.bfloat16)
  rule = lambda z: peaks(z, 5)  # noqa: E731
  batched = jax.vmap(rule)(z)
  for i in range(3):
    np.testing.assert_array_equal(batched[i], rule(z[i]))


# Tokens of different videos in one program.


@functools.partial(jax.jit, static_argnums=1)
def masked_peaks(z, num_keep, valid, num_valid):
  return diversity.density_peaks(z, num_keep, valid=valid, num_valid=num_valid)


@pytest.mark.parametrize("filler", [0.0, 1e4, np.nan])
def test_padding_has_no_influence(filler):
  rng = np.random.default_rng(0)
  for n, num_keep in [
    (1, 1),
    (2, 1),
    (3, 2),
    (4, 2),
    (11, 4),
    (20, 8),
    (24, 8),
  ]:
    z = rng.standard_normal((24, 6)).astype(np.float32) + 3.0
    z[n:] = filler
    index = masked_peaks(z, 8, np.arange(24) < n, num_keep)
    expected = peaks_by_a_loop(z[:n], num_keep)
    np.testing.assert_array_equal(index[:num_keep], expected)
    np.testing.assert_array_equal(index[num_keep:], 24)


def test_valid_tokens_may_lie_anywhere():
  z = np.random.default_rng(1).standard_normal((20, 4)).astype(np.float32)
  valid = np.random.default_rng(2).random(20) < 0.6
  index = masked_peaks(z, 5, valid, 5)
  expected = np.flatnonzero(valid)[peaks_by_a_loop(z[valid], 5)]
  np.testing.assert_array_equal(index, expected)
