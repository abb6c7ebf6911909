"""Rules that know the right tokens: bounds for a benchmark, not methods."""

import jax.numpy as jnp

from cacovid_jax.compressors import base


def decisive_boxes(features, *, grid, num_keep, text=None, aux=None, rng=None):
  """Returns the tokens that decide the question, and an even fill up to K.

  Where the question decides more than K tokens, evenly spaced ones of them.

  Args:
    features: float[N, D] video tokens.
    grid: static (T, H, W).
    num_keep: K, static.
    text: unused.
    aux: with `decisive` bool[N].
    rng: unused.
  """
  del grid, text, rng
  decisive = aux.decisive
  num_decisive = decisive.sum()
  num_other = features.shape[0] - num_decisive
  from_decisive = jnp.minimum(num_decisive, num_keep)
  keep = spread(decisive, num_decisive, from_decisive)
  keep |= spread(~decisive, num_other, num_keep - from_decisive)
  (index,) = jnp.nonzero(keep, size=num_keep)
  return base.take(features, index)


def spread(members, num_members, count):
  """Returns bool[N] with `count` evenly spaced ones of `members` bool[N].

  Member j is taken where floor(count * (j + 1) / num_members) steps up: exact
  in integers, though neither number is static.
  """
  rank = jnp.cumsum(members) - 1
  total = jnp.maximum(num_members, 1)
  step = (rank + 1) * count // total > rank * count // total
  return members & step


COMPRESSOR = base.Compressor(
  name="decisive_boxes",
  function=decisive_boxes,
  needs=frozenset(["decisive"]),
  oracle=True,
)
