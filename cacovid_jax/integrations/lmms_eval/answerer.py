"""Answers to lmms-eval's requests, by the evaluation's own programs."""

import collections
import dataclasses
import logging
import os
from collections.abc import Sequence
from typing import NamedTuple

from cacovid_jax import config as config_lib
from cacovid_jax import experiment as experiment_lib
from cacovid_jax.data import answer_log
from cacovid_jax.evals import evaluation
from cacovid_jax.evals import evaluator as evaluator_lib
from cacovid_jax.inference import batch as batch_lib
from cacovid_jax.inference import clip_queue
from cacovid_jax.inference import engine as engine_lib
from cacovid_jax.inference import methods as methods_lib
from cacovid_jax.integrations.lmms_eval import arguments, requests

_LOGGER = logging.getLogger(__name__)


class Reply(NamedTuple):
  """An answer and its size."""

  text: str  # "" if the clip cannot be read.
  input_tokens: int  # Of the prompt that was read, after selection.
  output_tokens: int


class RequestAnswerer:
  """A loaded model that answers from a share of a clip's tokens.

  Clips and programs are kept from one call to the next.
  """

  def __init__(self, config):
    """Loads the weights of a config, see `arguments.parse`."""
    self.condition = arguments.condition(config)
    # Clips are named by whole paths: a task says where they are.
    changes = {"data.root": os.path.abspath(os.sep), "data.media": ""}
    if self.condition.method is None:
      changes["evals.policies"] = ()
    config = config_lib.replace(config, changes)
    self.experiment = experiment_lib.Experiment.from_config(config)
    self.checkpoint = self.experiment.checkpoint
    self._policies = self.experiment.policies
    methods = [self.condition.method] if self.condition.method else []
    wanted = methods_lib.wanted(methods)
    self._source = clip_queue.open_queue(self.experiment, wanted)
    self._programs = {}

  def generate(
    self, asked: Sequence[requests.Asked], lengths: Sequence[int]
  ) -> list[Reply]:
    """Returns the answers, in order, of at most so many tokens each."""
    rows = requests.as_questions(asked)
    by_length = collections.defaultdict(dict)
    for row, length in zip(rows, lengths, strict=True):
      by_length[length][row.id] = row
    replies = {
      length: self._generate(list(by_length[length].values()), length)
      for length in sorted(by_length)
    }
    return [replies[n][row.id] for row, n in zip(rows, lengths, strict=True)]

  def likelihoods(self, asked, continuations) -> list[batch_lib.Likelihood]:
    """Returns how likely each continuation follows its prompt, in order."""
    rows = requests.as_questions(asked)
    distinct = {row.id: row for row in rows}
    engine = self._engine(list(distinct.values()), 1)
    found = engine.likelihoods(rows, continuations, self.condition)
    faults = {row.id: one.fault for row, one in zip(rows, found, strict=True)}
    _warn(distinct.values(), faults)
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
    _warn(rows, {name: one.get("fault", "") for name, one in records.items()})
    tokenizer, replies = self.checkpoint.tokenizer, {}
    for row in rows:
      text, kept = records[row.id]["text"], records[row.id]["kept"]
      around = records[row.id].get("beside_video", 0)
      count = len(tokenizer.encode(text))
      replies[row.id] = Reply(text, around + kept, count)
    return replies

  def _engine(self, rows, length) -> engine_lib.Engine:
    usual = evaluation.settings(self.experiment)
    engine = engine_lib.Engine.of(
      self.experiment,
      self._source,
      rows,
      dataclasses.replace(usual, max_new_tokens=length),
      policies=self._policies,
      programs=self._programs.get(length),
      more_follow=True,
    )
    self._programs[length] = engine.programs
    return engine


def _warn(rows, faults) -> None:
  """Tells which clips cannot be read, once each."""
  lost = [(row.video, faults[row.id]) for row in rows if faults[row.id]]
  for (video, fault), count in collections.Counter(lost).items():
    _LOGGER.warning(
      "/%s cannot be used (%s): %d question(s) about it answered by nothing",
      video.removeprefix("./"),
      fault,
      count,
    )
