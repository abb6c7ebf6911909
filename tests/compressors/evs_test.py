"""EVS against its rule token by token."""

import math

import numpy as np
import pytest

from cacovid_jax import compressors
from tests.compressors import naive, videos


def expected(x, grid, num_keep):
  T, P = grid[0], grid[1] * grid[2]
  frames = x.reshape(T, P, -1)
  values = [255.0] * P
  for t in range(1, T):
    for n in range(P):
      values.append(1 - naive.cosine(frames[t, n], frames[t - 1, n]))
  return {i: (x[i], [i]) for i in naive.largest(values, num_keep)}


@pytest.mark.parametrize(
  "grid,num_keep", [((1, 3, 3), 4), ((2, 3, 3), 17), ((7, 3, 3), 20)]
)
@pytest.mark.parametrize("kind", ["noise", "scenes"])
def test_equals_the_rule(grid, num_keep, kind):
  for seed in range(4):
    x = videos.features(kind, grid, seed)
    out = videos.program("evs", grid, num_keep)(x, videos.aux(grid))
    naive.check_rows(out, expected(x, grid, num_keep), math.prod(grid), atol=0)


def test_where_nothing_moves_the_first_frames_stay():
  grid = (7, 3, 3)
  out = videos.program("evs", grid, 20)(
    videos.features("static", grid), videos.aux(grid)
  )
  np.testing.assert_array_equal(out.index, np.arange(20))


def test_a_token_of_zeros_resembles_nothing():
  grid = (7, 3, 3)
  x = videos.features("static", grid).copy()
  x[40] = 0
  index = videos.program("evs", grid, 20)(x, videos.aux(grid)).index
  # The token itself, and the one behind it at the same place.
  np.testing.assert_array_equal(index[9:], [*range(9, 18), 40, 49])


def test_published_rounding_never_goes_below_a_frame():
  method = compressors.get("evs", exact_budget=False)
  assert method.rows((7, 3, 3), 0.05) == 9
  assert method.rows((7, 3, 3), 0.5) == 31
  assert compressors.get("evs").rows((7, 3, 3), 0.05) == 3
