"""Selections, and how they are made of numbers on tokens.

Ranks instead of sorts: a count that is data then is one comparison. `fold`
works behind any rule that selects tokens: each dropped token joins the kept
one that it resembles most, and the kept token becomes a mean.

Axes: N video tokens, D width, K kept tokens.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from cacovid_jax.compressors.math import similarity

# Ways of `merge_dropped`.
MERGES = ("none", "nearest")


class Selection(NamedTuple):
  """The compressed video.

  Valid entries of `index` are a strictly increasing prefix; padding has index
  N, mask False, zero features and zero mass.

  Attributes:
    features: float[K, D] rows that enter the language model.
    index: int32[K] position of each row in the uncompressed video.
    mask: bool[K], True where a row is valid.
    mass: float32[K], number of tokens that a row stands for.
    assign: int32[N], row that each token went into, -1 = dropped.
  """

  features: jax.Array
  index: jax.Array
  mask: jax.Array
  mass: jax.Array
  assign: jax.Array


def take(features, index, num_valid=None) -> Selection:
  """Returns the selection of distinct tokens `index` int32[K], in any order.

  Its rows are those of `features` float[N, D]. `num_valid` int32[] tells how
  many there are, the first ones, with N behind them; None for all.
  """
  rows = jnp.arange(index.shape[0], dtype=jnp.int32)
  assign = jnp.full(features.shape[:1], -1, jnp.int32)
  assign = assign.at[index].set(rows, mode="drop")
  return arrange(features[index], index, assign, num_valid)


def take_top(features, values, num_keep: int) -> Selection:
  """Returns the selection of the `num_keep` largest `values` float[N].

  Among equal values the earlier token wins.
  """
  _, index = jax.lax.top_k(values.astype(jnp.float32), num_keep)
  return take(features, index)


def take_mask(features, mask, num_rows: int) -> Selection:
  """Returns the selection of the tokens where `mask` bool[N] is True.

  Of more than `num_rows`, static, the first are taken; fewer leave padding.
  """
  chex.assert_shape(mask, features.shape[:1])
  (index,) = jnp.nonzero(mask, size=num_rows, fill_value=features.shape[0])
  return take(features, index, jnp.minimum(mask.sum(), num_rows))


def arrange(rows, index, assign, num_valid=None) -> Selection:
  """Returns a valid `Selection` of rows made in any order.

  Args:
    rows: float[K, D] what each row holds.
    index: int32[K] position of each row in the uncompressed video, distinct
      among the valid ones.
    assign: int32[N] row that each token went into, -1 = dropped; tokens of
      rows that are not valid count as dropped.
    num_valid: int32[] how many rows there are, the first ones; None for all.
  """
  num_video, num_rows = assign.shape[0], index.shape[0]
  place = jnp.arange(num_rows, dtype=jnp.int32)
  mask = place < (num_rows if num_valid is None else num_valid)
  index = jnp.where(mask, index.astype(jnp.int32), num_video)
  order = jnp.argsort(index)
  # Row -1 of tokens that were dropped: one place more, at the end.
  place_of = jnp.full([num_rows + 1], -1, jnp.int32)
  place_of = place_of.at[order].set(jnp.where(mask, place, -1))
  assign = place_of[jnp.where(assign < 0, num_rows, assign)]
  return Selection(
    features=jnp.where(mask[:, None], rows[order], 0),
    index=index[order],
    mask=mask,
    mass=similarity.segment_count(assign, num_rows),
    assign=assign,
  )


def merge(features, representative, assign, num_valid=None) -> Selection:
  """Returns the selection whose rows are the means of groups of tokens.

  A group without tokens keeps its representative's features, without mass.

  Args:
    features: float[N, D] video tokens.
    representative: int32[K] token whose place each group takes, distinct among
      the valid groups, in any order.
    assign: int32[N] group of each token, -1 = dropped.
    num_valid: int32[] how many groups there are, the first ones; None for all.
  """
  num_rows = representative.shape[0]
  own = features[jnp.minimum(representative, features.shape[0] - 1)]
  count = similarity.segment_count(assign, num_rows)[:, None]
  rows = similarity.segment_mean(features, assign, num_rows)
  rows = jnp.where(count > 0, rows.astype(features.dtype), own)
  return arrange(rows, representative, assign, num_valid)


def rank(values, valid=None):
  """Returns int32[..., n], how many values come before each, largest first.

  Equal values float[..., n], not NaN, rank by index. Those that are not `valid`
  bool[..., n] come before nothing, and their own rank is n; None for all valid.
  """
  if valid is None:
    return inverse(jnp.argsort(values, axis=-1, stable=True, descending=True))
  values = jnp.where(valid, values, -jnp.inf)
  # Those that are not there come behind what is there and as small.
  found = inverse(jnp.lexsort((-values, ~valid)))
  return jnp.where(valid, found, values.shape[-1])


def inverse(order):
  """Returns int32[..., n], the place of each item in an order int[..., n]."""
  return jnp.argsort(order, axis=-1).astype(jnp.int32)


def before(values):
  """Returns bool[..., n, n], whether a column's value comes before a row's.

  Larger values of float[..., n] come first, equal ones in the order of places.
  """
  # Ranks, not values: a GPU may compute values anew for each side, rounded
  # otherwise, and then two could come before each other.
  place = rank(values)
  return place[..., None, :] < place[..., :, None]


def collect(values, kept, into, num_rows, dtype=None) -> Selection:
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
  rows = values[jnp.minimum(index, num_video - 1)].astype(dtype or values.dtype)
  num_valid = jnp.minimum(kept.sum(dtype=jnp.int32), num_rows)
  return arrange(rows, index, assign, num_valid)


def collect_parts(values, into, num_rows, dtype, home=None) -> Selection:
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


def anchored(own, tokens, joins, weight):
  """Returns `weight` of each token plus the rest of the mean of what joins it.

  `joins` int32[..., N] tells which of `own` float[..., K, D] each of `tokens`
  float[..., N, D] joins, if any. One that none joins stays as it is.
  """
  num_rows = own.shape[-2]
  mean = similarity.segment_mean(tokens, joins, num_rows)
  count = similarity.segment_count(joins, num_rows)[..., None]
  return jnp.where(count > 0, weight * own + (1.0 - weight) * mean, own)


def merge_dropped(mode, selection, features):
  """Returns the selection as it is, or of mode "nearest" its `fold`."""
  return selection if mode == "none" else fold(selection, features)


def fold(selection, features):
  """Folds every dropped token into its nearest kept row.

  The nearest is the one of highest cosine, the first of equals; a token of
  zeros is as near to all of them. Every row, which may be merged already,
  becomes the mean of all tokens that it stands for then; one that none joins
  stays as it is, bit by bit.
  """
  num_rows = selection.index.shape[0]
  dropped = selection.assign < 0
  tokens = jnp.where(dropped[:, None], features, 0)
  cosines = similarity.between(tokens, selection.features)
  cosines = jnp.where(selection.mask, cosines, -jnp.inf)
  joins = jnp.argmax(cosines, axis=-1).astype(jnp.int32)
  joins = jnp.where(dropped, joins, -1)
  count = similarity.segment_count(joins, num_rows)
  own, kept = selection.mass, selection.features
  mean = own[:, None] * kept.astype(jnp.float32)
  mean = mean + similarity.segment_sum(tokens, joins, num_rows)
  mean = mean / jnp.maximum(own + count, 1.0)[:, None]
  return selection._replace(
    features=jnp.where(count[:, None] > 0, mean.astype(kept.dtype), kept),
    mass=own + count,
    assign=jnp.where(dropped, joins, selection.assign),
  )
