"""Feature maps of the decoder's layers are merged with the features' weights.

Maps of zeros and ones show the weights: features are to be their sums.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cacovid_jax import compressors
from cacovid_jax.compressors import framefusion, simple
from tests.compressors import all_methods_test, given, layerwise_test, quick

GRID, N = all_methods_test.GRID, all_methods_test.NUM_VIDEO
WIDTH, KEEP = all_methods_test.WIDTH, all_methods_test.KEEP
OPTIONS = (
  ("dyto", {"reduce": "mean"}),
  ("floc", {"merge": "nearest"}),
  ("scissor", {"mode": "bisect"}),
  ("visionzip", {"contextual_reduce": "mean"}),
  ("vqtoken", {"codes": "unit"}),
)
METHODS = [(name, {}) for name in all_methods_test.BEFORE if name != "dyto"]


def video():
  """Returns float32[N, D], of which neighbours in time are partly alike."""
  rng = np.random.default_rng(0)
  frame = rng.standard_normal((N // GRID[0], WIDTH))
  noise = rng.standard_normal((N, WIDTH)) * rng.choice([0.1, 1.0], (N, 1))
  return (np.tile(frame, (GRID[0], 1)) + noise).astype(np.float32)


def selected(method, features, deep, num_keep=KEEP):
  """Returns the selections without and with feature maps."""
  parts = all_methods_test.arguments()
  text, aux, rng = (parts[name] for name in ("text", "aux", "rng"))
  inputs = given.inputs(jnp.asarray(features), GRID, aux, text, rng)

  @quick.jit
  def select(inputs):
    return method.select(inputs, num_keep=num_keep, ratio=num_keep / N)

  return select(inputs), select(dataclasses.replace(inputs, deep=deep))


@pytest.mark.parametrize("name,options", METHODS + list(OPTIONS))
def test_weights_are_those_of_the_features(name, options):
  features, method = video(), compressors.get(name, **options)
  ones = np.eye(N, dtype=np.float32).reshape(N, -1, WIDTH).swapaxes(0, 1)
  plain, found = selected(method, features, jnp.asarray(ones))
  np.testing.assert_array_equal(found.index, plain.index)
  np.testing.assert_allclose(found.features, plain.features, rtol=1e-5)
  weights = np.swapaxes(found.deep, 0, 1).reshape(KEEP, N)
  assert weights.min() >= 0
  np.testing.assert_allclose(weights @ features, plain.features, atol=1e-5)
  rows = np.flatnonzero(np.asarray(found.mask))
  assert (weights[rows].sum(axis=1) > 0).all()


def test_the_largest_value_of_a_channel_brings_that_of_its_map():
  features, method = video(), compressors.get("dyto")
  deep = jnp.stack([features, 2 * features + 1])
  plain, found = selected(method, features, deep)
  np.testing.assert_array_equal(found.deep[0], plain.features)
  np.testing.assert_allclose(found.deep[1], 2 * plain.features + 1, rtol=1e-6)


def test_soft_means_by_their_definition():
  """Responsibilities of every token, in NumPy, from the bases of `em.fit`."""
  features, method = video(), compressors.get("em", rounds=2)
  rng = np.random.default_rng(1)
  deep = rng.standard_normal((2, N, WIDTH)).astype(np.float32)
  _, found = selected(method, features, jnp.asarray(deep))
  x = features / np.linalg.norm(features, axis=1, keepdims=True)
  bases = x[simple.even_positions(N, KEEP)].astype(np.float64)

  def shares(bases):
    z = np.exp((x @ bases.T - 1) / method.lam)
    return z / z.sum(axis=1, keepdims=True)

  for _ in range(2):
    bases = shares(bases).T @ x
    bases /= np.linalg.norm(bases, axis=1, keepdims=True)
  share = shares(bases)
  means = [share.T @ y / share.sum(axis=0)[:, None] for y in (features, *deep)]
  # Rows in the order of their places, which means do not tell.
  near = np.linalg.norm(found.features[:, None] - means[0], axis=-1)
  order = near.argmin(axis=1)
  assert sorted(order) == list(range(KEEP))
  np.testing.assert_allclose(found.features, means[0][order], atol=1e-4)
  for own, mean in zip(found.deep, means[1:], strict=True):
    np.testing.assert_allclose(own, mean[order], atol=1e-4)


def test_merging_inside_the_language_model_merges_what_is_added_later():
  """Maps are a linear function of the rows, before and after a stage."""
  features, layers = video(), layerwise_test.LAYERS
  stages = framefusion._Stages(
    compressors.get("framefusion"), GRID, layers, int(0.5 * layers * N),
    layers - 1,
  )  # fmt: skip
  rows = layerwise_test.whole(
    jnp.pad(jnp.asarray(features), [(2, 1), (0, 0)])[None],
    jnp.zeros((1, 1, N + 3), jnp.int32), [N + 3], [2], N,
  )  # fmt: skip
  turn = jax.random.normal(jax.random.key(0), (2, WIDTH, WIDTH))
  rows = rows._replace(deep=(features @ turn)[None])
  step = quick.jit(lambda rows: framefusion._stage(
    stages, rows, framefusion._start(rows), None, 0
  )[0])  # fmt: skip
  found = step(rows)
  count = int(found.count[0])
  kept = found.x[0, 2 : 2 + count]
  assert 0 < count < N
  changed = (kept != features[found.index[0, :count]]).any(axis=1)
  assert changed.any()
  deep = found.deep[0, :, :count]
  np.testing.assert_allclose(deep, kept @ turn, rtol=1e-4, atol=1e-5)
