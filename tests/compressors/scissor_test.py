"""LLaVA-Scissor's components against a loop written from the paper's steps."""

import functools

import jax.numpy as jnp
import networkx as nx
import numpy as np
import pytest

from cacovid_jax import compressors, errors
from tests.compressors import given, quick, selections

unit = selections.unit
GRID = (4, 2, 3)
AREA, NUM_VIDEO = 6, 24


def clustered(seed, noise=0.4, grid=GRID):
  """Tokens around few directions, so that components of all sizes appear."""
  rng = np.random.default_rng(seed)
  num_video = grid[0] * grid[1] * grid[2]
  centres = rng.normal(size=[5, 8])
  x = centres[rng.integers(0, 5, num_video)]
  return (x + noise * rng.normal(size=[num_video, 8])).astype(np.float32)


def melt(points, tau):
  """One stage: groups of linked points, by their hub, and the groups' means."""
  graph = unit(points) @ unit(points).T > tau
  np.fill_diagonal(graph, False)
  degree = graph.sum(axis=-1)
  groups = [
    sorted(g) for g in nx.connected_components(nx.from_numpy_array(graph))
  ]
  hubs = [max(g, key=lambda i: (degree[i], -i)) for g in groups]
  order = np.argsort(hubs)
  groups = [groups[i] for i in order]
  means = np.array([points[g].mean(axis=0) for g in groups])
  return groups, means, [hubs[i] for i in order]


def naive(features, tau, num_keep):
  """The three steps; components of equal mass are kept by their first token."""
  x = np.asarray(features, np.float64)
  tokens, means, hubs = [], [], []
  for t in range(GRID[0]):
    frame = x[t * AREA : (t + 1) * AREA]
    groups, mean, hub = melt(frame, tau)
    tokens += [[t * AREA + i for i in g] for g in groups]
    means += list(mean)
    hubs += [t * AREA + i for i in hub]
  groups, reps, top = melt(np.array(means), tau)
  members = [sorted(sum((tokens[i] for i in g), [])) for g in groups]
  index = [hubs[i] for i in top]
  kept = sorted(
    range(len(groups)), key=lambda k: (-len(members[k]), members[k][0])
  )[:num_keep]
  kept.sort(key=lambda k: index[k])
  reps = reps[kept]
  assign = np.argmax(unit(x) @ unit(reps).T, axis=-1)
  rows = [
    (reps[k] + x[assign == k].sum(axis=0)) / (1 + np.sum(assign == k))
    for k in range(len(kept))
  ]
  mass = [np.sum(assign == k) for k in range(len(kept))]
  return np.array(index)[kept], np.array(rows), assign, mass, len(groups)


@functools.cache
def thresholds(num_keep, mode):
  """A program with tau as data: one compilation for all thresholds."""
  return quick.jit(
    lambda x, tau: given.compress(
      compressors.get("scissor", mode=mode, tau=tau),
      x,
      grid=GRID,
      num_keep=num_keep,
    )
  )


@pytest.mark.parametrize("tau", [-1.0, 0.3, 0.7, 0.9, 0.97, 1.0])
def test_threshold_mode_equals_the_loop(tau):
  for seed in range(8):
    features = clustered(seed)
    index, rows, assign, mass, count = naive(features, tau, 9)
    out = thresholds(9, "tau")(features, tau)
    num_valid = min(count, 9)
    assert int(out.mask.sum()) == num_valid
    np.testing.assert_array_equal(out.index[:num_valid], index)
    np.testing.assert_array_equal(out.assign, assign)
    np.testing.assert_array_equal(out.mass[:num_valid], mass)
    np.testing.assert_allclose(out.features[:num_valid], rows, atol=1e-5)
    assert out.mass.sum() == NUM_VIDEO
    # Padding.
    assert (np.asarray(out.index[num_valid:]) == NUM_VIDEO).all()
    assert not np.any(out.features[num_valid:])


def test_tree_mode_equals_threshold_mode_where_that_meets_the_budget():
  met = 0
  for seed in range(30):
    features = clustered(seed)
    for tau in (0.75, 0.9):
      if naive(features, tau, NUM_VIDEO)[-1] != 9:
        continue
      met += 1
      by_tree = thresholds(9, "mst")(features, tau)
      by_threshold = thresholds(9, "tau")(features, tau)
      for name, value in by_tree._asdict().items():
        expected = getattr(by_threshold, name)
        if name == "features":  # Sums of two programs may round differently.
          np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6)
        else:
          np.testing.assert_array_equal(value, expected)
  assert met >= 3


@pytest.mark.parametrize("tau", [-1.0, 0.3, 0.9, 1.0])
def test_tree_mode_has_exactly_k_rows_at_every_threshold(tau):
  for seed in range(5):
    out = thresholds(9, "mst")(clustered(seed), tau)
    assert np.asarray(out.mask).all()
    assert len(set(np.asarray(out.index).tolist())) == 9
    assert out.mass.sum() == NUM_VIDEO


def test_bisection_keeps_the_largest_of_the_fewest_components_that_suffice():
  for seed in range(6):
    features = clustered(seed)
    out = thresholds(9, "bisect")(features, 0.0)
    assert np.asarray(out.mask).all()
    # The same rule in plain numbers.
    low, high = -1.0, 1.0
    for _ in range(16):
      tau = (low + high) / 2
      enough = naive(features, tau, NUM_VIDEO)[-1] >= 9
      low, high = (low, tau) if enough else (tau, high)
    np.testing.assert_array_equal(out.index, naive(features, high, 9)[0])


@pytest.mark.parametrize("mode", ["mst", "tau"])
def test_planted_regions_are_recovered(mode):
  rng = np.random.default_rng(0)
  region = np.tile([0, 0, 1, 1, 2, 2], GRID[0])  # The same in every frame.
  centres = np.eye(8)[:3]
  x = centres[region] + 0.02 * rng.normal(size=[NUM_VIDEO, 8])
  out = thresholds(3, mode)(x.astype(np.float32), 0.9)
  np.testing.assert_array_equal(out.mass, [8, 8, 8])
  rows = np.asarray(out.assign)
  for r in range(3):
    assert len(set(rows[region == r].tolist())) == 1
  assert len(set(rows.tolist())) == 3


def test_order_of_tokens_changes_the_labels_only():
  features = clustered(3)
  rng = np.random.default_rng(1)
  order = np.concatenate(
    [t * AREA + rng.permutation(AREA) for t in rng.permutation(GRID[0])]
  )
  straight = thresholds(9, "mst")(features, 0.9)
  shuffled = thresholds(9, "mst")(features[order], 0.9)
  together = np.asarray(straight.assign)[order]
  np.testing.assert_array_equal(
    together[:, None] == together[None],
    np.asarray(shuffled.assign)[:, None] == np.asarray(shuffled.assign)[None],
  )


def test_without_exact_budget_the_threshold_decides():
  free = compressors.get("scissor", exact_budget=False)
  run = quick.jit(
    lambda x: given.compress(free, x, grid=GRID, num_keep=12, ratio=0.5)
  )
  assert int(run(clustered(0, noise=0.01)).mask.sum()) == 5


def test_unknown_mode_is_one_line():
  with pytest.raises(errors.UserError, match="'mst', 'bisect' or 'tau'") as e:
    given.compress(
      compressors.get("scissor", mode="greedy"),
      jnp.ones([24, 8]),
      grid=GRID,
      num_keep=3,
    )
  assert "\n" not in str(e.value)
