r"""Every compressor at every budget, on the embedded benchmark.

python -m experiments.compressor_table [--smoke]

Asks the test questions from what each method of `compressors.names()` keeps at
25, 20, 15, 10 and 5 %, three seeds where a method draws, and measures how long
it takes to choose the tokens of one video, and to the first token. A budget is
a mean over the layers of the language model: methods inside it see more in
front and less behind.

WORKDIR/table.md, table.csv       a row per method and ratio
WORKDIR/accuracy_over_time.svg    accuracy over milliseconds to the first token
WORKDIR/results.json, report.html as `python -m cacovid_jax.evaluate` has them
WORKDIR/timings.json              times and host facts, by method and ratio
WORKDIR/selection.jsonl           every time as it is measured

A method that cannot be run at a ratio keeps its row, which says why. Given
again, it goes on where it was. The policy is the shipped one; the clips are
drawn if they are not there. `--methods=+my_rule.py:strongest` adds a row.
"""

import dataclasses
import functools
import os

from cacovid_jax import command, evaluate, files, schema
from cacovid_jax import config as config_lib
from cacovid_jax import experiment as experiment_lib
from cacovid_jax import progress as progress_lib
from cacovid_jax.data import answer_log
from cacovid_jax.evals import evaluation, latency, provenance, results, tables
from cacovid_jax.inference import clip_queue
from cacovid_jax.inference import engine as engine_lib
from cacovid_jax.inference import methods as methods_lib
from cacovid_jax.synthetic import build
from experiments import reporting

# Rows beside the methods, by label.
VARIANTS = {
  "cacovid_merged": "cacovid?merge=nearest",
  "prunevid_llm": "prunevid?llm_stage=True",
}
LEDGER = "selection.jsonl"
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
  reporting.files(workdir, (*tables.COMPRESSOR_FILES, *names))


def experiment_of(config, workdir) -> experiment_lib.Experiment:
  """Returns the evaluation behind a table; its features go to the workdir.

  Candidates of methods that are no rows are left out.
  """
  evals = config.evals
  labels = [methods_lib.split_label(spec)[0] for spec in evals.methods]
  candidates = config_lib.to_dict(evals.candidates)
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
  costs = {}

  def measure_all(out):
    costs.update(measure(experiment, out))
    return tables.totals(costs)

  out = evaluation.evaluate(experiment, measure_all)
  tables.write_compressors(experiment.workdir, out, costs)
  return out


def measure(experiment, out):
  """Returns {label: {ratio: `latency.Cost`}}, also written to timings.json.

  "vanilla", all tokens, is among them. `out` is its results.json, which says
  what was chosen and what can be run.
  """
  evals, repeats = experiment.config.evals, experiment.config.table.repeats
  cells = [methods_lib.Condition()]
  for spec in evals.methods:
    label, _ = methods_lib.split_label(spec)
    if chosen := out["chosen"].get(label):
      spec = _chosen_spec(evals, label, chosen["best"])
    spec = out.get("calibrated", {}).get(label, {}).get("spec", spec)
    method = dataclasses.replace(methods_lib.Method.parse(spec), label=label)
    row = out["methods"][label]
    cells += [
      methods_lib.Condition(method, ratio)
      for ratio in evals.ratios
      if row[results.ratio_key(ratio)]["status"] == "ok"
    ]
  path = experiment.workdir / LEDGER
  described = {"host": provenance.host(), "repeats": repeats}
  # Times of another machine say nothing about this one.
  if path.is_file() and answer_log.header(path) not in (described, {}):
    path.unlink()
  costs, times = {}, {}
  with answer_log.AnswerLog(path, described) as rows:
    _measure(experiment, cells, rows)
    for cell in cells:
      key, found = results.ratio_key(cell.ratio), rows[cell.key("prompt")]
      cost = latency.Cost(*(found[name] for name in latency.Cost._fields))
      costs.setdefault(cell.label, {})[key] = cost
      times.setdefault(cell.spec, {})[key] = cost._asdict()
  path = experiment.workdir / "timings.json"
  selection = {"milliseconds": times, "repeats": repeats}
  found = schema.read(path, dict, "delete it to measure again")
  files.write_json(path, found | {"selection": selection})
  return costs


def _chosen_spec(evals, label, best):
  """Returns the candidate called `best`, with the path of one's own method."""
  listed = evals.candidates.get(label, ())
  named = (spec for spec in listed if methods_lib.split_label(spec)[0] == best)
  return next(named, best)


def _measure(experiment, cells, rows):
  """Adds the fields of a `latency.Cost` to a ledger, of each cell it lacks."""
  cells = [cell for cell in cells if cell.key("prompt") not in rows]
  if not cells:
    return
  changes = {"evals.batch_size": 1, "evals.max_new_tokens": 1}
  if experiment.mesh.shape["data"] > 1:
    # A batch of one question has no use for more devices.
    changes["mesh.data"] = 1
  experiment = experiment.replace(changes)
  benchmark = evaluation.load_benchmark(experiment)
  wanted = methods_lib.wanted([c.method for c in cells if c.method])
  with (
    clip_queue.open_queue(experiment, wanted) as source,
    progress_lib.Progress(
      len(cells), description="selection times"
    ) as progress,
  ):
    engine = engine_lib.Engine.of(
      experiment,
      source,
      benchmark.questions,
      evaluation.settings(experiment),
      policies=experiment.policies,
      decisive=benchmark.decisive,
    )
    question = latency.readable(engine, benchmark.questions)
    subject = latency.subject(engine, question)
    stopwatch = latency.Stopwatch(subject, experiment.config.table.repeats)
    before = stopwatch.tower() + stopwatch.embed()

    def cost(cell):
      found = stopwatch.cost(cell.method, cell.ratio)
      return found._replace(before=before)._asdict()

    for done, cell in enumerate(cells, start=1):
      reporting.once(rows, cell.key("prompt"), functools.partial(cost, cell))
      progress.update(done)


if __name__ == "__main__":
  COMMAND.run(main)
