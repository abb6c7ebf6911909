"""Components and spanning forests against networkx, SciPy and plain loops."""

import functools

import jax
import jax.numpy as jnp
import networkx as nx
import numpy as np
import pytest
from scipy.sparse import csgraph

from cacovid_jax.compressors.math import clustering
from tests.compressors import quick

# Graphs of all sizes are padded to this, so that one program serves them.
SIZE = 48
# More edges than any graph below has.
EDGES = SIZE * SIZE

_components = quick.jit(clustering.connected_components)
_of_edges = quick.jit(clustering.components_of_edges, static_argnums=3)
_forest = quick.jit(clustering.maximum_spanning_forest)
_cut = quick.jit(clustering.cut)


def graphs():
  """Returns 100 adjacency matrices, random and degenerate ones."""
  rng = np.random.default_rng(0)
  out = {
    "empty": np.zeros([SIZE, SIZE], bool),
    "complete": ~np.eye(SIZE, dtype=bool),
    "one_node": np.zeros([1, 1], bool),
    "loops_only": np.eye(7, dtype=bool),
  }
  for n in (2, 3, 17, SIZE):
    chain = np.zeros([n, n], bool)
    order = rng.permutation(n)
    for name, path in {
      "rising": np.arange(n),
      "falling": np.arange(n)[::-1],
      "mixed": order,
      "star": np.insert(np.arange(n), range(1, n), n // 2),
    }.items():
      link = chain.copy()
      link[path[:-1], path[1:]] = True
      out[f"{name}_{n}"] = link | link.T
  while len(out) < 100:
    n = int(rng.integers(2, SIZE + 1))
    link = rng.random([n, n]) < rng.choice([0.5, 1.0, 1.5, 3.0]) / n
    out[f"random_{len(out)}"] = link | link.T
  return out


GRAPHS = graphs()


def smallest_members(groups, n):
  label = np.arange(n)
  for group in groups:
    label[list(group)] = min(group)
  return label


@functools.cache
def expected_labels(name):
  graph = GRAPHS[name]
  by_networkx = smallest_members(
    nx.connected_components(nx.from_numpy_array(graph)), len(graph)
  )
  count, label = csgraph.connected_components(graph, directed=False)
  by_scipy = smallest_members(
    [np.flatnonzero(label == c) for c in range(count)], len(graph)
  )
  np.testing.assert_array_equal(by_networkx, by_scipy)
  return by_networkx


def test_labels_equal_networkx_and_scipy_on_a_hundred_graphs():
  assert len(GRAPHS) == 100
  for name, graph in GRAPHS.items():
    n = len(graph)
    padded = np.pad(graph, (0, SIZE - n))
    label = np.asarray(_components(padded))
    np.testing.assert_array_equal(label[:n], expected_labels(name), name)
    np.testing.assert_array_equal(label[n:], np.arange(n, SIZE), name)


def test_labels_of_edges_equal_those_of_the_matrix():
  for name, graph in GRAPHS.items():
    first, second = np.nonzero(np.triu(graph))
    behind = EDGES - len(first)
    # What stands behind the edges would link everything if it were read.
    label = _of_edges(
      np.concatenate([first, np.arange(behind) % SIZE]).astype(np.int32),
      np.concatenate([second, np.zeros(behind)]).astype(np.int32),
      np.arange(EDGES) < len(first),
      SIZE,
    )
    np.testing.assert_array_equal(
      label[: len(graph)], expected_labels(name), name
    )


def test_a_batch_of_graphs_equals_single_ones():
  names = ["mixed_48", "empty", "complete", "random_60"]
  padded = jnp.stack(
    [np.pad(GRAPHS[n], (0, SIZE - len(GRAPHS[n]))) for n in names]
  )
  batched = quick.jit(jax.vmap(clustering.connected_components))(padded)
  for one, label in zip(padded, batched, strict=True):
    np.testing.assert_array_equal(_components(one), label)


@pytest.mark.parametrize("kind", ["chain", "edges"])
def test_a_chain_of_thousands_ends_after_few_rounds(kind):
  """Passing minima along edges would take as many rounds as the chain has."""
  n = 3000
  order = np.random.default_rng(1).permutation(n).astype(np.int32)
  rounds = []
  if kind == "chain":
    link = np.zeros([n, n], bool)
    link[order[:-1], order[1:]] = True
    link = jnp.asarray(link | link.T)

    def hook(label):
      rounds.append(1)
      return clustering._hook_neighbours(link, label)
  else:
    first, second = jnp.asarray(order[:-1]), jnp.asarray(order[1:])

    def hook(label):
      rounds.append(1)
      return clustering._hook_edges(first, second, label)

  label = np.arange(n)
  while True:
    hooked = np.asarray(hook(jnp.asarray(label)))
    hooked = hooked[hooked]
    if np.array_equal(hooked, label):
      break
    label = hooked
  assert not label.any()
  assert len(rounds) <= 3 * np.log2(n)


def naive_forest(similarity, valid):
  """Kruskal over edges by similarity, then by their ends."""
  n = len(similarity)
  edges = [
    (-similarity[i, j], i, j)
    for i in range(n)
    for j in range(i + 1, n)
    if valid[i] and valid[j] and similarity[i, j] > -np.inf
  ]
  label = list(range(n))
  kept = []
  for weight, i, j in sorted(edges):
    if label[i] != label[j]:
      old, new = label[i], label[j]
      label = [new if x == old else x for x in label]
      kept.append((-weight, i, j))
  return kept


def similarities():
  rng = np.random.default_rng(2)
  out = {}
  for seed in range(12):
    x = rng.normal(size=[SIZE, 3])
    x /= np.linalg.norm(x, axis=-1, keepdims=True)
    out[f"points_{seed}"] = x @ x.T
  out["ties"] = rng.integers(0, 3, [SIZE, SIZE]).astype(float)
  out["all_equal"] = np.ones([SIZE, SIZE])
  out["no_edges"] = np.full([SIZE, SIZE], -np.inf)
  parts = rng.normal(size=[SIZE, SIZE])
  parts[:20, 20:] = parts[20:, :20] = -np.inf
  out["two_parts"] = parts
  return {k: np.maximum(s, s.T).astype(np.float32) for k, s in out.items()}


SIMILARITIES = similarities()


@pytest.mark.parametrize("num_valid", [SIZE, 31, 1, 0])
def test_the_forest_equals_kruskal(num_valid):
  rng = np.random.default_rng(num_valid)
  for name, similarity in SIMILARITIES.items():
    valid = np.zeros(SIZE, bool)
    valid[rng.permutation(SIZE)[:num_valid]] = True
    forest = _forest(similarity, valid)
    filled = np.asarray(forest.weight) > -np.inf
    found = sorted(
      (float(w), int(min(a, b)), int(max(a, b)))
      for w, a, b in zip(
        np.asarray(forest.weight)[filled],
        np.asarray(forest.first)[filled],
        np.asarray(forest.second)[filled],
        strict=True,
      )
    )
    expected = sorted(
      (float(w), i, j) for w, i, j in naive_forest(similarity, valid)
    )
    assert found == expected, name


def test_the_forest_weighs_as_much_as_scipy_s():
  for seed in range(12):
    similarity = SIMILARITIES[f"points_{seed}"]
    weight = np.asarray(_forest(similarity).weight)
    # SciPy takes the smallest distances and reads 0 as no edge.
    tree = csgraph.minimum_spanning_tree(2.0 - similarity.astype(np.float64))
    np.testing.assert_allclose(
      weight[weight > -np.inf].sum(), (2.0 - tree.data).sum(), rtol=1e-5
    )


def test_cutting_a_tree_leaves_exactly_k_components():
  for name, similarity in SIMILARITIES.items():
    forest = _forest(similarity)
    trees = SIZE - int(np.sum(np.asarray(forest.weight) > -np.inf))
    for num_keep in (1, 2, 5, SIZE // 2, SIZE):
      label = np.asarray(_cut(forest, SIZE - num_keep))
      assert len(set(label.tolist())) == max(num_keep, trees), name
      np.testing.assert_array_equal(label[label], label)


def test_the_cut_is_the_partition_of_the_threshold_with_as_many_components():
  for seed in range(12):
    similarity = SIMILARITIES[f"points_{seed}"]
    forest = _forest(similarity)
    for tau in (-0.5, 0.5, 0.9, 0.99, 1.1):
      graph = nx.from_numpy_array(similarity > tau)
      groups = list(nx.connected_components(graph))
      np.testing.assert_array_equal(
        _cut(forest, SIZE - len(groups)), smallest_members(groups, SIZE)
      )


def test_best_member_equals_a_loop():
  rng = np.random.default_rng(4)
  label = rng.integers(0, 9, 40).astype(np.int32)
  value = rng.integers(0, 3, 40).astype(np.int32)
  tie = rng.permutation(40).astype(np.int32)
  label[label == 2] = 3
  for order in (None, tie):
    expected = [
      max(
        np.flatnonzero(label == group),
        key=lambda i: (value[i], -(i if order is None else order[i])),
        default=40,
      )
      for group in range(8)
    ]
    found = clustering.best_member(value, label, 8, tie=order)
    np.testing.assert_array_equal(found, expected)


def test_representatives_are_distinct_though_groups_are_empty():
  label = np.array([4, 4, 1, 1, 4, 1], np.int32)
  closeness = np.array([0.1, 0.9, 0.5, 0.5, 0.2, 0.4], np.float32)
  # Group 1 takes token 2, the first of two; group 4 takes token 1; the empty
  # ones the tokens left over: 0, 3, 4.
  found = clustering.distinct_representatives(closeness, label, 5)
  np.testing.assert_array_equal(found, [0, 2, 3, 4, 1])
