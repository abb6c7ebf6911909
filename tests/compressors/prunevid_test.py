"""PruneVID's first stage against its steps, and the cut into segments."""

import itertools
import math

import jax.numpy as jnp
import numpy as np
import pytest

from cacovid_jax import compressors
from cacovid_jax.compressors import prunevid
from cacovid_jax.compressors.math import segments
from tests.compressors import naive, quick, videos

GRID = (7, 3, 3)


def naive_segments(labels):
  """Lists of frames, by the rule frame by frame."""
  T = len(labels)
  runs = []  # label, first frame, length
  for label, group in itertools.groupby(labels):
    start = runs[-1][1] + runs[-1][2] if runs else 0
    runs.append((label, start, len(list(group))))
  new = [None] * T
  for label, start, length in runs:
    longest = max(r[2] for r in runs if r[0] == label)
    if length == longest and length > 1:
      new[start : start + length] = [label] * length
  t = 0
  while t < T:
    if new[t] is not None:
      t += 1
      continue
    end = t
    while end < T and new[end] is None:
      end += 1
    left = right = 0
    while t - left > 0 and new[t - left - 1] == new[t - 1]:
      left += 1
    while end + right < T and new[end + right] == new[end]:
      right += 1
    label = 0
    if left and left >= right:
      label = new[t - 1]
    elif right:
      label = new[end]
    new[t:end] = [label] * (end - t)
    t = end
  segments, t = [], 0
  for _, group in itertools.groupby(new):
    length = len(list(group))
    segments.append(list(range(t, t + length)))
    t += length
  return segments


def mean_cosine(tokens):
  pairs = list(itertools.combinations(tokens, 2))
  return sum(naive.cosine(a, b) for a, b in pairs) / len(pairs)


def expected(x, grid, num_keep=None, share=None, frame_share=0.25, tau=0.8):
  """Rows of the method; with a share those of the published rounding."""
  T, P = grid[0], grid[1] * grid[2]
  frames = np.asarray(x, np.float64).reshape(T, P, -1)
  vectors = frames.mean(axis=1)
  count = max(1, int(frame_share * T))
  _, centres, centre = naive.dpc_knn(vectors, range(T), count)
  segments = naive_segments([centres.index(centre[t]) for t in range(T)])
  sigma = {
    (s[0], n): mean_cosine(frames[s, n])
    for s in segments
    for n in range(P)
    if len(s) > 1
  }
  static = {key for key, value in sigma.items() if value > tau}
  length = {s[0]: len(s) for s in segments}

  def left():
    return T * P - sum(length[t] - 1 for t, _ in static)

  while share is None and left() < num_keep:
    static.remove(min(static, key=lambda k: (round(sigma[k] * 65536), k)))
  # Sets in order: of each frame the static ones first.
  values, members, sets = frames.copy(), {}, []
  for s in segments:
    for t in s:
      fixed = [n for n in range(P) if (s[0], n) in static]
      sets.append((t, fixed if t == s[0] else []))
      sets.append((t, [n for n in range(P) if n not in fixed]))
    for n in fixed:
      values[s[0], n] = frames[s, n].mean(axis=0)
      members[s[0], n] = [t * P + n for t in s]
  sizes = [len(places) for _, places in sets]
  if share is None:
    counts = naive.shares_of_sets(sizes, num_keep)
  else:
    counts = [n if n <= 14 else max(1, int(share * n)) for n in sizes]
  out = {}
  for (t, places), count in zip(sets, counts, strict=True):
    if not count:
      continue
    _, centres, centre = naive.dpc_knn(values[t], places, count)
    for c in centres:
      joined = [n for n in places if centre[n] == c]
      tokens = [i for n in joined for i in members.get((t, n), [t * P + n])]
      out[t * P + c] = values[t, joined].mean(axis=0), tokens
  return out


_starts = quick.jit(segments.runs_of_labels)


@pytest.mark.parametrize("T", [1, 2, 6, 7, 32])
def test_segments_equal_the_rule(T):
  rng = np.random.default_rng(T)
  for trial in range(60):
    # Few changes make long runs, many make short ones.
    labels = rng.integers(0, 4, T)
    for t in range(1, T):
      if rng.random() < (0.2, 0.5, 0.8)[trial % 3]:
        labels[t] = labels[t - 1]
    starts = np.flatnonzero(_starts(jnp.asarray(labels)))
    assert starts.tolist() == [s[0] for s in naive_segments(labels.tolist())]


@pytest.mark.parametrize(
  "labels,starts",
  [
    ([0, 0, 1, 2, 2, 2], [0, 2]),  # One alone joins the longer side.
    ([0, 0, 1, 2, 2], [0, 3]),  # On ties the left.
    ([0, 1, 2, 3], [0]),  # Nothing longer than one: a single segment.
    ([1, 0, 0, 0, 2, 3, 3, 3], [0, 5]),
    ([0, 0, 1, 0, 0, 1, 1, 1], [0, 5]),  # Both longest runs of 0 stay.
  ],
)
def test_segments_of_small_cases(labels, starts):
  assert np.flatnonzero(_starts(jnp.array(labels))).tolist() == starts


def test_mean_cosine_equals_all_pairs():
  x = videos.features("scenes", GRID).reshape(7, 9, -1).copy()
  x[2, 3] = 0
  first = jnp.array([0, 0, 0, 0, 4, 5, 5])
  found = np.asarray(prunevid.mean_cosine(jnp.asarray(x), first))
  for n in range(9):
    for frames in ([0, 1, 2, 3], [5, 6]):
      np.testing.assert_allclose(
        found[frames, n], mean_cosine(x[frames, n]), atol=1e-5
      )
    assert found[4, n] == -np.inf


@pytest.mark.parametrize(
  "grid,num_keep", [((1, 3, 3), 4), ((2, 3, 3), 17), ((6, 3, 3), 3), (GRID, 20)]
)
@pytest.mark.parametrize("kind", ["noise", "scenes"])
def test_equals_the_steps(grid, num_keep, kind):
  for seed in range(4):
    x = videos.features(kind, grid, seed)
    out = videos.program("prunevid", grid, num_keep)(x, videos.aux(grid))
    naive.check_rows(out, expected(x, grid, num_keep), len(x))


def test_equals_the_steps_with_several_segments():
  run = videos.program("prunevid", GRID, 30, frame_share=0.5)
  for seed in range(6):
    x = videos.features("scenes", GRID, seed)
    rows = expected(x, GRID, 30, frame_share=0.5)
    naive.check_rows(run(x, videos.aux(GRID)), rows, 63)


def test_equals_the_steps_with_published_rounding():
  grid = (4, 4, 5)
  run = videos.program("prunevid", grid, ratio=0.35, exact_budget=False)
  for kind in ("noise", "scenes"):
    for seed in range(2):
      x = videos.features(kind, grid, seed)
      out = run(x, videos.aux(grid))
      naive.check_rows(out, expected(x, grid, share=0.35), len(x))


def test_a_still_video_is_one_segment_of_static_tokens():
  grid = (7, 4, 5)
  run = videos.program(
    "prunevid", grid, ratio=0.3, exact_budget=False, cluster_share=0.5
  )
  out = run(videos.features("static", grid), videos.aux(grid))
  naive.check_valid(out, 140, 10)
  assert out.index[9] < 20
  np.testing.assert_array_equal(np.asarray(out.mass)[:10] % 7, 0)
  assert out.mass.sum() == 140


def test_a_still_video_still_fills_an_exact_budget():
  # 9 static tokens are too few for 20 rows: two places are taken back.
  x = videos.features("static", GRID)
  out = videos.program("prunevid", GRID, 20)(x, videos.aux(GRID))
  naive.check_rows(out, expected(x, GRID, 20), 63)
  assert (np.asarray(out.mass) > 1).sum() >= 1


def test_noise_has_no_static_token():
  x = videos.features("noise", GRID)
  out = videos.program("prunevid", GRID, 20)(x, videos.aux(GRID))
  assign = np.asarray(out.assign)
  for row in range(20):
    frames = np.flatnonzero(assign == row) // 9
    assert len(set(frames.tolist())) == 1
  assert np.isin(np.arange(20), assign).all()


def test_too_many_sets_for_the_budget_leave_the_small_ones_out():
  out = videos.program("prunevid", GRID, 1)(
    videos.features("noise", GRID), videos.aux(GRID)
  )
  naive.check_rows(out, expected(videos.features("noise", GRID), GRID, 1), 63)
  assert (np.asarray(out.assign) == -1).sum() == 54


@pytest.mark.parametrize("ratio", [0.02, 0.1, 0.25, 0.5, 0.9, 1.0])
def test_the_bound_of_rows_holds_for_every_split_of_a_frame(ratio):
  counts = [n if n <= 14 else max(1, int(ratio * n)) for n in range(41)]
  most = max(counts[a] + counts[40 - a] for a in range(41))
  method = compressors.get("prunevid", exact_budget=False)
  assert method.rows((3, 5, 8), ratio) == min(3 * most, 120)


def test_places_are_taken_back_only_as_far_as_needed():
  first = jnp.array([0, 0, 0, 3, 3])
  static = jnp.ones([5, 2], bool)
  closeness = jnp.array([[0.9, 0.95]] * 3 + [[0.85, 0.99]] * 2)
  # Four averages stand for ten tokens; each place taken back adds 1 or 2.
  for num_keep, apart in [(4, []), (5, [(3, 0)]), (6, [(3, 0), (0, 0)])]:
    kept = np.asarray(segments.keep_apart(static, closeness, first, num_keep))
    lost = {(int(first[t]), int(n)) for t, n in np.argwhere(~kept)}
    assert lost == set(apart)
  assert math.prod(kept.shape) == 10
