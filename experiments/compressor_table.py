r"""Every compressor at every budget, on the embedded benchmark.

python -m experiments.compressor_table [--smoke]

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
clips are drawn if they are not there. `--methods=+my_rule.py:strongest` adds a
row.
"""

import dataclasses
import json
import os

from cacovid_jax import command, errors, evaluate, files
from cacovid_jax import config as config_lib
from cacovid_jax import experiment as experiment_lib
from cacovid_jax import progress as progress_lib
from cacovid_jax.evals import (
  evaluation,
  latency,
  provenance,
  results,
  tables,
)
from cacovid_jax.inference import clip_queue
from cacovid_jax.inference import engine as engine_lib
from cacovid_jax.inference import methods as methods_lib
from cacovid_jax.synthetic import build

# Rows beside the methods, by label.
VARIANTS = {
  "cacovid_merged": "cacovid?merge=nearest",
  "prunevid_llm": "prunevid?llm_stage=True",
}
_SHARED = ("workdir", "model", "policy", "data", "methods", "ratios", "seeds")
COMMAND = command.Command(
  __doc__,
  evaluate.flags(*_SHARED, batch_size="table_batch")
  | {
    "repeats": latency.REPEATS,
    "smoke": command.Flag(
      "Few clips and questions, to see that everything runs.",
      default=False,
      old=["short"],
    ),
  },
  default="configs/synthetic.py",
  defaults={
    "evals.policies": (f"policy={experiment_lib.SHIPPED_POLICY}",),
    "evals.methods": tables.all_rows(VARIANTS),
    "evals.ratios": (0.25, 0.2, 0.15, 0.1, 0.05),
    "evals.seeds": (0, 1, 2),
  },
)


def main(args):
  """Makes the table that the command line describes."""
  config = args.config
  if "data.root" not in args.given:
    build.prepare(config)
  workdir = args.workdir or f"workdirs/compressors{'_smoke' * args.smoke}"
  out = run(experiment_of(config, workdir))
  evaluation.show(out)
  names = ("results.json", "report.html", "timings.json")
  for name in (*tables.COMPRESSOR_FILES, *names):
    print(os.path.join(workdir, name))


def experiment_of(config, workdir) -> experiment_lib.Experiment:
  """Returns the evaluation behind a table.

  Args:
    config: see `base_config`; candidates of methods that are no rows are left
      out.
    workdir: of the table, and of its features.
  """
  labels = [methods_lib.split_label(spec)[0] for spec in config.evals.methods]
  candidates = config_lib.to_dict(config.evals.candidates)
  # The merging policy is allowed the choice that the plain one is.
  candidates["cacovid_merged"] = [
    f"{spec}{'&' if '?' in spec else '?'}merge=nearest"
    for spec in candidates.get("cacovid", ())
  ]
  changes = {
    "evals.candidates": {
      label: tuple(specs)
      for label, specs in candidates.items()
      if specs and label in labels
    },
    "data.feature_cache": os.path.join(workdir, "features"),
  }
  return experiment_lib.Experiment.from_config(
    config_lib.replace(config, changes), workdir
  )


def run(experiment):
  """Writes all files of the table and returns results.json as a dict."""
  path = experiment.workdir / "timings.json"
  # Taken before the evaluation writes its own times anew.
  times = _read_times(path, experiment.config.table.repeats)
  costs = {}

  def measure_all(out):
    costs.update(measure(experiment, out, times))
    return tables.totals(costs)

  out = evaluation.evaluate(experiment, measure_all)
  tables.write_compressors(experiment.workdir, out, costs)
  return out


def measure(experiment, out, times):
  """Returns {label: {ratio: milliseconds}}, the missing ones measured.

  Written to timings.json as they come.

  Args:
    out: its results.json, which says what was chosen and what cannot be run.
    times: what an earlier start measured on this machine.
  """
  evals, methods = experiment.config.evals, {}
  for spec in evals.methods:
    label, _ = methods_lib.split_label(spec)
    chosen = out["chosen"].get(label)
    method = methods_lib.Method.parse(
      _chosen_spec(evals, label, chosen["best"]) if chosen else spec
    )
    methods[label] = dataclasses.replace(method, label=label)
  cells = [
    (method, ratio)
    for method in methods.values()
    for ratio in evals.ratios
    if out["methods"][method.label][results.ratio_key(ratio)]["status"] == "ok"
  ]
  missing = [
    (method, ratio) for method, ratio in cells
    if results.ratio_key(ratio) not in times.get(method.spec, {})
  ]  # fmt: skip
  if missing:
    _measure(experiment, missing, times)
  _write_times(experiment, times)
  found = {method.label: {} for method in methods.values()}
  for method, ratio in cells:
    key = results.ratio_key(ratio)
    found[method.label][key] = latency.Cost(**times[method.spec][key])
  return found


def _chosen_spec(evals, label, best):
  """Returns the candidate called `best`, with the path of one's own method."""
  listed = evals.candidates.get(label, ())
  named = (spec for spec in listed if methods_lib.split_label(spec)[0] == best)
  return next(named, best)


def _measure(experiment, missing, times):
  """Adds to `times`: spec -> ratio -> fields of a `latency.Cost`."""
  if experiment.mesh.shape["data"] > 1:
    # A batch of one question has no use for more devices.
    experiment = experiment.replace({"mesh.data": 1})
  evals = experiment.config.evals
  benchmark = evaluation.load_benchmark(
    experiment, evals.split, evals.num_questions
  )
  wanted = methods_lib.wanted([method for method, _ in missing])
  with (
    clip_queue.open_queue(experiment, wanted) as source,
    progress_lib.Progress(
      len(missing), description="selection times"
    ) as progress,
  ):
    engine = engine_lib.Engine.of(
      experiment,
      source,
      benchmark.questions,
      dataclasses.replace(evaluation.settings(experiment), batch_size=1),
      policies=experiment.policies,
      decisive=benchmark.decisive,
    )
    question = latency.readable(engine, benchmark.questions)
    subject = latency.subject(engine, question)
    stopwatch = latency.Stopwatch(subject, experiment.config.table.repeats)
    for done, (method, ratio) in enumerate(missing, start=1):
      cost = stopwatch.cost(method, ratio)
      times.setdefault(method.spec, {})[results.ratio_key(ratio)] = {
        name: round(value, 4) for name, value in cost._asdict().items()
      }
      _write_times(experiment, times)
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


def _write_times(experiment, times):
  path = experiment.workdir / "timings.json"
  found = json.loads(path.read_text(encoding="utf-8"))
  repeats = experiment.config.table.repeats
  found["selection"] = {"milliseconds": times, "repeats": repeats}
  files.write_json(path, found)


if __name__ == "__main__":
  COMMAND.run(main)
