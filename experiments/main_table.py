r"""The paper's main table: four benchmarks, every method, four ratios.

python -m experiments.main_table --config=configs/llava_onevision.py:size=7b \
    --model=DIR --policy=FILE --data=ROOT
python -m experiments.main_table ... --dry_run    # what it would take
python -m experiments.main_table --paper_rows     # docs/paper_table.md

ROOT holds one folder per benchmark: longvideobench, mlvu_dev, mlvu_test,
videomme, each as it was released (`--folders=videomme=DIR` names another one).
Answers from all tokens are part of the same run, on the same frames.

WORKDIR/<benchmark>/           an evaluation, and asked.json, what its results
                               were asked for
WORKDIR/results.json           all of them, averages, drift, what is reproduced
WORKDIR/table.md, table.csv    a row per method and ratio, the paper's beside it
WORKDIR/accuracy.svg           averages over the ratio
WORKDIR/timings.json           times and host facts

Stopped and given again, it goes on where it was, to the same bytes. Several
processes share the work by `--shard=0/4`, `1/4`, ...; the last one to end
writes the table. `--frame_manifest=OTHER_WORKDIR` shows the frames of another
table. A row is reproduced if it lies within `--tolerance` points of the
paper's, as the answers from all tokens do, and no question was left out.
"""

import os
import pathlib
from collections.abc import Mapping
from typing import Any

from cacovid_jax import (
  command,
  compressors,
  errors,
  evaluate,
  files,
  schema,
  terminal,
)  # fmt: skip
from cacovid_jax import config as config_lib
from cacovid_jax import experiment as experiment_lib
from cacovid_jax.data import readers
from cacovid_jax.evals import (
  benchmarks,
  combined,
  estimate,
  evaluation,
  frame_manifest,
  paper,
  results,
  shards,
  tables,
)
from cacovid_jax.inference import methods as methods_lib
from experiments import reporting

# Benchmark -> its evaluation.
Plan = Mapping[str, experiment_lib.Experiment]
_SHARED = ("workdir", "shard", "model", "policy", "data", "methods", "ratios",
           "seeds", "template")  # fmt: skip
COMMAND = command.Command(
  __doc__,
  evaluate.flags(
    *_SHARED,
    batch_size="table_batch",
    num_questions="table_limit",
    num_frames="table_frames",
    feature_cache="table_cache",
    on_bad_row="table_bad_rows",
    on_missing="table_missing",
  )
  | command.aliases(
    "table",
    folders="Folders that are not below --data: videomme=DIR.",
    benchmarks=command.Flag("Columns.", old=["table_benchmarks"]),
    tolerance="Points between two runs of the same thing.",
  )
  | {
    "frame_manifest": command.Flag(
      "Workdir of another table, whose frames are shown.",
      "evals.frame_manifest",
      old=["table_manifests"],
    ),
    "chips": command.Flag(
      "Devices that share a model.", "mesh.model", old=["table_chips"]
    ),
    "paper_rows": command.Flag(
      "Print docs/paper_table.md's tables and end.", default=False
    ),
  }
  | estimate.FLAGS,
  old_config=["base"],
  defaults={
    "model.dtype": "float32",
    "data.num_frames": paper.NUM_FRAMES,
    "evals.methods": tuple(paper.METHODS),
    "evals.ratios": tuple(paper.RATIOS),
    "evals.seeds": (0, 1, 2),
  },
)


def main(args):
  """Makes the table that the command line describes."""
  if args.paper_rows:
    print(tables.paper_markdown())
    return
  plan = plan_of(args)
  if args.dry_run:
    dry_run(plan, published="model.path" not in args.given)
  elif not (workdir := run(plan, preflight(plan))):
    print("this share is done; the last process to end writes the table")
  else:
    terminal.tell((workdir / "table.md").read_text(encoding="utf-8"))
    names = (*tables.MAIN_FILES, "results.json", "timings.json")
    reporting.files(workdir, names)


def dry_run(plan: Plan, *, published: bool = True) -> None:
  """Prints what a plan would take, and what cannot be read and counted."""
  plan = {
    name: estimate.without_weights(experiment, published=published)
    for name, experiment in plan.items()
  }
  loaded, faults = survey(plan)
  for name, fault in faults.items():
    terminal.tell(f"{name}: {fault}")
  lost = faults.keys() - loaded.keys()
  counted = {name: one for name, one in plan.items() if name not in lost}
  if not counted:
    raise errors.UserError(
      "no benchmark can be read; complete the folders, or leave --data out to"
      " count the published questions"
    )
  config = next(iter(counted.values())).config
  ratios = ", ".join(f"{ratio:g}" for ratio in config.evals.ratios)
  dtype = config.model.dtype
  speed = estimate.speed_of(config.table, dtype)
  title = f"{len(config.evals.methods)} methods at ratios {ratios}, {dtype}"
  if absent := ", ".join(name for name in plan if name in lost):
    title += f"; not counted: {absent}"
  estimate.show(estimate.estimate(counted, loaded, speed), speed, title)


def plan_of(args) -> Plan:
  """Returns the plan that a command line describes; reads no data."""
  config = args.config
  COMMAND.require(args, "model")
  root = config.data.root if "data.root" in args.given else ""
  name = pathlib.PurePath(config.model.path).name
  return make_plan(
    config,
    args.workdir or f"workdirs/main_table_{name}",
    _folders(root, config.table, args.dry_run),
    shard=shards.Shard.parse(args.shard),
    asks=not args.dry_run,
  )


def make_plan(config, workdir, folders, *, shard=(0, 1), asks=True) -> Plan:
  """Returns the evaluation of each benchmark of a table.

  `folders` is benchmark -> folder, "" for its published size in a dry run;
  `asks` whether it is to be run, for which a policy may be needed.
  """
  paper.check_tolerance(config.table.tolerance)
  evals = config.evals
  specs = tuple(evals.methods)
  if specs == ("all",):
    specs = tuple(dict.fromkeys([*paper.METHODS, *compressors.names()]))
  changes = {
    "evals.methods": specs,
    "evals.ratios": results.check_ratios(evals.ratios),
    "evals.oracles": (),
    # Benchmarks have no split to choose options on.
    "evals.select_on": "none",
    "evals.candidates": {},
    "evals.prompt_style": "",
    "evals.split": "",
    "data.media": "",
  }
  if not _check_methods(specs, evals.policies or not asks):
    # Answers are those of no policy: one given later asks nothing anew.
    changes["evals.policies"] = ()
  plan = {}
  for name, folder in folders.items():
    changes |= {"evals.benchmark": name, "data.root": folder}
    if evals.frame_manifest:
      path = os.path.join(evals.frame_manifest, name, frame_manifest.FILE)
      changes["evals.frame_manifest"] = path
    plan[name] = experiment_lib.Experiment.from_config(
      config_lib.replace(config, changes),
      pathlib.Path(workdir, name),
      shard=shard,
    )
  return plan


def _check_methods(specs, has_policy) -> bool:
  """Returns whether a method reads a policy's scores; refuses oracles."""
  methods = [methods_lib.Method.parse(spec) for spec in specs]
  for method in methods:
    if method.compressor.oracle:
      raise errors.UserError(
        f"{method.label} knows where the answer lies, which no benchmark tells;"
        " leave it out of --methods"
      )
  scored = [method.label for method in methods if method.score_fields]
  if scored and not has_policy:
    rest = [m.label for m in methods if "cacovid" not in m.label]
    raise errors.UserError(
      f"{scored[0]} needs a trained policy: add --policy=FILE, or leave it"
      f" out: --methods={','.join(rest)}"
    )
  return bool(scored)


def _folders(root, table, published) -> dict[str, str]:
  """Returns benchmark -> folder, of the section `table` and of `--data`."""
  names, named = list(table.benchmarks), {}
  known = ", ".join(paper.BENCHMARKS)
  for name in names:
    benchmarks.task(name)
    errors.check(names.count(name) <= 1, f"--benchmarks names {name} twice")
    if name not in paper.BENCHMARKS:
      raise errors.UserError(
        f"{name} is no column of the paper's table; evaluate it with `python -m"
        f" cacovid_jax.evaluate --benchmark={name}`"
      )
  errors.check(names, f"--benchmarks is empty; there are {known}")
  for entry in map(str, table.folders):
    name, equals, folder = entry.partition("=")
    told = f"--folders={entry}: give BENCHMARK=DIR, with one of {known}"
    errors.check(equals and name in paper.BENCHMARKS, told)
    if not folder:
      raise errors.UserError(
        f"--folders={entry} names no folder: give {name}=DIR, or leave it out"
        " to take it below --data"
      )
    named[name] = folder
  if root:
    named = {name: os.path.join(root, name) for name in names} | named
  elif not published and not named.keys() >= set(names):
    raise errors.UserError(
      "nothing says where the benchmarks lie: add --data=ROOT"
    )
  # Without a folder, a benchmark has its published size.
  return {name: named.get(name, "") for name in names}


def preflight(plan: Plan) -> dict[str, Any]:
  """Returns the questions of every benchmark, or names all that is missing."""
  found, faults = survey(plan)
  if not faults:
    return found
  ready = [name for name in plan if name not in faults]
  mend = "; complete the folders"
  if ready:
    mend += f", or ask what is there: --benchmarks={','.join(ready)}"
  if any(name in found for name in faults):
    mend += ", or count missing clips as wrong: --on_missing=count"
  listed = "; ".join(f"{name}: {fault}" for name, fault in faults.items())
  raise errors.UserError(listed + mend)


def survey(plan: Plan) -> tuple[dict[str, Any], dict[str, str]]:
  """Returns (the benchmarks that can be read, name -> what is missing).

  Prints the counts of all. One whose clips are missing is in both, unless they
  are to be counted as wrong; one without a folder is in neither.
  """
  found, faults, rows = {}, {}, []
  for name, experiment in plan.items():
    evals = experiment.config.evals
    if not experiment.config.data.root:
      rows.append([name, "", "", "", "no folder given"])
      continue
    try:
      counted = experiment.replace({"evals.on_missing": "count"})
      loaded = evaluation.load_benchmark(counted)
    except errors.UserError as error:
      faults[name] = errors.one_line(error)
      rows.append([name, "", "", "", "no data"])
      continue
    found[name], questions = loaded, loaded.questions
    names = [question.video for question in questions]
    missing, num_clips = readers.find_missing(names, loaded.root), len({*names})
    num_bad = len(loaded.report.bad_rows)
    rows.append([name, len(questions), num_clips, len(missing), num_bad])
    if missing and evals.on_missing == "raise":
      faults[name] = (
        f"{len(missing)} of {num_clips} clips are missing below {loaded.root}"
        f" ({sum(missing.values())} questions), first: {next(iter(missing))}"
      )
  head = ("benchmark", "questions", "clips", "missing", "left out")
  reporting.table(head, rows, "benchmarks")
  return found, faults


def run(plan: Plan, loaded) -> pathlib.Path | None:
  """Writes all files of the table and returns their folder.

  Of several processes that share the work, those that end before the last one
  return None.
  """
  # Processes that share the work wait for each other's results of this start:
  # those of an earlier one may hold failures that are mended by now.
  for experiment in plan.values():
    if not shards.Shard(*experiment.shard).alone:
      (experiment.workdir / combined.ASKED).unlink(missing_ok=True)
  for name, experiment in plan.items():
    if evaluation.evaluate(experiment) is not None:
      asked = combined.asked(experiment, loaded[name].questions)
      files.write_json(experiment.workdir / combined.ASKED, asked)
    for other in plan.values():
      other.adopt(experiment)  # The model and the policy are read once.
  # A benchmark that another process still works on, or ended, is known by its
  # files alone.
  if not all(
    combined.is_complete(experiment, loaded[name].questions)
    for name, experiment in plan.items()
  ):
    return None
  (workdir,) = {experiment.workdir.parent for experiment in plan.values()}
  out = combined.combine(plan, loaded)
  files.write_json(workdir / "results.json", out)
  tables.write_main(workdir, out)
  times = {
    name: {
      path.name: schema.read(path, dict, "delete it to measure again")
      for path in sorted(experiment.workdir.glob("timings*.json"))
    }
    for name, experiment in plan.items()
  }
  files.write_json(workdir / "timings.json", times)
  return workdir


if __name__ == "__main__":
  COMMAND.run(main)
