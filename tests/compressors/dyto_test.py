"""DyTo's frame clusters and mergings against loops and graph libraries."""

import functools

import jax.numpy as jnp
import networkx as nx
import numpy as np
import pytest
from sklearn import metrics

from cacovid_jax import compressors, errors
from cacovid_jax.compressors import dyto
from tests.compressors import given, quick

LENGTHS = (1, 2, 7, 20)


@functools.cache
def _levels(num_frames, num_levels=4):
  del num_frames  # One program for each.
  return quick.jit(functools.partial(dyto.tw_finch, num_levels=num_levels))


def naive_levels(points, num_levels):
  """First-neighbour clustering weighted by time, frame by frame."""
  points = np.asarray(points, np.float64)
  num_frames = len(points)
  clusters = [[i] for i in range(num_frames)]
  out = []
  for _ in range(num_levels):
    mean = [points[c].mean(axis=0) for c in clusters]
    when = [np.mean([(i + 1) / num_frames for i in c]) for c in clusters]
    graph = nx.Graph()
    graph.add_nodes_from(range(len(clusters)))
    for a in range(len(clusters)):
      distance = []
      for b in range(len(clusters)):
        norm = np.linalg.norm(mean[a]) * np.linalg.norm(mean[b])
        cosine = mean[a] @ mean[b] / norm if norm > 0 else 0.0
        distance.append((1 - cosine) * abs(when[a] - when[b]))
      others = [b for b in range(len(clusters)) if b != a]
      if others:
        graph.add_edge(a, min(others, key=lambda b: (distance[b], b)))
    clusters = [
      sorted(sum((clusters[i] for i in c), []))
      for c in nx.connected_components(graph)
    ]
    clusters.sort(key=min)
    label = np.zeros(num_frames, int)
    for c in clusters:
      label[c] = min(c)
    out.append(label)
  return np.array(out)


@pytest.mark.parametrize("num_frames", LENGTHS)
def test_levels_equal_the_naive_clustering(num_frames):
  for seed in range(10):
    points = np.random.default_rng(seed).normal(size=[num_frames, 6])
    labels, counts = _levels(num_frames)(points.astype(np.float32))
    expected = naive_levels(points, 4)
    np.testing.assert_array_equal(labels, expected)
    np.testing.assert_array_equal(
      counts, [len(set(level)) for level in expected.tolist()]
    )


def test_every_level_has_at_most_half_of_the_clusters():
  for seed in range(10):
    points = np.random.default_rng(seed).normal(size=[20, 6])
    _, counts = _levels(20)(points.astype(np.float32))
    before = np.array([20, *counts[:-1].tolist()])
    assert np.all(counts <= np.maximum(1, before // 2))


def test_identical_frames_are_paired_with_the_first():
  # All distances are 0; the first frame is everyone's first neighbour.
  labels, counts = _levels(20)(np.ones([20, 6], np.float32))
  assert not np.any(labels)
  np.testing.assert_array_equal(counts, 1)


def test_planted_shots_are_pure_and_each_has_a_representative():
  rng = np.random.default_rng(0)
  shot = np.repeat(np.arange(5), 20)
  centres = rng.normal(size=[5, 16])
  points = (centres[shot] + 0.1 * rng.normal(size=[100, 16])).astype(np.float32)
  labels, _ = _levels(100, num_levels=2)(points)
  label = np.asarray(labels[1])
  assert metrics.homogeneity_score(shot, label) == pytest.approx(1.0)
  chosen = quick.jit(lambda x: dyto.representatives(x, 1, 25))(points)
  assert set(shot[np.asarray(chosen)].tolist()) == set(range(5))


def naive_representatives(label, fewest, most):
  clusters = [np.flatnonzero(label == c) for c in sorted(set(label.tolist()))]
  if len(clusters) <= 6:
    chosen = [i for c in clusters for i in c[: 12 // len(clusters)]]
  else:
    chosen = [c[len(c) // 2] if len(c) > 2 else c[-1] for c in clusters]
  chosen = np.sort(chosen)
  if len(chosen) > most:
    places = np.round(np.linspace(0, len(chosen) - 1, most)).astype(int)
    chosen = chosen[places]
  others = np.setdiff1d(np.arange(len(label)), chosen)
  short = max(0, fewest - len(chosen))
  joined = [
    others[j]
    for j in range(len(others))
    if short * (j + 1) // len(others) > short * j // len(others)
  ]
  return sorted([*chosen.tolist(), *joined])


@pytest.mark.parametrize(
  "bounds", [(1, 20), (1, 4), (15, 16), (20, 20), (1, 1)]
)
def test_representatives_equal_the_naive_rule(bounds):
  choose = quick.jit(lambda x: dyto.representatives(x, *bounds))
  for seed in range(6):
    # A walk has few clusters, noise has many.
    points = np.random.default_rng(seed).normal(size=[20, 6])
    if seed % 2:
      points = points.cumsum(axis=0)
    levels = naive_levels(points, 2)
    label = levels[1] if len(set(levels[1].tolist())) > 1 else levels[0]
    np.testing.assert_array_equal(
      np.flatnonzero(choose(points.astype(np.float32))),
      naive_representatives(label, *bounds),
    )


def naive_merge(x, count, reduce):
  """The published steps on a list of tokens; positions instead of order."""
  heads = next(h for h in (16, 8, 4, 2, 1) if x.shape[1] % h == 0)
  rows = [(x[i].astype(np.float64), 1, [i]) for i in range(len(x))]
  done = []
  while len(rows) > count - len(done) and len(rows) > 1:
    half = len(rows) // 2
    take = min(half, len(rows) - count)
    metric = np.array([r[0].reshape(heads, -1).mean(axis=0) for r in rows])
    metric /= np.linalg.norm(metric, axis=-1, keepdims=True)
    alike = metric[:half] @ metric[half:].T
    best = alike.argmax(axis=-1)
    order = np.argsort(-alike.max(axis=-1), kind="stable")
    merged, second = set(order[:take].tolist()), rows[half:]
    members = [[a for a in merged if best[a] == b] for b in range(len(second))]
    new = []
    for b, (value, mass, own) in enumerate(second):
      parts = [rows[a] for a in members[b]] + [(value, mass, own)]
      if reduce == "max":
        value = np.max([p[0] for p in parts], axis=0)
      else:
        value = np.average(
          [p[0] for p in parts], axis=0, weights=[p[1] for p in parts]
        )
      # The representative stays last.
      tokens = sum((p[2] for p in parts), [])
      new.append((value, sum(p[1] for p in parts), tokens))
    done += [rows[a] for a in range(half) if a not in merged]
    rows = new
  return sorted(done + rows, key=lambda r: r[2][-1])


@pytest.mark.parametrize("reduce", ["max", "mean"])
@pytest.mark.parametrize("area", [16, 9])
def test_merging_equals_the_naive_steps_for_every_count(area, reduce):
  merge = quick.jit(
    functools.partial(dyto.merge_frame, fewest=1, reduce=reduce)
  )
  x = np.random.default_rng(area).normal(size=[area, 32]).astype(np.float32)
  for count in range(1, area + 1):
    rows, into = merge(x, count)
    expected = naive_merge(x, count, reduce)
    assert len(expected) == count
    place = [tokens[-1] for _, _, tokens in expected]
    np.testing.assert_array_equal(
      np.flatnonzero(np.asarray(into) == np.arange(area)), place
    )
    np.testing.assert_allclose(
      rows[np.array(place)], [value for value, _, _ in expected], atol=1e-5
    )
    for _, _, tokens in expected:
      assert set(np.asarray(into)[tokens].tolist()) == {tokens[-1]}


def test_the_published_counts_of_1_to_25_frames():
  """576 tokens a frame and 3680 in all, merged at most twice."""
  merge = quick.jit(functools.partial(dyto.merge_frame, fewest=144))
  x = np.random.default_rng(0).normal(size=[576, 4]).astype(np.float32)
  for frames in range(1, 26):
    if frames <= 12:
      left = 576 - np.clip(576 - 3680 // frames, 0, 288)
    else:
      left = 288 - np.clip(288 - 3680 // frames, 0, 144)
    count = np.clip(3680 // frames, 144, 576)
    _, into = merge(x, count)
    assert len(set(np.asarray(into).tolist())) == left
    if frames >= 7:
      assert 3667 <= left * frames <= 3680


def test_bounds_of_frames_hold_the_budget():
  for area in (1, 2, 6, 9, 16, 196):
    for num_frames in (1, 2, 7, 32):
      num_video = area * num_frames
      for num_keep in range(1, num_video, max(1, num_video // 50)):
        grid = (num_frames, 1, area)
        fewest, most = dyto.frame_bounds(grid, num_keep, 25)
        assert 1 <= fewest <= most <= num_frames
        assert fewest * area >= num_keep
        assert most <= 25 or most == fewest
        assert num_keep // most >= 1


@pytest.mark.parametrize("num_keep", [9, 33])
def test_a_video_equals_its_steps_put_together(num_keep):
  grid, area = (8, 2, 3), 6
  compressor = compressors.get("dyto")
  run = quick.jit(
    lambda x: given.compress(compressor, x, grid=grid, num_keep=num_keep)
  )
  for seed in range(4):
    x = np.random.default_rng(seed).normal(size=[48, 32]).astype(np.float32)
    frames = x.reshape(8, area, 32)
    levels = naive_levels(frames.mean(axis=1), 2)
    label = levels[1] if len(set(levels[1].tolist())) > 1 else levels[0]
    bounds = dyto.frame_bounds(grid, num_keep, 25)
    chosen = naive_representatives(label, *bounds)
    share, rest = divmod(num_keep, len(chosen))
    expected = []
    for place, t in enumerate(chosen):
      for value, mass, tokens in naive_merge(
        frames[t], share + (place < rest), "max"
      ):
        expected.append((t * area + tokens[-1], value, mass))
    out = run(x)
    np.testing.assert_array_equal(out.index, [e[0] for e in expected])
    np.testing.assert_allclose(
      out.features, [e[1] for e in expected], atol=1e-6
    )
    np.testing.assert_array_equal(out.mass, [e[2] for e in expected])
    frame = np.arange(48) // area
    np.testing.assert_array_equal(out.assign >= 0, np.isin(frame, chosen))


@pytest.mark.parametrize("option", [{"reduce": "sum"}, {"max_frames": 0}])
def test_options_out_of_range_are_one_line(option):
  with pytest.raises(
    errors.UserError, match="dyto: .*(use|at least 1)"
  ) as caught:
    given.compress(
      compressors.get("dyto", **option),
      jnp.ones([12, 8]),
      grid=(2, 2, 3),
      num_keep=3,
    )
  assert "\n" not in str(caught.value)
