"""Merging on top of selection: dropped tokens go into kept ones.

Works behind any rule that selects tokens. The rule decides which tokens enter
the language model, this decides what becomes of the others: each joins the
kept token that it resembles most, and the kept token becomes a mean.

Axes: N video tokens, D width, K kept tokens.
"""

import jax.numpy as jnp

from cacovid_jax import errors
from cacovid_jax.compressors import base, similarity

MODES = ("none", "nearest")


def apply(mode, selection, features, *, valid=None):
  """Returns the selection, merged as `mode` says.

  Args:
    mode: static; "none" leaves it as it is, "nearest" is `fold`.
    selection: base.Selection.
    features: float[N, D] video tokens.
    valid: bool[N], the tokens that are there; None for all.
  """
  check(mode)
  if mode == "none":
    return selection
  return fold(selection, features, valid=valid)


def check(mode):
  """Refuses a mode that is not one of `MODES`."""
  if mode not in MODES:
    raise errors.UserError(
      f"unknown merge {mode!r}; use {' or '.join(map(repr, MODES))}"
    )


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
