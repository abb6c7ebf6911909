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
from cacovid_jax.models import prompt_batch, video_llm

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
    self._model = checkpoint.model
    self._texts = {question.id: question.prompt for question in questions}
    # About a clip of one token; with all of them only when they are needed.
    prompts = {name: self.prompt(name, (1, 1, 1)) for name in self._texts}
    self._longest = max(
      prompts, key=lambda name: prompts[name].length, default=""
    )
    spans = (
      question_span(prompt, self.tokenizer) for prompt in prompts.values()
    )
    self._text_length = max((end - start for start, end in spans), default=0)

  def prompt(
    self, name: str, grid: tuple[int, int, int], seconds: float = 1.0
  ) -> tokenizer_lib.Prompt:
    """Returns a question's prompt about a clip of a grid (T, H, W).

    `seconds` pass from one temporal patch to the next.
    """
    return self._model.encode_prompt(
      self.tokenizer, self._texts[name], grid, seconds
    )

  def longest(self, grid: tuple[int, int, int]) -> tuple[int, int]:
    """Returns L and Q that hold every question about a clip of a grid.

    Refuses a clip that leaves a question no room.
    """
    return self.prompt(self._longest, grid).length, self._text_length


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
    length, text_length = texts.longest(grid)
    self._length, self._text_length = _rounded(length), _rounded(text_length)

  def batch(
    self,
    programs: programs_lib.Programs,
    features,
    ids: Sequence[str],
    seconds: Sequence[float],
  ) -> prompt_batch.PromptBatch:
    """Returns the prompts of the questions `ids`, padded to B rows.

    Args:
      programs: with the one that embeds.
      features: float[b, N, D] of their clips, b = len(ids) or B.
      ids: of at most B questions.
      seconds: per clip, from one temporal patch to the next.
    """
    rows = prompt_batch.pad_rows(len(ids), self._size)
    # In float32, as features are: what follows has the same bits everywhere.
    videos = [
      video_llm.VideoFeatures(None, self._grid, float(np.float32(seconds[row])))
      for row in rows
    ]
    prompts = [
      self._texts.prompt(ids[row], self._grid, video.second_per_grid_t)
      for row, video in zip(rows, videos, strict=True)
    ]
    padded = self._texts.tokenizer.pad(prompts, self._length)
    placed = [
      self._positions(prompt.ids, video)
      for prompt, video in zip(prompts, videos, strict=True)
    ]
    positions, following = map(np.array, zip(*placed, strict=True))
    text_rows = np.full([len(rows), self._text_length], self._length, np.int32)
    for row, prompt in zip(text_rows, prompts, strict=True):
      start, end = question_span(prompt, self._texts.tokenizer)
      row[: end - start] = np.arange(start, end)
    features = jnp.asarray(features)
    if features.shape[0] != len(rows):
      features = features[np.array(rows)]
    ids, lengths, video_rows = map(
      jnp.asarray, (padded.ids, padded.length, padded.video_rows)
    )
    # Awaited, so that its time is not taken for that of what follows.
    x = jax.block_until_ready(
      programs.embed(self._checkpoint.params, ids, features, video_rows)
    )
    return prompt_batch.PromptBatch(
      x=x,
      positions=jnp.asarray(positions),
      lengths=lengths,
      video_rows=video_rows,
      next_position=jnp.asarray(following, jnp.int32),
      features=features,
      ids=ids,
      text_rows=jnp.asarray(text_rows),
    )

  def _positions(self, ids, video):
    """Returns (int32[P, L], next position), counting on behind the prompt."""
    positions, following = self._checkpoint.model.positions(ids, video)
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
  start = prompt.video_rows[-1] + 1 + style.newline_tokens
  start += len(style.around[1:])
  ends = np.isin(prompt.ids[start:], tokenizer.eos_ids)
  end = start + int(ends.argmax()) if ends.any() else prompt.length
  return start, end


def _rounded(length: int) -> int:
  return -(-max(length, 1) // _LENGTH_STEP) * _LENGTH_STEP
