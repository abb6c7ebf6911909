"""Buckets: which one a grid gets, and a video's rows inside it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cacovid_jax import errors
from cacovid_jax.models import token_grid

BUCKET = token_grid.Bucket(5, 24, 75)
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
    token_grid.Bucket(8, 16, 32),
    token_grid.Bucket(4, 16),
    token_grid.Bucket(8, 20, 128),
    token_grid.Bucket(8, 20),
    token_grid.Bucket(2, 16),
  ]
  assert token_grid.pick(grid, listed) == listed[expected]


@pytest.mark.parametrize(
  "grid", [(6, 2, 2), (2, 5, 5), (4, 4, 5), (64, 14, 14)]
)
def test_a_grid_that_fits_nowhere_is_named_with_the_mend(grid):
  small = token_grid.Bucket(2, 8)
  with pytest.raises(errors.UserError) as raised:
    token_grid.pick(grid, [BUCKET, small])
  message = str(raised.value)
  assert "\n" not in message
  assert " x ".join(map(str, grid)) in message
  assert "5 frames of 24 (75 in all)" in message
  # The mend that it names works.
  area = grid[1] * grid[2]
  assert f"Bucket({grid[0]}, {area}, {grid[0] * area})" in message
  mend = token_grid.Bucket(grid[0], area, grid[0] * area)
  assert token_grid.pick(grid, [small, mend]) == mend
  with pytest.raises(errors.UserError, match="buckets: none"):
    token_grid.pick(grid, [])


@pytest.mark.parametrize("grid", [(0, 4, 4), (2, -1, 4), (4, 4)])
def test_an_empty_grid_is_refused(grid):
  for refuse in (
    lambda: token_grid.pick(grid, [BUCKET]),
    lambda: token_grid.place(grid, BUCKET),
    lambda: token_grid.as_grid(grid),
  ):
    with pytest.raises(errors.UserError, match="at least 1"):
      refuse()


@pytest.mark.parametrize(
  "sizes", [(0, 4), (4, 0), (4, 4, 17), (4, 4, 3), (2, 8, 7), (4, 4, -1)]
)
def test_a_bucket_that_cannot_be_filled_is_refused(sizes):
  with pytest.raises(errors.UserError, match="cannot be filled"):
    token_grid.Bucket(*sizes)


def test_rows_go_to_their_frame_and_back():
  there = jax.jit(lambda grid, x: grid.by_frame(x, -1))
  back = jax.jit(lambda grid, x: grid.packed(grid.by_frame(x), -1))
  x = np.arange(100, 175)
  for grid in GRIDS:
    placed = token_grid.place(grid, BUCKET)
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


def test_frame_means_are_those_of_the_videos_own_rows():
  means = jax.jit(lambda grid, x: grid.frame_means(x))
  rng = np.random.default_rng(0)
  for grid in GRIDS:
    T, area = grid[0], grid[1] * grid[2]
    x = rng.standard_normal((75, 3)).astype(np.float32)
    expected = np.zeros((5, 3))
    expected[:T] = x[: T * area].reshape(T, area, 3).mean(axis=1)
    x[T * area :] = np.nan
    found = means(token_grid.place(grid, BUCKET), x)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    static = token_grid.as_grid(grid).frame_means(x[: T * area])
    np.testing.assert_allclose(found[:T], static, rtol=1e-5, atol=1e-6)


def test_frame_means_of_a_vector_and_under_vmap():
  stack = functools.partial(jax.tree.map, lambda *leaves: np.stack(leaves))
  placed = stack(*[token_grid.place(grid, BUCKET) for grid in GRIDS])
  x = np.tile(np.arange(75.0, dtype=np.float32), (len(GRIDS), 1))
  means = jax.vmap(lambda grid, x: grid.frame_means(x))(placed, x)
  assert means.shape == (len(GRIDS), 5)
  np.testing.assert_allclose(means[0], [7, 22, 37, 52, 0], rtol=1e-6)
  np.testing.assert_allclose(means[3], [0, 0, 0, 0, 0])


def test_a_static_grid_fills_its_bucket_and_leaves_no_trace():
  grid = token_grid.as_grid((4, 5, 3))
  assert grid.fills_bucket and grid.bucket == token_grid.Bucket(4, 15)
  assert token_grid.as_grid(grid) is grid
  assert not token_grid.place((4, 5, 3), token_grid.Bucket(4, 15)).fills_bucket
  x = jnp.ones(60)
  assert token_grid.fill(x, grid.valid_tokens, 0.0) is x
