"""What mergers promise on degenerate videos and in batches.

`all_methods_test` checks the interface; here are more videos, and variants.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cacovid_jax import compressors
from tests.compressors import given, quick

GRID = (5, 2, 3)
NUM_VIDEO = 30
MERGERS = ["scissor", "dyto", "em", "vqtoken"]
VARIANTS = [*MERGERS, "scissor?mode=bisect", "dyto?reduce=mean"]


def features_of(seed, grid=GRID, width=8):
  return jax.random.normal(jax.random.key(seed), [math.prod(grid), width])


@functools.cache
def program(spec, num_keep, grid=GRID):
  compressor = compressors.get(spec)

  def compress(features, rng):
    return given.compress(
      compressor, features, grid=grid, num_keep=num_keep, rng=rng
    )

  return quick.jit(compress)


def run(spec, features, num_keep, grid=GRID, seed=0):
  return program(spec, num_keep, grid)(features, jax.random.key(seed))


def degenerate(kind):
  frame = jax.random.normal(jax.random.key(4), [6, 8])
  return {
    "random": features_of(1),
    "zeros": jnp.zeros([30, 8]),
    "identical_frames": jnp.tile(frame, [5, 1]),
    "identical_tokens": jnp.ones([30, 8]),
    "one_zero": features_of(5).at[3].set(0.0),
    "zero_frames": features_of(6).at[6:18].set(0.0),
    "tiny_norms": features_of(7) * 1e-8,
    "opposite": jnp.concatenate([features_of(8)[:15], -features_of(8)[:15]]),
  }[kind]


KINDS = [
  "random", "zeros", "identical_frames", "identical_tokens", "one_zero",
  "zero_frames", "tiny_norms", "opposite",
]  # fmt: skip


def check(out, num_keep, num_video=NUM_VIDEO):
  """Asserts the contract of a selection of exactly K merged rows."""
  index, assign = np.asarray(out.index), np.asarray(out.assign)
  assert index.shape == (num_keep,) and index.dtype == np.int32
  assert np.all(np.diff(index) > 0)
  assert 0 <= index[0] and index[-1] < num_video
  assert np.asarray(out.mask).all()
  assert assign.min() >= -1 and assign.max() < num_keep
  mass = np.asarray(out.mass)
  assert mass.min() >= 0
  assert mass.sum() == pytest.approx(np.sum(assign >= 0), rel=1e-5)
  assert np.isfinite(np.asarray(out.features, np.float32)).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spec", VARIANTS)
def test_keeps_exactly_k_rows_in_order_and_loses_no_mass(spec, kind):
  out = run(spec, degenerate(kind), 7)
  check(out, 7)
  if not spec.startswith("dyto"):  # Whole frames may be left out there.
    assert np.asarray(out.assign).min() >= 0
  assert program(spec, 7, GRID)._cache_size() == 1


@pytest.mark.parametrize("spec", MERGERS)
def test_all_but_one_token_of_one_frame_of_an_odd_size(spec):
  check(run(spec, features_of(3, (1, 3, 3)), 8, grid=(1, 3, 3)), 8, 9)


@pytest.mark.parametrize("spec", MERGERS)
def test_a_batch_of_eight_equals_eight_videos(spec):
  videos = jnp.stack(
    [degenerate(kind) for kind in KINDS[:5]]
    + [features_of(seed) for seed in (20, 21, 22)]
  )
  keys = jax.random.split(jax.random.key(0), 8)
  batched = quick.jit(jax.vmap(program(spec, 7, GRID).__wrapped__))(
    videos, keys
  )
  for i in range(8):
    single = program(spec, 7, GRID)(videos[i], keys[i])
    np.testing.assert_array_equal(batched.index[i], single.index)
    np.testing.assert_array_equal(batched.assign[i], single.assign)
    np.testing.assert_allclose(
      batched.features[i], single.features, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("spec", MERGERS)
def test_the_same_key_gives_the_same_rows(spec):
  first, again = (run(spec, features_of(9), 7, seed=3) for _ in range(2))
  np.testing.assert_array_equal(first.features, again.features)


def test_none_of_them_looks_at_the_question():
  for spec in VARIANTS:
    assert compressors.get(spec).requirements == ()
  assert [s for s in VARIANTS if compressors.get(s).stochastic] == ["vqtoken"]


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
@pytest.mark.parametrize("spec", VARIANTS)
def test_lowers_for_accelerators_at_real_sizes(spec, platform):
  grid, num_keep = (32, 14, 14), 1568
  traced = program(spec, num_keep, grid).trace(
    jax.ShapeDtypeStruct([32 * 196, 3584], jnp.bfloat16), jax.random.key(0)
  )
  text = traced.lower(lowering_platforms=(platform,)).as_text()
  assert "tensor<1568x3584xbf16>" in text
