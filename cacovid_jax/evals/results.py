"""Answers -> results.json: accuracies, intervals, differences, provenance.

Everything in it follows from the answers; times and host facts go elsewhere,
so that the same run gives the same bytes.
"""

import collections
import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from cacovid_jax import errors
from cacovid_jax.data import answer_log
from cacovid_jax.data import question as question_lib
from cacovid_jax.evals import benchmarks, statistics
from cacovid_jax.evals import evaluator as evaluator_lib
from cacovid_jax.inference import methods as methods_lib

SCHEMA = 1
REFERENCE = "cacovid"


@dataclasses.dataclass(frozen=True, eq=False)
class Table:
  """Which answers of a ledger make up a table.

  Attributes:
    benchmark: name of the data set.
    split: "validation" or "test".
    questions: asked, in the order of the data set.
    methods: rows.
    ratios: columns.
    seeds: evaluation seeds.
    grid: (T, H, W); where clips differ, of most of them.
    task: how answers are counted.
    grids: clip -> (T, H, W) where they differ.
  """

  benchmark: str
  split: str
  questions: Sequence[question_lib.Question]
  methods: Sequence[methods_lib.Method]
  ratios: Sequence[float]
  seeds: Sequence[int]
  grid: tuple[int, int, int]
  task: benchmarks.Task = benchmarks.task(benchmarks.PREPARED)
  grids: Mapping[str, tuple[int, int, int]] = dataclasses.field(
    default_factory=dict
  )

  def grid_of(self, question) -> tuple[int, int, int]:
    """Returns (T, H, W) of a question's clip."""
    return self.grids.get(question.video, self.grid)

  @property
  def num_video(self) -> np.ndarray:
    """N of each question, int64[Q]."""
    return np.array([math.prod(self.grid_of(q)) for q in self.questions])

  @property
  def clips(self) -> list[str]:
    return [question.video for question in self.questions]

  @property
  def strata(self) -> statistics.Strata | None:
    return self.task.strata(self.questions)

  def shown_method(
    self,
    ratio: float,
    failures: Mapping[tuple[str, float], evaluator_lib.Failure],
  ) -> methods_lib.Method:
    """Returns the learned method, or the first row that can be run."""
    able = [m for m in self.methods if (m.spec, ratio) not in failures]
    named = (m for m in able if m.label == REFERENCE)
    return next(named, able[0] if able else None)


def build(
  table: Table,
  ledger: answer_log.Ledger,
  *,
  provenance: Mapping[str, Any],
  failures: Mapping[tuple[str, float], evaluator_lib.Failure] | None = None,
  chosen: Mapping[str, Any] | None = None,
  decisive: Mapping[str, Sequence[int]] | None = None,
  rule: str = "paper",
  left_out: Mapping[str, Any] | None = None,
  frame_ratio: float = 0.125,
) -> dict[str, Any]:
  """Returns results.json as a dict.

  Accuracies are fractions whatever the task's scale; of a task with a macro
  mean, they and their intervals are macro means. Breakdowns are plain. Guesses
  of a scorer are counted in `num_fallbacks`, all seeds together. A paired
  entry's mean is the accuracy of `method` less that of `vs`.

  Args:
    table: what to tabulate; the ledger must hold all of it, but for failures.
    ledger: the answers.
    provenance: see `provenance.describe`.
    failures: what `Evaluator.run` could not ask; such a cell has its reason as
      its status, and no accuracy.
    chosen: what was chosen on validation, and from which candidates.
    decisive: question id -> tokens that decide it, for the frame head.
    rule: how letters were taken from answers.
    left_out: what was not asked, see `Benchmark.left_out`.
    frame_ratio: share of frames that the frame head would draw in training.
  """
  failures = failures or {}
  vanilla = _values(table, ledger, methods_lib.Condition())
  methods, oracles, paired = {}, {}, []
  values = {}
  for method in table.methods:
    row = {}
    for ratio in table.ratios:
      failure = failures.get((method.spec, ratio))
      if failure is not None:
        row[ratio_key(ratio)] = _failed(method, failure)
        continue
      cell, mean = _cell(table, ledger, method, ratio, vanilla)
      row[ratio_key(ratio)] = cell
      values[method.label, ratio] = mean
    (oracles if method.compressor.oracle else methods)[method.label] = row
  labels = [method.label for method in table.methods]
  for ratio in table.ratios:
    reference = values.get((REFERENCE, ratio))
    if reference is None:
      continue
    for label in labels:
      if label != REFERENCE and (label, ratio) in values:
        paired.append(
          _paired(table, label, REFERENCE, ratio, values[label, ratio],
                  reference)
        )  # fmt: skip
    paired.append(
      _paired(table, REFERENCE, methods_lib.VANILLA, ratio, reference, vanilla)
    )
  out = {
    "schema": SCHEMA,
    "benchmark": table.benchmark,
    "split": table.split,
    "metric": table.task.metric,
    "scale": table.task.scale,
    "macro": list(table.strata.names) if table.strata else [],
    "rule": rule,
    "left_out": dict(left_out or {}),
    "grid": _grids(table),
    "num_clips": len(set(table.clips)),
    "chance": _number(_chance(table)),
    "vanilla": {
      **_estimate(table, vanilla),
      "n": len(vanilla),
      "kept_tokens": _number(table.num_video.mean()),
      **_breakdowns(table, vanilla),
      **_fallbacks(_records(table, ledger, methods_lib.Condition())),
    },
    "methods": methods,
    "oracles": oracles,
    "paired": paired,
    "frame_head": _frame_head(table, ledger, decisive, frame_ratio, failures),
    "chosen": dict(chosen or {}),
    "unreadable": _unreadable(table, ledger, failures),
    "seeds": list(table.seeds),
    "provenance": dict(provenance),
  }
  return out


def grid_words(grid: Sequence[Any]) -> str:
  """Returns the `grid` of results.json in words."""

  def words(sides):
    return " \N{MULTIPLICATION SIGN} ".join(map(str, sides))

  if not isinstance(grid[0], Mapping):
    return f"{words(grid)} tokens a clip (time, rows, columns)"
  common = sorted(grid, key=lambda entry: -entry["clips"])
  listed = [f"{words(e['grid'])} ({e['clips']} clips)" for e in common[:4]]
  if len(common) > 4:
    listed.append(f"{len(common) - 4} more")
  return (
    f"{len(common)} grids of tokens (time, rows, columns): {', '.join(listed)}"
  )


def ratio_key(ratio: float) -> str:
  """Returns the ratio as tables write it, with two decimals."""
  return f"{ratio:.2f}"


def check_ratios(ratios: Iterable[float]) -> tuple[float, ...]:
  """Returns the ratios; refuses two that tables could not tell apart."""
  ratios = tuple(ratios)
  if not ratios:
    raise errors.UserError("no retention ratio given; for example 0.25,0.1")
  keys = collections.Counter(ratio_key(ratio) for ratio in ratios)
  for key, count in keys.items():
    if count > 1 or key == "0.00":
      raise errors.UserError(
        f"retention ratios {', '.join(map(str, ratios))}: {key} names"
        f" {'none' if key == '0.00' else 'several'} of them; results.json"
        " writes two decimals"
      )
  return ratios


def keys(
  table: Table, failures: Mapping[tuple[str, float], evaluator_lib.Failure]
) -> list[answer_log.Key]:
  """Returns the keys of all answers of a table, less what could not be run."""
  return [
    cell.key(question.id)
    for cell in methods_lib.conditions(table.methods, table.ratios, table.seeds)
    if cell.place not in failures
    for question in table.questions
  ]


def frame_hashes(
  table: Table, ledger: answer_log.Ledger, field: str = "frame_hash"
) -> dict[str, str]:
  """Returns clip -> sha256 of the frames that were shown to the model.

  Args:
    table: whose clips.
    ledger: with the answers to whole prompts.
    field: "frame_hash" is of their pixels, "index_hash" of which they are.
  """
  cell = methods_lib.Condition()
  found = {}
  for question in table.questions:
    digest = ledger[cell.key(question.id)].get(field)
    if digest:
      found[question.video] = digest
  return found


def _values(table, ledger, cell) -> np.ndarray:
  """Returns float64[Q], the score of each question."""
  return np.array([r["score"] for r in _records(table, ledger, cell)])


def _records(table, ledger, cell) -> list[Mapping[str, Any]]:
  """Returns the answers of a cell in the order of the questions."""
  return [ledger[cell.key(question.id)] for question in table.questions]


def _cell(table, ledger, method, ratio, vanilla):
  """Returns (the cell of results.json, float64[Q] mean over seeds)."""
  cells = [
    cell
    for cell in methods_lib.conditions([method], [ratio], table.seeds)
    if cell.method is not None
  ]
  per_seed = [_values(table, ledger, cell) for cell in cells]
  mean = np.mean(per_seed, axis=0)
  records = [r for cell in cells for r in _records(table, ledger, cell)]
  num_video = np.tile(table.num_video, len(cells))
  kept = float(np.mean([record["kept"] for record in records]))
  # Before the language model, every layer sees the tokens that were kept.
  equivalent = [
    record.get("equivalent", record["kept"] / count)
    for record, count in zip(records, num_video, strict=True)
  ]
  share = statistics.ratio_of_means(
    mean, vanilla, table.clips, strata=table.strata
  )
  out = {
    **_estimate(table, mean),
    "n": len(mean),
    "kept_tokens": _number(kept),
    "equivalent_ratio": _number(np.mean(equivalent)),
    "of_vanilla": None if share is None else _number(share.mean),
    "of_vanilla_ci95": share and [_number(share.low), _number(share.high)],
    **_breakdowns(table, mean),
    **_fallbacks(records),
    "status": "ok",
  }
  forced = np.mean([record.get("forced", False) for record in records])
  if forced:
    # Questions where the rule was changed to stay within the budget.
    out["forced"] = _number(forced)
  out |= _facts(method)
  if len(per_seed) > 1:
    out["by_seed"] = {
      str(cell.seed): _number(statistics.mean(values, table.strata))
      for cell, values in zip(cells, per_seed, strict=True)
    }
  return out, mean


def _failed(method, failure: evaluator_lib.Failure) -> dict[str, Any]:
  """Returns the cell of a method that cannot be run at a ratio."""
  out = {"status": failure.reason, **_facts(method)}
  if failure.minimum_ratio is not None:
    # Rounded up, so that it can be used as it stands; not a rounded one again.
    lowest = math.ceil(round(failure.minimum_ratio * 1e4, 6)) / 1e4
    out["minimum_ratio"] = lowest
  return out


def _facts(method) -> dict[str, Any]:
  """Returns what a cell says of its method, where there is something."""
  compressor, out = method.compressor, {}
  if compressor.options:
    out["options"] = dict(compressor.options)
  if not getattr(compressor, "exact_budget", True):
    out["exact_budget"] = False
  if note := getattr(compressor, "note", ""):
    out["note"] = note
  return out


def _estimate(table, values) -> dict[str, Any]:
  estimate = statistics.accuracy(values, table.clips, strata=table.strata)
  return {
    "accuracy": _number(estimate.mean),
    "ci95": [_number(estimate.low), _number(estimate.high)],
  }


def _paired(table, label, versus, ratio, values, reference):
  difference = statistics.paired_difference(
    values, reference, table.clips, strata=table.strata
  )
  return {
    "method": label,
    "vs": versus,
    "ratio": ratio_key(ratio),
    "mean": _number(difference.mean),
    "ci95": [_number(difference.low), _number(difference.high)],
  }


def _breakdowns(table, values) -> dict[str, Any]:
  """Returns {facet: {name: accuracy and n}} over all groupings."""
  facets = collections.defaultdict(list)
  for question, value in zip(table.questions, values, strict=True):
    for facet, name in question.groups:
      facets[facet].append((name, value))
  pairs = list(zip(table.questions, values, strict=True))
  return {
    "by_duration": _groups((q.duration, value) for q, value in pairs),
    "by_category": _groups((q.category, value) for q, value in pairs),
    "by_group": {
      facet: _groups(found) for facet, found in sorted(facets.items())
    },
  }


def _groups(pairs) -> dict[str, dict[str, Any]]:
  """Returns {name: accuracy and n} of (name, value) pairs; None is no group."""
  groups = collections.defaultdict(list)
  for name, value in pairs:
    if name:
      groups[name].append(value)
  return {
    name: {"accuracy": _number(np.mean(group)), "n": len(group)}
    for name, group in sorted(groups.items())
  }


def _grids(table) -> list[Any]:
  """Returns [T, H, W], or all grids with how many clips and questions."""
  questions = collections.Counter(map(table.grid_of, table.questions))
  if len(questions) == 1:
    return list(next(iter(questions)))
  clips = {question.video: table.grid_of(question)
           for question in table.questions}  # fmt: skip
  clips = collections.Counter(clips.values())
  return [
    {"grid": list(grid), "clips": clips[grid], "questions": questions[grid]}
    for grid in sorted(questions)
  ]


def _fallbacks(records) -> dict[str, int]:
  count = sum(record.get("fallback", False) for record in records)
  return {"num_fallbacks": count} if count else {}


def _chance(table) -> float:
  """Returns the accuracy of guessing one of the options."""
  shares = [1 / len(q.options) for q in table.questions if q.options]
  if len(shares) == len(table.questions):
    return statistics.mean(shares, table.strata)
  return float(np.mean(shares)) if shares else 0.0


def _frame_head(table, ledger, decisive, frame_ratio, failures):
  """Returns how often the best frames hold a decisive one, against chance.

  None where no policy was followed or no decisive tokens are known.
  """
  method = next(
    (
      m
      for m in table.methods
      if "scores" in m.needs
      and m.label.partition("?")[0] == REFERENCE
      and (m.spec, table.ratios[0]) not in failures
    ),
    None,
  )
  if method is None or not decisive:
    return None
  T, H, W = table.grid  # Decisive tokens are known of one grid alone.
  drawn = math.ceil(frame_ratio * T)
  cell = methods_lib.Condition(method, table.ratios[0], 0)
  hits, chances, clips = [], [], []
  for question in table.questions:
    order = ledger[cell.key(question.id)].get("frames")
    tokens = decisive.get(question.id)
    if order is None or not tokens:
      continue
    frames = {token // (H * W) for token in tokens}
    hits.append(bool(frames & set(order[:drawn])))
    chances.append(statistics.overlap_by_chance(T, len(frames), drawn))
    clips.append(question.video)
  if not hits:
    return None
  hit = statistics.accuracy(hits, clips)
  above = statistics.paired_difference(hits, chances, clips)
  return {
    "method": method.label,
    "frames": drawn,
    "of": T,
    "n": len(hits),
    "hit": _number(hit.mean),
    "ci95": [_number(hit.low), _number(hit.high)],
    "chance": _number(np.mean(chances)),
    "above_chance": _number(above.mean),
    "above_chance_ci95": [_number(above.low), _number(above.high)],
  }


def _unreadable(table, ledger, failures) -> list[dict[str, Any]]:
  """Returns the clips that could not be used; their questions count as 0.

  Those as well that were lost before the last row was asked.
  """
  faults = {}
  for key in keys(table, failures):
    fault = ledger[key].get("fault")
    if fault:
      faults.setdefault(key.question, fault)
  found = {}
  for question in table.questions:
    if question.id in faults:
      entry = found.setdefault(
        question.video,
        {
          "video": question.video,
          "reason": faults[question.id],
          "questions": 0,
        },
      )
      entry["questions"] += 1
  return [found[name] for name in sorted(found)]


def _number(value) -> float | int:
  """Returns a number with six decimals; a whole one as an int."""
  value = round(float(value), 6)
  return int(value) if value.is_integer() and abs(value) > 1 else value
