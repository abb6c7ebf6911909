r"""The paper's main table: four benchmarks, every method, four ratios.

python -m experiments.main_table --base=ov7b --table_model=DIR \
    --table_policy=FILE --table_data=ROOT
python -m experiments.main_table ... --dry_run    # what it would take
python -m experiments.main_table --paper_rows     # docs/paper_table.md

ROOT holds one folder per benchmark: longvideobench, mlvu_dev, mlvu_test,
videomme, each as it was released (`--folders=videomme=DIR` names another one).
`--base` is a config of `configs/` by its short name, `--config` any other.
Answers from all tokens are part of the same run, on the same frames.

WORKDIR/<benchmark>/           an evaluation: answers.jsonl (every question),
                               results.json, report.html, frames.jsonl; and
                               asked.json, what those results were asked for
WORKDIR/results.json           all of them, averages, drift, what is reproduced
WORKDIR/table.md, table.csv    a row per method and ratio, the paper's beside it
WORKDIR/accuracy.svg           averages over the ratio
WORKDIR/timings.json           times and host facts

Stopped and given again, it goes on where it was, to the same bytes. Several
processes share the work by `--table_shard=0/4`, `1/4`, ...; the last one to
end writes the table. `--table_manifests=OTHER_WORKDIR` shows the frames of
another table. A row is called reproduced only if it lies within `--tolerance`
points of the paper's, the answers from all tokens do, too, and every question
was asked, about a clip that could be read.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import rich.console
import rich.table
from absl import flags

from cacovid_jax import base_config, compressors, errors, files
from cacovid_jax import config as config_lib
from cacovid_jax import experiment as experiment_lib
from cacovid_jax.data import answer_log, readers
from cacovid_jax.evals import (
  benchmarks,
  combined,
  estimate,
  evaluation,
  frame_manifest,
  paper,
  paper_rows,
  results,
  runner,
  shards,
  tables,
)
from experiments import table_flags

config_lib.define_flag()
ASKED = "asked.json"

_BASE = flags.DEFINE_enum(
  "base", None, list(table_flags.BASES), "Config of a released model."
)
_BENCHMARKS = flags.DEFINE_list(
  "table_benchmarks", list(paper.BENCHMARKS), "Columns."
)
_FOLDERS = flags.DEFINE_list(
  "folders", [], "Folders that are not below --table_data: videomme=DIR."
)
_LIMIT = flags.DEFINE_integer(
  "table_limit", 0, "First so many questions of each; 0 for all.", lower_bound=0
)
_BAD_ROWS = flags.DEFINE_enum(
  "table_bad_rows", "raise", ["raise", "skip"], "What to do with unfit rows."
)
_MISSING = flags.DEFINE_enum(
  "table_missing",
  "raise",
  ["raise", "count"],
  "What to do without a clip: end before the start, or count it as wrong.",
)
_TOLERANCE = flags.DEFINE_float(
  "tolerance", paper.TOLERANCE, "Points between two runs of the same thing."
)
_FRAMES = flags.DEFINE_integer(
  "table_frames", None, "Frames per clip; the config's, or 32.", lower_bound=1
)
_TEMPLATE = flags.DEFINE_enum(
  "table_template",
  None,
  ["processor", "tokenizer"],
  "Whose chat template prompts are written by; the config's, or the default.",
)
_MANIFESTS = flags.DEFINE_string(
  "table_manifests",
  None,
  "Workdir of another table, whose frames are to be shown.",
)
_CACHE = flags.DEFINE_string(
  "table_cache",
  None,
  "Folder of cached features, for further tables; --dry_run tells its size.",
)
_SHARD = flags.DEFINE_string(
  "table_shard", "0/1", "i/n: this is process i of n that share the work."
)
_CHIPS = flags.DEFINE_integer(
  "table_chips", 1, "Devices that share one model, for --dry_run's memory.",
  lower_bound=1,
)  # fmt: skip
_PAPER_ROWS = flags.DEFINE_bool(
  "paper_rows", False, "Print the tables of docs/paper_table.md and end."
)


def main(argv):
  """Makes the table that the flags describe."""
  if len(argv) > 1:
    raise errors.UserError(f"unknown argument {argv[1]!r}; flags begin with --")
  if _PAPER_ROWS.value:
    print(paper_rows.markdown())
    return
  plan = plan_from_flags()
  if table_flags.DRY_RUN.value:
    dry_run(plan)
    return
  test = preflight(plan)
  if run(plan, test) is None:
    print("this share is done; the last process to end writes the table")
    return
  print((plan.workdir / "table.md").read_text(encoding="utf-8"))
  for name in (*tables.MAIN_FILES, "results.json", "timings.json"):
    print(os.path.join(plan.workdir, name))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
  """What to make.

  Attributes:
    workdir: of the table.
    experiments: benchmark -> its evaluation.
    tolerance: points between two runs of the same thing.
  """

  workdir: pathlib.Path
  experiments: Mapping[str, experiment_lib.Experiment]
  tolerance: float = paper.TOLERANCE

  @property
  def first(self) -> experiment_lib.Experiment:
    """The evaluation of one benchmark; in most fields all are alike."""
    return next(iter(self.experiments.values()))

  @property
  def methods(self) -> list[runner.Method]:
    return [runner.Method.parse(spec) for spec in self.first.evals.methods]


def dry_run(plan: Plan) -> dict[str, Any]:
  """Prints what a plan would take, and returns it; reads no weights.

  Where no folder or model was given, published sizes are taken. One that was
  given and cannot be read is a fault, which is printed; the benchmark is not
  counted then.
  """
  experiment = plan.first
  checkpoint = estimate.describe(
    experiment.config.model.path,
    # A model that was named is that one, or a mistake.
    None if table_flags.MODEL.value else _BASE.value,
    experiment.config.model.dtype,
    experiment.evals.template,
  )
  loaded, faults = survey(plan)
  for name, fault in faults.items():
    print(f"{name}: {fault}")
  experiments = {
    name: each
    for name, each in plan.experiments.items()
    if name in loaded or name not in faults
  }
  if not experiments:
    raise errors.UserError(
      "no benchmark can be read; complete the folders, or leave --table_data"
      " out to count the published questions"
    )
  speed = table_flags.speed(experiment.config.model.dtype)
  out = estimate.estimate(
    checkpoint, experiments, loaded, speed, model_shards=_CHIPS.value
  )
  ratios = ", ".join(f"{ratio:g}" for ratio in experiment.evals.ratios)
  title = f"{len(plan.methods)} methods at ratios {ratios},"
  title += f" {experiment.config.model.dtype}"
  absent = [name for name in plan.experiments if name not in experiments]
  if absent:
    title += f"; not counted: {', '.join(absent)}"
  estimate.show(out, speed, title)
  return out


def all_rows() -> list[str]:
  """Returns the paper's methods, and all others behind them."""
  rest = [name for name in compressors.names() if name not in paper.METHODS]
  return [*paper.METHODS, *rest]


def plan_from_flags() -> Plan:
  """Returns the plan that the flags describe; reads no data."""
  if _BASE.value and flags.FLAGS.config:
    raise errors.UserError("--base and --config name two configs; give one")
  if _BASE.value:
    config = config_lib.load(
      table_flags.BASES[_BASE.value], flags.FLAGS.config_override or []
    )
  elif flags.FLAGS.config:
    config = config_lib.from_flags()
  else:
    config = None
  model = table_flags.MODEL.value
  changes = {}
  if config is None:
    config = config_lib.replace(
      base_config.get_config(), {"model.dtype": "float32"}
    )
    changes["data.num_frames"] = paper.NUM_FRAMES
    methods = paper.METHODS
  else:
    config = config_lib.complete(config)
    methods = config.evals.methods
  methods = table_flags.METHODS.value or methods
  if list(methods) == ["all"]:
    methods = all_rows()
  for key, value in {
    "data.num_frames": _FRAMES.value,
    "model.path": model,
    "evals.template": _TEMPLATE.value,
    "data.feature_cache": _CACHE.value,
    "evals.batch_size": table_flags.BATCH.value,
  }.items():
    if value:
      changes[key] = value
  if not (model or config.model.path) and not (
    _BASE.value and table_flags.DRY_RUN.value
  ):
    raise errors.UserError("nothing says which base model: add --table_model")
  if table_flags.POLICY.value:
    changes["evals.policies"] = (f"policy={table_flags.POLICY.value}",)
  name = _BASE.value or "table"
  return make_plan(
    config_lib.replace(
      config,
      changes
      | {
        "evals.ratios": table_flags.ratios(paper.RATIOS),
        "evals.seeds": table_flags.seeds(),
        "evals.num_questions": _LIMIT.value,
        "evals.on_bad_row": _BAD_ROWS.value,
        "evals.on_missing": _MISSING.value,
      },
    ),
    table_flags.WORKDIR.value or f"workdirs/main_table_{name}",
    _checked_benchmarks(_BENCHMARKS.value),
    _folders(table_flags.DATA.value, _FOLDERS.value, _BENCHMARKS.value),
    methods=methods,
    tolerance=_TOLERANCE.value,
    manifests=_MANIFESTS.value or "",
    shard=shards.Shard.parse(_SHARD.value),
  )


def make_plan(
  config,
  workdir: str | os.PathLike,
  names: Sequence[str],
  folders: Mapping[str, str],
  *,
  methods: Sequence[str],
  tolerance: float = paper.TOLERANCE,
  manifests: str = "",
  shard: tuple[int, int] = (0, 1),
) -> Plan:
  """Returns a plan.

  Args:
    config: what all benchmarks share, see `base_config`.
    workdir: of the table.
    names: benchmarks.
    folders: benchmark -> folder.
    methods: rows.
    tolerance: points.
    manifests: workdir of another table, whose frames are shown; "" for none.
    shard: (i, n): this is process i of n that share the work.
  """
  workdir = pathlib.Path(workdir)
  parsed = [runner.Method.parse(spec) for spec in methods]
  labels = [method.label for method in parsed]
  policies = config.evals.policies
  reads_scores = False
  for method in parsed:
    if method.compressor.oracle:
      raise errors.UserError(
        f"{method.label} knows where the answer lies, which no benchmark tells;"
        " leave it out of --table_methods"
      )
    scored = [need for need in method.needs if need.endswith("scores")]
    reads_scores |= bool(scored)
    if scored and not policies and not table_flags.DRY_RUN.value:
      raise errors.UserError(
        f"{method.label} needs a trained policy: add --table_policy=FILE, or"
        f" leave it out: --table_methods="
        f"{','.join(label for label in labels if 'cacovid' not in label)}"
      )
  common = {
    "evals.methods": tuple(methods),
    "evals.oracles": (),
    # Answers are those of no policy: one given later asks nothing anew.
    "evals.policies": policies if reads_scores else (),
    # Benchmarks have no split to choose options on.
    "evals.select_on": "none",
    "evals.candidates": {},
    "evals.prompt_style": "",
    "evals.split": "",
    "data.media": "",
  }
  experiments = {}
  for name in names:
    frames = os.path.join(manifests, name, frame_manifest.FILE)
    own = {
      "evals.benchmark": name,
      "data.root": folders[name],
      "evals.frame_manifest": frames if manifests else "",
    }
    experiments[name] = experiment_lib.Experiment.from_config(
      config_lib.replace(config, common | own), workdir / name, shard=shard
    )
    evaluation.check(experiments[name].config)
  return Plan(
    workdir=workdir,
    experiments=experiments,
    tolerance=paper.check_tolerance(tolerance),
  )


def _checked_benchmarks(names) -> list[str]:
  for name in names:
    benchmarks.task(name)
    if names.count(name) > 1:
      raise errors.UserError(f"--table_benchmarks names {name} twice")
    if name not in paper.BENCHMARKS:
      raise errors.UserError(
        f"{name} is no column of the paper's table; evaluate it with `python -m"
        f" cacovid_jax.evaluate --benchmark={name}`"
      )
  if not names:
    raise errors.UserError(
      f"--table_benchmarks is empty; there are {', '.join(paper.BENCHMARKS)}"
    )
  return list(names)


def _folders(root, given, names) -> dict[str, str]:
  """Returns benchmark -> folder, of `--table_data` and `--folders`."""
  named = {}
  for entry in given:
    name, equals, folder = entry.partition("=")
    if not equals or name not in paper.BENCHMARKS:
      raise errors.UserError(
        f"--folders={entry}: give BENCHMARK=DIR, with one of"
        f" {', '.join(paper.BENCHMARKS)}"
      )
    if not folder:
      raise errors.UserError(
        f"--folders={entry} names no folder: give {name}=DIR, or leave it out"
        " to take it below --table_data"
      )
    named[name] = folder
  if root is None and table_flags.DRY_RUN.value:
    # Without a folder, a benchmark has its published size.
    return {name: named.get(name, "") for name in names}
  if root is None and any(name not in named for name in names):
    raise errors.UserError(
      "nothing says where the benchmarks lie: add --table_data=ROOT"
    )
  return {
    name: named[name] if name in named else os.path.join(root, name)
    for name in names
  }


def preflight(plan: Plan) -> dict[str, benchmarks.Benchmark]:
  """Returns the questions of every benchmark, and prints their counts.

  Raises:
    UserError: folders, files or clips are missing; names all of them.
  """
  found, faults = survey(plan)
  if not faults:
    return found
  ready = [name for name in plan.experiments if name not in faults]
  mend = "; complete the folders"
  if ready:
    mend += f", or ask what is there: --table_benchmarks={','.join(ready)}"
  if any(name in found for name in faults):
    mend += ", or count missing clips as wrong: --table_missing=count"
  listed = "; ".join(f"{name}: {fault}" for name, fault in faults.items())
  raise errors.UserError(listed + mend)


def survey(
  plan: Plan,
) -> tuple[dict[str, benchmarks.Benchmark], dict[str, str]]:
  """Returns (the benchmarks that can be read, name -> what is missing).

  Prints the counts of all. One whose clips are missing is in both, unless they
  are to be counted as wrong; one without a folder is in neither.
  """
  found, faults = {}, {}
  table = rich.table.Table(title="benchmarks")
  for title in ("benchmark", "questions", "clips", "missing", "left out"):
    table.add_column(title)
  for name, experiment in plan.experiments.items():
    if not experiment.data.root:
      table.add_row(name, "", "", "", "no folder given")
      continue
    try:
      counted = experiment.replace({"evals.on_missing": "count"})
      loaded = evaluation.load_benchmark(
        counted, experiment.evals.split, experiment.evals.num_questions
      )
    except errors.UserError as error:
      faults[name] = errors.one_line(error)
      table.add_row(name, "", "", "", "no data")
      continue
    found[name] = loaded
    missing = readers.check_media(loaded.questions, loaded.root)
    num_clips = len({question.video for question in loaded.questions})
    counts = (len(loaded.questions), num_clips, len(missing),
              len(loaded.report.bad_rows))  # fmt: skip
    table.add_row(name, *map(str, counts))
    if missing and experiment.evals.on_missing == "raise":
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

  Args:
    plan: what to make.
    loaded: of `preflight`.
  """
  plan.workdir.mkdir(parents=True, exist_ok=True)
  notes = {
    name: pathlib.Path(experiment.workdir, ASKED)
    for name, experiment in plan.experiments.items()
  }
  # Processes that share the work wait for each other's results of this start:
  # those of an earlier one may hold failures that are mended by now.
  if not shards.Shard(*plan.first.shard).alone:
    for note in notes.values():
      note.unlink(missing_ok=True)
  for name, experiment in plan.experiments.items():
    if evaluation.evaluate(experiment) is not None:
      files.write_json(notes[name], asked(experiment, loaded[name].questions))
  # A benchmark that another process still works on, or ended, is known by its
  # files alone.
  if not all(
    is_complete(experiment, loaded[name].questions)
    for name, experiment in plan.experiments.items()
  ):
    return None
  runs = {
    name: asked(experiment, loaded[name].questions)["run"]
    for name, experiment in plan.experiments.items()
  }
  out = combined.combine(plan.experiments, loaded, runs, plan.tolerance)
  files.write_json(plan.workdir / "results.json", out)
  tables.write_main(plan.workdir, out)
  times = {
    name: {
      path.name: json.loads(path.read_text(encoding="utf-8"))
      for path in sorted(pathlib.Path(experiment.workdir).glob("timings*.json"))
    }
    for name, experiment in plan.experiments.items()
  }
  files.write_json(plan.workdir / "timings.json", times)
  return out


def asked(experiment: experiment_lib.Experiment, questions) -> dict[str, Any]:
  """Returns what an evaluation was asked for, for `ASKED` beside its results.

  Args:
    experiment: that this process has taken part in.
    questions: of the benchmark.
  """
  digest = hashlib.sha256()
  for question in questions:
    fields = dataclasses.asdict(question)
    digest.update(json.dumps(fields, sort_keys=True).encode() + b"\n")
  own = shards.Shard(*experiment.shard).file("answers.jsonl")
  methods = map(runner.Method.parse, experiment.evals.methods)
  return {
    "questions": digest.hexdigest(),
    "ratios": list(map(results.ratio_key, experiment.evals.ratios)),
    "rows": [[method.label, method.spec] for method in methods],
    "run": answer_log.header(pathlib.Path(experiment.workdir, own)),
    "seeds": list(experiment.evals.seeds),
  }


def is_complete(experiment: experiment_lib.Experiment, questions) -> bool:
  """Returns whether a benchmark's results.json is of just what is asked for."""
  note = pathlib.Path(experiment.workdir, ASKED)
  try:
    found = json.loads(note.read_text(encoding="utf-8"))
  except FileNotFoundError:
    return False
  except ValueError as error:
    raise errors.UserError(
      f"{note} is damaged ({error}); delete it and start again"
    ) from error
  return found == asked(experiment, questions)


if __name__ == "__main__":
  errors.run(main)
