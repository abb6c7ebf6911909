"""From numbers on tokens to the rows of a selection, with counts as data.

Ranks instead of sorts: a count that is data then is one comparison.

Axes: N video tokens, D width, K kept tokens, S shares of a budget.
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
  n = values.shape[-1]
  row, column = values[..., :, None], values[..., None, :]
  place = jnp.arange(n)
  earlier = place[None, :] < place[:, None]
  before = (column > row) | ((column == row) & earlier)
  if valid is not None:
    before = before & valid[..., None, :]
  found = before.sum(axis=-1, dtype=jnp.int32)
  return found if valid is None else jnp.where(valid, found, n)


def apportion(
  total: int | jax.Array,
  weights: jax.Array,
  most: jax.Array,
  at_least_one: jax.Array | None = None,
) -> jax.Array:
  """Splits a budget in proportion to weights, rounding by largest remainder.

  A share that would pass its limit gets the limit, and the rest is split
  between the others in proportion. Equal remainders go to the first.

  Args:
    total: the budget, at most the sum of `most`.
    weights: float[S] or int[S], positive where `most` is. Shares of integers
      are exact: their products with the budget must fit into int32.
    most: int32[S], the limit of each share.
    at_least_one: bool[S], shares that must not be zero; None for none. If
      they are more than the budget, the heaviest ones get one each.

  Returns:
    int32[S] shares that sum to `total`.
  """
  exact = jnp.issubdtype(weights.dtype, jnp.integer)
  real = weights.astype(jnp.float32)
  total = jnp.asarray(total, jnp.int32)
  if at_least_one is None:
    least = jnp.zeros_like(most)
  else:
    at_least_one = at_least_one & (most > 0)
    least = (rank(real, at_least_one) < total) & at_least_one
    least = least.astype(most.dtype)

  def shares(scale):
    return jnp.clip(scale[..., None] * real, least, most)

  # The sum of the shares grows piecewise linearly with the scale, with a bend
  # where a share meets a limit.
  positive = jnp.maximum(real, jnp.finfo(jnp.float32).tiny)
  bends = jnp.concatenate([jnp.zeros(1), least / positive, most / positive])
  bends = jnp.where(jnp.isfinite(bends), bends, 0.0)
  sums = shares(bends).sum(axis=-1)
  low = jnp.max(jnp.where(sums <= total, bends, 0.0))
  high = jnp.min(jnp.where(sums >= total, bends, bends.max()))
  low_sum, high_sum = shares(low).sum(), shares(high).sum()
  part = (total - low_sum) / jnp.maximum(high_sum - low_sum, 1e-9)
  wanted = shares(low + jnp.clip(part, 0.0, 1.0) * (high - low))
  share = jnp.floor(wanted).astype(most.dtype)
  remainder = wanted - share
  if exact:
    # Between the limits in whole numbers: rounding must not decide on ties.
    free = (wanted > least) & (wanted < most)
    left = total - jnp.where(free, 0, share).sum()
    whole = jnp.maximum(jnp.where(free, weights, 0).sum(), 1)
    share = jnp.where(free, left * weights // whole, share)
    remainder = jnp.where(free, left * weights % whole, 0).astype(jnp.float32)
  rest = total - share.sum()
  up = rank(remainder, share < most) < rest
  # Only rounding of the scale can leave a whole one too much.
  down = rank(-remainder, share > least) < -rest
  return share + up.astype(most.dtype) - down.astype(most.dtype)


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
