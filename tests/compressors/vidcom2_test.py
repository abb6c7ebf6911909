"""VidCom2 against its formulas written out."""

import math

import numpy as np
import pytest

from cacovid_jax import compressors
from tests.compressors import naive, videos

GRID = (7, 3, 3)


def naive_scores(x, grid):
  T, P = grid[0], grid[1] * grid[2]
  x = np.asarray(x, np.float64)
  width = x.shape[1]
  variance = [np.var(x[:, d]) for d in range(width)]
  channels = sorted(range(width), key=lambda d: (variance[d], d))[: width // 2]
  unit = []
  for row in x[:, sorted(channels)]:
    unit.append(row / max(np.linalg.norm(row), 1e-12))
  unit = np.array(unit)

  def similar(token, mean):
    squared = float(((token - mean) ** 2).sum())
    return sum(math.exp(-squared / (2 * 2.0**p)) for p in range(-3, 2))

  video = [similar(u, unit.mean(axis=0)) for u in unit]
  frame = [
    similar(u, unit[i // P * P : i // P * P + P].mean(axis=0))
    for i, u in enumerate(unit)
  ]
  logits = -np.array(video).reshape(T, P).mean(axis=1) / 0.01
  weight = np.exp(logits - logits.max())
  return video, frame, weight / weight.sum()


def expected(x, grid, counts):
  P = grid[1] * grid[2]
  video, frame, _ = naive_scores(x, grid)
  out = {}
  for t, count in enumerate(counts):
    values = [-(video[t * P + n] + frame[t * P + n]) for n in range(P)]
    for n in naive.largest(values, count):
      out[t * P + n] = x[t * P + n], [t * P + n]
  return out


@pytest.mark.parametrize(
  "grid,num_keep", [((1, 3, 3), 4), ((2, 3, 3), 17), (GRID, 20)]
)
@pytest.mark.parametrize("kind", ["noise", "scenes"])
def test_equals_the_formulas(grid, num_keep, kind):
  T, P = grid[0], grid[1] * grid[2]
  for seed in range(4):
    x = videos.features(kind, grid, seed)
    _, _, weight = naive_scores(x, grid)
    rates = [1 + w - 1 / T for w in weight]
    counts = naive.apportion(num_keep, rates, [P] * T)
    out = videos.program("vidcom2", grid, num_keep)(x, videos.aux(grid))
    naive.check_rows(out, expected(x, grid, counts), T * P, atol=0)


def test_reference_rounds_frame_by_frame():
  run = videos.program("vidcom2", GRID, ratio=0.35, exact_budget=False)
  sums = set()
  for seed in range(6):
    x = videos.features("scenes", GRID, seed)
    _, _, weight = naive_scores(x, GRID)
    counts = [round(0.35 * (1 + w - 1 / 7) * 9) for w in weight]
    out = run(x, videos.aux(GRID))
    naive.check_rows(out, expected(x, GRID, counts), 63, atol=0)
    sums.add(sum(counts))
  # 3.15 a frame on average, less for those that do not stand out.
  assert all(count <= 25 for count in sums)
  assert compressors.get("vidcom2", exact_budget=False).rows(GRID, 0.35) == 25


def test_an_odd_frame_keeps_more():
  x = videos.features("static", GRID).reshape(7, 9, -1).copy()
  x[4] = videos.features("noise", (1, 3, 3), 9)
  out = videos.program("vidcom2", GRID, 20)(x.reshape(63, -1), videos.aux(GRID))
  counts = np.bincount(np.asarray(out.index) // 9, minlength=7)
  assert counts.argmax() == 4 and counts[4] > 20 / 7 + 1
