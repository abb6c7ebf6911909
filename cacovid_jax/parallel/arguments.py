"""Weights as fewer arguments of a compiled program.

An accelerator waits while the host goes through a program's arguments: some
microseconds for each array, whatever its size (one H200, jax 0.11.2: 2 to 3 ms
for the 400 to 700 arrays of a 7B model before the first kernel starts). Scales
and biases, most of them, are therefore joined, once, and cut inside.
"""

import functools
import weakref
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

_LEAST = 16  # Arrays below which nothing is gained.


class Joined(struct.PyTreeNode):
  """A tree of arrays, whose vectors are one array for each dtype."""

  others: tuple[jax.Array, ...]
  vectors: dict[str, jax.Array]  # By dtype.
  treedef: Any = struct.field(pytree_node=False)
  # Of each leaf: (dtype, where its vector begins and ends), None for another.
  places: tuple[Any, ...] = struct.field(pytree_node=False)

  def tree(self):
    """Returns the tree; called inside a compiled function."""
    others = iter(self.others)

    def leaf(place):
      if place is None:
        return next(others)
      dtype, start, end = place
      return self.vectors[dtype][start:end]

    return jax.tree.unflatten(self.treedef, map(leaf, self.places))


class _Known(NamedTuple):
  """What was joined of a tree."""

  seen: tuple[Any, ...] = ()  # Weak references to its leaves.
  others: tuple[int, ...] = ()  # Places of those that were not joined.
  vectors: Mapping[str, jax.Array] = {}
  places: tuple[Any, ...] = ()  # As of `Joined`.


class Joiner:
  """Joins the vectors of trees, once for the tree that came last.

  It keeps none of the arrays but what it joined. Threads may share it.
  """

  def __init__(self):
    self._known = _Known()

  def __call__(self, tree):
    """Returns the `Joined` of a tree, or the tree as it is.

    The latter where there are few arrays, or some are not on one device.
    """
    leaves, treedef = jax.tree.flatten(tree)
    if len(leaves) < _LEAST:
      return tree
    known = self._known  # Read once: another thread may change it.
    same = len(leaves) == len(known.seen) and all(
      seen() is leaf for seen, leaf in zip(known.seen, leaves, strict=True)
    )
    if not same:
      if not all(map(_is_on_one_device, leaves)):
        return tree
      known = self._known = _join(leaves)
    others = tuple(leaves[n] for n in known.others)
    return Joined(others, known.vectors, treedef, known.places)


def _is_on_one_device(leaf) -> bool:
  if isinstance(leaf, jax.core.Tracer) or not isinstance(leaf, jax.Array):
    return False
  return len(leaf.sharding.device_set) == 1


def _join(leaves) -> _Known:
  parts, ends, places = {}, {}, []
  for leaf in leaves:
    place = None
    if leaf.ndim == 1:
      start = ends.get(dtype := str(leaf.dtype), 0)
      ends[dtype] = start + len(leaf)
      parts.setdefault(dtype, []).append(leaf)
      place = dtype, start, ends[dtype]
    places.append(place)
  return _Known(
    tuple(map(weakref.ref, leaves)),
    tuple(n for n, place in enumerate(places) if place is None),
    {name: jnp.concatenate(own) for name, own in parts.items()},
    tuple(places),
  )


class Joining:
  """A jitted function, some of whose arguments are handed over joined."""

  def __init__(self, jit: Callable, function: Callable, weights):
    """`jit` compiles; `weights` are places of arguments, trees of arrays."""
    self._joiners = {place: Joiner() for place in weights}

    @functools.wraps(function)
    def run(*args):
      return function(
        *(arg.tree() if isinstance(arg, Joined) else arg for arg in args)
      )

    self._run = jit(run)

  def __call__(self, *args):
    joined = (
      self._joiners[n](arg) if n in self._joiners else arg
      for n, arg in enumerate(args)
    )
    return self._run(*joined)

  def _cache_size(self) -> int:  # As jitted functions have it.
    return self._run._cache_size()
