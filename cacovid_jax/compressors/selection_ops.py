"""From numbers on tokens to the rows of a selection, with counts as data.

Ranks instead of sorts: a count that is data then is one comparison. `fold`
works behind any rule that selects tokens: each dropped token joins the kept
one that it resembles most, and the kept token becomes a mean.

Axes: N video tokens, D width, K kept tokens.
"""

import jax
import jax.numpy as jnp

from cacovid_jax.compressors import base
from cacovid_jax.compressors.math import similarity

# Ways of `merge_dropped`.
MERGES = ("none", "nearest")


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


def collect_parts(values, into, num_rows, dtype, home=None) -> base.Selection:
  """Returns `collect` of tokens that went into others of their own part.

  Args:
    values: float[G, P, D], what the row of each token shall hold, by parts:
      mostly frames.
    into: int32[G, P] the place in its part that each token went into, its own
      for one that is kept, P where it was dropped.
    num_rows: K, static.
    dtype: of the rows.
    home: int32[G, P] the token of the video, G * P in all, whose fate each
      shares; None for its own.
  """
  G, P = into.shape
  start = jnp.arange(G, dtype=jnp.int32)[:, None] * P
  into = jnp.where(into < P, into + start, G * P).reshape(-1)
  kept = into == jnp.arange(G * P)
  if home is not None:
    into = into[home.reshape(-1)]
  return collect(values.reshape(G * P, -1), kept, into, num_rows, dtype)


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


def merge_dropped(mode, selection, features, *, valid=None):
  """Returns the selection, with dropped tokens merged as `mode` says.

  Args:
    mode: static; "none" leaves it as it is, "nearest" is `fold`.
    selection: base.Selection.
    features: float[N, D] video tokens.
    valid: bool[N], the tokens that are there; None for all.
  """
  if mode == "none":
    return selection
  return fold(selection, features, valid=valid)


def fold(selection, features, *, weighted=True, valid=None):
  """Folds every dropped token into its nearest kept row.

  The nearest is the one of highest cosine, the first of equals; a token of
  zeros is as near to all of them. Every row becomes the mean of itself and the
  tokens that join it; a row that none joins stays as it is, bit by bit.

  Args:
    selection: base.Selection of these tokens; its rows may be merged already.
    features: float[N, D] video tokens.
    weighted: True lets a row count as much as its mass, the number of tokens
      that it stands for already; False lets it count as one. For rows of a
      plain selection there is no difference.
    valid: bool[N], the tokens that are there; None for all. The others join
      nothing, whatever they hold.

  Returns:
    base.Selection with the same index and mask, in which no valid token is
    dropped: mass and assign count all of them.
  """
  dropped = selection.assign < 0
  if valid is not None:
    dropped &= valid
  tokens = jnp.where(dropped[:, None], features, 0)
  joins = jnp.where(dropped, nearest(selection, tokens), -1)
  num_rows = selection.index.shape[0]
  added = base.segment_sum(tokens, joins, num_rows)
  count = base.segment_count(joins, num_rows)
  own = selection.mass if weighted else selection.mask.astype(jnp.float32)
  kept = selection.features
  mean = own[:, None] * kept.astype(jnp.float32) + added
  mean = mean / jnp.maximum(own + count, 1.0)[:, None]
  return base.Selection(
    features=jnp.where(count[:, None] > 0, mean.astype(kept.dtype), kept),
    index=selection.index,
    mask=selection.mask,
    mass=selection.mass + count,
    assign=jnp.where(dropped, joins, selection.assign),
  )


def nearest(selection, features):
  """Returns int32[N], the valid row of highest cosine to each token."""
  cosines = similarity.between(features, selection.features)
  cosines = jnp.where(selection.mask, cosines, -jnp.inf)
  return jnp.argmax(cosines, axis=-1).astype(jnp.int32)
