"""Selections, and how they are made of numbers on tokens.

Ranks instead of sorts: a count that is data then is one comparison.
"""

import dataclasses
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from cacovid_jax.compressors.math import similarity
from cacovid_jax.models import token_grid


class Selection(NamedTuple):
  """The compressed video.

  Valid entries of `index` are a strictly increasing prefix; padding has index
  N, mask False, zero features and zero mass.
  """

  features: jax.Array  # float[K, D] rows that enter the language model.
  index: jax.Array  # int32[K] position of each row in the uncompressed video.
  mask: jax.Array  # bool[K], True where a row is valid.
  mass: jax.Array  # float32[K], number of tokens that a row stands for.
  assign: jax.Array  # int32[N], row that each token went into, -1 = dropped.
  # float[S, K, D], rows of `video_llm.VideoFeatures.deep`, made of tokens with
  # the weights of `features`; None of models without it, and of tokens as they
  # are.
  deep: jax.Array | None = None


def with_deep(choose, inputs) -> Selection:
  """Returns choose(inputs), with rows of `inputs.deep` if there is any.

  Rows are weighted sums of tokens, so that their derivative along another map
  of the tokens are that map's rows; weights are to have no derivative.
  """
  if inputs.deep is None:
    return choose(inputs)
  features = inputs.features

  def rows(features):
    selection = choose(dataclasses.replace(inputs, features=features))
    return selection.features, selection

  def along(one):
    given = (features,), (one.astype(features.dtype),)
    return jax.jvp(rows, *given, has_aux=True)[1:]

  deep, selection = jax.vmap(along, out_axes=(0, None))(inputs.deep)
  return selection._replace(deep=deep.astype(inputs.deep.dtype))


def take(features, index, num_valid=None) -> Selection:
  """Returns the selection of distinct tokens `index` int32[K], in any order.

  `num_valid` int32[] tells how many there are, the first ones; None for all.
  """
  place = jnp.arange(index.shape[0], dtype=jnp.int32)
  mask = place < (len(place) if num_valid is None else num_valid)
  index = jnp.where(mask, index.astype(jnp.int32), len(features))
  index = jnp.sort(index)
  assign = jnp.full(features.shape[:1], -1, jnp.int32)
  return Selection(
    features=jnp.where(mask[:, None], features[index], 0),
    index=index,
    mask=mask,
    mass=mask.astype(jnp.float32),
    assign=assign.at[index].set(place, mode="drop"),
  )


def take_top(features, values, num_keep: int) -> Selection:
  """Returns the `num_keep` largest `values` float[N], the first of equals."""
  _, index = jax.lax.top_k(values.astype(jnp.float32), num_keep)
  return take(features, index)


def take_mask(features, mask, num_rows: int) -> Selection:
  """Returns the selection of the tokens where `mask` bool[N] is True.

  The first `num_rows`, static, of more; fewer leave padding.
  """
  chex.assert_shape(mask, features.shape[:1])
  index = token_grid.first(mask, num_rows)
  return take(features, index, jnp.minimum(mask.sum(), num_rows))


def arrange(rows, index, assign, num_valid=None) -> Selection:
  """Returns a valid `Selection` of rows made in any order.

  Rows hold [K, D], stand at the places `index` int32[K], distinct among the
  valid ones, and take in the tokens that `assign` int32[N] sends there, -1 =
  dropped, as are those of rows that are not valid. `num_valid` is as in `take`.
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

  Group k of `assign` int32[N], -1 = dropped, takes the place of token
  `representative[k]`; a group without tokens keeps that token's features,
  without mass. `num_valid` is as in `take`.
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
  bool[..., n] come before nothing and have rank n.
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
  """Returns bool[..., n, n], whether a column's `rank` is before a row's."""
  # Ranks, not values: a GPU may compute values anew for each side, rounded
  # otherwise, and then two could come before each other.
  place = rank(values)
  return place[..., None, :] < place[..., :, None]


def collect(values, into, num_rows, dtype, home=None) -> Selection:
  """Returns the selection of tokens that others of their part went into.

  Parts of P tokens are mostly frames. `values` float[G, P, D] are what the row
  of each token shall hold, `into` int32[G, P] the place in its part that each
  token went into, its own for one that is kept, P where it was dropped. At most
  `num_rows`, static, are kept. With `home` int32[G, P] a token shares the fate
  of that one of the G * P.
  """
  G, P = into.shape
  num_video = G * P
  start = jnp.arange(G, dtype=jnp.int32)[:, None] * P
  into = jnp.where(into < P, into + start, num_video).reshape(-1)
  kept = into == jnp.arange(num_video)
  if home is not None:
    into = into[home.reshape(-1)]
  index = token_grid.first(kept, num_rows)
  row = jnp.cumsum(kept, dtype=jnp.int32) - 1
  row = jnp.where(kept & (row < num_rows), row, -1)
  assign = jnp.append(row, -1)[into]
  rows = values.reshape(num_video, -1)[jnp.minimum(index, num_video - 1)]
  num_valid = jnp.minimum(kept.sum(dtype=jnp.int32), num_rows)
  return arrange(rows.astype(dtype), index, assign, num_valid)


def anchored(own, tokens, joins, weight):
  """Returns `weight` of each token plus the rest of the mean of what joins it.

  `joins` int32[..., N] tells which of `own` float[..., K, D] each of `tokens`
  float[..., N, D] joins, if any. One that none joins stays as it is.
  """
  num_rows = own.shape[-2]
  mean = similarity.segment_mean(tokens, joins, num_rows)
  count = similarity.segment_count(joins, num_rows)[..., None]
  return jnp.where(count > 0, weight * own + (1.0 - weight) * mean, own)


def fold(selection, features):
  """Folds every dropped token into the kept row of highest cosine, the first.

  Every row, which may be merged already, becomes the mean of all tokens that it
  stands for then; one that none joins stays as it is, bit by bit.
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
