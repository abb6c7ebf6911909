"""Questions about clips -> batches of whole prompts on device.

Letters: B batch, L prompt tokens, N video tokens, D width, P position rows,
Q tokens of a question's text.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cacovid_jax import errors
from cacovid_jax.data import question as question_lib
from cacovid_jax.data import tokenizer as tokenizer_lib
from cacovid_jax.evals import programs as programs_lib

# Lengths are rounded up to a multiple of this, so that a few texts more or
# less do not mean another program.
_LENGTH_STEP = 16


class Texts:
  """The questions of an evaluation, tokenised once for all grids.

  Attributes:
    tokenizer: of the checkpoint.
  """

  def __init__(
    self, checkpoint: Any, questions: Sequence[question_lib.Question]
  ):
    """Tokenises.

    Args:
      checkpoint: `models.checkpoints.Checkpoint` with a tokenizer.
      questions: every question that will be asked.
    """
    self.tokenizer = checkpoint.tokenizer
    if self.tokenizer is None:
      raise errors.UserError(
        "the checkpoint has no tokenizer.json; evaluation needs a complete"
        " checkpoint directory"
      )
    self._texts = {question.id: question.prompt for question in questions}
    # About a clip of one token; with all of them only when they are needed.
    self._prompts = {
      name: self.tokenizer.encode_prompt(text, 1)
      for name, text in self._texts.items()
    }
    self._spans = {
      name: question_span(prompt, self.tokenizer)
      for name, prompt in self._prompts.items()
    }

  def prompt(self, name: str, num_video: int) -> tokenizer_lib.Prompt:
    """Returns a question's prompt about a clip of N tokens."""
    return self.tokenizer.resize(
      self._prompts[name], num_video, self._texts[name]
    )

  def span(self, name: str, num_video: int) -> tuple[int, int]:
    """Returns `question_span` of that prompt."""
    start, end = self._spans[name]
    return start + num_video - 1, end + num_video - 1

  def longest(self, num_video: int) -> tuple[int, int]:
    """Returns L and Q that hold every question about a clip of N tokens.

    Refuses a clip that leaves a question no room.
    """
    name = max(self._prompts, key=lambda name: self._prompts[name].length)
    length = self.prompt(name, num_video).length
    return length, max(end - start for start, end in self._spans.values())


class Prompts:
  """The prompts of all questions about clips of one grid."""

  def __init__(
    self,
    checkpoint: Any,
    texts: Texts,
    grid: tuple[int, int, int],
    batch_size: int,
  ):
    """The longest prompt sets L, the longest question Q.

    Any question may be asked, since a policy may be given the words of one
    about a clip of another grid.

    Args:
      checkpoint: the one that `texts` was made with.
      texts: the questions.
      grid: (T, H, W) of their clips.
      batch_size: B.
    """
    self._checkpoint, self._texts = checkpoint, texts
    self._grid, self._size = grid, batch_size
    self._num_video = grid[0] * grid[1] * grid[2]
    length, text_length = texts.longest(self._num_video)
    self._length, self._text_length = _rounded(length), _rounded(text_length)

  def batch(
    self,
    programs: programs_lib.Programs,
    features,
    ids: Sequence[str],
    seconds: Sequence[float],
  ) -> programs_lib.Batch:
    """Returns the prompts of the questions `ids`, padded to B rows.

    Args:
      programs: with the one that embeds.
      features: float[b, N, D] of their clips, b = len(ids) or B.
      ids: of at most B questions.
      seconds: per clip, see `Batch.seconds`.
    """
    rows = pad_rows(len(ids), self._size)
    names = [ids[row] for row in rows]
    prompts = [self._texts.prompt(name, self._num_video) for name in names]
    padded = self._texts.tokenizer.pad(prompts, self._length)
    seconds = np.asarray(seconds, np.float32)
    seconds = seconds[np.minimum(rows, len(seconds) - 1)]
    placed = [
      self._positions(prompt.ids, gap)
      for prompt, gap in zip(prompts, seconds, strict=True)
    ]
    positions, following = map(np.array, zip(*placed, strict=True))
    text_rows = np.full([len(names), self._text_length], self._length, np.int32)
    for row, name in zip(text_rows, names, strict=True):
      start, end = self._texts.span(name, self._num_video)
      row[: end - start] = np.arange(start, end)
    features = jnp.asarray(features)
    if features.shape[0] != len(rows):
      features = features[np.array(rows)]
    ids, length, start = map(
      jnp.asarray, (padded.ids, padded.length, padded.video_start)
    )
    # Awaited, so that its time is not taken for that of what follows.
    x = jax.block_until_ready(
      programs.embed(self._checkpoint.params, ids, features, start)
    )
    return programs_lib.Batch(
      features,
      ids,
      length,
      start,
      jnp.asarray(positions),
      jnp.asarray(following, jnp.int32),
      jnp.asarray(seconds),
      jnp.asarray(text_rows),
      x,
    )

  def _positions(self, ids, seconds):
    """Returns (int32[P, L], next position), counting on behind the prompt."""
    positions, following = self._checkpoint.model.positions(
      ids, grid=self._grid, seconds_per_slice=float(seconds)
    )
    behind = np.arange(1, self._length - len(ids) + 1, dtype=np.int32)
    behind = positions[:, -1:] + behind
    return np.concatenate([positions, behind], axis=1), following


def question_span(
  prompt: tokenizer_lib.Prompt, tokenizer: tokenizer_lib.Tokenizer
) -> tuple[int, int]:
  """Returns the first row of a question's text, and the one behind its last.

  The text lies between the video's block and the end of the user's turn.
  """
  style = tokenizer.style
  start = prompt.video_start + prompt.num_video_tokens + style.newline_tokens
  start += len(style.around[1:])
  ends = np.isin(prompt.ids[start:], tokenizer.eos_ids)
  end = start + int(ends.argmax()) if ends.any() else prompt.length
  return start, end


def pad_rows(count: int, size: int) -> list[int]:
  """Returns `size` row numbers below `count`; the last one is repeated."""
  return [min(row, count - 1) for row in range(size)]


def _rounded(length: int) -> int:
  return -(-max(length, 1) // _LENGTH_STEP) * _LENGTH_STEP
