"""From numbers on tokens to the rows of a selection, with counts as data.

Ranks instead of sorts: a count that is data then is one comparison.

Axes: N video tokens, D width, K kept tokens.
"""

import jax
import jax.numpy as jnp

from cacovid_jax.compressors import base


def rank(values: jax.Array, valid: jax.Array | None = None) -> jax.Array:
  """Returns int32[..., n], how many values come before each, largest first.

  Equal values rank by index. Rows along leading axes are ranked on their own.

  Args:
    values: float[..., n], not NaN.
    valid: bool[..., n], the values that are there; None for all. The others
      come before nothing, and their own rank is n.
  """
  if valid is not None:
    values = jnp.where(valid, values, -jnp.inf)
    # Those that are not there come behind what is there and as small.
    order = jnp.lexsort((-values, ~valid))
  else:
    order = jnp.argsort(values, axis=-1, stable=True, descending=True)
  found = jnp.argsort(order, axis=-1).astype(jnp.int32)
  return found if valid is None else jnp.where(valid, found, values.shape[-1])


def before(values: jax.Array) -> jax.Array:
  """Returns bool[..., n, n], whether a column's value comes before a row's.

  Larger values of float[..., n] come first, equal ones in the order of places.
  """
  # Ranks, not values: a GPU may compute values anew for each side, rounded
  # otherwise, and then two could come before each other.
  place = rank(values)
  return place[..., None, :] < place[..., :, None]


def collect(
  values: jax.Array,
  kept: jax.Array,
  into: jax.Array,
  num_rows: int,
  dtype=None,
) -> base.Selection:
  """Returns the selection of the marked tokens, with the values given.

  Args:
    values: float[N, D], at a marked token what its row shall hold.
    kept: bool[N] marks, at most `num_rows` of them.
    into: int32[N] the marked token into which each token went, itself for a
      marked one; N where it was dropped.
    num_rows: K, static.
    dtype: of the rows; None for that of `values`.
  """
  num_video = kept.shape[0]
  (index,) = jnp.nonzero(kept, size=num_rows, fill_value=num_video)
  row = jnp.cumsum(kept, dtype=jnp.int32) - 1
  row = jnp.where(kept & (row < num_rows), row, -1)
  assign = jnp.append(row, -1)[jnp.minimum(into, num_video)]
  taken = values[jnp.minimum(index, num_video - 1)]
  return base.arrange(
    taken.astype(dtype or values.dtype),
    index,
    assign,
    jnp.minimum(kept.sum(dtype=jnp.int32), num_rows),
  )


def anchored(
  own: jax.Array, others: jax.Array, count: jax.Array, weight: float
) -> jax.Array:
  """Returns `weight` of a token plus the rest of the mean of what it took in.

  A token that took in nothing stays as it is.

  Args:
    own: float[..., D] tokens.
    others: float[..., D] sum of the tokens that each took in.
    count: int[...] how many these are.
    weight: of the token itself, in [0, 1].
  """
  count = count[..., None]
  mean = others / jnp.maximum(count, 1)
  return jnp.where(count > 0, weight * own + (1.0 - weight) * mean, own)
