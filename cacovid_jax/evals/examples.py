"""Questions of a run to look at: their clips, what was kept, what was said."""

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from cacovid_jax.data import question as question_lib
from cacovid_jax.evals import results, runner

SHOWN_RATIO = 0.1
# Methods whose kept tokens can be looked at, besides the shown one.
_NUM_OTHERS = 3


class Said(NamedTuple):
  """An answer.

  Attributes:
    text: of the model, stripped.
    letter: the option in it, "" if none.
    right: whether it is the right one; None if that is not known.
  """

  text: str
  letter: str
  right: bool | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Example:
  """One question, its clip, and what methods kept of it.

  Attributes:
    question: the question.
    frames: uint8[T, h, w, 3], one for each row of the grid's first axis.
    grid: (T, H, W).
    views: (method, ratio) -> what it kept: `runner.Trace` or `runner.Kept`.
    answers: method -> ratio -> what was said; vanilla's ratio is 1.
    shown: the (method, ratio) that is shown first, one of `views`.
    decisive: tokens that decide the question; empty if not known.
    frames_per_slice: frames of the clip that a row of the grid stands for.
  """

  question: question_lib.Question
  frames: np.ndarray
  grid: tuple[int, int, int]
  views: Mapping[tuple[str, float], Any]
  answers: Mapping[str, Mapping[float, Said]]
  shown: tuple[str, float]
  decisive: frozenset[int] = frozenset()
  frames_per_slice: int = 1

  @property
  def said(self) -> Said:
    """What was said from the tokens that are shown first."""
    method, ratio = self.shown
    return self.answers[method][ratio]


def choose(
  table: results.Table,
  answers: Any,
  evaluator: runner.Evaluator,
  decisive: Mapping[str, Sequence[int]],
  count: int,
  *,
  failures: Mapping[tuple[str, float], runner.Failure] | None = None,
) -> list[Example]:
  """Returns right and wrong answers, half each as far as there are such.

  Right and wrong from what the learned method kept, at the ratio nearest to a
  tenth. Clips differ from each other where possible, and kinds of question take
  turns. The choice depends on the answers alone.

  Args:
    table: of the run.
    answers: its ledger.
    evaluator: that asked.
    decisive: question id -> tokens that decide it, where known.
    count: at most as many examples.
    failures: what could not be asked.
  """
  failures = failures or {}
  ratio = min(table.ratios, key=lambda r: (abs(r - SHOWN_RATIO), r))
  method = table.shown_method(ratio, failures)
  if method is None or not count:
    return []

  def able(method, ratio):
    return (method.spec, ratio) not in failures

  def cell(method, ratio):
    seed = table.seeds[0] if method.per_seed else 0
    return runner.Cell(method, ratio, seed)

  shown = cell(method, ratio)
  usable = [
    question
    for question in table.questions
    if question.lettered and "fault" not in answers[shown.key(question.id)]
  ]
  accuracies = {
    other.label: _mean(answers, cell(other, ratio), usable)
    for other in table.methods
    if able(other, ratio)
  }
  asked = [
    cell(other, r)
    for other in table.methods
    for r in table.ratios
    if able(other, r)
  ]
  looked = {method.label, *_others(table, method, accuracies)}
  views = [one for one in asked if one.method.label in looked]
  picked = _pick(usable, answers, shown, count)
  kept = evaluator.kept(picked, views)
  examples = []
  for question in picked:
    whole = _said(answers, runner.Cell(None, 1.0, 0), question)
    said = {runner.VANILLA: {1.0: whole}}
    for one in asked:
      row = said.setdefault(one.method.label, {})
      row[one.ratio] = _said(answers, one, question)
    frames = evaluator.source.frames(question.video)
    first, per_slice = slices(frames, evaluator.grid_of(question)[0])
    examples.append(
      Example(
        question=question,
        frames=first,
        grid=evaluator.grid_of(question),
        views={
          (one.method.label, one.ratio): found
          for one, found in zip(views, kept[question.id], strict=True)
        },
        answers=said,
        shown=(method.label, ratio),
        decisive=frozenset(decisive.get(question.id, ())),
        frames_per_slice=per_slice,
      )
    )
  return examples


def slices(frames: np.ndarray, num_slices: int) -> tuple[np.ndarray, int]:
  """Returns the first frame of each slice, and how many a slice stands for.

  A row of the grid's first axis is one frame, or several (Qwen2.5-VL).
  """
  step = -(-len(frames) // num_slices)
  return frames[::step], step


def _others(table, shown, accuracies) -> list[str]:
  """Returns the labels of the best methods besides the shown one.

  Other methods before variants of the same one; oracles know too much.
  """
  name = shown.label.partition("?")[0]
  found = [
    (method.label.startswith(name), -accuracies[method.label], method.label)
    for method in table.methods
    if method.label in accuracies
    and method.label != shown.label
    and not method.compressor.oracle
  ]
  return [label for *_, label in sorted(found)[:_NUM_OTHERS]]


def _mean(answers, cell, questions) -> float:
  scores = [answers[cell.key(question.id)]["score"] for question in questions]
  return float(np.mean(scores)) if scores else 0.0


def _pick(usable, answers, cell, count):
  """Returns right ones, then wrong ones."""
  scores = {q.id: answers[cell.key(q.id)]["score"] for q in usable}
  right = _by_turns([q for q in usable if scores[q.id] == 1])
  wrong = _by_turns([q for q in usable if scores[q.id] < 1])
  num_wrong = min(len(wrong), max(count // 2, count - len(right)))
  return right[: count - num_wrong] + wrong[:num_wrong]


def _said(answers, cell, question) -> Said:
  record = answers[cell.key(question.id)]
  return Said(record["text"], record["letter"], record["score"] == 1)


def _by_turns(questions):
  """Returns questions, new clips first, kinds of question taking turns."""
  groups = collections.defaultdict(list)
  seen = set()
  for question in sorted(questions, key=_shuffled):
    again = question.video in seen
    seen.add(question.video)
    groups[again, question.category or ""].append(question)
  out = []
  for repeated in (False, True):
    queues = [groups[key] for key in sorted(groups) if key[0] == repeated]
    while any(queues):
      out += [queue.pop(0) for queue in queues if queue]
  return out


def _shuffled(question):
  return question_lib.question_hash(question.id), question.id
