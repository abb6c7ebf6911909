"""Clusters of tokens: density peaks, connected components, spanning forests.

Density peaks cluster the points of masked sets, each on its own: a point is
dense if its k nearest points, itself included, are near; it is separate if the
nearest denser point is far. The largest products of the two are the centres,
every other point joins the nearest. Of equals the earlier point comes first.
Paper: https://doi.org/10.1016/j.knosys.2016.02.001

Axes: n points or nodes, m edges, K groups.
"""

import functools
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from cacovid_jax.compressors import selection_ops
from cacovid_jax.models import token_grid
from cacovid_jax.policy import diversity


class Clusters(NamedTuple):
  """Clusters of disjoint sets of points, some of which may not be there."""

  # float32[n], log(density * separation); -inf where a point is not there, and
  # where it coincides with a denser one.
  score: jax.Array
  # int32[n], place of a point's score in its set, from 0; n if not there. The
  # centres are the ranks below the number of clusters.
  rank: jax.Array
  centre: jax.Array  # int32[n], the one that a point joins; n if not there.
  label: jax.Array  # int32[n], rank of that centre, -1 if not there.


def cluster(x, num_clusters, *, num_neighbours=7, sets=None):
  """Clusters points by their Euclidean distance over the root of D.

  Arguments but x float[n, D] are those of `from_distances`.
  """
  chex.assert_rank(x, 2)
  squared = diversity.squared_distances(x, None if sets is None else sets >= 0)
  return from_distances(
    squared, num_clusters, num_neighbours=num_neighbours, sets=sets
  )


def from_distances(squared, num_clusters, *, num_neighbours=7, sets=None):
  """Returns the `Clusters` of points of squared distances float32[n, n].

  Args:
    squared: symmetric, zero diagonal.
    num_clusters: of a set; an int, an int32[], or int32[n] which gives at each
      point the number of its set. Below 1 counts as 1; a set of fewer points
      has each point in a cluster of its own.
    num_neighbours: k; a set of fewer points has as many neighbours only.
    sets: int32[n], negative where a point is not there, None for one set;
      points of different sets do not see each other.
  """
  chex.assert_rank(squared, 2)
  n = squared.shape[0]
  points = jnp.arange(n, dtype=jnp.int32)
  if sets is None:
    sets = jnp.zeros([n], jnp.int32)
  present = sets >= 0
  together = (sets[:, None] == sets[None, :]) & present[:, None] & present

  # Logarithms of the densities: their order is the same, and they do not
  # vanish where all points are far apart.
  reach = jnp.where(together, -squared, -jnp.inf)
  nearest, _ = jax.lax.top_k(reach, min(num_neighbours, n))
  size = together.sum(axis=-1)
  near = jnp.arange(nearest.shape[1]) < size[:, None]
  density = jnp.where(near, nearest, 0.0).sum(axis=-1)
  density = density / jnp.maximum(near.sum(axis=-1), 1)

  denser = together & selection_ops.before(density)
  closest = jnp.min(jnp.where(denser, squared, jnp.inf), axis=-1)
  widest = jnp.where(together, squared, 0.0).max(axis=-1)
  widest = jnp.where(together, widest[None, :], 0.0).max(axis=-1)
  separation = jnp.where(denser.any(axis=-1), closest, widest)
  score = density + 0.5 * jnp.log(separation)
  score = jnp.where(present, score, -jnp.inf)

  rank = (together & selection_ops.before(score)).sum(axis=-1, dtype=jnp.int32)
  num_clusters = jnp.maximum(jnp.asarray(num_clusters, jnp.int32), 1)
  is_centre = present & (rank < num_clusters)
  reach = jnp.where(together & is_centre[None, :], squared, jnp.inf)
  centre = jnp.argmin(reach, axis=-1).astype(jnp.int32)
  # A centre that coincides with an earlier one keeps its own cluster.
  centre = jnp.where(is_centre, points, centre)
  return Clusters(
    score=score,
    rank=jnp.where(present, rank, n),
    centre=jnp.where(present, centre, n),
    label=jnp.where(present, rank[centre], -1),
  )


def connected_components(adjacency: jax.Array) -> jax.Array:
  """Returns int32[n], the least node of each one's component, of bool[n, n]."""
  hook = functools.partial(_hook_neighbours, adjacency)
  return _until_stable(hook, len(adjacency))


def _hook_neighbours(adjacency, label):
  """Returns int32[n], the smallest label next to each node or its tree."""
  others = jnp.where(adjacency, label[None, :], len(label))
  below = jnp.minimum(jnp.min(others, axis=-1), label)
  # Written to the root as well, so that its whole tree follows at once.
  return jnp.minimum(label.at[label].min(below), below)


def components_of_edges(first, second, present, num_nodes: int) -> jax.Array:
  """Returns the same of edges int32[m] to int32[m], where bool[m] is True."""
  first = jnp.where(present, first, 0)
  second = jnp.where(present, second, 0)
  return _until_stable(functools.partial(_hook_edges, first, second), num_nodes)


def _hook_edges(first, second, label):
  """As `_hook_neighbours`, of a list of edges."""
  a, b = label[first], label[second]
  below = jnp.minimum(a, b)
  label = label.at[a].min(below).at[b].min(below)
  return label.at[first].min(below).at[second].min(below)


def _until_stable(hook, n):
  # Hooking roots onto roots and halving the way to them takes about log n
  # rounds, where passing minima along edges would take as many as a chain has.
  def step(state):
    label, _ = state
    hooked = hook(label)
    hooked = hooked[hooked]
    return hooked, jnp.any(hooked != label)

  state = (jnp.arange(n, dtype=jnp.int32), jnp.array(True))
  return jax.lax.while_loop(lambda state: state[1], step, state)[0]


class Forest(NamedTuple):
  """Edges in n slots: two ends int32[n], and a weight, -inf if it is empty."""

  first: jax.Array
  second: jax.Array
  weight: jax.Array


def maximum_spanning_forest(similarity, valid=None) -> Forest:
  """Returns the spanning forest of largest total similarity (Boruvka).

  Edges are ordered by similarity float32[n, n], symmetric to the last bit, -inf
  for no edge, then by the smaller and the larger end, so that there is one such
  forest. Nodes that are not `valid` bool[n] are trees of their own.
  """
  n = similarity.shape[0]
  node = jnp.arange(n, dtype=jnp.int32)
  if valid is None:
    valid = jnp.ones([n], bool)

  def grow(state):
    label, forest, _ = state
    outside = label[:, None] != label[None, :]
    outside &= valid[:, None] & valid[None, :]
    weight = jnp.where(outside, similarity, -jnp.inf)
    # The first of several best ends also makes the first edge in the order.
    other = jnp.argmax(weight, axis=-1).astype(jnp.int32)
    weight = jnp.max(weight, axis=-1)
    best = jax.ops.segment_max(weight, label, num_segments=n)
    leads = (weight == best[label]) & (weight > -jnp.inf)
    key = jnp.minimum(node, other) * n + jnp.maximum(node, other)
    key = jnp.where(leads, key, n * n)
    least = jax.ops.segment_min(key, label, num_segments=n)
    # One node of a tree offers its best edge: both ends of an edge lie in
    # different trees, hence no second node of this tree has the same key.
    offers = leads & (key == least[label])
    slot = jnp.where(offers, label, n)
    target = node.at[slot].set(label[other], mode="drop")
    # Trees hang onto the tree that their edge leads to. The only circle is a
    # pair that took the same edge: its smaller tree stays a root.
    root = (target[target] == node) & (node <= target)
    parent = jnp.where(root, node, target)
    hangs = offers & ~root[label]
    slot = jnp.where(hangs, label, n)
    forest = Forest(
      forest.first.at[slot].set(node, mode="drop"),
      forest.second.at[slot].set(other, mode="drop"),
      forest.weight.at[slot].set(weight, mode="drop"),
    )
    for _ in range(max(n - 1, 1).bit_length()):
      parent = parent[parent]
    return parent[label], forest, jnp.any(hangs)

  forest = Forest(node, node, jnp.full([n], -jnp.inf, jnp.float32))
  state = (node, forest, jnp.array(n > 1))
  _, forest, _ = jax.lax.while_loop(lambda state: state[2], grow, state)
  return forest


def cut(forest: Forest, num_edges: jax.Array) -> jax.Array:
  """Returns int32[n] labels of the forest's `num_edges` strongest edges.

  With s valid nodes in one tree, s - K edges leave exactly K components: those
  of the graph of all similarities above a threshold that K components have.
  Equal weights are cut in the order of the edges' ends.
  """
  low = jnp.minimum(forest.first, forest.second)
  high = jnp.maximum(forest.first, forest.second)
  order = jnp.lexsort((high, low, -forest.weight))
  keep = selection_ops.inverse(order) < num_edges
  keep &= forest.weight > -jnp.inf
  return components_of_edges(forest.first, forest.second, keep, len(order))


def best_member(value, label, num_groups: int, tie=None) -> jax.Array:
  """Returns int32[K], the member of each group with the largest value [n].

  Among equal values the one of lowest `tie` int32[n], distinct numbers below n;
  None for the index. Groups without members get n; labels int32[n] of K or
  more are left out.
  """
  n = value.shape[0]
  node = jnp.arange(n, dtype=jnp.int32)
  inside = label < num_groups
  label = jnp.where(inside, label, num_groups)
  if tie is None:
    tie = node
  best = jax.ops.segment_max(value, label, num_segments=num_groups + 1)
  leads = inside & (value == best[label])
  tie = jnp.where(leads, tie, n)
  least = jax.ops.segment_min(tie, label, num_segments=num_groups + 1)
  slot = jnp.where(leads & (tie == least[label]), label, num_groups)
  found = jnp.full([num_groups + 1], n, jnp.int32).at[slot].set(node)
  return found[:num_groups]


def distinct_representatives(closeness, label, num_groups: int) -> jax.Array:
  """Returns int32[K] distinct tokens, each group's closest member.

  Of closeness float[n] in [-1, 1] of each token to its own group, label
  int32[n]. The j-th group without members gets the j-th token that represents
  no group, since every row must have a place in the video. K, static, is at
  most n.
  """
  n = closeness.shape[0]
  # The two members of a pair are equally close to their mean, but for rounding.
  found = best_member(jnp.round(closeness * 2**16), label, num_groups)
  empty = found == n
  used = jnp.zeros([n], bool).at[found].set(True, mode="drop")
  spare = token_grid.first(~used, num_groups)
  place = jnp.cumsum(empty) - 1
  return jnp.where(empty, spare[place], found).astype(jnp.int32)
