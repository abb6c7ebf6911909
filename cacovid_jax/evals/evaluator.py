"""Asks questions under many conditions and writes the answers down.

A method that cannot be run at a ratio does not stop the others: `run` returns
why, and the table shows it. What asks is `inference.engine`.
"""

import functools
import hashlib
import json
import math
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from cacovid_jax import errors
from cacovid_jax import progress as progress_lib
from cacovid_jax.compressors import base
from cacovid_jax.data import answer_log
from cacovid_jax.data import question as question_lib
from cacovid_jax.evals import benchmarks, provenance, scoring
from cacovid_jax.inference import engine as engine_lib
from cacovid_jax.inference import methods as methods_lib

# What answer logs know of a question, under the names that they have for it.
# The right answer is among it: scores are kept in the log. A clip that is not
# there yet may turn up in another folder with another ending.
_QUESTION = {
  "id": lambda question: question.id,
  "video": lambda question: pathlib.PurePosixPath(question.video).stem,
  "question": lambda question: question.question,
  "options": lambda question: question.options,
  "answer": lambda question: question.answer,
  "problem_type": lambda question: question.problem_type,
  "duration": lambda question: question.duration,
  "category": lambda question: question.category,
  "groups": lambda question: question.groups,
  "source": lambda question: question.source,
  "prompt": lambda question: question.prompt,
  "stream": lambda question: question.stream,
}


class Failure(NamedTuple):
  """Why a method cannot be run at a ratio.

  Attributes:
    reason: one line.
    minimum_ratio: the lowest ratio that it can, where the method knows.
    batch: number of the batch that showed it, -1 before any was asked.
  """

  reason: str
  minimum_ratio: float | None = None
  batch: int = -1


class NothingToAsk(errors.UserError):
  """None of the methods can be run; the message is the first one's reason."""


class Evaluator:
  """An engine whose answers are scored; `run` asks, the log keeps.

  Attributes:
    engine: that asks.
    task: how answers are scored.
  """

  def __init__(
    self, engine: engine_lib.Engine, task: benchmarks.Task | None = None
  ):
    """Computes nothing; the task None is that of prepared data."""
    self.engine = engine
    self.task = task or benchmarks.task(benchmarks.PREPARED)

  def identity(
    self, questions: Sequence[question_lib.Question]
  ) -> dict[str, Any]:
    """Returns what the answers to `questions` depend on, for a log."""
    engine, source = self.engine, self.engine.source
    found = {
      "checkpoint": engine.checkpoint.identity["sha256"],
      "dtype": str(jnp.dtype(engine.checkpoint.model.dtype)),
      "policies": {name: p.identity for name, p in engine.policies.items()},
      "questions": self._digest(questions),
      "settings": engine.settings.identity,
      "template": provenance.digest(engine.checkpoint.tokenizer.template),
      **source.identity,
      "task": self.task.name,
    }
    lengths = engine.prompts.lengths
    if source.buckets or len(lengths) > 1:
      found["prompt_rows"] = list(lengths)
    if source.buckets:
      found["buckets"] = [
        [bucket.frames, bucket.frame_tokens, bucket.tokens]
        for bucket in source.buckets
      ]
    return found

  def _digest(self, questions) -> str:
    """Returns a sha256 of all that is known of these questions.

    A clip that is not there yet has no grid: prompts are as of clips of one
    token.
    """
    digest = hashlib.sha256()
    for question in engine_lib.by_id(questions):
      fields = {name: get(question) for name, get in _QUESTION.items()}
      digest.update(json.dumps(fields, sort_keys=True).encode() + b"\0")
      prompt = self.engine.prompts.prompt(question.id, (1, 1, 1))
      digest.update(prompt.ids.tobytes())
    return digest.hexdigest()

  def run(
    self,
    questions: Sequence[question_lib.Question],
    conditions: Sequence[methods_lib.Condition],
    log: answer_log.AnswerLog,
    *,
    description: str = "evaluate",
    shard: tuple[int, int] = (0, 1),
  ) -> dict[tuple[str, float], Failure]:
    """Asks what the log lacks, batch by batch, and writes it down.

    The composition of batches depends on the questions and the shapes of their
    clips alone, so that an evaluation that was stopped, or shared among several
    processes, gives the same answers.

    Args:
      questions: to ask.
      conditions: to ask them under.
      log: of the answers.
      description: names the progress bar.
      shard: (i, n): batches i, i + n, i + 2 n, ... are asked.

    Returns:
      Condition.place -> why it could not be run, the lowest ratio known.
      Nothing of it is kept in the log, so that what was mended is tried again.

    Raises:
      NothingToAsk: no method can be run.
    """
    engine, source, failures = self.engine, self.engine.source, {}
    batches = engine.batches(questions)
    grids = dict.fromkeys(engine.grid_of(batch[0]) for batch in batches)
    for condition in conditions:
      for grid in grids if condition.method else ():
        base.budget(grid, condition.ratio)
        if condition.place not in failures:
          check = functools.partial(engine.check, condition, grid)
          self._note(failures, condition, check)
    _check_any_left(conditions, failures)
    engine.pool = engine_lib.by_id(questions)
    index, count = shard
    own = list(enumerate(batches))[index::count]
    total = len(conditions) * sum(len(batch) for _, batch in own)
    with progress_lib.Progress(total, description=description) as progress:
      done = 0
      for place, (number, batch) in enumerate(own):
        self._confirm_faults(batch, conditions, log)
        todo = _lacking(batch, conditions, log, failures)
        # What is known, and what cannot be run, is no work that is left.
        done += len(batch) * (len(conditions) - len(todo))
        if todo:
          later = [batch for _, batch in own[place + 1 :]]
          following = _following(later, conditions, log, failures)
          ahead = [*(question.video for question in batch), *following]
          source.discard(keep=ahead)
          source.prefetch(ahead)

          def tell(asked, what, start=done, rows=batch):
            progress.update(start + asked * len(rows), note=what)

          log.add(self._ask(batch, todo, failures, number, tell))
          done += len(batch) * len(todo)
          _check_any_left(conditions, failures)
        progress.update(done)
    source.discard()
    return failures

  def _confirm_faults(self, batch, conditions, log) -> None:
    """Keeps the answers about clips that still cannot be used, unasked."""
    for question in batch:
      keys = [condition.key(question.id) for condition in conditions]
      known = {key: log.fault(key) for key in keys if log.fault(key)}
      if known:
        fault = self.engine.source[question.video].fault
        size = math.prod(self.engine.grid_of(question))
        log.confirm(
          key
          for key, record in known.items()
          if (record["fault"], record["of"]) == (fault, size)
        )

  def _note(self, failures, condition, action, batch: int = -1):
    """Returns action(); of a user's mistake None, and its reason is noted."""
    try:
      return action()
    except errors.UserError as error:
      num_layers = self.engine.checkpoint.model.config.text.num_layers
      lowest = [
        condition.method.compressor.minimum_ratio(num_layers, math.prod(grid))
        for grid in self.engine.grids
      ]
      failures[condition.place] = Failure(
        errors.one_line(error),
        max((ratio for ratio in lowest if ratio is not None), default=None),
        batch,
      )
      return None

  def _ask(self, questions, todo, failures, number: int, tell):
    """Returns records of a batch under the conditions `todo`; adds failures.

    `tell` takes how many conditions are done, and what is being done now.
    """
    tell(0, "clips")
    batch = self.engine.batch(questions)
    # One prefill gives both the answers and what methods read of it.
    if any(one.method and "attention" in one.method.needs for one in todo):
      tell(0, methods_lib.VANILLA)
      batch.vanilla(want_attention=True)
    records = []
    for asked, condition in enumerate(todo):
      if condition.place in failures:
        continue  # With an earlier seed.
      inside = top = None
      if condition.method is None:
        tell(asked, condition.label)
        ids = batch.vanilla().ids
        kept = np.full(len(ids), batch.num_video)
      else:
        tell(asked, f"{condition.label} at {100 * condition.ratio:g} %")
        ask = functools.partial(batch.output, condition)
        output = self._note(failures, condition, ask, number)
        if output is None:
          continue
        ids, top = output.ids, batch.top_frames(condition)
        kept = np.asarray(output.trace.mask).sum(axis=1)
        if not condition.method.compressor.selects_first:
          inside = output.trace
          # Before the language model it follows from what was kept.
          equivalent = np.asarray(inside.equivalent_ratio(batch.num_video))
      texts = self.engine.decode(ids)
      for row, question in enumerate(questions):
        record = self._record(question, texts[row], batch, row, kept[row])
        if condition.method is None and "fault" not in record:
          clip = self.engine.source[question.video]
          record["frame_hash"] = clip.frame_hash
          record["index_hash"] = clip.index_hash
        if inside is not None:
          record["equivalent"] = round(float(equivalent[row]), 9)
          if inside.forced is not None and inside.forced[row]:
            record["forced"] = True
        if top is not None and "fault" not in record:
          record["frames"] = top[row]
        records.append((condition.key(question.id), record))
    return records

  def _record(self, question, text, batch, row, kept) -> dict[str, Any]:
    """Returns what is written of an answer, whatever the condition."""
    fault = batch.faults.get(row, "")
    # A clip that cannot be used is wrong, whatever a rule would guess.
    scored = scoring.Scored(0.0) if fault else self._score(question, text)
    record = {
      "text": "" if fault else text,
      "letter": scored.letter,
      "score": scored.score,
      "kept": int(kept),
      "of": batch.num_video,
      **_facts(question),
    }
    if scored.fallback:
      record["fallback"] = True
    if fault:
      record["fault"] = fault
    return record

  def _score(self, question, text) -> scoring.Scored:
    return self.task.score(question, text, rule=self.engine.settings.rule)


def _check_any_left(conditions, failures) -> None:
  """Refuses to go on where no method can be run."""
  asked = [one.place for one in conditions if one.method is not None]
  if asked and all(place in failures for place in asked):
    raise NothingToAsk(failures[asked[0]].reason)


def _lacking(batch, conditions, log, failures) -> list[methods_lib.Condition]:
  """Returns under what some question of a batch is still to be asked."""
  return [
    condition
    for condition in conditions
    if condition.place not in failures
    and any(condition.key(question.id) not in log for question in batch)
  ]


def _following(batches, conditions, log, failures) -> list[str]:
  """Returns the clips of the next batch of which something is not known."""
  for batch in batches:
    lacking = _lacking(batch, conditions, log, failures)
    if not lacking:
      continue
    faulty = {
      question.id: any(
        log.fault(condition.key(question.id)) is not None
        for condition in lacking
      )
      for question in batch
    }
    # Where only faults are left, the other clips are as a rule not needed.
    only_faults = all(
      condition.key(question.id) in log or faulty[question.id]
      for question in batch
      for condition in lacking
    )
    return [q.video for q in batch if faulty[q.id] or not only_faults]
  return []


def _facts(question: question_lib.Question) -> dict[str, Any]:
  """Returns what a line says of its question, for a table made of lines."""
  facts = {
    "video": question.video,
    "answer": question.answer,
    "category": question.category,
    "duration": question.duration,
  }
  if question.groups:
    facts["groups"] = dict(question.groups)
  return {name: value for name, value in facts.items() if value is not None}
