"""How likely given texts are as answers, from some of the video tokens.

The prompt is read once for all of its continuations; what they are scored from
is what an answer is generated from.

Letters: B batch, L prompt tokens, M tokens of a continuation.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from cacovid_jax.data import question as question_lib
from cacovid_jax.evals import asker as asker_lib
from cacovid_jax.evals import runner
from cacovid_jax.models import generation, prompt_batch

# M is rounded up to a multiple of this: few programs for many lengths.
_LENGTH_STEP = 8


class Likelihood(NamedTuple):
  """Of one continuation.

  Attributes:
    log_prob: natural logarithm of its probability, summed over its tokens;
      -inf if the clip cannot be used.
    num_tokens: how many they are.
    greedy: whether the most likely answer begins with it.
    fault: why the clip cannot be used, else "".
  """

  log_prob: float
  num_tokens: int
  greedy: bool
  fault: str = ""


def score(
  evaluator: runner.Evaluator,
  questions: Sequence[question_lib.Question],
  continuations: Sequence[str],
  cell: runner.Cell,
) -> list[Likelihood]:
  """Returns the likelihood of each continuation of a question's prompt.

  Args:
    evaluator: made for these questions.
    questions: one per continuation; the same one may stand there again.
    continuations: texts; the tokens that end an answer are no part of them.
    cell: method and ratio, or vanilla.
  """
  encode = evaluator.checkpoint.tokenizer.encode
  wanted: dict[str, dict[str, list[int]]] = {}
  for question, text in zip(questions, continuations, strict=True):
    wanted.setdefault(question.id, {}).setdefault(text, encode(text))
  longest = max(len(ids) for texts in wanted.values() for ids in texts.values())
  size = -(-max(longest, 1) // _LENGTH_STEP) * _LENGTH_STEP
  readers, found = {}, {}
  distinct = list({question.id: question for question in questions}.values())
  for batch in evaluator.batches(distinct):
    tools = evaluator.tools(batch[0])
    if tools.grid not in readers:
      readers[tools.grid] = _Reader(evaluator, tools, cell, size)
    reader = readers[tools.grid]
    asker = asker_lib.Asker(evaluator, batch)
    state = reader.prefill(asker)
    texts = [list(wanted[question.id]) for question in batch]
    for column in range(max(map(len, texts))):
      # A question with fewer continuations repeats its last.
      chosen = [own[min(column, len(own) - 1)] for own in texts]
      ids = [wanted[q.id][t] for q, t in zip(batch, chosen, strict=True)]
      log_prob, greedy = reader.score(state, asker.batch, ids)
      for row, (question, text) in enumerate(zip(batch, chosen, strict=True)):
        fault = asker.faults.get(row, "")
        found[question.id, text] = Likelihood(
          -np.inf if fault else float(log_prob[row]),
          len(wanted[question.id][text]),
          bool(greedy[row]) and not fault,
          fault,
        )
  return [
    found[question.id, text]
    for question, text in zip(questions, continuations, strict=True)
  ]


class _Reader:
  """Prompts read by one method, and continuations scored behind them."""

  def __init__(self, evaluator, tools: runner.Tools, cell, size: int):
    """Compiles nothing yet.

    Args:
      evaluator: `runner.Evaluator`.
      tools: its, of the clips' grid.
      cell: `runner.Cell`.
      size: M, static.
    """
    self._cell, self._size = cell, size
    self._model = evaluator.checkpoint.model
    self._params = evaluator.checkpoint.params
    self._rows = evaluator.settings.batch_size
    if cell.method is not None:
      tools.programs.check(cell.method.compressor, cell.ratio)
    self._whole = jax.jit(self._read_whole)
    self._kept = jax.jit(self._read_kept)
    self._compressor = cell.method and cell.method.compressor
    if self._compressor and self._compressor.on_host:
      self._kept = self._read_kept
    self._score = jax.jit(functools.partial(generation.score, self._model))

  def prefill(self, asker: asker_lib.Asker):
    """Returns (logits, cache) behind the prompts of a batch."""
    if self._cell.method is None:
      return self._whole(self._params, asker.batch)
    inputs = selection = None
    if self._compressor.selects_first:
      selection = asker.select(self._cell)
    else:
      inputs = asker.inputs(self._cell)
    return self._kept(
      self._params, asker.batch, inputs, selection, self._compressor.load()
    )

  def score(
    self, state, batch: prompt_batch.PromptBatch, ids: Sequence[list[int]]
  ):
    """Returns (float32[B], bool[B]) of at most B continuations."""
    padded = np.zeros((self._rows, self._size), np.int32)
    lengths = np.zeros(self._rows, np.int32)
    for row, own in enumerate(ids):
      padded[row, : len(own)] = own
      lengths[row] = len(own)
    log_prob, greedy = self._score(
      self._params, *state, batch.next_position, padded, lengths
    )
    return np.asarray(log_prob), np.asarray(greedy)

  def _read_whole(self, params, batch):
    logits, cache, _ = self._model.prefill(
      params,
      batch.x,
      batch.positions,
      batch.lengths,
      cache_length=batch.x.shape[1] + self._size - 1,
      deep=batch.deep,
      video_rows=batch.video_rows,
    )
    return logits, cache

  def _read_kept(self, params, batch, inputs, selection, own_params):
    logits, cache, _ = self._compressor.prefill(
      self._model,
      params,
      prompt_batch.whole(batch),
      inputs,
      ratio=self._cell.ratio,
      new_rows=self._size - 1,
      own_params=own_params,
      selection=selection,
    )
    return logits, cache
