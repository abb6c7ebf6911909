"""Prompts about videos on the device, whole or pruned of video tokens.

Text may stand between a video's temporal patches. Dropping tokens removes their
rows, and text rows stay, unless `frames` tells that they are of a patch which
keeps no token. Every row keeps its position of the whole prompt.

Axes: B batch, L rows of a whole prompt, R rows of a pruned one, D width, N
video tokens, n of them left, K kept next, P position rows, S auxiliary feature
maps, Q tokens of a question's text, V vocabulary.
"""

import bisect
import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cacovid_jax import errors
from cacovid_jax.models import qwen2

_MULTIPLE = 16
_WORTH = 0.1


@dataclasses.dataclass(frozen=True)
class PromptBuckets:
  """How long the text of prompts is padded to: a few lengths for many texts."""

  text_rows: tuple[int, ...]  # Of a prompt beside its video tokens; rising.

  def __post_init__(self):
    rows = tuple(map(int, self.text_rows))
    if not 1 <= len(rows) <= 3 or rows[0] < 1 or sorted({*rows}) != [*rows]:
      raise errors.UserError(
        f"config.data.prompt_rows={self.text_rows}: give one to three rising"
        " numbers of rows, or leave it empty"
      )
    object.__setattr__(self, "text_rows", rows)

  @classmethod
  def of(cls, lengths: Sequence[int], *, beside: int = 0) -> "PromptBuckets":
    """Returns the buckets that pad prompts of these text rows least.

    `beside` are the video rows of a prompt as it is computed. One more bucket
    means more programs, and so has to spare a share of all rows.
    """
    rounded = -(-np.maximum(lengths, 1) // _MULTIPLE) * _MULTIPLE
    sizes, counts = np.unique(rounded, return_counts=True)

    def rows(chosen):
      padded = np.asarray(chosen)[np.searchsorted(chosen, sizes)]
      return int(((padded + beside) * counts).sum())

    best = (int(sizes[-1]),)
    for number in (2, 3):
      smaller = itertools.combinations(sizes[:-1].tolist(), number - 1)
      found = min(((*c, best[-1]) for c in smaller), key=rows, default=best)
      if rows(found) > (1 - _WORTH) * rows(best):
        break
      best = found
    return cls(best)

  def pick(self, text_rows: int) -> int:
    """Returns the smallest length that holds so many rows."""
    place = bisect.bisect_left(self.text_rows, text_rows)
    if place == len(self.text_rows):
      raise errors.UserError(
        f"a prompt has {text_rows} rows beside its video, above the"
        f" {self.text_rows[-1]} of config.data.prompt_rows; raise the last of"
        " them, or leave the key empty"
      )
    return self.text_rows[place]


class PromptBatch(NamedTuple):
  """B whole prompts, right padded (or ONE, without the leading axis).

  The last four are None where nothing reads them.
  """

  x: jax.Array  # float[B, L, D] embeddings.
  positions: jax.Array  # int32[B, P, L].
  lengths: jax.Array  # int32[B] rows without padding.
  video_rows: jax.Array  # int32[B, N], ascending; L behind a video's own.
  next_position: jax.Array  # int32[B] of the first generated token.
  # float[B, S, N, D], see `video_llm.VideoFeatures`, or None.
  deep: jax.Array | None = None
  features: jax.Array | None = None  # float[B, N, D] as they were encoded.
  ids: jax.Array | None = None  # int32[B, L] that were embedded.
  text_rows: jax.Array | None = None  # int32[B, Q] of the question, L for none.
  # int32[B, L], the temporal patch that a row is of, as token or as text, -1
  # for none. Its text goes with the last of its tokens; None keeps all text.
  frames: jax.Array | None = None


class PrunedPrompts(NamedTuple):
  """B prompts somewhere between two layers of a decoder.

  Of the n entries per prompt the first `count` are valid.
  """

  x: jax.Array  # float[B, R, D] residual stream.
  positions: jax.Array  # int32[B, P, R] of the whole prompt.
  lengths: jax.Array  # int32[B] rows without padding.
  video_rows: jax.Array  # int32[B, n] of the tokens left, R for padding.
  num_after: jax.Array  # int32[B] text rows behind the whole video's last.
  index: jax.Array  # int32[B, n] tokens of the whole video, N for padding.
  row: jax.Array  # int32[B, n] row of the selection that entered the model.
  count: jax.Array  # int32[B] valid entries.
  deep: jax.Array | None = None  # float[B, S, n, D].
  # Selection [B, ...] that entered the model; None if that was all the video.
  entered: Any = None
  frames: jax.Array | None = None  # int32[B, R], see `PromptBatch`.


def kept_rows(
  index, num_valid, *, video_rows, length, num_rows, frames=None
):  # fmt: skip
  """Returns (rows, new length, new video rows) of ONE pruned prompt.

  `x[rows]` are its embeddings and `positions[:, rows]` its positions: rows are
  int32[L - N + K], strictly ascending over the new length int32[], the last
  one repeated behind; the new video rows int32[K] are L - N + K for padding.

  Args:
    index: int32[K] kept video tokens, ascending in 0..N-1.
    num_valid: int or int32[]; only as many entries of `index` are read.
    video_rows: int32[N], `num_rows` or more for padding.
    length: int or int32[], rows of the whole prompt without padding.
    num_rows: L, static.
    frames: int32[L] of `PromptBatch`, or None.
  """
  out_rows = num_rows - len(video_rows) + len(index)
  valid = jnp.arange(len(index)) < num_valid
  kept = jnp.take(video_rows, index, mode="clip")
  kept = jnp.where(valid, kept, num_rows)
  row = jnp.arange(num_rows)
  stays = (row < length).at[video_rows].set(False, mode="drop")
  stays = stays.at[kept].set(True, mode="drop")
  if frames is not None:
    own = jnp.where(valid, jnp.take(frames, kept, mode="clip"), num_rows)
    holds = jnp.zeros(num_rows, bool).at[own].set(True, mode="drop")
    stays &= (frames < 0) | holds[frames]
  place = jnp.cumsum(stays, dtype=jnp.int32) - 1
  new_length = place[-1] + 1
  rows = jnp.zeros(out_rows, jnp.int32)
  rows = rows.at[jnp.where(stays, place, out_rows)].set(row, mode="drop")
  rows = rows[jnp.minimum(jnp.arange(out_rows), new_length - 1)]
  kept = jnp.where(valid, jnp.take(place, kept, mode="clip"), out_rows)
  return rows, new_length, kept


def prune(prompt, index, num_valid):
  """Returns (rows int32[R], prompt) of ONE prompt with only some video tokens.

  The rows are those that went on. Of a `PromptBatch` or `PrunedPrompts`,
  `index` int32[K] are the kept entries of `video_rows`, ascending over the
  first `num_valid`, int or int32[].
  """
  rows, length, video_rows = kept_rows(
    index, num_valid, video_rows=prompt.video_rows, length=prompt.lengths,
    num_rows=len(prompt.x), frames=prompt.frames,
  )  # fmt: skip
  deep, frames = prompt.deep, prompt.frames
  if deep is not None:
    deep = jnp.take(deep, index, axis=1, mode="clip")
  return rows, prompt._replace(
    x=prompt.x[rows], positions=prompt.positions[:, rows], lengths=length,
    video_rows=video_rows, deep=deep,
    frames=None if frames is None else frames[rows],
  )  # fmt: skip


def behind(prompts, count: int):
  """Returns B prompts without their first `count` rows, all of them text.

  Their lengths stay those with these rows, see `VideoLLM.prefill`.
  """
  return prompts._replace(
    x=prompts.x[:, count:],
    positions=prompts.positions[:, :, count:],
    video_rows=prompts.video_rows - count,
  )


def whole(prompts: PromptBatch) -> PrunedPrompts:
  """Returns whole prompts, with all their video, before the first layer."""
  num_video, num_rows = prompts.video_rows.shape[1], prompts.x.shape[1]
  if num_rows < num_video:
    raise ValueError(
      f"prompts of {num_rows} rows do not hold {num_video} video tokens"
    )
  valid = prompts.video_rows < num_rows
  every = jnp.where(valid, jnp.arange(num_video, dtype=jnp.int32), num_video)
  lengths = jnp.asarray(prompts.lengths, jnp.int32)
  last = jnp.where(valid, prompts.video_rows, -1).max(axis=1)
  return PrunedPrompts(
    prompts.x, prompts.positions, lengths, prompts.video_rows,
    num_after=lengths - 1 - last, index=every, row=every,
    count=valid.sum(axis=1, dtype=jnp.int32), deep=prompts.deep,
    frames=prompts.frames,
  )  # fmt: skip


def crop(prompts: PromptBatch, num_video: int) -> PromptBatch:
  """Returns prompts without the padding of a bucket, all of N video tokens."""
  num_rows = prompts.x.shape[1] + num_video - prompts.video_rows.shape[1]
  deep, features, ids = prompts.deep, prompts.features, prompts.ids
  frames = prompts.frames
  return prompts._replace(
    x=prompts.x[:, :num_rows],
    positions=prompts.positions[:, :, :num_rows],
    video_rows=prompts.video_rows[:, :num_video],
    deep=None if deep is None else deep[:, :, :num_video],
    features=None if features is None else features[:, :num_video],
    ids=None if ids is None else ids[:, :num_rows],
    frames=None if frames is None else frames[:, :num_rows],
  )


def keep(prompts: PrunedPrompts, selection, *, num_video) -> PrunedPrompts:
  """Returns whole prompts with only what a selection [B, ...] keeps of N."""
  count = selection.mask.sum(axis=1).astype(jnp.int32)
  _, kept = take(prompts, selection.index, count, num_video=num_video)
  kept = write_selection(kept, selection)
  own = jnp.arange(selection.index.shape[1], dtype=jnp.int32)
  row = jnp.broadcast_to(own, selection.index.shape)
  return kept._replace(row=row, entered=selection)


def write_selection(kept, selection):
  """Returns B prompts of what is kept with a selection's rows in their places.

  A method may have changed the rows that it keeps, merged tokens; feature maps
  change where the selection has them.
  """
  if selection.deep is not None:
    kept = kept._replace(deep=selection.deep.astype(kept.deep.dtype))
  x = write_video(kept.x, kept.video_rows, selection.features)
  return kept._replace(x=x)


def take(prompts: PrunedPrompts, kept, count, *, num_video):
  """Returns (taken int32[B, R'], prompts) with only some of the video tokens.

  `taken` are the rows that went on. Of the n entries, those `kept` int32[B, K]
  stay, ascending over the first `count` int32[B]; padding has the index N.
  """

  def one(prompt, kept, count):
    taken, pruned = prune(prompt, kept, count)
    if prompt.frames is not None:
      # The mark behind the last patch may have gone.
      behind = taken >= prompt.lengths - prompt.num_after
      behind &= jnp.arange(len(taken)) < pruned.lengths
      pruned = pruned._replace(num_after=behind.sum(dtype=jnp.int32))
    valid = jnp.arange(len(kept)) < count

    def entries(x):
      return jnp.where(valid, jnp.take(x, kept, mode="clip"), num_video)

    return taken, pruned._replace(
      index=entries(prompt.index), row=entries(prompt.row), count=count
    )

  # What entered the model is not changed any more.
  entered = prompts.entered
  taken, pruned = jax.vmap(one)(prompts._replace(entered=None), kept, count)
  return taken, pruned._replace(entered=entered)


def read_video(x, video_rows):
  """Returns [B, n, ...], rows of x [B, R, ...]; zeros for padding."""
  take = functools.partial(jnp.take, axis=0, mode="fill", fill_value=0)
  return jax.vmap(take)(x, video_rows)


def write_video(x, video_rows, values):
  """Returns x [B, R, ...] with `values` [B, n, ...] in its video rows."""

  def one(x, rows, values):
    return x.at[rows].set(values.astype(x.dtype), mode="drop")

  return jax.vmap(one)(x, video_rows, values)


def last_logits(model, params, prompts: PrunedPrompts):
  """Returns float32[B, V] behind each prompt's last valid row."""
  last = (prompts.lengths - 1)[:, None, None]
  last = jnp.take_along_axis(prompts.x, last, axis=1)
  return model.final_logits(params, last[:, 0])


def drop(cache: qwen2.Cache, taken, lengths) -> qwen2.Cache:
  """Returns the cache with only the rows `taken` int32[B, R']."""

  def rows(x):  # [B, S, K, H], with or without layers before it.
    place = jnp.expand_dims(taken, [*range(x.ndim - 4), -2, -1])
    return jnp.take_along_axis(x, place, axis=-3)

  return qwen2.Cache(*jax.tree.map(rows, cache[:2]), lengths)


def place(model, prompts, videos, length: int):
  """Returns (int32[B, P, length], next positions int32[B]) of B prompts.

  Positions count on behind a prompt; `videos` are as of `VideoLLM.positions`.
  """
  found, following = [], []
  for prompt, video in zip(prompts, videos, strict=True):
    rows, after = model.positions(prompt.ids, video)
    behind = np.arange(1, length - rows.shape[1] + 1, dtype=np.int32)
    found.append(np.concatenate([rows, rows[:, -1:] + behind], axis=1))
    following.append(after)
  return np.stack(found), np.array(following, np.int32)


def pad_tokens(array, size: int, axis: int = 0):
  """Returns an array with zeros behind its own `size` or fewer of an axis."""
  widths = [(0, 0)] * array.ndim
  widths[axis] = (0, size - array.shape[axis])
  if not widths[axis][1]:
    return array
  pad = jnp.pad if isinstance(array, jax.Array) else np.pad
  return pad(array, widths)


def pad_rows(count: int, size: int) -> list[int]:
  """Returns `size` row numbers below `count`; the last one is repeated."""
  return [min(row, count - 1) for row in range(size)]
