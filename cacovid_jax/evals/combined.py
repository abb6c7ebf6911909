"""Several benchmarks, evaluated each on its own -> one table of averages.

The average is that of the benchmarks' own numbers, each with its own way of
counting (a mean over questions, or over categories). Its interval draws clips
within every benchmark, at the same time in all of them.

Letters: Q questions of a benchmark, C its clips, R bootstrap replicates.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cacovid_jax import errors
from cacovid_jax import experiment as experiment_lib
from cacovid_jax.data import answer_log
from cacovid_jax.data import question as question_lib
from cacovid_jax.evals import (
  benchmarks,
  paper,
  provenance,
  results,
  shards,
  statistics,
)
from cacovid_jax.inference import methods as methods_lib
from cacovid_jax.models import checkpoints

_LEDGER = "answers.jsonl"
_ALONE = shards.Shard()


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
  """What one benchmark says of all rows.

  Attributes:
    name: of the benchmark.
    questions: asked, in order.
    out: its results.json.
    scores: (label, ratio key) -> float64[Q], the mean over seeds; vanilla is
      ("vanilla", "1.00"). Cells that cannot be run are absent.
    seed: of the resampling: parts of one table draw from streams of their own.
  """

  name: str
  questions: Sequence[question_lib.Question]
  out: Mapping[str, Any]
  scores: Mapping[tuple[str, str], np.ndarray]
  seed: int = 0

  def value(self, key: tuple[str, str]) -> float:
    """Returns the benchmark's number of a row, a fraction."""
    return statistics.mean(self.scores[key], self._strata)

  def draws(self, key: tuple[str, str], replicates: int) -> np.ndarray:
    """Returns float64[R], the number in each replicate."""
    return statistics.draws(
      self.scores[key],
      [question.video for question in self.questions],
      strata=self._strata,
      replicates=replicates,
      seed=self.seed,
    )

  @property
  def _strata(self) -> statistics.Strata | None:
    if not self.out["macro"]:
      return None
    return statistics.Strata(
      tuple(str(question.category) for question in self.questions),
      tuple(self.out["macro"]),
    )


def read_part(
  name: str,
  workdir: str | os.PathLike,
  questions: Sequence[question_lib.Question],
  methods: Sequence[methods_lib.Method],
  ratios: Sequence[float],
  seeds: Sequence[int],
  *,
  run: Mapping[str, Any],
  shard: shards.Shard = _ALONE,
  seed: int = 0,
) -> Part:
  """Returns a benchmark's part from the files of its evaluation.

  Args:
    name: of the benchmark.
    workdir: of the evaluation, which is complete.
    questions: that it asked.
    methods: rows, as they were asked.
    ratios: columns.
    seeds: evaluation seeds.
    run: that the answers belong to, see `ledger.header`.
    shard: this process; where two ledgers have an answer, its own counts, as
      in the evaluation.
    seed: see `Part`.
  """
  workdir = pathlib.Path(workdir)
  out = json.loads((workdir / "results.json").read_text(encoding="utf-8"))
  answers = answer_log.Ledger(None, run)
  own = workdir / shard.file(_LEDGER)
  paths = shards.ledgers(workdir, _LEDGER)
  answers.look(sorted(paths, key=lambda path: path != own))
  # What was wrong with a clip in the end is an answer, too.
  answers.confirm_all()
  scores = {}
  for method, ratio in [
    (None, 1.0),
    *((method, ratio) for method in methods for ratio in ratios),
  ]:
    key = results.ratio_key(ratio)
    label = methods_lib.VANILLA if method is None else method.label
    if method and out["methods"][label][key]["status"] != "ok":
      continue
    used = seeds if method and method.per_seed else (0,)
    cells = [methods_lib.Condition(method, ratio, one) for one in used]
    try:
      scores[label, key] = np.mean(
        [
          [answers[cell.key(question.id)]["score"] for question in questions]
          for cell in cells
        ],
        axis=0,
      )
    except KeyError as error:
      raise errors.UserError(
        f"{workdir}: the answers are not those of results.json"
        f" ({error.args[0].method} lacks question {error.args[0].question});"
        " delete results.json to evaluate again"
      ) from error
  return Part(name, tuple(questions), out, scores, seed)


def average(
  parts: Sequence[Part],
  methods: Sequence[methods_lib.Method],
  ratios: Sequence[float],
  *,
  replicates: int = statistics.REPLICATES,
) -> dict[str, Any]:
  """Returns the section `average` of results.json: rows over all parts.

  Args:
    parts: benchmarks.
    methods: rows.
    ratios: columns.
    replicates: R, number of bootstrap replicates.
  """
  known = {}

  def draws(key):
    if key not in known:
      known[key] = np.mean([p.draws(key, replicates) for p in parts], axis=0)
    return known[key]

  def mean(key):
    return float(np.mean([part.value(key) for part in parts]))

  vanilla = methods_lib.VANILLA, results.ratio_key(1.0)
  rows = {}
  for method in methods:
    cells = {}
    for ratio in ratios:
      key = method.label, results.ratio_key(ratio)
      reason = _failure(parts, key)
      if reason:
        cells[key[1]] = {"status": reason}
        continue
      cells[key[1]] = {
        "status": "ok",
        **_estimate(mean(key), draws(key)),
        **_share(mean(key), draws(key), mean(vanilla), draws(vanilla)),
        "columns": columns(parts, key),
      }
    rows[method.label] = cells
  paired = []
  for ratio in map(results.ratio_key, ratios):
    reference = results.REFERENCE, ratio
    if rows.get(reference[0], {}).get(ratio, {}).get("status") != "ok":
      continue
    for label in rows:
      if label != results.REFERENCE and rows[label][ratio]["status"] == "ok":
        paired.append(_paired((label, ratio), reference, mean, draws))
    paired.append(_paired(reference, vanilla, mean, draws))
  return {
    "benchmarks": [part.name for part in parts],
    "vanilla": {
      **_estimate(mean(vanilla), draws(vanilla)),
      "columns": columns(parts, vanilla),
    },
    "methods": rows,
    "paired": paired,
  }


def columns(parts: Sequence[Part], key: tuple[str, str]) -> dict[str, float]:
  """Returns {benchmark, and benchmark/duration: accuracy} of a row.

  Args:
    parts: benchmarks.
    key: (label, ratio key).
  """
  found = {}
  for part in parts:
    duration = np.array([str(question.duration) for question in part.questions])
    for name in part.out["vanilla"].get("by_duration", {}):
      inside = part.scores[key][duration == name]
      found[f"{part.name}/{name}"] = _number(inside.mean())
    found[part.name] = _number(part.value(key))
  return found


def _failure(parts, key) -> str:
  """Returns why a row cannot be averaged, "" if it can."""
  label, ratio = key
  for part in parts:
    cell = part.out["methods"][label][ratio]
    if cell["status"] != "ok":
      return f"{part.name}: {cell['status']}"
  return ""


def _interval(value, draws) -> list[float]:
  found = statistics.interval(value, draws)
  return [_number(found.low), _number(found.high)]


def _estimate(value, draws) -> dict[str, Any]:
  return {"accuracy": _number(value), "ci95": _interval(value, draws)}


def _share(value, draws, vanilla, vanilla_draws) -> dict[str, Any]:
  """Returns the share of vanilla's average; None where that is 0."""
  if vanilla == 0:
    return {"of_vanilla": None, "of_vanilla_ci95": None}
  usable = vanilla_draws > 0
  shares = draws[usable] / vanilla_draws[usable]
  return {
    "of_vanilla": _number(value / vanilla),
    "of_vanilla_ci95": _interval(value / vanilla, shares),
  }


def _paired(key, versus, mean, draws) -> dict[str, Any]:
  difference = mean(key) - mean(versus)
  return {
    "method": key[0],
    "vs": versus[0],
    "ratio": key[1],
    "mean": _number(difference),
    "ci95": _interval(difference, draws(key) - draws(versus)),
  }


def _number(value) -> float:
  """Returns a number with the six decimals of results.json."""
  return round(float(value), 6)


def combine(
  experiments: Mapping[str, experiment_lib.Experiment],
  loaded: Mapping[str, benchmarks.Benchmark],
  runs: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
  """Returns results.json of a table from those of its benchmarks.

  Args:
    experiments: benchmark -> its evaluation, which is complete; but for the
      benchmark and its folders, their configs are alike.
    loaded: benchmark -> its questions.
    runs: benchmark -> what its answers belong to, see `read_part`.
  """
  config = next(iter(experiments.values())).config
  evals = config.evals
  methods = [methods_lib.Method.parse(spec) for spec in evals.methods]
  parts = [
    read_part(
      name,
      each.workdir,
      loaded[name].questions,
      methods,
      evals.ratios,
      evals.seeds,
      run=runs[name],
      shard=shards.Shard(*each.shard),
      seed=number,
    )
    for number, (name, each) in enumerate(experiments.items())
  ]
  rows = average(parts, methods, evals.ratios)
  model = paper.model_of(checkpoints.load_config(config.model.path))
  absent = [name for name in paper.BENCHMARKS if name not in experiments]
  own = _per_cent(rows["vanilla"], absent)
  found = paper.drift(model, own, config.table.tolerance)
  reasons = paper.obstacles(config, parts, absent, model)
  rows["vanilla"]["reproduced"] = paper.reproduced(
    found, paper.row(model, paper.VANILLA, 1.0), own, reasons
  )
  for method in methods:
    for ratio in evals.ratios:
      cell = rows["methods"][method.label][results.ratio_key(ratio)]
      row = None
      if paper.is_method(
        method.label, method.compressor.name, method.compressor.options
      ):
        row = paper.row(model, method.label, ratio)
      cell["paper"] = row.reported() if row else None
      if cell["status"] == "ok":
        cell["reproduced"] = paper.reproduced(
          found, row, _per_cent(cell, absent), reasons
        )
  return {
    "schema": results.SCHEMA,
    "model": model and paper.MODELS[model].name,
    "absent": absent,
    "average": rows,
    "benchmarks": {part.name: part.out for part in parts},
    "drift": found,
    "ratios": [results.ratio_key(ratio) for ratio in evals.ratios],
    "seeds": list(evals.seeds),
    "provenance": _provenance(parts),
  }


def _provenance(parts) -> dict[str, Any]:
  """Returns what all benchmarks were answered with, every environment."""
  each = [part.out["provenance"] for part in parts]
  found = provenance.describe(
    frame_hashes={p.name: p.out["provenance"]["frame_hash"] for p in parts},
    index_hashes={
      p.name: p.out["provenance"]["frame_index_hash"] for p in parts
    },
    # The same for all: they are asked by one plan.
    checkpoint={"sha256": each[0]["checkpoint"]},
    policies=each[0]["policies"],
    settings=each[0]["settings"],
    environments=[one for part in each for one in part["environments"]],
  )
  return found | {"template_hash": each[0]["template_hash"]}


def _per_cent(row, absent) -> dict[str, float]:
  """Returns a row's accuracies as the paper has them, by column."""
  found = {name: 100 * value for name, value in row["columns"].items()}
  if not absent:
    found[paper.AVERAGE] = 100 * row["accuracy"]
  return found
