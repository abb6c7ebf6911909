"""Weights that are handed over as fewer arrays."""

import functools
import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np

from cacovid_jax.parallel import arguments


def weights(count=8, seed=0):
  """Returns kernels and vectors of two dtypes, in an order of their own."""
  rng = np.random.default_rng(seed)

  def draw(*shape, dtype=jnp.float32):
    return jnp.asarray(rng.standard_normal(shape), dtype)

  return {
    str(n): {
      "kernel": draw(3, n + 1),
      "bias": draw(n + 1, dtype=jnp.bfloat16),
      "a": {"scale": draw(2 * n + 1), "empty": draw(0)},
      "number": draw(),
    }
    for n in range(count)
  }


def assert_same(one, other):
  assert jax.tree.structure(one) == jax.tree.structure(other)
  for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_what_is_joined_comes_back():
  tree = weights()
  joined = arguments.Joiner()(tree)
  # Eight kernels and numbers as they are, one array for each dtype.
  assert len(jax.tree.leaves(joined)) == 8 + 8 + 2
  assert_same(jax.jit(lambda given: given.tree())(joined), tree)


def test_a_tree_is_joined_once_and_another_one_anew(monkeypatch):
  calls, join = [], arguments.jnp.concatenate
  monkeypatch.setattr(
    arguments.jnp, "concatenate", lambda x: calls.append(1) or join(x)
  )
  joiner, tree = arguments.Joiner(), weights()
  first, again = joiner(tree), joiner(jax.tree.map(lambda leaf: leaf, tree))
  assert len(calls) == 2  # Of two dtypes.
  assert all(first.vectors[k] is again.vectors[k] for k in first.vectors)
  other = tree | {"0": weights(seed=1)["0"]}
  assert_same(joiner(other).tree(), other)
  assert len(calls) == 4
  assert_same(joiner(tree).tree(), tree)


def test_a_small_tree_and_one_that_is_traced_stay():
  joiner, small = arguments.Joiner(), weights(2)
  assert joiner(small) is small
  assert joiner(None) is None and joiner(2.0) == 2.0
  on_host = jax.tree.map(np.asarray, weights())
  assert joiner(on_host) is on_host
  mesh = jax.make_mesh((2,), ("model",), devices=jax.devices()[:2])
  whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  on_two = jax.device_put(weights(), whole)
  assert joiner(on_two) is on_two

  @jax.jit
  def traced(tree):
    assert joiner(tree) is tree
    return tree

  traced(weights())


def test_threads_that_share_it_get_their_own_weights(monkeypatch):
  """Another one's tree comes while this one's is joined."""
  joiner, tree, other = arguments.Joiner(), weights(), weights(seed=1)
  found, join = [], jnp.concatenate

  def interrupted(parts):
    monkeypatch.setattr(arguments.jnp, "concatenate", join)
    found.append(joiner(other))
    return join(parts)

  monkeypatch.setattr(arguments.jnp, "concatenate", interrupted)
  assert_same(joiner(tree).tree(), tree)
  assert_same(found[0].tree(), other)
  assert_same(joiner(other).tree(), other)


def test_no_weights_are_kept():
  joiner, tree = arguments.Joiner(), weights()
  kernel = weakref.ref(tree["0"]["kernel"])
  joiner(tree)
  del tree
  gc.collect()
  assert kernel() is None


def test_a_function_of_joined_weights_is_compiled_once():
  def function(x, tree, y):
    return {"sum": x + y, **jax.tree.map(lambda leaf: leaf * 2, tree)}

  run = arguments.Joining(functools.partial(jax.jit), function, (1,))
  for seed in range(2):
    tree = weights(seed=seed)
    assert_same(run(1, tree, 2), function(jnp.array(1), tree, 2))
  assert run._cache_size() == 1
