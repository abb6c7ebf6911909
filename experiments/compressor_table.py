r"""Every compressor at every budget, on the embedded benchmark.

python -m experiments.compressor_table [--short]

Asks the test questions from what each method of `compressors.names()` keeps at
25, 20, 15, 10 and 5 %, three seeds where a method draws, and measures how long
it takes to choose the tokens of one video. A budget is a mean over the layers
of the language model: methods inside it see more in front and less behind.

WORKDIR/table.md, table.csv       a row per method and ratio
WORKDIR/accuracy_over_time.svg    accuracy at 10 % over milliseconds
WORKDIR/results.json, report.html as `python -m cacovid_jax.evaluate` has them
WORKDIR/timings.json              times and host facts, by method and ratio

A method that cannot be run at a ratio keeps its row, which says why. Stopped
and given again, it goes on where it was. The policy is the shipped one; the
clips are drawn if they are not there.
"""

import dataclasses
import json
import os
import pathlib

from absl import flags

from cacovid_jax import config as config_lib
from cacovid_jax import errors, files
from cacovid_jax import experiment as experiment_lib
from cacovid_jax import progress as progress_lib
from cacovid_jax.evals import (
  evaluation,
  latency,
  provenance,
  results,
  runner,
  tables,
)
from cacovid_jax.synthetic import build
from experiments import table_flags

_CONFIG = "configs/synthetic.py"
_POLICY = "cacovid_jax/assets/policy"
RATIOS = (0.25, 0.2, 0.15, 0.1, 0.05)
# Rows beside the methods: label -> (the method it follows, its spec).
VARIANTS = {
  "cacovid_merged": ("cacovid", "cacovid?merge=nearest"),
  "prunevid_llm": ("prunevid", "prunevid?llm_stage=True"),
}

_SHORT = flags.DEFINE_bool(
  "short", False, "Few clips and questions, to see that everything runs."
)
_MORE = flags.DEFINE_list(
  "more_methods", [], "Rows beside those, such as my_rule.py:strongest."
)


def main(argv):
  """Makes the table that the flags describe."""
  if len(argv) > 1:
    raise errors.UserError(f"unknown argument {argv[1]!r}; flags begin with --")
  ratios, seeds = table_flags.ratios(RATIOS), table_flags.seeds()
  methods = table_flags.METHODS.value
  config = config_lib.load(_CONFIG + (":debug" if _SHORT.value else ""))
  if table_flags.DATA.value is None:
    build.prepare(config)
  experiment = experiment_of(
    config,
    table_flags.WORKDIR.value
    or f"workdirs/compressors{'_short' * _SHORT.value}",
    {
      "evals.ratios": ratios,
      "evals.seeds": seeds,
      "evals.policies": (f"policy={table_flags.POLICY.value or _POLICY}",),
      "evals.batch_size": table_flags.BATCH.value or config.evals.batch_size,
      "data.root": table_flags.DATA.value or config.data.root,
      "model.path": table_flags.MODEL.value or config.model.path,
    },
    methods=[*(methods or table_flags.all_rows(VARIANTS)), *_MORE.value],
  )
  out = run(experiment, repeats=table_flags.REPEATS.value)
  evaluation.show(out)
  names = ("results.json", "report.html", "timings.json")
  for name in (*tables.COMPRESSOR_FILES, *names):
    print(os.path.join(experiment.workdir, name))


def experiment_of(config, workdir, changes, *, methods):
  """Returns the evaluation behind a table.

  Args:
    config: such as the quickstart's.
    workdir: of the table.
    changes: {key: value} of the config, besides `methods`.
    methods: specs of its rows.
  """
  labels = [runner.split_label(spec)[0] for spec in methods]
  # The merging policy is allowed the choice that the plain one is.
  candidates = config_lib.to_dict(config.evals.candidates)
  candidates["cacovid_merged"] = [
    f"{spec}{'&' if '?' in spec else '?'}merge=nearest"
    for spec in candidates.get("cacovid", ())
  ]
  return experiment_lib.Experiment.from_config(
    config_lib.replace(
      config,
      {
        "evals.methods": tuple(methods),
        "evals.candidates": {
          label: tuple(specs)
          for label, specs in candidates.items()
          if specs and label in labels
        },
        "data.feature_cache": os.path.join(workdir, "features"),
      }
      | changes,
    ),
    workdir,
  )


def run(experiment, *, repeats=9):
  """Writes all files of the table and returns results.json as a dict."""
  workdir = pathlib.Path(experiment.workdir)
  # Taken before the evaluation writes its own times anew.
  times = _read_times(workdir / "timings.json", repeats)
  costs = {}

  def measure_all(out):
    costs.update(measure(experiment, out, times, repeats))
    return {
      label: {ratio: cost.total for ratio, cost in row.items()}
      for label, row in costs.items()
    }

  out = evaluation.evaluate(experiment, measure_all)
  tables.write_compressors(workdir, out, costs)
  return out


def measure(experiment, out, times, repeats):
  """Returns {label: {ratio: milliseconds}}, the missing ones measured.

  Written to timings.json as they come.

  Args:
    experiment: of the evaluation.
    out: its results.json, which says what was chosen and what cannot be run.
    times: what an earlier start measured on this machine.
    repeats: runs that a time is the median of.
  """
  methods = {}
  for spec in experiment.evals.methods:
    label, _ = runner.split_label(spec)
    chosen = out["chosen"].get(label)
    method = runner.Method.parse(
      _chosen_spec(experiment, label, chosen["best"]) if chosen else spec
    )
    methods[label] = dataclasses.replace(method, label=label)
  cells = [
    (method, ratio)
    for method in methods.values()
    for ratio in experiment.evals.ratios
    if out["methods"][method.label][results.ratio_key(ratio)]["status"] == "ok"
  ]
  missing = [
    (method, ratio) for method, ratio in cells
    if results.ratio_key(ratio) not in times.get(method.spec, {})
  ]  # fmt: skip
  if missing:
    _measure(experiment, missing, times, repeats)
  path = pathlib.Path(experiment.workdir) / "timings.json"
  _write_times(path, times, repeats)
  found = {method.label: {} for method in methods.values()}
  for method, ratio in cells:
    key = results.ratio_key(ratio)
    found[method.label][key] = latency.Cost(**times[method.spec][key])
  return found


def _chosen_spec(experiment, label, best):
  """Returns the candidate called `best`, with the path of one's own method."""
  listed = experiment.evals.candidates.get(label, ())
  named = (spec for spec in listed if runner.split_label(spec)[0] == best)
  return next(named, best)


def _measure(experiment, missing, times, repeats):
  """Adds to `times`: spec -> ratio -> fields of a `latency.Cost`."""
  evals = experiment.evals
  benchmark = evaluation.load_benchmark(
    experiment, evals.split, evals.num_questions
  )
  path = pathlib.Path(experiment.workdir) / "timings.json"
  wanted = runner.wanted([method for method, _ in missing])
  with (
    evaluation.open_source(experiment, wanted) as source,
    progress_lib.Progress(
      len(missing), description="selection times"
    ) as progress,
  ):
    evaluator = runner.Evaluator(
      experiment.checkpoint,
      source,
      benchmark.questions,
      dataclasses.replace(evaluation.settings(experiment), batch_size=1),
      policies=experiment.policies,
      decisive=benchmark.decisive,
    )
    question = latency.readable(evaluator, benchmark.questions)
    subject = latency.subject(evaluator, question)
    stopwatch = latency.Stopwatch(subject, repeats)
    for done, (method, ratio) in enumerate(missing, start=1):
      cost = stopwatch.cost(method, ratio)
      times.setdefault(method.spec, {})[results.ratio_key(ratio)] = {
        name: round(value, 4) for name, value in cost._asdict().items()
      }
      _write_times(path, times, repeats)
      progress.update(done)


def _read_times(path, repeats):
  """Returns the times of an earlier start, if they are of this machine."""
  try:
    found = json.loads(path.read_text(encoding="utf-8"))
  except FileNotFoundError:
    return {}
  except ValueError as error:
    raise errors.UserError(
      f"{path} is damaged ({errors.one_line(error)}); delete it to measure"
      " again"
    ) from error
  same = found.get("host") == provenance.host()
  selection = found.get("selection", {})
  if not same or selection.get("repeats") != repeats:
    return {}
  return selection["milliseconds"]


def _write_times(path, times, repeats):
  found = json.loads(path.read_text(encoding="utf-8"))
  found["selection"] = {"milliseconds": times, "repeats": repeats}
  files.write_json(path, found)


if __name__ == "__main__":
  errors.run(main)
