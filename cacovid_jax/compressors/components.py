"""Connected components, maximum spanning forests, and their representatives.

All with static shapes: a partition of n nodes is a label int32[n] per node, one
of the members of its component, so that the node with `label[i] == i` stands
for the component. Rounds that depend on the data run in a `while_loop`; hooking
roots onto roots and halving the way to them takes about log n rounds, where
passing minima along edges would take as many as a chain is long.

Axes: n nodes, m edges, K groups.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


def connected_components(adjacency: jax.Array) -> jax.Array:
  """Returns int32[n] component labels, the smallest member of each.

  Args:
    adjacency: bool[n, n], symmetric; the diagonal has no influence.
  """
  return _until_stable(
    lambda label: _hook_neighbours(adjacency, label), adjacency.shape[0]
  )


def _hook_neighbours(adjacency, label):
  """Returns int32[n], the smallest label next to each node or its tree."""
  others = jnp.where(adjacency, label[None, :], label.shape[0])
  below = jnp.minimum(jnp.min(others, axis=-1), label)
  # Written to the root as well, so that its whole tree follows at once.
  return jnp.minimum(label.at[label].min(below), below)


def components_of_edges(
  first: jax.Array, second: jax.Array, present: jax.Array, num_nodes: int
) -> jax.Array:
  """Returns int32[n] component labels, the smallest member of each.

  Args:
    first: int32[m] one end of each edge.
    second: int32[m] the other end.
    present: bool[m], False where there is no edge.
    num_nodes: n, static.
  """
  first = jnp.where(present, first, 0)
  second = jnp.where(present, second, 0)

  return _until_stable(
    lambda label: _hook_edges(first, second, label), num_nodes
  )


def _hook_edges(first, second, label):
  """As `_hook_neighbours`, of a list of edges."""
  a, b = label[first], label[second]
  below = jnp.minimum(a, b)
  label = label.at[a].min(below).at[b].min(below)
  return label.at[first].min(below).at[second].min(below)


def _until_stable(hook, n):
  start = jnp.arange(n, dtype=jnp.int32)

  def step(state):
    label, _ = state
    hooked = hook(label)
    hooked = hooked[hooked]
    return hooked, jnp.any(hooked != label)

  state = (start, jnp.array(True))
  label, _ = jax.lax.while_loop(lambda state: state[1], step, state)
  return label


class Forest(NamedTuple):
  """A maximum spanning forest; edges lie in n slots in no special order.

  Attributes:
    first: int32[n] one end of the slot's edge.
    second: int32[n] the other end.
    weight: float32[n] its similarity, -inf where the slot is empty.
  """

  first: jax.Array
  second: jax.Array
  weight: jax.Array


def maximum_spanning_forest(
  similarity: jax.Array, valid: jax.Array | None = None
) -> Forest:
  """Returns the spanning forest of largest total similarity (Boruvka).

  In each round every tree takes the best edge that leaves it, all at once.
  Edges are ordered by similarity, then by the smaller and the larger end, so
  equal similarities give one well-defined forest.

  Args:
    similarity: float32[n, n], symmetric to the last bit; -inf for no edge.
    valid: bool[n], the nodes that are there; None for all. The others are
      trees of their own.
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

  Args:
    forest: of n slots.
    num_edges: int32[], how many edges to keep; may exceed what there is.
  """
  n = forest.weight.shape[0]
  low = jnp.minimum(forest.first, forest.second)
  high = jnp.maximum(forest.first, forest.second)
  order = jnp.lexsort((high, low, -forest.weight))
  rank = jnp.zeros([n], jnp.int32).at[order].set(jnp.arange(n))
  keep = (rank < num_edges) & (forest.weight > -jnp.inf)
  return components_of_edges(forest.first, forest.second, keep, n)


def best_member(
  value: jax.Array, label: jax.Array, num_groups: int, tie=None
) -> jax.Array:
  """Returns int32[K], the member of each group with the largest value.

  Among equal values the lowest tie, then the lowest index. Groups without
  members get n.

  Args:
    value: [n] what to compare.
    label: int32[n]; labels of K or more are left out.
    num_groups: K, static.
    tie: int32[n] distinct numbers below n; None for the index.
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


def distinct_representatives(
  closeness: jax.Array, label: jax.Array, num_groups: int
) -> jax.Array:
  """Returns int32[K] distinct tokens, each group's closest member.

  A group without members gets a token that represents no group, the j-th such
  group the j-th such token, since every row must have a place in the video.

  Args:
    closeness: float[n] in [-1, 1] of each token to its own group. The two
      members of a pair are equally close to their mean, but for rounding:
      differences below 2e-5 count as none, and the first one wins.
    label: int32[n] group of each token, below K.
    num_groups: K, static, at most n.
  """
  n = closeness.shape[0]
  found = best_member(jnp.round(closeness * 2**16), label, num_groups)
  empty = found == n
  used = jnp.zeros([n], bool).at[found].set(True, mode="drop")
  (spare,) = jnp.nonzero(~used, size=num_groups, fill_value=n)
  place = jnp.cumsum(empty) - 1
  return jnp.where(empty, spare[place], found).astype(jnp.int32)
