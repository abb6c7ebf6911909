"""Questions about clips -> batches of whole prompts on device.

Letters: B batch, L prompt rows, N_max video tokens of a grid bucket, D width,
Q tokens of a question's text.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from cacovid_jax import errors
from cacovid_jax.data import question as question_lib
from cacovid_jax.data import tokenizer as tokenizer_lib
from cacovid_jax.models import prompt_batch, video_llm

_MULTIPLE = 16  # Text is rounded up to it: a token more is no other program.
_USUAL = (64, 256, 1024)  # Lengths of text where later ones are not known.


@dataclasses.dataclass(eq=False, repr=False)
class Prompts:
  """The questions that may be asked, and their prompts in a few lengths.

  Any question may be asked about any clip, since a policy may be given the
  words of one about another.

  Attributes:
    text_rows: question id -> rows of its prompt beside the video's.
    lengths: rising, what text is padded to; a batch takes that of its longest.
  """

  checkpoint: Any  # `models.checkpoints.Checkpoint` with a tokenizer.
  questions: Sequence[question_lib.Question]  # That lengths follow.
  _: dataclasses.KW_ONLY
  # Returns (T, H, W) of a question's clip; refused is one that leaves a
  # question no room.
  grid_of: Callable[[Any], tuple[int, int, int]] = lambda question: (1, 1, 1)
  num_video: int = 0  # Largest N_max.
  # Whether lengths are usual ones that serve later questions as well, and not
  # those that pad these ones least.
  more_follow: bool = False
  others: Sequence[question_lib.Question] = ()  # Further questions.
  # Whether text of a temporal patch goes where none of its tokens is kept.
  drop_empty_frames: bool = False

  def __post_init__(self):
    self._model = self.checkpoint.model
    self.tokenizer = self.checkpoint.tokenizer
    if self.tokenizer is None:
      raise errors.UserError(
        "the checkpoint has no tokenizer.json; evaluation needs a complete"
        " checkpoint directory"
      )
    every = [*self.others, *self.questions]
    self._texts = {question.id: question.prompt for question in every}
    grids = {question.id: self.grid_of(question) for question in every}
    self.text_rows, spans = {}, [1]
    for name, grid in grids.items():
      prompt = self.prompt(name, grid)
      start, end = question_span(prompt, self.tokenizer)
      self.text_rows[name] = _text_rows(prompt)
      spans.append(end - start)
    longest = max(self.text_rows, key=self.text_rows.get, default="")
    for grid in sorted(set(grids.values())):
      prompt = self.prompt(longest, grid)
      if self.drop_empty_frames:  # Refused before anything is computed.
        self._model.frame_rows(self.tokenizer, prompt, grid)
    most = self.text_rows.get(longest, 1)
    if self.more_follow:
      self._question_rows = None  # Q is the text's length.
      self.lengths = _USUAL
      if most > _USUAL[-1]:
        self.lengths += (_rounded(most),)
      return
    self._question_rows = _rounded(max(spans))
    own = [self.text_rows[question.id] for question in self.questions] or [1]
    best = prompt_batch.PromptBuckets.of(own, beside=self.num_video)
    self.lengths = best.text_rows
    if len(self.lengths) == 1:
      # All rows together are a multiple.
      self.lengths = (_rounded(self.num_video + most) - self.num_video,)

  def prompt(self, name: str, grid, seconds=None) -> tokenizer_lib.Prompt:
    """Returns a question's prompt, by seconds of `processors.TowerInputs`."""
    text = self._texts[name]
    return self._model.encode_prompt(self.tokenizer, text, grid, seconds)

  def pick(self, text_rows: int) -> int:
    """Returns the length that so many rows of text are padded to."""
    fits = (length for length in self.lengths if length >= text_rows)
    return next(fits, _rounded(text_rows))

  def batch(
    self, embed, ids, grid, seconds, features, deep=None
  ) -> prompt_batch.PromptBatch:
    """Returns the prompts of at most B questions; the last one is repeated.

    L is N_max and the length of the longest text. The clips have one grid
    (T, H, W), and `seconds` from one temporal patch to the next; `features`
    float[B, N_max, D] and `deep` float[B, S, N_max, D] or None have zeros
    behind their own rows. `embed` takes (ids, features, video rows), B each.
    """
    rows, model = prompt_batch.pad_rows(len(ids), len(features)), self._model
    # In float32, as features are: what follows has the same bits everywhere.
    # Times of a prompt are text, and stay as they are.
    apart = [seconds[row] for row in rows]
    apart = [x if isinstance(x, tuple) else float(np.float32(x)) for x in apart]
    videos = [video_llm.VideoFeatures(None, grid, one) for one in apart]
    prompts = [
      self.prompt(ids[row], grid, one)
      for row, one in zip(rows, apart, strict=True)
    ]
    text = self.pick(max(map(_text_rows, prompts)))
    length = features.shape[1] + text
    padded = self.tokenizer.pad(prompts, length, features.shape[1])
    positions, following = prompt_batch.place(model, prompts, videos, length)
    shape = len(rows), self._question_rows or text
    text_rows = np.full(shape, length, np.int32)
    for row, prompt in zip(text_rows, prompts, strict=True):
      start, end = question_span(prompt, self.tokenizer)
      row[: end - start] = np.arange(start, end)
    ids, lengths, video_rows = map(
      jnp.asarray, (padded.ids, padded.length, padded.video_rows)
    )
    return prompt_batch.PromptBatch(
      x=embed(ids, features, video_rows),
      positions=jnp.asarray(positions),
      lengths=lengths,
      video_rows=video_rows,
      next_position=jnp.asarray(following),
      deep=deep,
      features=features,
      ids=ids,
      text_rows=jnp.asarray(text_rows),
      frames=self._frames(prompts, grid, apart, length),
    )

  def _frames(self, prompts, grid, seconds, length: int):
    """Returns int32[B, L], `frames` of a `prompt_batch.PromptBatch`."""
    if not self.drop_empty_frames:
      return None
    found = np.full((len(prompts), length), -1, np.int32)
    for row, prompt, one in zip(found, prompts, seconds, strict=True):
      given = self.tokenizer, prompt, grid, one
      row[: prompt.length] = self._model.frame_rows(*given)
    return jnp.asarray(found)


def question_span(prompt: tokenizer_lib.Prompt, tokenizer) -> tuple[int, int]:
  """Returns the first row of a question's text, and the one behind its last.

  The text lies between the video's block and the end of the user's turn.
  """
  style = tokenizer.style
  start = prompt.video_rows[-1] + 1 + style.newline_tokens
  for mark in map(tokenizer.token_id, style.around[1:]):
    while start < prompt.length and prompt.ids[start] == mark:
      start += 1  # Of its last temporal patch, and of all of it.
  ends = np.isin(prompt.ids[start:], tokenizer.eos_ids)
  end = start + int(ends.argmax()) if ends.any() else prompt.length
  return start, end


def _text_rows(prompt: tokenizer_lib.Prompt) -> int:
  return prompt.length - len(prompt.video_rows)


def _rounded(length: int) -> int:
  return -(-max(length, 1) // _MULTIPLE) * _MULTIPLE
