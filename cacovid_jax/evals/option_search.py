"""Options of methods, chosen on the validation split.

By accuracy, or so that what each question gets has the asked mean.
"""

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cacovid_jax import config as config_lib
from cacovid_jax import errors
from cacovid_jax.compressors import base, budgets
from cacovid_jax.data import answer_log
from cacovid_jax.evals import benchmarks, results
from cacovid_jax.evals import evaluator as evaluator_lib
from cacovid_jax.inference import methods as methods_lib


@dataclasses.dataclass(frozen=True)
class Search:
  """What to choose from."""

  # Label -> methods; the first of equals wins.
  by_label: Mapping[str, Sequence[methods_lib.Method]]
  ratio: float  # At which they are compared.

  @classmethod
  def of(cls, experiment, methods) -> "Search | None":
    """Returns what config.evals and the methods ask for; None for nothing."""
    evals = experiment.config.evals
    given = config_lib.to_dict(evals.candidates)
    task = benchmarks.task(evals.benchmark)
    if evals.select_on == "none":
      return None
    if not task.can_choose(evals.split):
      if given:
        raise errors.UserError(
          f"candidates are given, and {task.name} has no validation split apart"
          " from what is asked; name the options in the methods themselves"
        )
      return None
    specs = {}
    for method in methods:
      name = method.label.partition("?")[0]
      if listed := given.get(method.label):
        specs[method.label] = listed
      elif name == "last_query" and "layer" not in method.compressor.options:
        layers = range(experiment.checkpoint.model.config.text.num_layers)
        specs[method.label] = [f"last_query?layer={layer}" for layer in layers]
    unknown = sorted(set(given) - {m.label for m in methods})
    if unknown:
      raise errors.UserError(
        f"candidates are given for {unknown[0]!r}, which is not among the"
        " methods"
      )
    if not specs:
      return None
    parse = methods_lib.Method.parse
    by_label = {name: list(map(parse, found)) for name, found in specs.items()}
    return cls(by_label, base.check_ratio(evals.select_ratio))

  @property
  def candidates(self) -> list[methods_lib.Method]:
    return [method for found in self.by_label.values() for method in found]

  def run(
    self,
    evaluator: evaluator_lib.Evaluator,
    validation: benchmarks.Benchmark,
    methods: Sequence[methods_lib.Method],
    answers: answer_log.AnswerLog,
  ) -> tuple[list[methods_lib.Method], dict[str, Any]]:
    """Returns the methods with chosen options, and the record of the choice.

    Those without candidates that can be run are returned as they are.
    """
    questions, ratio = validation.questions, self.ratio
    asked = [methods_lib.Condition(one, ratio) for one in self.candidates]
    try:
      failures = evaluator.run(
        questions, asked, answers, description="choosing on validation"
      )
    except evaluator_lib.NothingToAsk:
      return list(methods), {}
    chosen, out = {}, []
    for method in methods:
      found = [
        (accuracy(methods_lib.Condition(one, ratio), questions, answers), one)
        for one in self.by_label.get(method.label, ())
        if (one.spec, ratio) not in failures
      ]
      if found:
        best = max(found, key=lambda pair: pair[0])[1]
        chosen[method.label] = {
          "split": validation.split,
          "n": len(questions),
          "ratio": results.ratio_key(ratio),
          "best": best.label,
          "candidates": [
            {"method": one.label, "accuracy": round(value, 6)}
            for value, one in found
          ],
        }
        method = dataclasses.replace(best, label=method.label)
      out.append(method)
    return out, chosen


def accuracy(condition, questions, answers) -> float:
  """Returns the mean score of these questions' answers under a condition."""
  keys = [condition.key(question.id) for question in questions]
  return float(np.mean([answers[key]["score"] for key in keys]))


def calibrates(experiment, methods) -> bool:
  """Returns whether a method's threshold is to be chosen, and can be."""
  evals = experiment.config.evals
  can = benchmarks.task(evals.benchmark).can_choose(evals.split)
  return any(map(is_open, methods)) and can and evals.select_on != "none"


def is_open(method) -> bool:
  """Returns whether a method lacks a threshold, as of `cacovid`."""
  return getattr(method.compressor, "uncalibrated", False)


def calibrate(
  engine,
  validation: benchmarks.Benchmark | None,
  methods: Sequence[methods_lib.Method],
  ratios: Sequence[float],
) -> tuple[list[methods_lib.Method], dict[str, Any]]:
  """Returns methods with thresholds of the asked mean size, and the record.

  On usable clips of the validation questions; no answer is looked at. The
  record is the section `calibrated` of results.json, nothing without any.
  """
  lacking = [one for one in methods if is_open(one)]
  if not lacking or validation is None:
    return list(methods), {}
  conditions = [
    methods_lib.Condition(one, ratio) for one in lacking for ratio in ratios
  ]
  measured = _measure(engine, validation.questions, conditions)
  out, record = list(methods), {}
  for place, method in enumerate(methods):
    found = tuple(
      (one.ratio, _threshold(measured[one], one.ratio))
      for one in conditions
      if one.method is method and measured[one]
    )
    if not found:
      continue
    spec = f"{method.spec}&threshold={found}".replace(" ", "")
    chosen = method.compressor.with_options(threshold=found)
    out[place] = dataclasses.replace(method, spec=spec, compressor=chosen)
    record[method.label] = {
      "split": validation.split,
      "n": len(validation.questions),
      "spec": spec,
      "thresholds": {results.ratio_key(r): value for r, value in found},
    }
  return out, {"calibrated": record} if record else {}


def _measure(engine, questions, conditions) -> dict[Any, list]:
  """Returns condition -> (mass left, shares kept) float[S] of each question.

  None of a condition that cannot be run: asking under it tells why.
  """
  found = {condition: [] for condition in conditions}
  for group in engine.batches(questions):
    grid, batch = engine.grid_of(group[0]), engine.batch(group)
    usable = [row for row in range(len(group)) if row not in batch.faults]
    for condition in conditions:
      compressor, ratio = condition.method.compressor, condition.ratio
      with contextlib.suppress(errors.UserError):
        engine.check(condition, grid)
        left = compressor.mass_left_batch(batch.inputs(condition), ratio=ratio)
        shares = np.array(compressor.row_sizes(grid, ratio)) / batch.num_video
        found[condition] += [(np.asarray(left[row]), shares) for row in usable]
  return found


def _threshold(measured, ratio: float) -> float:
  # Small grids have fewer sizes: the largest stands for those that are not.
  most = max(len(left) for left, _ in measured)
  rows = [
    [np.pad(x, (0, most - len(x)), mode="edge") for x in row]
    for row in measured
  ]
  left, shares = np.array(rows).swapaxes(0, 1)
  return budgets.mean_threshold(left, shares, ratio)
