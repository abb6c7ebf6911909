"""Answers to lmms-eval's requests, by the evaluation's own programs."""

import dataclasses
import logging
import os
from collections.abc import Sequence
from typing import NamedTuple

from cacovid_jax import config as config_lib
from cacovid_jax import experiment as experiment_lib
from cacovid_jax.data import answer_log
from cacovid_jax.data import question as question_lib
from cacovid_jax.evals import evaluation
from cacovid_jax.evals import evaluator as evaluator_lib
from cacovid_jax.inference import batch as batch_lib
from cacovid_jax.inference import clip_queue
from cacovid_jax.inference import engine as engine_lib
from cacovid_jax.inference import methods as methods_lib
from cacovid_jax.integrations.lmms_eval import arguments, requests

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


class RequestAnswerer:
  """A loaded model that answers from a share of a clip's tokens.

  Clips and programs are kept from one call to the next.
  """

  def __init__(self, config):
    """Loads the weights of a config, see `arguments.parse`."""
    self.condition = arguments.condition(config)
    changes = {
      # Clips are named by whole paths: a task says where they are.
      "data.root": os.path.abspath(os.sep),
      "data.media": "",
    }
    if self.condition.method is None:
      changes["evals.policies"] = ()
    self.experiment = experiment_lib.Experiment.from_config(
      config_lib.replace(config, changes)
    )
    self.checkpoint = self.experiment.checkpoint
    self._policies = self.experiment.policies
    methods = [self.condition.method] if self.condition.method else []
    self._source = clip_queue.open_queue(
      self.experiment, methods_lib.wanted(methods)
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
  ) -> list[batch_lib.Likelihood]:
    """Returns how likely each continuation follows its prompt, in order."""
    rows = requests.as_questions(asked)
    engine = self._engine(_distinct(rows), 1)
    found = engine.likelihoods(rows, continuations, self.condition)
    self._warn(
      {row.id: row for row in rows},
      {row.id: one.fault for row, one in zip(rows, found, strict=True)},
    )
    return found

  def close(self) -> None:
    """Stops the threads that decode."""
    self._source.close()

  def _generate(self, rows, length) -> dict[str, Reply]:
    evaluator = evaluator_lib.Evaluator(self._engine(rows, length))
    answers = answer_log.AnswerLog(None, {})
    failures = evaluator.run(
      rows, [self.condition], answers, description="lmms-eval"
    )
    if self.condition.place in failures:
      # A method that stops half-way, with the clip that it cannot do.
      raise evaluator_lib.NothingToAsk(failures[self.condition.place].reason)
    records = {row.id: answers[self.condition.key(row.id)] for row in rows}
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

  def _engine(self, rows, length) -> engine_lib.Engine:
    engine = engine_lib.Engine.of(
      self.experiment,
      self._source,
      rows,
      dataclasses.replace(
        evaluation.settings(self.experiment), max_new_tokens=length
      ),
      policies=self._policies,
      programs=self._programs.get(length),
      more_follow=True,
    )
    self._programs[length] = engine.programs
    return engine

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
