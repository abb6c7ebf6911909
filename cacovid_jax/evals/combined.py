"""Several benchmarks, evaluated each on its own -> one table of averages.

The average is that of the benchmarks' own numbers, each with its own way of
counting (a mean over questions, or over categories). Its interval draws clips
within every benchmark, at the same time in all of them.

Letters: Q questions of a benchmark, R bootstrap replicates.
"""

import dataclasses
import hashlib
import itertools
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cacovid_jax import errors, schema
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

ASKED = "asked.json"
_LEDGER = "answers.jsonl"


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
  """What one benchmark says of all rows."""

  name: str
  questions: Sequence[question_lib.Question]  # Asked, in order.
  out: Mapping[str, Any]  # Its results.json.
  # (label, ratio key) -> float64[Q], the mean over seeds; vanilla is
  # `results.VANILLA_KEY`. Cells that cannot be run are absent.
  scores: Mapping[tuple[str, str], np.ndarray]
  # Of the resampling: parts of one table draw from streams of their own.
  seed: int = 0

  def value(self, key: tuple[str, str]) -> float:
    """Returns the benchmark's number of a row, a fraction."""
    return self._sample().mean(self.scores[key])

  def draws(self, key: tuple[str, str], replicates: int) -> np.ndarray:
    """Returns float64[R], the number in each replicate."""
    return self._sample(replicates).draws(self.scores[key])

  def _sample(self, replicates: int = statistics.REPLICATES):
    clips = [question.video for question in self.questions]
    names = tuple(self.out["macro"])
    kinds = [str(question.category) for question in self.questions if names]
    return statistics.Sample(clips, kinds, names, replicates, self.seed)


def asked(experiment: experiment_lib.Experiment, questions) -> dict[str, Any]:
  """Returns what an evaluation, in which this process took part, was asked."""
  digest = hashlib.sha256()
  for question in questions:
    fields = dataclasses.asdict(question)
    digest.update(json.dumps(fields, sort_keys=True).encode() + b"\n")
  evals = experiment.config.evals
  methods = map(methods_lib.Method.parse, evals.methods)
  return {
    "questions": digest.hexdigest(),
    "ratios": list(map(results.ratio_key, evals.ratios)),
    "rows": [[method.label, method.spec] for method in methods],
    "run": answer_log.header(_own_ledger(experiment)),
    "seeds": list(evals.seeds),
  }


def _own_ledger(experiment) -> pathlib.Path:
  return experiment.workdir / shards.Shard(*experiment.shard).file(_LEDGER)


def is_complete(experiment: experiment_lib.Experiment, questions) -> bool:
  """Returns whether a benchmark's results.json is of just what is asked for."""
  note = experiment.workdir / ASKED
  if not note.is_file():
    return False
  found = schema.read(note, dict, "delete it and start again")
  return found == asked(experiment, questions)


def read_part(
  name: str,
  experiment: experiment_lib.Experiment,
  questions: Sequence[question_lib.Question],
  run: Mapping[str, Any],
  seed: int = 0,
) -> Part:
  """Returns a benchmark's part from the files of its complete evaluation.

  Where two ledgers have an answer, that of this process counts, as in the
  evaluation. The answers belong to `run`, see `answer_log.header`.
  """
  workdir, evals = experiment.workdir, experiment.config.evals
  out = results.read(workdir)
  own, answers = _own_ledger(experiment), answer_log.AnswerLog(None, run)
  paths = shards.ledgers(workdir, _LEDGER)
  answers.look(sorted(paths, key=lambda path: path != own))
  # What was wrong with a clip in the end is an answer, too.
  answers.confirm_all()

  def mean(cells):
    keys = [[cell.key(question.id) for question in questions] for cell in cells]
    return np.mean([[answers[k]["score"] for k in row] for row in keys], axis=0)

  ratios = list(map(results.ratio_key, evals.ratios))
  try:
    scores = {results.VANILLA_KEY: mean([methods_lib.Condition()])}
    for method in map(methods_lib.Method.parse, evals.methods):
      for ratio, key in zip(evals.ratios, ratios, strict=True):
        cell = out["methods"].get(method.label, {}).get(key, {})
        if cell.get("status") == "ok":
          _, *cells = methods_lib.conditions([method], [ratio], evals.seeds)
          scores[method.label, key] = mean(cells)
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
  """Returns the section `average` of results.json: rows over all parts."""
  known = {}

  def numbers(key):
    """Returns (the average, float64[R], that of each replicate)."""
    if key not in known:
      known[key] = (
        float(np.mean([part.value(key) for part in parts])),
        np.mean([part.draws(key, replicates) for part in parts], axis=0),
      )
    return known[key]

  def difference(key, versus):
    (mean, draws), (other, others) = numbers(key), numbers(versus)
    return statistics.interval(mean - other, draws - others)

  def row(key):
    estimate = statistics.interval(*numbers(key))
    return {**results.figures(estimate), "columns": columns(parts, key)}

  def cell(label, ratio):
    for part in parts:
      status = part.out["methods"][label][ratio]["status"]
      if status != "ok":
        return {"status": f"{part.name}: {status}"}
    key = label, ratio
    share = statistics.ratio(*numbers(key), *numbers(results.VANILLA_KEY))
    told = results.figures(share, "of_vanilla", "of_vanilla_ci95")
    return {"status": "ok", **row(key), **told}

  ratios = [results.ratio_key(ratio) for ratio in ratios]
  labels = [method.label for method in methods]
  rows = {n: {ratio: cell(n, ratio) for ratio in ratios} for n in labels}
  answered = [
    key
    for key in itertools.product(rows, ratios)
    if rows[key[0]][key[1]]["status"] == "ok"
  ]
  return {
    "benchmarks": [part.name for part in parts],
    "vanilla": row(results.VANILLA_KEY),
    "methods": rows,
    "paired": results.paired(answered, ratios, difference),
  }


def columns(parts: Sequence[Part], key: tuple[str, str]) -> dict[str, float]:
  """Returns {benchmark, and benchmark/duration: accuracy} of a row's key."""
  found = {}
  for part in parts:
    duration = np.array([str(question.duration) for question in part.questions])
    for name in part.out["vanilla"].get("by_duration", {}):
      inside = part.scores[key][duration == name]
      found[f"{part.name}/{name}"] = results.number(inside.mean())
    found[part.name] = results.number(part.value(key))
  return found


def combine(
  experiments: Mapping[str, experiment_lib.Experiment],
  loaded: Mapping[str, benchmarks.Benchmark],
) -> dict[str, Any]:
  """Returns results.json of a table from those of its benchmarks.

  Configs of the complete evaluations are alike but for benchmark and folders.
  """
  config = next(iter(experiments.values())).config
  evals = config.evals
  parts = []
  for seed, (name, each) in enumerate(experiments.items()):
    run = answer_log.header(_own_ledger(each))
    parts.append(read_part(name, each, loaded[name].questions, run, seed))
  methods = [methods_lib.Method.parse(spec) for spec in evals.methods]
  rows = average(parts, methods, evals.ratios)
  model = paper.model_of(checkpoints.load_config(config.model.path))
  absent = [name for name in paper.BENCHMARKS if name not in experiments]
  found = paper.drift(
    model, _per_cent(rows["vanilla"], absent), config.table.tolerance
  )
  reasons = paper.obstacles(config, parts, absent, model)

  def reproduced(cell, row):
    own = _per_cent(cell, absent)
    return paper.reproduced(found, row, own, reasons)

  rows["vanilla"]["reproduced"] = reproduced(
    rows["vanilla"], paper.row(model, paper.VANILLA, 1.0)
  )
  for method in methods:
    for ratio in evals.ratios:
      cell = rows["methods"][method.label][results.ratio_key(ratio)]
      row = None
      if paper.is_method(method):
        row = paper.row(model, method.label, ratio)
      cell["paper"] = row.reported() if row else None
      if cell["status"] == "ok":
        cell["reproduced"] = reproduced(cell, row)
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
  each = {part.name: part.out["provenance"] for part in parts}
  # The same for all: they are asked by one plan.
  first = next(iter(each.values()))
  found = provenance.describe(
    frame_hashes={name: one["frame_hash"] for name, one in each.items()},
    index_hashes={name: one["frame_index_hash"] for name, one in each.items()},
    checkpoint={"sha256": first["checkpoint"]},
    policies=first["policies"],
    settings=first["settings"],
    environments=[o for one in each.values() for o in one["environments"]],
  )
  return found | {"template_hash": first["template_hash"]}


def _per_cent(row, absent) -> dict[str, float]:
  """Returns a row's accuracies as the paper has them, by column."""
  found = {name: 100 * value for name, value in row["columns"].items()}
  if not absent:
    found[paper.AVERAGE] = 100 * row["accuracy"]
  return found
