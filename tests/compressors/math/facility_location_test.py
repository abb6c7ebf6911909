"""Picks of a block: kernel (interpreted), loop, and every gain written out."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cacovid_jax.compressors.math import facility_location
from tests.compressors import quick, selections

kernel = quick.jit(
  functools.partial(facility_location.block_picks, interpret=True)
)


@quick.jit
def loop(rows, covered, gains, rival, limit):
  windows = jnp.zeros([rows.shape[0]], jnp.int32)
  picked, count, covered, gains = facility_location.block_picks_loop(
    rows, windows, covered[None], gains, rival, limit
  )
  return picked, count, covered[0], gains


def naive(rows, covered, gains, rival, limit):
  covered, taken, picked = covered.copy(), gains < 0, []
  while True:
    gains = np.maximum(rows - covered, 0).sum(axis=1)
    gains[taken] = -1
    best = int(np.argmax(gains))
    enough = gains[best] > rival[0] or (
      gains[best] == rival[0] and best < rival[1]
    )
    if not enough or gains[best] < 0 or len(picked) == limit:
      return picked, covered, gains
    picked.append(best)
    taken[best] = True
    covered = np.maximum(covered, rows[best])


def problem(seed, num_candidates, area, levels):
  rng = np.random.default_rng(seed)
  rows = rng.integers(0, levels, [num_candidates, area], dtype=np.int32)
  rows *= rng.random(rows.shape) < 0.4
  covered = rng.integers(0, levels // 3 + 1, [area], dtype=np.int32)
  gains = np.maximum(rows - covered, 0).sum(axis=1).astype(np.int32)
  gains[rng.random(num_candidates) < 0.2] = -1
  return rows, covered, gains


# More tokens than are listed at a time, sizes beside powers of two; few
# levels make ties.
@pytest.mark.parametrize("num_candidates,area", [(7, 37), (8, 32), (1, 2)])
def test_kernel_and_loop_pick_by_definition(num_candidates, area):
  counts = set()
  for seed in range(12):
    levels = 1000 if seed % 2 else 3
    rows, covered, gains = problem(seed, num_candidates, area, levels)
    for share, behind, limit in [(0.0, 0, 99), (0.4, 3, 99), (0.1, 7, 2),
                                 (2.0, 0, 99), (0.0, 5, 0)]:  # fmt: skip
      bound = int(share * gains.max())
      args = rows, covered, gains, np.array([bound, behind], np.int32), limit
      expected, after, left = naive(*args)
      for run in (kernel, loop):
        picked, count, covered_now, gains_now = run(*args[:4], jnp.int32(limit))
        assert int(count) == len(expected)
        np.testing.assert_array_equal(picked[: len(expected)], expected)
        np.testing.assert_array_equal(covered_now, after)
        if limit:
          np.testing.assert_array_equal(gains_now, left)
      counts.add(len(expected))
  assert 0 in counts and max(counts) > (num_candidates > 1)


def test_a_batch_of_kernels_is_each_of_them():
  problems = [problem(seed, 7, 37, 50) for seed in range(3)]
  rival, limit = jnp.array([10, 3], jnp.int32), jnp.int32(5)
  together = jax.vmap(lambda *p: kernel(*p, rival, limit))(
    *(jnp.stack(part) for part in zip(*problems, strict=True))
  )
  for i, each in enumerate(problems):
    expected, after, _ = naive(*each, np.array([10, 3]), 5)
    assert int(together[1][i]) == len(expected)
    np.testing.assert_array_equal(together[0][i, : len(expected)], expected)
    np.testing.assert_array_equal(together[2][i], after)


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_other_platforms_get_the_loop(platform):
  program = quick.jit(
    functools.partial(
      facility_location.greedy, num_keep=5, grid=(5, 2, 3), kernel=True
    )
  ).trace(selections.video("random"))
  text = program.lower(lowering_platforms=(platform,)).as_text()
  assert "stablehlo.while" in text and "triton" not in text


def test_facility_location_with_the_kernel_is_that_without(monkeypatch):
  options = {"num_keep": 11, "grid": selections.GRID, "block": 7}
  without = quick.jit(functools.partial(facility_location.greedy, **options))
  monkeypatch.setattr(
    jax.lax, "platform_dependent", lambda *args, cuda, default: cuda(*args)
  )
  monkeypatch.setattr(
    facility_location,
    "block_picks",
    functools.partial(facility_location.block_picks, interpret=True),
  )
  with_kernel = quick.jit(
    functools.partial(facility_location.greedy, kernel=True, **options)
  )
  for kind in [*selections.KINDS, "scenes"]:
    features = selections.video(kind)
    np.testing.assert_array_equal(with_kernel(features), without(features))


def test_windows_in_blocks_take_no_more_memory_than_one_window():
  def temporary(windows):
    program = jax.jit(
      functools.partial(
        facility_location.greedy,
        num_keep=32,
        grid=(16, 8, 8),
        windows=windows,
        similarities="blocks",
      )
    )
    shape = jax.ShapeDtypeStruct([1024, 256], jnp.float32)
    analysis = program.lower(shape).compile().memory_analysis()
    return analysis.temp_size_in_bytes

  # A copy of its window for each candidate of a block would be thirty times it.
  assert temporary(4) <= 1.2 * temporary(1)
