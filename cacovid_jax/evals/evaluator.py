"""Asks questions under many conditions and writes the answers down.

A method that cannot be run at a ratio does not stop the others: `run` returns
why, and the table shows it. What asks is `inference.engine`.
"""

import collections
import functools
import hashlib
import itertools
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from cacovid_jax import errors
from cacovid_jax import progress as progress_lib
from cacovid_jax.compressors import base
from cacovid_jax.data import answer_log, rewards
from cacovid_jax.data import question as question_lib
from cacovid_jax.evals import benchmarks, provenance
from cacovid_jax.evals import throughput as throughput_lib
from cacovid_jax.inference import engine as engine_lib
from cacovid_jax.inference import methods as methods_lib

# What answer logs know of a question, by explicit names: logs that exist have
# them. The right answer is among it: scores are kept in the log.
_QUESTION = ("id", "question", "options", "answer", "problem_type", "duration",
             "category", "groups", "source", "prompt", "stream")  # fmt: skip


class Failure(NamedTuple):
  """Why a method cannot be run at a ratio."""

  reason: str  # One line.
  minimum_ratio: float | None = None  # That it can, where the method knows.
  batch: int = -1  # Number of the one that showed it, -1 before any was asked.


Failures = Mapping[tuple[str, float], Failure]  # By `Condition.place`.


class NothingToAsk(errors.UserError):
  """None of the methods can be run; the message is the first one's reason."""


class Evaluator:
  """An `engine` whose answers are scored by a `task`; a log keeps them."""

  def __init__(
    self, engine: engine_lib.Engine, task: benchmarks.Task | None = None
  ):
    """Computes nothing; the task None is that of prepared data."""
    self.engine = engine
    self.task = task or benchmarks.task(benchmarks.PREPARED)
    self.throughput = throughput_lib.Throughput(engine.source.watch)

  def identity(
    self, questions: Sequence[question_lib.Question]
  ) -> dict[str, Any]:
    """Returns what the answers to `questions` depend on, for a log."""
    engine, source = self.engine, self.engine.source
    found = {
      "checkpoint": engine.checkpoint.identity["sha256"],
      "dtype": engine.checkpoint.model.precision,
      "policies": {name: p.identity for name, p in engine.policies.items()},
      "questions": self._digest(questions),
      "settings": engine.settings.identity,
      "template": provenance.digest(engine.checkpoint.tokenizer.template),
      **source.identity,
      "task": self.task.name,
    }
    # Logs of earlier versions, which counted the public words, name none.
    free = any(q.problem_type == question_lib.FREE_FORM for q in questions)
    if free and engine.settings.rouge != rewards.PUBLIC:
      found["rouge"] = engine.settings.rouge
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
    """Returns a sha256 of all that is known of these questions."""
    digest = hashlib.sha256()
    for question in engine_lib.by_id(questions):
      text = json.dumps(known(question), sort_keys=True)
      digest.update(text.encode() + b"\0")
      # As of a clip of one token: one that is not there yet has no grid.
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
    processes, gives the same answers. Where the engine does not wait, a batch
    is dispatched before the one in front of it is written down.

    Args:
      log: of the answers.
      description: names the progress bar.
      shard: (i, n): batches i, i + n, i + 2 n, ... are asked.

    Returns:
      Condition.place -> why it could not be run. Nothing of it is kept in the
      log, so that what was mended is tried again.

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
      with self.throughput.running():
        self._ask_all(own, conditions, log, failures, progress)
    source.discard()
    source.to_host()
    return failures

  def _ask_all(self, own, conditions, log, failures, progress) -> None:
    """Asks numbered batches; the last one is written when the next is asked."""
    source, waiting, done = self.engine.source, collections.deque(), 0

    def write(ahead: int) -> None:
      """Writes the answers of the batches in `waiting` but so many."""
      nonlocal done
      while len(waiting) > ahead:
        finish, batch, todo = waiting.popleft()
        with self.engine.stage("answers"):  # Of any program of the batch.
          log.add(finish(tell))
        done += len(batch) * len(todo)
        progress.update(done, {"clips/s": self.throughput.add(batch)})

    def tell(what: str, more: int = 0) -> None:
      """Shows what is done now, and answers that are known beside `done`."""
      progress.update(done + more, note=what)

    for place, (number, batch) in enumerate(own):
      self._confirm_faults(batch, conditions, log)
      todo = _lacking(batch, conditions, log, failures)
      # What is known, and what cannot be run, is no work that is left.
      done += len(batch) * (len(conditions) - len(todo))
      if todo:
        later, least = (b for _, b in own[place + 1 :]), source.num_threads
        following = _following(later, conditions, log, failures, least)
        ahead = [*(question.video for question in batch), *following]
        source.discard(keep=ahead)
        source.prefetch(ahead)
        try:
          finish = self._ask(batch, todo, failures, number, tell)
        except BaseException:
          write(0)  # What was asked before is an answer.
          raise
        waiting.append((finish, batch, todo))
        write(int(not self.engine.waits and _any_left(conditions, failures)))
        _check_any_left(conditions, failures)
      progress.update(done)
    write(0)
    _check_any_left(conditions, failures)

  def _confirm_faults(self, batch, conditions, log) -> None:
    """Keeps the answers about clips that still cannot be used, unasked."""
    for question in batch:
      keys = [condition.key(question.id) for condition in conditions]
      if faults := {key: log.fault(key) for key in keys if log.fault(key)}:
        fault = self.engine.source[question.video].fault
        now = fault, math.prod(self.engine.grid_of(question))
        log.confirm(
          key
          for key, record in faults.items()
          if (record["fault"], record["of"]) == now
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
    """Asks a batch under the conditions `todo`; adds failures.

    Returns f(tell), which waits for the answers and returns their records, all
    of a question together.
    """
    tell("clips")
    batch, asked = self.engine.batch(questions), []
    # One prefill gives both the answers and what methods read of it.
    if any(one.method and "attention" in one.method.needs for one in todo):
      tell(methods_lib.VANILLA)
      batch.vanilla(want_attention=True)
    for condition in todo:
      if condition.place in failures:
        continue  # With an earlier seed.
      tell(_told(condition))
      if condition.method is None:
        output = batch.vanilla().ids, None
      else:
        ask = functools.partial(batch.output, condition)
        output = self._note(failures, condition, ask, number)
      if output is not None:
        asked.append((condition, output))
    batch.release()
    return functools.partial(
      self._records, questions, batch, asked, failures, number
    )

  def _records(self, questions, batch, asked, failures, number: int, tell):
    """Returns what is written of what was asked; adds failures."""
    batch.check()
    # A later batch, which may have been asked by now, has failures of its own.
    failed = {k for k, failure in failures.items() if failure.batch < number}
    records = [[] for _ in questions]
    for place, (condition, (ids, trace)) in enumerate(asked):
      if condition.place in failed:
        continue
      tell(_told(condition), place * len(questions))
      read = functools.partial(self._facts, questions, batch, condition, trace)
      facts = self._note(failures, condition, read, number)
      if facts is None:
        failed.add(condition.place)
        continue
      texts = self.engine.decode(ids)
      for row, question in enumerate(questions):
        fault = batch.faults.get(row, "")
        record = self._record(question, texts[row], fault) | facts[row]
        records[row].append((condition.key(question.id), record))
    return list(itertools.chain(*records))

  def _facts(self, questions, batch, condition, trace) -> list[dict[str, Any]]:
    """Returns by row what is written of the tokens that an answer is from."""
    batch.check(condition)
    count, rows = batch.num_video, range(len(questions))
    facts = [{"kept": count, "of": count} for _ in rows]
    usable = [row for row in rows if row not in batch.faults]
    beside = batch.beside_video(trace)
    for row in usable:
      facts[row]["beside_video"] = beside[row]
    if condition.method is None:
      for row in usable:
        record = batch.records[row]
        facts[row]["frame_hash"] = record.frame_hash
        facts[row]["index_hash"] = record.index_hash
        facts[row] |= record.damage
      return facts
    kept = np.asarray(trace.mask).sum(axis=1)
    for row in rows:
      facts[row]["kept"] = int(kept[row])
    if not condition.method.compressor.selects_first:
      # Before the language model it follows from what was kept.
      equivalent = np.asarray(trace.equivalent_ratio(count))
      for row in rows:
        facts[row]["equivalent"] = round(float(equivalent[row]), 9)
        if trace.forced is not None and trace.forced[row]:
          facts[row]["forced"] = True
    top = batch.top_frames(condition)
    for row in usable if top is not None else ():
      facts[row]["frames"] = top[row]
    return facts

  def _record(self, question, text, fault: str) -> dict[str, Any]:
    """Returns what is written of an answer, whatever the condition."""
    facts = {
      "video": question.video,
      "answer": question.answer,
      "category": question.category,
      "duration": question.duration,
      "groups": dict(question.groups) or None,
    }
    record = {name: fact for name, fact in facts.items() if fact is not None}
    if fault:
      # A clip that cannot be used is wrong, whatever a rule would guess.
      return record | {"text": "", "letter": "", "score": 0.0, "fault": fault}
    scored = self._score(question, text)
    if scored.fallback:
      record["fallback"] = True
    if scored.read_by:
      record["read_by"] = scored.read_by
    said = {"text": text, "letter": scored.letter, "score": scored.score}
    return record | said

  def _score(self, question, text):
    settings, options = self.engine.settings, {}
    # Of the benchmarks, none but one's own questions has such answers.
    if question.problem_type == question_lib.FREE_FORM:
      options["rouge"] = settings.rouge
    return self.task.score(question, text, rule=settings.rule, **options)


def known(question: question_lib.Question) -> dict[str, Any]:
  """Returns what answer logs know of a question."""
  # A clip that is not there yet may turn up in another folder and form.
  video = {"video": pathlib.PurePosixPath(question.video).stem}
  return {name: getattr(question, name) for name in _QUESTION} | video


def _told(condition: methods_lib.Condition) -> str:
  if condition.method is None:
    return condition.label
  return f"{condition.label} at {100 * condition.ratio:g} %"


def _any_left(conditions, failures) -> bool:
  """Returns whether some method can be run, or none was to be."""
  asked = [one.place for one in conditions if one.method is not None]
  return not asked or any(place not in failures for place in asked)


def _check_any_left(conditions, failures) -> None:
  """Refuses to go on where no method can be run."""
  if not _any_left(conditions, failures):
    first = next(one.place for one in conditions if one.method is not None)
    raise NothingToAsk(failures[first].reason)


def _lacking(batch, conditions, log, failures) -> list[methods_lib.Condition]:
  """Returns under what some question of a batch is still to be asked."""
  return [
    condition
    for condition in conditions
    if condition.place not in failures
    and any(condition.key(question.id) not in log for question in batch)
  ]


def _following(batches, conditions, log, failures, least: int) -> list[str]:
  """Returns clips of which something is not known, in the order of batches.

  Those of the next such batch, and of as many more as have `least` clips.
  """
  found = {}
  for batch in batches:
    lacking = _lacking(batch, conditions, log, failures)
    if not lacking:
      continue
    keys = {q.id: [one.key(q.id) for one in lacking] for q in batch}
    faulty = {
      name: any(log.fault(key) is not None for key in of)
      for name, of in keys.items()
    }
    # Where only faults are left, the other clips are as a rule not needed.
    only_faults = all(
      faulty[name] or all(key in log for key in of) for name, of in keys.items()
    )
    own = [q.video for q in batch if faulty[q.id] or not only_faults]
    found |= dict.fromkeys(own)
    if len(found) >= least:
      break
  return list(found)
