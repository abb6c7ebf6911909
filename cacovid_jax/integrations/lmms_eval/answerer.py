"""Answers to lmms-eval's requests, by the evaluation's own programs."""

import logging
import os
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp

from cacovid_jax.data import answer_log
from cacovid_jax.data import question as question_lib
from cacovid_jax.evals import answering, evaluation, likelihood, runner
from cacovid_jax.integrations.lmms_eval import arguments, requests
from cacovid_jax.models import checkpoints
from cacovid_jax.policy import loading

_LOGGER = logging.getLogger(__name__)


class Reply(NamedTuple):
  """An answer and its size.

  Attributes:
    text: the answer, "" if the clip cannot be read.
    input_tokens: of the prompt that the language model read, after selection.
    output_tokens: of the text.
  """

  text: str
  input_tokens: int
  output_tokens: int


class Answerer:
  """A loaded model that answers from a share of a clip's tokens.

  Clips and programs are kept from one call to the next.
  """

  def __init__(self, args: arguments.Arguments):
    """Loads the weights."""
    self.args = args
    self.cell = args.cell()
    self.checkpoint = checkpoint = evaluation.with_template(
      checkpoints.load(args.directory, jnp.dtype(args.dtype)),
      args.directory,
      args.template,
    )
    self._policies = {}
    if self.cell.method is not None:
      self._policies = self._load_policies()
    methods = [self.cell.method] if self.cell.method else []
    self._source = evaluation.open_source(
      evaluation.Request(
        # Clips are named by whole paths: a task says where they are.
        data=os.path.abspath(os.sep),
        workdir="",
        checkpoint=args.directory,
        num_frames=args.num_frames,
        min_pixels=args.min_pixels,
        max_pixels=args.max_pixels,
        batch_size=args.batch_size,
        dtype=args.dtype,
        cache=args.feature_cache,
      ),
      checkpoint,
      runner.wanted(methods),
    )
    self._programs = {}

  def generate(
    self, asked: Sequence[requests.Asked], lengths: Sequence[int]
  ) -> list[Reply]:
    """Returns the answers, in order.

    Args:
      asked: the requests.
      lengths: longest answer to each, in tokens.
    """
    rows = requests.as_questions(asked)
    replies = {}
    for length in sorted(set(lengths)):
      wanted = _distinct(
        row for row, own in zip(rows, lengths, strict=True) if own == length
      )
      for name, reply in self._generate(wanted, length).items():
        replies[name, length] = reply
    return [
      replies[row.id, length] for row, length in zip(rows, lengths, strict=True)
    ]

  def likelihoods(
    self, asked: Sequence[requests.Asked], continuations: Sequence[str]
  ) -> list[likelihood.Likelihood]:
    """Returns how likely each continuation follows its prompt, in order."""
    rows = requests.as_questions(asked)
    evaluator = self._evaluator(_distinct(rows), 1)
    found = likelihood.score(evaluator, rows, continuations, self.cell)
    self._warn(
      {row.id: row for row in rows},
      {row.id: one.fault for row, one in zip(rows, found, strict=True)},
    )
    return found

  def close(self) -> None:
    """Stops the threads that decode."""
    self._source.close()

  def _generate(self, rows, length) -> dict[str, Reply]:
    evaluator = self._evaluator(rows, length)
    answers = answer_log.Ledger(None, {})
    failures = evaluator.run(
      rows, [self.cell], answers, description="lmms-eval"
    )
    if self.cell.place in failures:
      # A method that stops half-way, with the clip that it cannot do.
      raise runner.NothingToAsk(failures[self.cell.place].reason)
    records = {row.id: answers[self.cell.key(row.id)] for row in rows}
    self._warn(
      {row.id: row for row in rows},
      {name: record.get("fault", "") for name, record in records.items()},
    )
    encode = self.checkpoint.tokenizer.encode
    return {
      row.id: Reply(
        records[row.id]["text"],
        self._text_tokens(row) + records[row.id]["kept"],
        len(encode(records[row.id]["text"])),
      )
      for row in rows
    }

  def _evaluator(self, rows, length) -> runner.Evaluator:
    evaluator = runner.Evaluator(
      self.checkpoint,
      self._source,
      rows,
      runner.Settings(
        num_frames=self.args.num_frames,
        batch_size=self.args.batch_size,
        max_new_tokens=length,
      ),
      policies=self._policies,
      programs=self._programs.get(length),
    )
    self._programs[length] = evaluator.programs
    return evaluator

  def _load_policies(self) -> dict[str, loading.LoadedPolicy]:
    path = self.args.policy
    if not path and not self.args.pretrained:
      path = os.fspath(answering.SHIPPED_POLICY)
    elif not path and loading.has_policy(self.args.pretrained):
      path = self.args.pretrained
    if not path:
      return {}
    return {"policy": loading.load_policy(path, self.checkpoint)}

  def _text_tokens(self, row: question_lib.Question) -> int:
    """Returns the prompt's tokens that are none of the video's N."""
    return self.checkpoint.tokenizer.encode_prompt(row.prompt, 1).length - 1

  def _warn(self, rows, faults) -> None:
    """Tells which clips cannot be read, once each."""
    clips = {}
    for name, fault in faults.items():
      if fault:
        clips.setdefault(rows[name].video, [fault, 0])[1] += 1
    for video, (fault, count) in clips.items():
      _LOGGER.warning(
        "/%s cannot be used (%s): %d question(s) about it answered by nothing",
        video.removeprefix("./"),
        fault,
        count,
      )


def _distinct(rows) -> list[question_lib.Question]:
  return list({row.id: row for row in rows}.values())
