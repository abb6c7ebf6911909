"""FastVID against its steps: segments, salient tokens, anchors."""

import jax.numpy as jnp
import numpy as np
import pytest

from cacovid_jax import compressors
from cacovid_jax.compressors.math import segments
from tests.compressors import naive, videos

GRID = (7, 3, 3)


def naive_segments(cosine, num_segments, threshold):
  cuts = naive.largest([-c for c in cosine], num_segments - 1)
  segments = [[0]]
  for t, value in enumerate(cosine):
    if t in cuts or value < threshold:
      segments.append([])
    segments[-1].append(t + 1)
  return segments


def expected(
  x,
  aux,
  grid,
  num_keep,
  num_segments=8,
  threshold=0.9,
  context=0.4,
  stride=4,
  weight=0.6,
):
  T, P = grid[0], grid[1] * grid[2]
  x = np.asarray(x, np.float64)
  frames = x.reshape(T, P, -1)
  vectors = frames.mean(axis=1)
  segments = naive_segments(
    [naive.cosine(vectors[t], vectors[t + 1]) for t in range(T - 1)],
    num_segments,
    threshold,
  )
  budgets = [num_keep // T + (t < num_keep % T) for t in range(T)]
  wanted = [int(b * context) for b in budgets]
  salient = [b - w for b, w in zip(budgets, wanted, strict=True)]
  anchors = [0] * T
  for segment in segments:
    holders = [t for t in segment if (segment[-1] - t) % stride == 0]
    total = sum(wanted[t] for t in segment)
    for i, t in enumerate(holders):
      share = total // len(holders) + (i < total % len(holders))
      anchors[t] = min(share, P - salient[t])
  room = [P - salient[t] - anchors[t] for t in range(T)]
  more = naive.apportion(num_keep - sum(salient) - sum(anchors), room, room)
  salient = [s + m for s, m in zip(salient, more, strict=True)]
  out = {}
  for segment in segments:
    chosen, rest = [], []
    for t in segment:
      attention = np.asarray(aux.vision_attention)[t * P : t * P + P]
      looked_at = naive.largest(attention.tolist(), salient[t])
      others = [n for n in range(P) if n not in looked_at]
      for n in looked_at:
        out[t * P + n] = x[t * P + n], [t * P + n]
      peaks = []
      if anchors[t]:
        score, _, _ = naive.dpc_knn(frames[t], others, 1)
        peaks = sorted(others, key=lambda n: (-score[n], n))[: anchors[t]]
      chosen += [t * P + n for n in sorted(peaks)]
      rest += [t * P + n for n in others if n not in peaks]
    taken = {i: [] for i in chosen}
    for i in rest if chosen else []:
      near = [naive.cosine(x[i], x[j]) for j in chosen]
      taken[chosen[int(np.argmax(near))]].append(i)
    for i, merged in taken.items():
      row = x[i]
      if merged:
        own = max(1 / (len(merged) + 1), weight)
        row = own * row + (1 - own) * x[merged].mean(axis=0)
      out[i] = row, [i, *merged]
  assert len(out) == num_keep
  return out


@pytest.mark.parametrize("T", [1, 2, 6, 7, 20])
def test_segments_end_where_neighbours_are_unlike(T):
  rng = np.random.default_rng(T)
  for _ in range(10):
    cosine = rng.choice([0.3, 0.85, 0.92, 0.95, 0.99], T - 1)
    found = segments.unlike_neighbours(jnp.asarray(cosine), 4, 0.9)
    starts = [s[0] for s in naive_segments(cosine.tolist(), 4, 0.9)]
    assert np.flatnonzero(found).tolist() == starts


# The last keeps more than fits where anchors are: the rest becomes salient.
@pytest.mark.parametrize(
  "grid,num_keep,options",
  [
    ((1, 3, 3), 4, {}),
    ((2, 3, 3), 17, {}),
    (GRID, 1, {}),
    (GRID, 20, {}),
    (GRID, 40, {"num_segments": 2, "threshold": -1.0}),
  ],
)
@pytest.mark.parametrize("kind", ["noise", "scenes"])
def test_equals_the_steps(grid, num_keep, options, kind):
  run = videos.program("fastvid", grid, num_keep, **options)
  for seed in range(3):
    x, aux = videos.features(kind, grid, seed), videos.aux(grid, seed)
    rows = expected(x, aux, grid, num_keep, **options)
    naive.check_rows(run(x, aux), rows, len(x))


def test_anchors_take_in_the_rest_of_their_segment():
  options = {
    "num_segments": 2,
    "threshold": -1.0,
    "anchor_stride": 2,
    "anchor_weight": 0.3,
  }
  run = videos.program("fastvid", (6, 3, 3), 20, **options)
  for seed in range(4):
    x, aux = videos.features("scenes", (6, 3, 3), seed), videos.aux((6, 3, 3))
    rows = expected(
      x,
      aux,
      (6, 3, 3),
      20,
      num_segments=2,
      threshold=-1.0,
      stride=2,
      weight=0.3,
    )
    out = run(x, aux)
    naive.check_rows(out, rows, 54)
    assert (np.asarray(out.assign) >= 0).all()


def test_without_context_the_salient_tokens_are_left():
  run = videos.program("fastvid", GRID, 20, context_share=0)
  x, aux = videos.features("noise", GRID), videos.aux(GRID)
  naive.check_rows(run(x, aux), expected(x, aux, GRID, 20, context=0), 63)


def test_reference_cuts_off_each_frame():
  method = compressors.get("fastvid", exact_budget=False)
  assert method.rows((32, 14, 14), 0.255) == 32 * 49
