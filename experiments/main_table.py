r"""The paper's main table: four benchmarks, every method, four ratios.

python -m experiments.main_table --config=configs/llava_onevision.py:size=7b \
    --model=DIR --policy=FILE --data=ROOT
python -m experiments.main_table ... --dry_run    # what it would take
python -m experiments.main_table --paper_rows     # docs/paper_table.md

ROOT holds one folder per benchmark: longvideobench, mlvu_dev, mlvu_test,
videomme, each as it was released (`--folders=videomme=DIR` names another one).
Answers from all tokens are part of the same run, on the same frames.

WORKDIR/<benchmark>/           an evaluation: answers.jsonl (every question),
                               results.json, report.html, frames.jsonl; and
                               asked.json, what those results were asked for
WORKDIR/results.json           all of them, averages, drift, what is reproduced
WORKDIR/table.md, table.csv    a row per method and ratio, the paper's beside it
WORKDIR/accuracy.svg           averages over the ratio
WORKDIR/timings.json           times and host facts

Stopped and given again, it goes on where it was, to the same bytes. Several
processes share the work by `--shard=0/4`, `1/4`, ...; the last one to end
writes the table. `--frame_manifest=OTHER_WORKDIR` shows the frames of another
table. A row is called reproduced only if it lies within `--tolerance` points of
the paper's, the answers from all tokens do, too, and every question was asked,
about a clip that could be read.
"""

import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import rich.console
import rich.table

from cacovid_jax import command, compressors, errors, evaluate, files
from cacovid_jax import config as config_lib
from cacovid_jax import experiment as experiment_lib
from cacovid_jax.compressors import base
from cacovid_jax.data import readers
from cacovid_jax.evals import (
  benchmarks,
  combined,
  estimate,
  evaluation,
  frame_manifest,
  paper,
  paper_rows,
  results,
  shards,
  tables,
)
from cacovid_jax.inference import methods as methods_lib

_SHARED = ("workdir", "shard", "model", "policy", "methods", "ratios", "seeds",
           "template")  # fmt: skip
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
  | {
    "data": command.Flag(
      "Folder with one folder per benchmark.", "data.root", old=["table_data"]
    ),
    "frame_manifest": command.Flag(
      "Workdir of another table, whose frames are shown.",
      "evals.frame_manifest",
      old=["table_manifests"],
    ),
    "folders": command.Flag(
      "Folders that are not below --data: videomme=DIR.", "table.folders"
    ),
    "benchmarks": command.Flag(
      "Columns.", "table.benchmarks", old=["table_benchmarks"]
    ),
    "tolerance": command.Flag(
      "Points between two runs of the same thing.", "table.tolerance"
    ),
    "chips": command.Flag(
      "Devices that share a model.", "mesh.model", old=["table_chips"], least=1
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
    print(paper_rows.markdown())
    return
  plan = plan_of(args)
  if args.dry_run:
    dry_run(plan, published="model.path" not in args.given)
  elif run(plan, preflight(plan)) is None:
    print("this share is done; the last process to end writes the table")
  else:
    print((plan.workdir / "table.md").read_text(encoding="utf-8"))
    for name in (*tables.MAIN_FILES, "results.json", "timings.json"):
      print(os.path.join(plan.workdir, name))


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
  """What to make."""

  # What the evaluations of all benchmarks have in common.
  experiment: experiment_lib.Experiment
  # Benchmark -> folder; "" takes its published size in a dry run.
  folders: Mapping[str, str]

  @property
  def workdir(self) -> pathlib.Path:
    return self.experiment.workdir

  @functools.cached_property
  def experiments(self) -> dict[str, experiment_lib.Experiment]:
    """Benchmark -> its evaluation."""
    manifests = self.experiment.config.evals.frame_manifest
    found = {}
    for name, folder in self.folders.items():
      changes = {"evals.benchmark": name, "data.root": folder}
      if manifests:
        path = os.path.join(manifests, name, frame_manifest.FILE)
        changes["evals.frame_manifest"] = path
      found[name] = self.experiment.replace(changes, self.workdir / name)
    return found


def dry_run(plan: Plan, *, published: bool = True) -> dict[str, Any]:
  """Prints what a plan would take, and returns it; reads no weights.

  Where no folder was given, published sizes are taken. What was given and
  cannot be read is printed as a fault, and not counted.
  """
  bare = estimate.without_weights(plan.experiment, published=published)
  plan = Plan(bare, plan.folders)
  loaded, faults = survey(plan)
  for name, fault in faults.items():
    print(f"{name}: {fault}")
  lost = faults.keys() - loaded.keys()
  counted = {n: one for n, one in plan.experiments.items() if n not in lost}
  if not counted:
    raise errors.UserError(
      "no benchmark can be read; complete the folders, or leave --data out to"
      " count the published questions"
    )
  config = plan.experiment.config
  ratios = ", ".join(f"{ratio:g}" for ratio in config.evals.ratios)
  methods, dtype = config.evals.methods, config.model.dtype
  speed = estimate.speed_of(config.table, dtype)
  out = estimate.estimate(counted, loaded, speed)
  title = f"{len(methods)} methods at ratios {ratios}, {dtype}"
  if absent := ", ".join(n for n in plan.folders if n in lost):
    title += f"; not counted: {absent}"
  estimate.show(out, speed, title)
  return out


def plan_of(args) -> Plan:
  """Returns the plan that a command line describes; reads no data."""
  config = args.config
  COMMAND.require(config, "model")
  root = config.data.root if "data.root" in args.given else ""
  name = pathlib.PurePath(config.model.path).name
  return make_plan(
    config,
    args.workdir or f"workdirs/main_table_{name}",
    _folders(root, config.table, args.dry_run),
    shard=shards.Shard.parse(args.shard),
    asks=not args.dry_run,
  )


def make_plan(
  config,
  workdir: str | os.PathLike,
  folders: Mapping[str, str],
  *,
  shard: Sequence[int] = (0, 1),
  asks: bool = True,
) -> Plan:
  """Returns a plan.

  Args:
    shard: (i, n): this is process i of n that share the work.
    asks: whether it is to be run, for which a policy may be needed.
  """
  paper.check_tolerance(config.table.tolerance)
  evals = config.evals
  specs, ratios = tuple(evals.methods), map(base.check_ratio, evals.ratios)
  if specs == ("all",):
    specs = tuple(dict.fromkeys([*paper.METHODS, *compressors.names()]))
  changes = {
    "evals.methods": specs,
    "evals.ratios": results.check_ratios(ratios),
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
  experiment = experiment_lib.Experiment.from_config(
    config_lib.replace(config, changes), workdir, shard=shard
  )
  return Plan(experiment, folders)


def _check_methods(specs, has_policy) -> bool:
  """Returns whether a method reads a policy's scores; refuses oracles."""
  methods = [methods_lib.Method.parse(spec) for spec in specs]
  scored = []
  for method in methods:
    if method.compressor.oracle:
      raise errors.UserError(
        f"{method.label} knows where the answer lies, which no benchmark tells;"
        " leave it out of --methods"
      )
    if any(need.endswith("scores") for need in method.needs):
      scored.append(method.label)
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
  for name in names:
    benchmarks.task(name)
    if names.count(name) > 1:
      raise errors.UserError(f"--benchmarks names {name} twice")
    if name not in paper.BENCHMARKS:
      raise errors.UserError(
        f"{name} is no column of the paper's table; evaluate it with `python -m"
        f" cacovid_jax.evaluate --benchmark={name}`"
      )
  if not names:
    raise errors.UserError(
      f"--benchmarks is empty; there are {', '.join(paper.BENCHMARKS)}"
    )
  for entry in map(str, table.folders):
    name, equals, folder = entry.partition("=")
    if not equals or name not in paper.BENCHMARKS:
      raise errors.UserError(
        f"--folders={entry}: give BENCHMARK=DIR, with one of"
        f" {', '.join(paper.BENCHMARKS)}"
      )
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


def preflight(plan: Plan) -> dict[str, benchmarks.Benchmark]:
  """Returns the questions of every benchmark, and prints their counts.

  Raises:
    UserError: folders, files or clips are missing; names all of them.
  """
  found, faults = survey(plan)
  if not faults:
    return found
  ready = [name for name in plan.folders if name not in faults]
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
  found, faults = {}, {}
  table = rich.table.Table(title="benchmarks")
  for title in ("benchmark", "questions", "clips", "missing", "left out"):
    table.add_column(title)
  for name, experiment in plan.experiments.items():
    evals = experiment.config.evals
    if not plan.folders[name]:
      table.add_row(name, "", "", "", "no folder given")
      continue
    try:
      counted = experiment.replace({"evals.on_missing": "count"})
      loaded = evaluation.load_benchmark(counted, count=evals.num_questions)
    except errors.UserError as error:
      faults[name] = errors.one_line(error)
      table.add_row(name, "", "", "", "no data")
      continue
    found[name] = loaded
    names = [question.video for question in loaded.questions]
    missing, num_clips = readers.find_missing(names, loaded.root), len({*names})
    num_bad = len(loaded.report.bad_rows)
    counts = (len(loaded.questions), num_clips, len(missing), num_bad)
    table.add_row(name, *map(str, counts))
    if missing and evals.on_missing == "raise":
      faults[name] = (
        f"{len(missing)} of {num_clips} clips are missing below {loaded.root}"
        f" ({sum(missing.values())} questions), first: {next(iter(missing))}"
      )
  rich.console.Console(width=100).print(table)
  return found, faults


def run(
  plan: Plan, loaded: Mapping[str, benchmarks.Benchmark]
) -> dict[str, Any] | None:
  """Writes all files of the table and returns results.json as a dict.

  Of several processes that share the work, those that end before the last one
  return None.
  """
  plan.workdir.mkdir(parents=True, exist_ok=True)
  notes = {name: plan.workdir / name / combined.ASKED for name in plan.folders}
  # Processes that share the work wait for each other's results of this start:
  # those of an earlier one may hold failures that are mended by now.
  if not shards.Shard(*plan.experiment.shard).alone:
    for note in notes.values():
      note.unlink(missing_ok=True)
  last = plan.experiment
  for name, experiment in plan.experiments.items():
    experiment.adopt(last)  # The model and the policy are read once.
    last = experiment
    if evaluation.evaluate(experiment) is not None:
      asked = combined.asked(experiment, loaded[name].questions)
      files.write_json(notes[name], asked)
  # A benchmark that another process still works on, or ended, is known by its
  # files alone.
  if not all(
    combined.is_complete(experiment, loaded[name].questions)
    for name, experiment in plan.experiments.items()
  ):
    return None
  out = combined.combine(plan.experiments, loaded)
  files.write_json(plan.workdir / "results.json", out)
  tables.write_main(plan.workdir, out)
  times = {
    name: {
      path.name: json.loads(path.read_text(encoding="utf-8"))
      for path in sorted((plan.workdir / name).glob("timings*.json"))
    }
    for name in plan.folders
  }
  files.write_json(plan.workdir / "timings.json", times)
  return out


if __name__ == "__main__":
  COMMAND.run(main)
