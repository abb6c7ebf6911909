"""Buckets: which one a grid gets, and a video's rows inside it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cacovid_jax import errors
from cacovid_jax.data import frames
from cacovid_jax.models import processors, qwen3_vl_processor, token_grid

BUCKET = token_grid.GridBucket(5, 24, 75)
GRIDS = [(4, 5, 3), (3, 4, 6), (5, 3, 5), (1, 1, 1)]


@pytest.mark.parametrize(
  ("grid", "expected"),
  [
    ((4, 5, 3), 1),
    ((8, 2, 2), 0),
    ((2, 4, 4), 4),  # Of two with 32 rows, that with less padding by frame.
    ((4, 4, 4), 1),
    ((8, 4, 4), 2),  # Fewer rows than frames times tokens of a frame.
    ((8, 3, 6), 3),
  ],
)
def test_the_smallest_bucket_that_holds_a_grid_is_picked(grid, expected):
  listed = [
    token_grid.GridBucket(8, 16, 32),
    token_grid.GridBucket(4, 16),
    token_grid.GridBucket(8, 20, 128),
    token_grid.GridBucket(8, 20),
    token_grid.GridBucket(2, 16),
  ]
  assert token_grid.pick(grid, listed) == listed[expected]


@pytest.mark.parametrize(
  "grid", [(6, 2, 2), (2, 5, 5), (4, 4, 5), (64, 14, 14)]
)
def test_a_grid_that_fits_nowhere_is_named_with_the_mend(grid):
  small = token_grid.GridBucket(2, 8)
  with pytest.raises(errors.UserError) as raised:
    token_grid.pick(grid, [BUCKET, small])
  message = str(raised.value)
  assert "\n" not in message
  assert " x ".join(map(str, grid)) in message
  assert "5 frames of 24 (75 in all)" in message
  # The mend that it names works.
  area = grid[1] * grid[2]
  assert f"Bucket({grid[0]}, {area}, {grid[0] * area})" in message
  mend = token_grid.GridBucket(grid[0], area, grid[0] * area)
  assert token_grid.pick(grid, [small, mend]) == mend
  with pytest.raises(errors.UserError, match="buckets: none"):
    token_grid.pick(grid, [])


@pytest.mark.parametrize("grid", [(0, 4, 4), (2, -1, 4), (4, 4)])
def test_an_empty_grid_is_refused(grid):
  for refuse in (
    lambda: token_grid.pick(grid, [BUCKET]),
    lambda: token_grid.TokenGrid.of(grid, BUCKET),
    lambda: token_grid.TokenGrid.of(grid),
  ):
    with pytest.raises(errors.UserError, match="at least 1"):
      refuse()


@pytest.mark.parametrize(
  "sizes", [(0, 4), (4, 0), (4, 4, 17), (4, 4, 3), (2, 8, 7), (4, 4, -1)]
)
def test_a_bucket_that_cannot_be_filled_is_refused(sizes):
  with pytest.raises(errors.UserError, match="cannot be filled"):
    token_grid.GridBucket(*sizes)


def test_rows_go_to_their_frame_and_back():
  there = jax.jit(lambda grid, x: grid.by_frame(x, -1))
  back = jax.jit(lambda grid, x: grid.packed(grid.by_frame(x), -1))
  x = np.arange(100, 175)
  for grid in GRIDS:
    placed = token_grid.TokenGrid.of(grid, BUCKET)
    T, area = grid[0], grid[1] * grid[2]
    expected = np.full((5, 24), -1)
    expected[:T, :area] = x[: T * area].reshape(T, area)
    np.testing.assert_array_equal(there(placed, x), expected)
    expected = np.where(np.arange(75) < T * area, x, -1)
    np.testing.assert_array_equal(back(placed, x), expected)
    # NumPy numbers outside a program give the same.
    np.testing.assert_array_equal(
      placed.packed(placed.by_frame(x), -1), expected
    )
  assert there._cache_size() == 1


def by_frame_in_a_bucket(method, by_hand):
  """Yields (found, T) of a method of each grid, compared with NumPy's.

  Alone and in a bucket, where rows behind the video's own are NaN; `by_hand`
  takes float32[T, A, 3].
  """
  there = jax.jit(lambda grid, x: getattr(grid, method)(x))
  close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
  rng = np.random.default_rng(0)
  for grid in GRIDS:
    T, area = grid[0], grid[1] * grid[2]
    x = rng.standard_normal((75, 3)).astype(np.float32)
    expected = by_hand(x[: T * area].reshape(T, area, 3))
    x[T * area :] = np.nan
    found = there(token_grid.TokenGrid.of(grid, BUCKET), x)
    close(found[:T], expected)
    static = getattr(token_grid.TokenGrid.of(grid), method)(x[: T * area])
    close(static, expected)
    close(found[:T], static)
    yield found, T


def test_frame_means_are_those_of_the_videos_own_rows():
  means = by_frame_in_a_bucket("frame_means", lambda x: x.mean(axis=1))
  for found, T in means:
    np.testing.assert_allclose(found[T:], np.zeros((5 - T, 3)), atol=1e-6)


def test_frame_changes_against_a_loop():
  def by_hand(x):
    expected = np.zeros((len(x), 3))
    for t in range(1, len(x)):
      for now, before in zip(x[t], x[t - 1], strict=True):
        expected[t] += np.abs(now - before) / len(x[t])
    return expected

  for found, _ in by_frame_in_a_bucket("frame_changes", by_hand):
    assert np.isfinite(found).all()


def test_frame_means_of_a_vector_and_under_vmap():
  stack = functools.partial(jax.tree.map, lambda *leaves: np.stack(leaves))
  placed = stack(*[token_grid.TokenGrid.of(grid, BUCKET) for grid in GRIDS])
  x = np.tile(np.arange(75.0, dtype=np.float32), (len(GRIDS), 1))
  means = jax.vmap(lambda grid, x: grid.frame_means(x))(placed, x)
  assert means.shape == (len(GRIDS), 5)
  np.testing.assert_allclose(means[0], [7, 22, 37, 52, 0], rtol=1e-6)
  np.testing.assert_allclose(means[3], [0, 0, 0, 0, 0])


def test_a_full_grid_is_static_and_leaves_no_trace():
  grid = token_grid.TokenGrid.of((4, 5, 3))
  assert grid.full and grid.bucket == token_grid.GridBucket(4, 15)
  assert token_grid.TokenGrid.of(grid) is grid
  assert not token_grid.TokenGrid.of(
    (4, 5, 3), token_grid.GridBucket(4, 15)
  ).full
  x = jnp.ones(60)
  assert token_grid.fill(x, grid.valid_tokens, 0.0) is x
  # Nothing to trace, to stack or to send to a device.
  assert not jax.tree.leaves(grid)
  assert jax.tree.map(lambda *leaves: 1 / 0, grid, grid) == grid
  seen = []
  jax.jit(seen.append)(grid)
  assert seen == [grid] and seen[0].full


def test_a_program_of_a_full_grid_has_no_trace_of_a_mask():
  """Its operations are those of plain reshapes and means."""
  grid = token_grid.TokenGrid.of((4, 5, 3))
  x = jnp.ones((60, 2))

  def ours(x):
    return grid.packed(grid.by_frame(x)), grid.frame_means(x)

  def plain(x):
    frames = x.reshape(4, 15, 2)
    return frames.reshape(60, 2), x.reshape(4, 15, 2).mean(axis=1)

  assert str(jax.make_jaxpr(ours)(x)) == str(jax.make_jaxpr(plain)(x))


def test_shape_and_sizes_of_a_grid_inside_its_bucket():
  grid = token_grid.TokenGrid.of((3, 4, 6), BUCKET)
  leaves = [leaf.dtype for leaf in jax.tree.leaves(grid)]
  assert leaves == [np.int32] * 3
  assert grid.shape == (3, 4, 6)
  assert (grid.frame_tokens, grid.num_tokens) == (24, 72)


@pytest.mark.parametrize("most", [1, 2, 3])
@pytest.mark.parametrize("rule", frames.RULES)
def test_a_few_frames_have_a_bucket_too(most, rule):
  qwen3 = qwen3_vl_processor.Qwen3VLProcessor()
  for processor in (processors.Qwen2_5VLProcessor(), qwen3):
    made = token_grid.make_buckets((), processor, frames.FrameRule(most, rule))
    assert [bucket.frames for bucket in made][-1] == -(-most // 2)


def test_default_buckets_follow_from_the_pixels():
  def sizes(processor, given=()):
    made = token_grid.make_buckets(given, processor, frames.FrameRule(32))
    return [dataclasses.astuple(bucket) for bucket in made]

  paper = processors.Qwen2_5VLProcessor(
    min_pixels=processors.PAPER_MIN_PIXELS,
    max_pixels=processors.PAPER_MAX_PIXELS,
  )
  # 181 is the whole part of the root of 128 x 256.
  assert sizes(paper) == [(16, 181, 2896), (16, 256, 4096)]
  one = dataclasses.replace(paper, min_pixels=paper.max_pixels)
  assert sizes(one) == [(16, 256, 4096)]
  given = ((16, 256, 4000), (16, 128))
  assert sizes(paper, given) == [(16, 128, 2048), (16, 256, 4000)]
  for bad, match in (
    (((16,),), "give .temporal patches, tokens of one."),
    (((16, "x"),), "give .temporal patches"),
    (((8, 256),), "fewer temporal patches than the 16"),
  ):
    with pytest.raises(errors.UserError, match=match):
      sizes(paper, bad)


@pytest.mark.parametrize("count", [1, 4, 9, 16, 20])
def test_first_places_are_those_of_numpy(count):
  for share in (0.0, 0.3, 1.0):
    mask = np.random.default_rng(5).random(16) < share
    expected = np.append(np.flatnonzero(mask), [16] * count)[:count]
    found = token_grid.first(jnp.asarray(mask), count)
    assert found.dtype == jnp.int32
    np.testing.assert_array_equal(found, expected)
