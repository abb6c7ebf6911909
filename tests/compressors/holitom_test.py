"""HoliTom's windows against all ways to cut, and its rows against its steps."""

import itertools
import math

import jax.numpy as jnp
import numpy as np
import pytest

from cacovid_jax import compressors
from cacovid_jax.compressors.math import segments
from tests.compressors import naive, quick, videos

GRID = (7, 3, 3)


def all_cuts(T):
  for cuts in itertools.product([False, True], repeat=T - 1):
    starts = [0] + [t + 1 for t, cut in enumerate(cuts) if cut]
    yield [
      list(range(a, b)) for a, b in zip(starts, [*starts[1:], T], strict=True)
    ]


def static_places(window, alike):
  """Places that stay alike from the window's first frame to its last."""
  if len(window) == 1:
    return []
  places = range(alike.shape[1])
  return [n for n in places if all(alike[t, n] for t in window[:-1])]


def best_cut(alike):
  """Of the cuts that save most, the one whose last windows are longest."""

  def order(windows):
    gain = sum(len(static_places(w, alike)) * (len(w) - 1) for w in windows)
    return gain, [len(w) for w in reversed(windows)]

  return max(all_cuts(alike.shape[0] + 1), key=order)


def expected(x, aux, grid, num_keep=None, ratio=None, tau=0.8, weight=0.6):
  """Rows of the method; with a ratio those of the published rounding."""
  T, P = grid[0], grid[1] * grid[2]
  frames = np.asarray(x, np.float64).reshape(T, P, -1)
  attention = np.asarray(aux.vision_attention).reshape(T, P)
  cosine = np.array(
    [
      [naive.cosine(frames[t, n], frames[t + 1, n]) for n in range(P)]
      for t in range(T - 1)
    ]
  ).reshape(T - 1, P)
  windows = best_cut(cosine > tau)
  static = {
    (w[0], n): min(cosine[t, n] for t in w[:-1])
    for w in windows
    for n in static_places(w, cosine > tau)
  }
  length = {w[0]: len(w) for w in windows}

  def left():
    return T * P - sum(length[t] - 1 for t, _ in static)

  while ratio is None and left() < num_keep:
    key = min(static, key=lambda k: (round(static[k] * 65536), k))
    del static[key]
  sets = []
  for w in windows:
    fixed = [n for n in range(P) if (w[0], n) in static]
    for t in w:
      sets.append((w, t, True, fixed if t == w[0] else []))
      sets.append((w, t, False, [n for n in range(P) if n not in fixed]))
  sizes = [len(places) for *_, places in sets]
  if ratio is None:
    counts = naive.shares_of_sets(sizes, num_keep)
  else:
    share = min(1.0, ratio * T * P / left())
    counts = [int(share * n) for n in sizes]
  out = {}
  for (window, t, fixed, places), count in zip(sets, counts, strict=True):
    if not count:
      continue
    if not fixed:
      chosen = naive.largest([attention[t, n] for n in places], count)
      for n in (places[i] for i in chosen):
        out[t * P + n] = frames[t, n], [t * P + n]
      continue
    average = frames[window].mean(axis=0)
    _, centres, centre = naive.dpc_knn(average, places, count)
    for c in centres:
      others = [n for n in places if centre[n] == c and n != c]
      row = average[c]
      if others:
        row = weight * row + (1 - weight) * average[others].mean(axis=0)
      tokens = [u * P + n for n in (c, *others) for u in window]
      out[t * P + c] = row, tokens
  return out


_windows = quick.jit(segments.most_saved)


@pytest.mark.parametrize("T", [1, 2, 6, 7])
def test_windows_are_the_best_of_all_cuts(T):
  rng = np.random.default_rng(T)
  for trial in range(25):
    alike = rng.random([T - 1, 4]) < (0.3, 0.6, 0.8, 0.95, 0.0)[trial % 5]
    first = np.asarray(_windows(jnp.asarray(alike)))
    windows = best_cut(alike)
    assert first.tolist() == [w[0] for w in windows for _ in w]


@pytest.mark.parametrize(
  "grid,num_keep", [((1, 3, 3), 4), ((2, 3, 3), 17), (GRID, 1), (GRID, 20)]
)
@pytest.mark.parametrize("kind", ["noise", "scenes"])
def test_equals_the_steps(grid, num_keep, kind):
  for seed in range(4):
    x, aux = videos.features(kind, grid, seed), videos.aux(grid, seed)
    out = videos.program("holitom", grid, num_keep)(x, aux)
    naive.check_rows(out, expected(x, aux, grid, num_keep), len(x))


def test_equals_the_steps_with_other_options():
  options = {"threshold": 0.65, "centre_weight": 0.9}
  run = videos.program("holitom", (6, 3, 3), 15, **options)
  for seed in range(4):
    x, aux = videos.features("scenes", (6, 3, 3), seed), videos.aux((6, 3, 3))
    rows = expected(x, aux, (6, 3, 3), 15, tau=0.65, weight=0.9)
    naive.check_rows(run(x, aux), rows, 54)


def test_equals_the_steps_with_published_rounding():
  run = videos.program("holitom", GRID, ratio=0.35, exact_budget=False)
  for kind in ("noise", "scenes"):
    for seed in range(3):
      x, aux = videos.features(kind, GRID, seed), videos.aux(GRID, seed)
      naive.check_rows(run(x, aux), expected(x, aux, GRID, ratio=0.35), 63)


def test_a_still_video_keeps_every_average_with_published_rounding():
  run = videos.program("holitom", GRID, ratio=0.35, exact_budget=False)
  x = videos.features("static", GRID)
  out = run(x, videos.aux(GRID))
  # 22 rows would fit, but only 9 tokens are left after averaging.
  naive.check_valid(out, 63, 9)
  np.testing.assert_array_equal(out.index[:9], np.arange(9))
  np.testing.assert_array_equal(out.mass[:9], 7)
  np.testing.assert_allclose(out.features[:9], x[:9], rtol=1e-6)


def test_a_still_video_still_fills_an_exact_budget():
  x, aux = videos.features("static", GRID), videos.aux(GRID)
  out = videos.program("holitom", GRID, 20)(x, aux)
  naive.check_rows(out, expected(x, aux, GRID, 20), 63)


def test_the_bound_of_rows_rounds_down():
  method = compressors.get("holitom", exact_budget=False)
  for ratio in (0.05, 0.1, 0.15, 0.2, 0.25):
    assert method.rows((32, 14, 14), ratio) == math.floor(ratio * 6272 + 1e-3)
