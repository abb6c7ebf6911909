"""What every selection has to satisfy, and small videos to make them from."""

import chex
import jax
import jax.numpy as jnp
import numpy as np

from tests.compressors import given, quick

GRID = (5, 2, 3)
NUM_VIDEO = 30
WIDTH = 8
KINDS = ("random", "zeros", "identical_frames", "identical_tokens", "one_zero")


def check_lowers_for_tpu(compressor, num_keep, aux=None, grid=GRID):
  """Asserts that the program can be made for a TPU, on any machine."""
  quick.jit(
    lambda features, aux: given.compress(
      compressor, features, grid=grid, num_keep=num_keep, aux=aux
    )
  ).trace(video("random", grid=grid), aux).lower(lowering_platforms=("tpu",))


def check(out, num_video, num_keep):
  """Asserts the contract of a selection with an exact budget."""
  index, assign = np.asarray(out.index), np.asarray(out.assign)
  assert index.shape == (num_keep,) and index.dtype == np.int32
  assert np.all(np.diff(index) > 0)
  assert 0 <= index[0] and index[-1] < num_video
  assert np.asarray(out.mask).all()
  assert np.isfinite(np.asarray(out.features, np.float32)).all()
  assert assign.shape == (num_video,) and assign.dtype == np.int32
  assert -1 <= assign.min() and assign.max() < num_keep
  # A row stands for its own token at least.
  np.testing.assert_array_equal(assign[index], np.arange(num_keep))
  np.testing.assert_array_equal(
    out.mass, np.bincount(assign[assign >= 0], minlength=num_keep)
  )


def video(kind, seed=0, grid=GRID):
  """Returns float32[N, D] tokens; kinds are `KINDS` and "scenes"."""
  T, H, W = grid
  P = H * W
  rng = np.random.default_rng(seed)
  x = rng.normal(size=(T, P, WIDTH)).astype(np.float32)
  if kind == "zeros":
    x[:] = 0
  elif kind == "identical_frames":
    x[:] = x[0]
  elif kind == "identical_tokens":
    x[:] = 1
  elif kind == "one_zero":
    x[T // 2, P // 2] = 0
  elif kind == "scenes":
    # Two shots of few kinds of tokens; within a shot little changes.
    kinds = rng.normal(size=(2, 3, WIDTH))
    which = rng.integers(3, size=(2, P))
    for t in range(T):
      shot = int(2 * t >= T)
      x[t] = kinds[shot, which[shot]] + 0.1 * rng.normal(size=(P, WIDTH))
      x[t, 0] = rng.normal(size=WIDTH)
  return jnp.asarray(x.reshape(-1, WIDTH))


def check_batch_and_compilations(compressor, num_keep, aux_of=None, grid=GRID):
  """Asserts that 8 videos by vmap are 8 single runs of one program."""
  aux_of = aux_of or (lambda seed: None)

  def one(features, aux):
    return given.compress(
      compressor, features, grid=grid, num_keep=num_keep, aux=aux
    )

  kinds = ["random", "scenes", "identical_frames", "zeros"] * 2
  inputs = [(video(k, i, grid), aux_of(i)) for i, k in enumerate(kinds)]
  single = quick.jit(one)
  alone = [single(*each) for each in inputs]
  assert single._cache_size() == 1
  batch = jax.tree.map(lambda *x: jnp.stack(x), *inputs)
  together = quick.jit(jax.vmap(one))(*batch)
  for i, out in enumerate(alone):
    found = jax.tree.map(lambda leaf, i=i: leaf[i], together)
    chex.assert_trees_all_close(found, out, rtol=1e-5, atol=1e-5)


def unit(x):
  """Returns float64 rows of length one; zeros stay zeros."""
  x = np.asarray(x, np.float64)
  return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-6)
