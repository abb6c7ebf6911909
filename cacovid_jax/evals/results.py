"""Answers -> results.json: accuracies, intervals, differences, provenance.

Everything in it follows from the answers; times and host facts go elsewhere,
so that the same run gives the same bytes.
"""

import collections
import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import msgspec
import numpy as np

from cacovid_jax import errors, schema
from cacovid_jax.compressors import base
from cacovid_jax.data import answer_log, rewards, video
from cacovid_jax.data import question as question_lib
from cacovid_jax.evals import benchmarks, statistics
from cacovid_jax.evals import evaluator as evaluator_lib
from cacovid_jax.inference import methods as methods_lib

SCHEMA = 1
REFERENCE = "cacovid"
# Share of frames that the frame head would draw in training.
_FRAME_RATIO = 0.125
_WHOLE = methods_lib.Condition()
VANILLA_KEY = methods_lib.VANILLA, "1.00"


@dataclasses.dataclass(frozen=True, eq=False)
class Table:
  """Which answers of a ledger make up a table."""

  benchmark: str
  split: str  # "validation" or "test".
  questions: Sequence[question_lib.Question]
  methods: Sequence[methods_lib.Method]
  ratios: Sequence[float]
  seeds: Sequence[int]
  grid: tuple[int, int, int]  # (T, H, W); where clips differ, of most of them.
  # How answers are counted.
  task: benchmarks.Task = benchmarks.task(benchmarks.PREPARED)
  # Clip -> (T, H, W) where they differ.
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

  @functools.cached_property
  def sample(self) -> statistics.Sample:
    return self.task.sample(self.questions)


def build(
  table: Table,
  ledger: answer_log.AnswerLog,
  *,
  provenance: Mapping[str, Any],
  failures: evaluator_lib.Failures | None = None,
  decisive: Mapping[str, Sequence[int]] | None = None,
  **sections: Any,
) -> dict[str, Any]:
  """Returns results.json as a dict.

  Accuracies are fractions whatever the task's scale; of a task with a macro
  mean, they and their intervals are macro means. Breakdowns are plain. Guesses
  of a scorer are counted in `num_fallbacks`, all seeds together.

  Args:
    table: what to tabulate; the ledger must hold all of it, but for failures.
    failures: what `Evaluator.run` could not ask: cells without accuracy.
    decisive: question id -> tokens that decide it, for the frame head.
    **sections: `chosen`, `rule`, `rouge`, `left_out`, and `calibrated` where
      thresholds were chosen.
  """
  failures = failures or {}
  records = _records(table, ledger, _WHOLE)
  vanilla = np.array([record["score"] for record in records])
  return {
    "schema": SCHEMA,
    "benchmark": table.benchmark,
    "split": table.split,
    "metric": table.task.metric,
    "scale": table.task.scale,
    "macro": list(table.sample.names),
    "grid": _grids(table),
    "num_clips": len(set(table.sample.clips)),
    "chance": number(_chance(table)),
    "vanilla": {
      **_counted(table, records, vanilla),
      "kept_tokens": number(table.num_video.mean()),
      **_prompt_tokens(records),
    },
    **_rows(table, ledger, failures, vanilla),
    "frame_head": _frame_head(table, ledger, decisive, failures),
    "unreadable": _unreadable(table, ledger, failures),
    "damaged": _damaged(table, ledger),
    "seeds": list(table.seeds),
    "rule": "paper",
    "rouge": rewards.UNICODE,
    "left_out": {},
    "chosen": {},
    "provenance": provenance,
    **sections,
  }


class _Cell(msgspec.Struct):
  status: str
  accuracy: float | None = None


class _Results(msgspec.Struct):
  methods: dict[str, dict[str, _Cell]]


def read(workdir: pathlib.Path) -> dict[str, Any]:
  """Returns a workdir's results.json, with cells of methods as they must be."""
  path, mend = workdir / "results.json", "delete it to evaluate again"
  out = schema.read(path, dict, mend)
  schema.fit(out, _Results, path, mend)
  return out


def _rows(table, ledger, failures, vanilla) -> dict[str, Any]:
  """Returns the sections of all methods: their cells, and differences."""
  out, values = {"methods": {}, "oracles": {}}, {}
  for method in table.methods:
    group = "oracles" if method.compressor.oracle else "methods"
    row = out[group][method.label] = {}
    for ratio in table.ratios:
      key = ratio_key(ratio)
      if failure := failures.get((method.spec, ratio)):
        row[key] = _failed(method, failure)
      else:
        row[key], mean = _cell(table, ledger, method, ratio, vanilla)
        values[method.label, key] = mean

  def difference(key, versus):
    return table.sample.difference(values[key], values.get(versus, vanilla))

  out["paired"] = paired(values, map(ratio_key, table.ratios), difference)
  return out


def paired(
  answered: Collection[tuple[str, str]],
  ratios: Iterable[str],
  difference: Callable[..., statistics.Estimate],
) -> list[dict[str, Any]]:
  """Returns every row less the reference, and the reference less vanilla.

  Of `answered` cells, (label, ratio key), `difference` is that of two. A ratio
  at which the reference failed has no entry.
  """
  out = []
  for ratio in ratios:
    reference = REFERENCE, ratio
    if reference not in answered:
      continue
    others = [key for key in answered if key[1] == ratio and key != reference]
    pairs = [(key, reference) for key in others]
    for key, versus in [*pairs, (reference, VANILLA_KEY)]:
      entry = {"method": key[0], "vs": versus[0], "ratio": ratio}
      out.append(entry | figures(difference(key, versus), "mean"))
  return out


def figures(estimate, name="accuracy", interval="ci95") -> dict[str, Any]:
  """Returns an estimate under these names of results.json; None for none."""
  if estimate is None:
    return {name: None, interval: None}
  mean, low, high = map(number, estimate)
  return {name: mean, interval: [low, high]}


def number(value: float) -> float | int:
  """Returns a number with six decimals; a whole one as an int."""
  value = round(float(value), 6)
  return int(value) if value.is_integer() and abs(value) > 1 else value


def ratio_key(ratio: float) -> str:
  """Returns the ratio as tables write it, with two decimals."""
  return f"{ratio:.2f}"


def check_ratios(ratios: Iterable[float]) -> tuple[float, ...]:
  """Returns the ratios; refuses two that tables could not tell apart."""
  ratios = tuple(map(base.check_ratio, ratios))
  errors.check(ratios, "no retention ratio given; for example 0.25,0.1")
  for key, count in collections.Counter(map(ratio_key, ratios)).items():
    if count > 1 or key == "0.00":
      raise errors.UserError(
        f"retention ratios {', '.join(map(str, ratios))}: {key} names"
        f" {'none' if key == '0.00' else 'several'} of them; results.json"
        " writes two decimals"
      )
  return ratios


def keys(
  table: Table, failures: evaluator_lib.Failures
) -> list[answer_log.Key]:
  """Returns the keys of all answers of a table, less what could not be run."""
  return [
    cell.key(question.id)
    for cell in methods_lib.conditions(table.methods, table.ratios, table.seeds)
    if cell.place not in failures
    for question in table.questions
  ]


def frame_hashes(
  table: Table, ledger: answer_log.AnswerLog, field: str = "frame_hash"
) -> dict[str, str]:
  """Returns clip -> sha256 of its shown pixels, or by "index_hash" of which."""
  found = zip(table.sample.clips, _records(table, ledger, _WHOLE), strict=True)
  return {clip: record[field] for clip, record in found if record.get(field)}


def _records(table, ledger, cell) -> list[Mapping[str, Any]]:
  """Returns the answers of a cell in the order of the questions."""
  return [ledger[cell.key(question.id)] for question in table.questions]


def _counted(table, records, values) -> dict[str, Any]:
  """Returns what every cell has: accuracies of float64[Q], and guesses."""
  pairs = list(zip(table.questions, values, strict=True))
  by_group = collections.defaultdict(list)
  for question, value in pairs:
    for facet, name in question.groups:
      by_group[facet].append((name, value))
  out = {
    **figures(table.sample.accuracy(values)),
    "n": len(values),
    "by_duration": _groups((q.duration, value) for q, value in pairs),
    "by_category": _groups((q.category, value) for q, value in pairs),
    "by_group": {facet: _groups(by_group[facet]) for facet in sorted(by_group)},
  }
  if guesses := sum(record.get("fallback", False) for record in records):
    out["num_fallbacks"] = guesses
  return out


def _groups(pairs) -> dict[str, dict[str, Any]]:
  """Returns {name: accuracy and n} of pairs; None is no group."""
  groups = collections.defaultdict(list)
  for name, value in pairs:
    if name:
      groups[name].append(value)
  return {
    name: {"accuracy": number(np.mean(group)), "n": len(group)}
    for name, group in sorted(groups.items())
  }


def _prompt_tokens(records) -> dict[str, float]:
  """Returns the mean length of whole prompts: what was kept, and the rest.

  Of clips that can be used; nothing where an earlier version has answered.
  """
  usable = [record for record in records if not record.get("fault")]
  if not usable or not all("beside_video" in record for record in usable):
    return {}
  lengths = [record["kept"] + record["beside_video"] for record in usable]
  return {"prompt_tokens": number(np.mean(lengths))}


def _cell(table, ledger, method, ratio, vanilla):
  """Returns (the cell of results.json, float64[Q] mean over seeds)."""
  _, *cells = methods_lib.conditions([method], [ratio], table.seeds)
  per_seed = [_records(table, ledger, cell) for cell in cells]
  scores = np.array([[r["score"] for r in found] for found in per_seed])
  mean, records = scores.mean(axis=0), sum(per_seed, [])
  # Before the language model, every layer sees the tokens that were kept.
  counts = np.tile(table.num_video, len(cells))
  equivalent = [
    record.get("equivalent", record["kept"] / count)
    for record, count in zip(records, counts, strict=True)
  ]
  out = {
    **_counted(table, records, mean),
    **figures(
      table.sample.share(mean, vanilla), "of_vanilla", "of_vanilla_ci95"
    ),
    **_facts(method),
    "kept_tokens": number(np.mean([record["kept"] for record in records])),
    "equivalent_ratio": number(np.mean(equivalent)),
    "status": "ok",
  }
  out |= _prompt_tokens(records)
  kept = [record["kept"] for record in records]
  if len(set(kept)) > 1:  # Not all questions have as many.
    out["kept_tokens_p95"] = number(np.percentile(kept, 95))
  if forced := np.mean([record.get("forced", False) for record in records]):
    # Questions where the rule was changed to stay within the budget.
    out["forced"] = number(forced)
  if len(cells) > 1:
    out["by_seed"] = {
      str(cell.seed): number(table.sample.mean(values))
      for cell, values in zip(cells, scores, strict=True)
    }
  return out, mean


def _failed(method, failure: evaluator_lib.Failure) -> dict[str, Any]:
  out = {"status": failure.reason, **_facts(method)}
  if (lowest := failure.minimum_ratio) is not None:
    # Rounded up, so that it can be used as it stands; not a rounded one again.
    out["minimum_ratio"] = math.ceil(round(lowest * 1e4, 6)) / 1e4
  return out


def _facts(method) -> dict[str, Any]:
  """Returns what a cell says of its method, where there is something."""
  compressor, out = method.compressor, {}
  if compressor.options:
    out["options"] = dict(compressor.options)
  if note := getattr(compressor, "note", ""):
    out["note"] = note
  if not getattr(compressor, "exact_budget", True):
    out["exact_budget"] = False
  return out


def _grids(table) -> list[Any]:
  """Returns [T, H, W], or all grids with how many clips and questions."""
  questions = collections.Counter(map(table.grid_of, table.questions))
  if len(questions) == 1:
    (grid,) = questions
    return list(grid)
  clips = {q.video: table.grid_of(q) for q in table.questions}
  counts = collections.Counter(clips.values())
  return [
    {"grid": list(grid), "clips": counts[grid], "questions": questions[grid]}
    for grid in sorted(questions)
  ]


def _chance(table) -> float:
  """Returns the accuracy of guessing one of the options."""
  shares = [1 / len(q.options) for q in table.questions if q.options]
  if len(shares) == len(table.questions):
    return table.sample.mean(shares)
  return float(np.mean(shares)) if shares else 0.0


def _frame_head(table, ledger, decisive, failures):
  """Returns how often the best frames hold a decisive one, against chance."""
  ratio = table.ratios[0]
  followed = [
    method
    for method in table.methods
    if "scores" in method.needs
    and method.label.partition("?")[0] == REFERENCE
    and (method.spec, ratio) not in failures
  ]
  if not followed or not decisive:
    return None  # No policy was followed, or nothing is known.
  T, H, W = table.grid  # Decisive tokens are known of one grid alone.
  drawn = math.ceil(_FRAME_RATIO * T)
  cell = methods_lib.Condition(followed[0], ratio, 0)
  found = []  # (whether hit, by chance, clip) of each question.
  for question in table.questions:
    order = ledger[cell.key(question.id)].get("frames")
    frames = {token // (H * W) for token in decisive.get(question.id, ())}
    if order is not None and frames:
      hit = bool(frames & set(order[:drawn]))
      chance = statistics.overlap_by_chance(T, len(frames), drawn)
      found.append((hit, chance, question.video))
  if not found:
    return None
  hits, chances, clips = zip(*found, strict=True)
  sample = statistics.Sample(clips)
  return {
    "method": cell.label,
    "frames": drawn,
    "of": T,
    "n": len(hits),
    **figures(sample.accuracy(hits), "hit"),
    "chance": number(np.mean(chances)),
    **figures(
      sample.difference(hits, chances), "above_chance", "above_chance_ci95"
    ),
  }


def _unreadable(table, ledger, failures) -> list[dict[str, Any]]:
  """Returns the clips that could not be used; their questions count as 0."""
  faults = {}  # Those as well that were lost before the last row was asked.
  for key in keys(table, failures):
    if fault := ledger[key].get("fault"):
      faults.setdefault(key.question, fault)
  found = {}
  for question in table.questions:
    if reason := faults.get(question.id):
      entry = {"video": question.video, "reason": reason, "questions": 0}
      found.setdefault(question.video, entry)["questions"] += 1
  return [found[video] for video in sorted(found)]


def _damaged(table, ledger) -> list[dict[str, Any]]:
  """Returns the clips of which not all pictures could be decoded whole."""
  found, asked = {}, _records(table, ledger, _WHOLE)
  for question, record in zip(table.questions, asked, strict=True):
    counts = {name: record.get(name, 0) for name in video.DAMAGE}
    if any(counts.values()):
      entry = {"video": question.video, "questions": 0, **counts}
      found.setdefault(question.video, entry)["questions"] += 1
  return [found[video] for video in sorted(found)]
