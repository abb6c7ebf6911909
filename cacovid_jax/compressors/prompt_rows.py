"""Prompts somewhere between two layers of a decoder, and their caches.

Prompts are prefix text, video, suffix text, padding; video rows go, the others
stay. Everything is batched and keeps static shapes.

Axes: B batch, D width, N video tokens of a whole prompt, R rows between two
layers, n of them of the video, P position rows, V vocabulary.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from cacovid_jax.models import pruning, qwen2


class Rows(NamedTuple):
  """B prompts somewhere between two layers.

  Video rows that are valid come first among the n; of the others, `index` is
  N.

  Attributes:
    x: float[B, R, D] residual stream.
    positions: int32[B, P, R]; tokens keep those of the whole prompt.
    lengths: int32[B] rows without padding.
    video_start: int32[B] first row of the video.
    index: int32[B, n] token of the whole video behind each video row.
    row: int32[B, n] row of the selection that entered the model.
    count: int32[B] valid video rows.
    entered: `base.Selection` that entered the model, leading axis B; None if
      that was the whole video.
  """

  x: jax.Array
  positions: jax.Array
  lengths: jax.Array
  video_start: jax.Array
  index: jax.Array
  row: jax.Array
  count: jax.Array
  entered: Any = None


def whole(x, positions, lengths, video_start, num_video: int) -> Rows:
  """Returns prompts with all N video tokens; arguments as in `Rows`."""
  batch = x.shape[0]
  if x.shape[1] < num_video:
    raise ValueError(
      f"prompts of {x.shape[1]} rows do not hold {num_video} video tokens"
    )
  every = jnp.broadcast_to(
    jnp.arange(num_video, dtype=jnp.int32), (batch, num_video)
  )
  return Rows(
    x=x,
    positions=positions,
    lengths=jnp.asarray(lengths, jnp.int32),
    video_start=jnp.asarray(video_start, jnp.int32),
    index=every,
    row=every,
    count=jnp.full(batch, num_video, jnp.int32),
  )


def keep(rows: Rows, selection, *, num_video: int) -> Rows:
  """Returns whole prompts with only the tokens of a selection [B, ...]."""
  size = selection.index.shape[1]
  count = selection.mask.sum(axis=1).astype(jnp.int32)
  _, rows = take(rows, selection.index, count, num_video=num_video)
  # A method may have changed the rows that it keeps (merged tokens).
  kept = jnp.where(
    selection.mask[..., None],
    selection.features.astype(rows.x.dtype),
    video_rows(rows.x, rows.video_start, size),
  )
  own = jnp.arange(size, dtype=jnp.int32)
  return rows._replace(
    x=write_rows(rows.x, rows.video_start, kept),
    row=jnp.broadcast_to(own, selection.index.shape),
    entered=selection,
  )


def take(rows: Rows, kept, count, *, num_video):
  """Returns (taken int32[B, R'], rows) with only some of the video rows.

  Args:
    rows: the prompts.
    kept: int32[B, k] video rows, ascending in 0..n-1 over the first `count`.
    count: int32[B].
    num_video: N, the index of padding.

  `taken` are the rows that went on, of `rows`.
  """
  size = kept.shape[1]
  out_length = rows.x.shape[1] - rows.index.shape[1] + size

  def one(x, positions, length, start, index, row, before, kept, count):
    taken, new_length = pruning.pruned_rows(
      kept,
      count,
      video_start=start,
      num_video=before,
      length=length,
      out_length=out_length,
    )
    valid = jnp.arange(size) < count
    return (
      taken,
      x[taken],
      positions[:, taken],
      new_length,
      jnp.where(valid, jnp.take(index, kept, mode="clip"), num_video),
      jnp.where(valid, jnp.take(row, kept, mode="clip"), num_video),
    )

  taken, x, positions, lengths, index, row = jax.vmap(one)(
    rows.x,
    rows.positions,
    rows.lengths,
    rows.video_start,
    rows.index,
    rows.row,
    rows.count,
    kept,
    count,
  )
  return taken, rows._replace(
    x=x,
    positions=positions,
    lengths=lengths,
    index=index,
    row=row,
    count=count,
  )


def video_rows(x, start, size: int):
  """Returns [B, size, ...] rows of x [B, R, ...], from `start` int32[B] on."""
  return jax.vmap(
    lambda x, start: jax.lax.dynamic_slice_in_dim(x, start, size)
  )(x, start)


def write_rows(x, start, rows):
  """Returns x [B, R, ...] with `rows` [B, n, ...] from `start` int32[B] on."""
  return jax.vmap(
    lambda x, rows, start: jax.lax.dynamic_update_slice_in_dim(
      x, rows, start, axis=0
    )
  )(x, rows, start)


def last_logits(model, params, x, lengths):
  """Returns float32[B, V] behind each prompt's last valid row."""
  last = jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1)
  return model.end(params, last[:, 0])


def drop(cache: qwen2.Cache, taken, lengths) -> qwen2.Cache:
  """Returns the cache with only the rows `taken` int32[B, R']."""
  place = taken[None, :, :, None, None]
  return qwen2.Cache(
    keys=jnp.take_along_axis(cache.keys, place, axis=2),
    values=jnp.take_along_axis(cache.values, place, axis=2),
    lengths=lengths,
  )
