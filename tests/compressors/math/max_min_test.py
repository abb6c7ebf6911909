"""The loop of max-min diversity: kernel (interpreted), loop and definition."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cacovid_jax.compressors.math import max_min
from tests.compressors import quick, selections

kernel = quick.jit(
  functools.partial(max_min.max_min_picks, interpret=True), static_argnums=2
)


@functools.partial(quick.jit, static_argnums=2)
def loop(distances, first, num_keep):
  return max_min.max_min_loop(
    lambda item: distances[item], first, len(distances), num_keep
  )


def naive(distances, first, num_keep):
  picked = [first]
  while len(picked) < num_keep:
    rest = [i for i in range(len(distances)) if i not in picked]
    picked.append(max(rest, key=lambda i: min(distances[j][i] for j in picked)))
  return picked


# One below, on and above a power of two, and single items.
@pytest.mark.parametrize(
  "num_items,num_keep", [(1, 1), (2, 2), (31, 12), (32, 32), (33, 20), (37, 1)]
)
def test_kernel_and_loop_pick_by_definition(num_items, num_keep):
  rng = np.random.default_rng(num_items)
  distances = rng.uniform(0, 2, [num_items, num_items]).astype(np.float32)
  first = num_items // 2
  expected = naive(distances, first, num_keep)
  args = jnp.asarray(distances), jnp.int32(first), num_keep
  np.testing.assert_array_equal(kernel(*args), expected)
  np.testing.assert_array_equal(loop(*args), expected)


@pytest.mark.parametrize("distance", [0.0, 1.0, -1e-7])
def test_equal_distances_go_to_the_first_item(distance):
  distances = jnp.full([33, 33], distance)
  expected = [5, 0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18]
  args = distances, jnp.int32(5), 19
  np.testing.assert_array_equal(kernel(*args), expected)
  np.testing.assert_array_equal(loop(*args), expected)


def test_few_levels_of_distance_make_many_ties():
  rng = np.random.default_rng(0)
  distances = rng.integers(0, 3, [33, 33]).astype(np.float32)
  args = jnp.asarray(distances), jnp.int32(0), 20
  np.testing.assert_array_equal(kernel(*args), loop(*args))
  assert len(set(np.asarray(kernel(*args)).tolist())) == 20


def test_a_batch_of_kernels_is_each_of_them():
  rng = np.random.default_rng(1)
  distances = jnp.asarray(rng.uniform(0, 2, [3, 33, 33]), jnp.float32)
  first = jnp.array([3, 0, 32], jnp.int32)
  together = jax.vmap(lambda d, i: kernel(d, i, 9))(distances, first)
  for d, i, picks in zip(distances, first, together, strict=True):
    np.testing.assert_array_equal(picks, naive(np.asarray(d), int(i), 9))


@pytest.mark.parametrize("batched", [False, True])
def test_other_platforms_get_the_loop(batched):
  def picks(distances, first):
    return max_min.max_min(distances, first, 5)

  shapes = [[33, 33], []]
  if batched:
    picks, shapes = jax.vmap(picks), [[2, 33, 33], [2]]
  args = [
    jax.ShapeDtypeStruct(shape, dtype)
    for shape, dtype in zip(shapes, [jnp.float32, jnp.int32], strict=True)
  ]
  for platform in ["cpu", "tpu"]:
    program = (
      quick.jit(picks).trace(*args).lower(lowering_platforms=(platform,))
    )
    text = program.as_text()
    assert "stablehlo.while" in text
    assert "triton" not in text


def test_divprune_with_the_kernel_is_that_without(monkeypatch):
  def pick(features):
    return max_min.max_min_subset(features, num_keep=11)

  videos = [selections.video(k) for k in [*selections.KINDS, "scenes"]]
  without = quick.jit(lambda x: pick(x))
  expected = [without(x) for x in videos]
  monkeypatch.setattr(
    jax.lax, "platform_dependent", lambda *args, cuda, default: cuda(*args)
  )
  monkeypatch.setattr(
    max_min,
    "max_min_picks",
    functools.partial(max_min.max_min_picks, interpret=True),
  )
  with_kernel = quick.jit(lambda x: pick(x))
  for features, picks in zip(videos, expected, strict=True):
    np.testing.assert_array_equal(with_kernel(features), picks)
