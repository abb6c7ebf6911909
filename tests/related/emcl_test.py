"""EMCL against a loop of its published steps, and on planted groups."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.cluster import vq
from sklearn import decomposition

from cacovid_jax import errors
from cacovid_jax.compressors import em
from cacovid_jax.related import emcl, retrieval

SETTINGS = dict(num_bases=6, rounds=4)


def unit(x, axis):
  return x / np.maximum(np.linalg.norm(x, axis=axis, keepdims=True), 1e-6)


def naive(x, bases, lam, rounds, beta):
  """The released steps: x [M, D], bases [M, K]."""
  for _ in range(rounds):
    logits = x.T @ bases / lam
    share = np.exp(logits - logits.max(axis=1, keepdims=True))
    share = share / share.sum(axis=1, keepdims=True)
    weight = share / (1e-6 + share.sum(axis=0))
    bases = unit(x @ weight, axis=0)
  return x + beta * bases @ weight.T, bases


def features(seed, rows=30, width=16):
  return np.random.default_rng(seed).normal(size=(rows, width))


@pytest.mark.parametrize("init", ["released", "random"])
def test_the_released_form_is_its_published_loop(init):
  x, rng = features(0), jax.random.key(3)
  config = emcl.EMCL.released(init=init, lam=2.0, **SETTINGS)
  found, bases = emcl.enhance(config, jnp.float32(x), rng)
  start = np.asarray(emcl._start(config, jnp.float32(x).T, rng, None)).T
  expected = naive(x, start, 2.0, 4, 3.0)
  np.testing.assert_allclose(found, expected[0], atol=1e-4)
  np.testing.assert_allclose(bases, expected[1], atol=1e-4)


def test_the_released_start_is_one_of_two_constants_and_stays_collapsed():
  state = np.asarray(emcl.init_state(jax.random.key(0), 12))
  assert set(np.abs(state)) == {1.0}
  x = jnp.float32(features(1, rows=200, width=64))
  for init, least, most in (("released", 1, 2), ("random", 8, 12)):
    config = emcl.EMCL.released(num_bases=12, init=init)
    found, _ = emcl.enhance(config, x, jax.random.key(1))
    added = np.asarray(found - x, np.float64)
    assert least <= np.linalg.matrix_rank(added, tol=1e-4) <= most
    assert np.linalg.norm(added) < 0.1 * np.linalg.norm(x)
  # A tenth of the rows' mean of the bases goes into the state.
  np.testing.assert_allclose(
    emcl.update(jnp.ones(2), jnp.array([[0.0, 1.0], [1.0, 1.0]])), [0.95, 1.0]
  )


def test_the_corrected_form_is_responsibility_times_projection():
  x, rng = features(2), jax.random.key(4)
  config = emcl.EMCL.corrected(**SETTINGS)
  found, bases = emcl.enhance(config, jnp.float32(x), rng)
  points = unit(x, axis=0)
  start = np.asarray(emcl._start(config, jnp.float32(x).T, rng, None)).T
  expected = start
  for _ in range(4):
    share = np.exp(points.T @ expected / 0.05)
    share = share / share.sum(axis=1, keepdims=True)
    expected = unit(points @ share, axis=0)
  np.testing.assert_allclose(bases, expected, atol=1e-3)
  added = expected @ (share * (x.T @ expected)).T
  np.testing.assert_allclose(found, x + 3 * added, atol=1e-2)
  assert np.linalg.matrix_rank(np.asarray(found) - x, tol=1e-3) <= 6


def test_narrow_bases_are_k_means_of_unit_columns():
  """In the limit of the width, from the same seeds (SciPy)."""
  centres = 2 * features(3, rows=10, width=2)
  group = np.arange(60) % 2
  columns = unit(centres[:, group] + features(11, rows=10, width=60), axis=0)
  start = columns.T[[0, 1]]
  bases = em.fit(jnp.float32(columns.T), jnp.float32(start), lam=1e-3, rounds=9)
  ours = np.argmax(columns.T @ np.asarray(bases).T, axis=1)
  _, label = vq.kmeans2(columns.T, start, iter=9, minit="matrix")
  np.testing.assert_array_equal(ours, label)
  np.testing.assert_array_equal(ours, group)


@pytest.mark.parametrize("form", ["released", "corrected"])
def test_the_gradient_is_that_of_the_identity(form):
  x = jnp.float32(features(4))
  config = getattr(emcl.EMCL, form)(**SETTINGS)
  weight = jnp.float32(features(5))

  def value(x):
    return jnp.sum(weight * emcl.enhance(config, x, jax.random.key(0))[0])

  np.testing.assert_allclose(jax.grad(value)(x), weight)


@pytest.mark.parametrize("form", ["released", "corrected"])
def test_rows_and_dimensions_may_be_reordered(form):
  """Rows of the output follow; a start of its own row aside."""
  config = getattr(emcl.EMCL, form)(**SETTINGS)
  x, rng = jnp.float32(features(6)), jax.random.key(2)
  rows = np.random.default_rng(7).permutation(len(x))
  plain, _ = emcl.enhance(config, x, rng)
  moved, _ = emcl.enhance(config, x[rows], rng)
  np.testing.assert_allclose(moved, plain[rows], atol=1e-4)


def test_the_corrected_form_finds_groups_and_the_released_one_does_nothing():
  """300 pairs of 16 groups; without groups nothing is gained."""
  gains = {}
  for kind in ("groups", "subspace"):
    t, v = emcl.planted(0, kind, 300, 1.6 if kind == "groups" else 0.45, 16)
    for form in ("released", "corrected"):
      config = getattr(emcl.EMCL, form)(num_bases=16)
      both, _ = emcl.enhance(config, jnp.concatenate([t, v]), jax.random.key(0))
      scores = emcl.scores(both[:300], both[300:])
      gains[kind, form] = retrieval.gain(scores, emcl.scores(t, v))
  assert gains["groups", "corrected"].low > 0.1
  assert abs(gains["groups", "released"].mean) < 0.03
  assert gains["subspace", "corrected"].mean <= 0


def test_pca_is_that_of_scikit_learn_and_centring_leaves_no_offset():
  t, v = features(8), features(9) + 1
  known = decomposition.PCA(3).fit(np.concatenate([t, v]))
  found = emcl.principal(jnp.float32(t), jnp.float32(v), 3)
  # Directions may be turned around; the origin is not moved.
  expected = np.abs(t @ known.components_.T)
  np.testing.assert_allclose(np.abs(found[0]), expected, atol=1e-3)
  for one in emcl.centre(jnp.float32(t), jnp.float32(v)):
    np.testing.assert_allclose(one.mean(axis=0), 0, atol=1e-6)


def test_too_many_bases_and_settings_out_of_range_are_one_line():
  config = emcl.EMCL(num_bases=40)
  with pytest.raises(errors.UserError, match="40 bases of 16 dimensions"):
    emcl.enhance(config, jnp.float32(features(0)), jax.random.key(0))
  with pytest.raises(errors.UserError, match="rounds=0"):
    emcl.EMCL(rounds=0)


def test_a_net_scores_every_pair_and_ignores_padding():
  rng = np.random.default_rng(10)
  text = rng.normal(size=(3, 5, 8)), np.arange(5) < [[5], [3], [4]]
  video = rng.normal(size=(4, 6, 8)), np.ones((4, 6), bool)
  key = jax.random.key(0)
  net = emcl.EMCLNet(16, 16, emcl.EMCL.corrected(num_bases=4))
  params = net.init(key, text, video, key)
  cosines, scale = net.apply(params, text, video, key)
  assert cosines.shape == (3, 4) and float(scale) == pytest.approx(1 / 0.07)
  assert np.abs(cosines).max() <= 1 + 1e-5
