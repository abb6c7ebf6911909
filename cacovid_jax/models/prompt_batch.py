"""Prompts about videos on the device, whole or pruned of video tokens.

A video's rows need not follow each other: text may stand between its temporal
patches. Dropping tokens removes their rows; text rows stay, and every row keeps
its position of the whole prompt. Shapes are static.

Axes: B batch, L rows of a whole prompt, R rows of a pruned one, D width, N
video tokens, n of them left, K kept next, P position rows, S auxiliary feature
maps, Q tokens of a question's text, V vocabulary.
"""

import bisect
import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cacovid_jax import errors
from cacovid_jax.models import qwen2

_MULTIPLE = 16


@dataclasses.dataclass(frozen=True)
class PromptBuckets:
  """How long the text of prompts is padded to: a few lengths for many texts.

  Attributes:
    text_rows: rising; rows of a prompt beside its video tokens.
  """

  text_rows: tuple[int, ...]

  def __post_init__(self):
    rows = tuple(map(int, self.text_rows))
    if not 1 <= len(rows) <= 3 or rows[0] < 1 or sorted({*rows}) != [*rows]:
      raise errors.UserError(
        f"config.data.prompt_rows={self.text_rows}: give one to three rising"
        " numbers of rows, or leave it empty"
      )
    object.__setattr__(self, "text_rows", rows)

  @classmethod
  def of(
    cls, lengths: Sequence[int], *, beside: int = 0, worth: float = 0.1
  ) -> "PromptBuckets":
    """Returns the buckets that pad these prompts least.

    Each more means more programs, and so has to spare a share of the rows.

    Args:
      lengths: text rows of every prompt, at least one.
      beside: video rows of a prompt as it is computed.
      worth: the share of all rows that one more bucket has to spare.
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
      if rows(found) > (1 - worth) * rows(best):
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

  Attributes:
    x: float[B, L, D] embeddings.
    positions: int32[B, P, L].
    lengths: int32[B] rows without padding.
    video_rows: int32[B, N] rows of the video tokens, ascending; L where a video
      has fewer than N.
    next_position: int32[B] of the first generated token.
    deep: float[B, S, N, D], see `video_llm.VideoFeatures`, or None.
    features: float[B, N, D] of the video as it was encoded; None where nothing
      reads them but the prompt itself.
    ids: int32[B, L] from which the prompts were embedded, or None.
    text_rows: int32[B, Q] rows of the question's text, L where there are none;
      None where nothing reads it.
  """

  x: jax.Array
  positions: jax.Array
  lengths: jax.Array
  video_rows: jax.Array
  next_position: jax.Array
  deep: jax.Array | None = None
  features: jax.Array | None = None
  ids: jax.Array | None = None
  text_rows: jax.Array | None = None


class PrunedPrompts(NamedTuple):
  """B prompts somewhere between two layers of a decoder.

  Of the n entries per prompt the first `count` are valid.

  Attributes:
    x: float[B, R, D] residual stream.
    positions: int32[B, P, R] of the whole prompt.
    lengths: int32[B] rows without padding.
    video_rows: int32[B, n] rows of the tokens that are left, R for padding.
    num_after: int32[B] text rows behind the last row of the whole video.
    index: int32[B, n] token of the whole video behind each entry, N for
      padding.
    row: int32[B, n] row of the selection that entered the model.
    count: int32[B] valid entries.
    deep: float[B, S, n, D] or None.
    entered: selection that entered the model (`index`, `assign` and the like,
      leading axis B); None if that was the whole video.
  """

  x: jax.Array
  positions: jax.Array
  lengths: jax.Array
  video_rows: jax.Array
  num_after: jax.Array
  index: jax.Array
  row: jax.Array
  count: jax.Array
  deep: jax.Array | None = None
  entered: Any = None


def kept_rows(index, num_valid, *, video_rows, length, num_rows):
  """Returns (rows, new length, new video rows) of ONE pruned prompt.

  `x[rows]` are its embeddings and `positions[:, rows]` its positions.

  Args:
    index: int32[K] kept video tokens, ascending in 0..N-1; only the first
      `num_valid` entries are read.
    num_valid: int or int32[], at most K.
    video_rows: int32[N], `num_rows` or more for padding.
    length: int or int32[], rows of the whole prompt without padding.
    num_rows: L, static.

  Returns:
    rows int32[L - N + K], strictly ascending over the first new length
    entries, repeating the last one behind them; int32[]; int32[K] places of
    the kept tokens among `rows`, L - N + K behind `num_valid`.
  """
  out_rows = num_rows - len(video_rows) + len(index)
  valid = jnp.arange(len(index)) < num_valid
  kept = jnp.take(video_rows, index, mode="clip")
  kept = jnp.where(valid, kept, num_rows)
  row = jnp.arange(num_rows)
  stays = (row < length).at[video_rows].set(False, mode="drop")
  stays = stays.at[kept].set(True, mode="drop")
  place = jnp.cumsum(stays, dtype=jnp.int32) - 1
  new_length = place[-1] + 1
  rows = jnp.zeros(out_rows, jnp.int32)
  rows = rows.at[jnp.where(stays, place, out_rows)].set(row, mode="drop")
  rows = rows[jnp.minimum(jnp.arange(out_rows), new_length - 1)]
  kept = jnp.where(valid, jnp.take(place, kept, mode="clip"), out_rows)
  return rows, new_length, kept


def prune(prompt, index, num_valid):
  """Returns (rows, prompt) of ONE prompt with only some video tokens.

  Args:
    prompt: `PromptBatch` or `PrunedPrompts`, without its leading axis.
    index: int32[K] kept entries of its `video_rows`, ascending over the first
      `num_valid`.
    num_valid: int or int32[].

  Returns:
    rows int32[R] that went on; the prompt, of which embeddings, positions,
    length, video rows and auxiliary features have changed.
  """
  rows, length, video_rows = kept_rows(
    index,
    num_valid,
    video_rows=prompt.video_rows,
    length=prompt.lengths,
    num_rows=len(prompt.x),
  )
  deep = prompt.deep
  if deep is not None:
    deep = jnp.take(deep, index, axis=1, mode="clip")
  return rows, prompt._replace(
    x=prompt.x[rows],
    positions=prompt.positions[:, rows],
    lengths=length,
    video_rows=video_rows,
    deep=deep,
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
    x=prompts.x,
    positions=prompts.positions,
    lengths=lengths,
    video_rows=prompts.video_rows,
    num_after=lengths - 1 - last,
    index=every,
    row=every,
    count=valid.sum(axis=1, dtype=jnp.int32),
    deep=prompts.deep,
  )


def crop(prompts: PromptBatch, num_video: int) -> PromptBatch:
  """Returns prompts without the padding of a bucket.

  Every video has `num_video` tokens.
  """
  num_rows = prompts.x.shape[1] + num_video - prompts.video_rows.shape[1]

  def first(array, count):
    return None if array is None else array[:, :count]

  return prompts._replace(
    x=prompts.x[:, :num_rows],
    positions=prompts.positions[:, :, :num_rows],
    video_rows=prompts.video_rows[:, :num_video],
    deep=None if prompts.deep is None else prompts.deep[:, :, :num_video],
    features=first(prompts.features, num_video),
    ids=first(prompts.ids, num_rows),
  )


def keep(prompts: PrunedPrompts, selection, *, num_video) -> PrunedPrompts:
  """Returns whole prompts with only what a selection [B, ...] keeps of N."""
  count = selection.mask.sum(axis=1).astype(jnp.int32)
  _, kept = take(prompts, selection.index, count, num_video=num_video)
  kept = write_selection(kept, prompts.deep, selection)
  own = jnp.arange(selection.index.shape[1], dtype=jnp.int32)
  return kept._replace(
    row=jnp.broadcast_to(own, selection.index.shape), entered=selection
  )


def write_selection(kept, deep, selection):
  """Returns pruned prompts with a selection's rows [B, ...] in their places.

  A method may have changed the rows that it keeps (merged tokens).

  Args:
    kept: B prompts with what the selection keeps.
    deep: float[B, S, N, D] of the whole videos, or None.
    selection: see `compressors.base.Selection`.
  """
  if deep is not None:
    kept = kept._replace(deep=jax.vmap(_means)(deep, selection))
  return kept._replace(
    x=write_video(kept.x, kept.video_rows, selection.features)
  )


def take(prompts: PrunedPrompts, kept, count, *, num_video):
  """Returns (taken int32[B, R'], prompts) with only some of the video tokens.

  Args:
    prompts: the prompts.
    kept: int32[B, K] of their n entries, ascending over the first `count`.
    count: int32[B].
    num_video: N, the index of padding.

  `taken` are the rows that went on.
  """

  def one(prompt, kept, count):
    taken, pruned = prune(prompt, kept, count)
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


def _means(deep, selection):
  """Returns float[S, K, D]: means of the tokens that a row stands for."""
  size = selection.index.shape[0]
  members = selection.assign == jnp.arange(size)[:, None]  # [K, N]
  weights = members / jnp.maximum(members.sum(axis=1, keepdims=True), 1)
  # A product with zeros and ones, not a sum by row numbers, whose order is
  # open on a GPU; one token alone stays as it is.
  return jnp.einsum(
    "KN,SND->SKD",
    weights.astype(jnp.float32),
    deep.astype(jnp.float32),
    precision="highest",
  ).astype(deep.dtype)


def read_video(x, video_rows):
  """Returns [B, n, ...], rows of x [B, R, ...]; zeros for padding."""
  return jax.vmap(
    lambda x, rows: jnp.take(x, rows, axis=0, mode="fill", fill_value=0)
  )(x, video_rows)


def write_video(x, video_rows, values):
  """Returns x [B, R, ...] with `values` [B, n, ...] in its video rows."""
  return jax.vmap(
    lambda x, rows, values: x.at[rows].set(values.astype(x.dtype), mode="drop")
  )(x, video_rows, values)


def last_logits(model, params, prompts: PrunedPrompts):
  """Returns float32[B, V] behind each prompt's last valid row."""
  last = (prompts.lengths - 1)[:, None, None]
  last = jnp.take_along_axis(prompts.x, last, axis=1)
  return model.final_logits(params, last[:, 0])


def drop(cache: qwen2.Cache, taken, lengths) -> qwen2.Cache:
  """Returns the cache with only the rows `taken` int32[B, R']."""
  place = taken[None, :, :, None, None]
  return qwen2.Cache(
    keys=jnp.take_along_axis(cache.keys, place, axis=2),
    values=jnp.take_along_axis(cache.values, place, axis=2),
    lengths=lengths,
  )


def place(model, prompts, videos, length: int):
  """Returns (int32[B, P, length], next positions int32[B]) of B prompts.

  Positions count on behind a prompt. `videos` are what `VideoLLM.positions`
  takes, one for each `data.tokenizer.Prompt`.
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
  return np.pad(array, widths) if widths[axis][1] else array


def pad_rows(count: int, size: int) -> list[int]:
  """Returns `size` row numbers below `count`; the last one is repeated."""
  return [min(row, count - 1) for row in range(size)]
