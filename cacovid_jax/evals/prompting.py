"""Questions about clips -> batches of whole prompts on device.

Letters: B batch, L prompt tokens, N video tokens, D width, P position rows,
Q tokens of a question's text.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cacovid_jax import errors
from cacovid_jax.data import prompts as prompts_lib
from cacovid_jax.data import questions as questions_lib
from cacovid_jax.evals import programs as programs_lib

# Lengths are rounded up to a multiple of this, so that a few texts more or
# less do not mean another program.
_LENGTH_STEP = 16


class Prompts:
  """The prompts of all questions that an evaluation may ask, tokenised."""

  def __init__(
    self,
    checkpoint: Any,
    questions: Sequence[questions_lib.Question],
    grid: tuple[int, int, int],
    batch_size: int,
  ):
    """Tokenises; the longest prompt sets L, the longest question Q.

    Args:
      checkpoint: `models.checkpoints.Checkpoint` with a tokenizer.
      questions: every question that will be asked.
      grid: (T, H, W) of their clips.
      batch_size: B.
    """
    tokenizer = checkpoint.tokenizer
    if tokenizer is None:
      raise errors.UserError(
        "the checkpoint has no tokenizer.json; evaluation needs a complete"
        " checkpoint directory"
      )
    self._checkpoint, self._grid, self._size = checkpoint, grid, batch_size
    num_video = grid[0] * grid[1] * grid[2]
    self._prompts = {
      question.id: tokenizer.encode_prompt(question.prompt, num_video)
      for question in questions
    }
    self._spans = {
      name: question_span(prompt, tokenizer)
      for name, prompt in self._prompts.items()
    }
    self._length = _rounded(max(p.length for p in self._prompts.values()))
    self._text_length = _rounded(max(b - a for a, b in self._spans.values()))

  def digest(self, questions: Sequence[questions_lib.Question]) -> str:
    """Returns a sha256 of the ids of these questions' prompts."""
    digest = hashlib.sha256()
    for name in sorted(question.id for question in questions):
      digest.update(name.encode() + b"\0")
      digest.update(self._prompts[name].ids.tobytes())
    return digest.hexdigest()

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
    prompts = [self._prompts[name] for name in names]
    padded = self._checkpoint.tokenizer.pad(prompts, self._length)
    seconds = np.asarray(seconds, np.float32)
    seconds = seconds[np.minimum(rows, len(seconds) - 1)]
    placed = [
      self._positions(prompt.ids, gap)
      for prompt, gap in zip(prompts, seconds, strict=True)
    ]
    positions, following = map(np.array, zip(*placed, strict=True))
    text_rows = np.full([len(names), self._text_length], self._length, np.int32)
    for row, name in zip(text_rows, names, strict=True):
      start, end = self._spans[name]
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
  prompt: prompts_lib.Prompt, tokenizer: prompts_lib.Tokenizer
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
