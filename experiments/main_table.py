r"""The paper's main table: four benchmarks, every method, four ratios.

python -m experiments.main_table --base=ov7b --table_model=DIR \
    --table_policy=FILE --table_data=ROOT
python -m experiments.main_table ... --dry_run    # what it would take
python -m experiments.main_table --paper_rows     # the README's table

ROOT holds one folder per benchmark: longvideobench, mlvu_dev, mlvu_test,
videomme, each as it was released (`--folders=videomme=DIR` names another one).
`--base` is a config of `configs/` by its short name, `--config` any other.
Answers from all tokens are part of the same run, on the same frames.

WORKDIR/<benchmark>/           an evaluation: answers.jsonl (every question),
                               results.json, report.html, frames.jsonl
WORKDIR/results.json           all of them, averages, drift, what is reproduced
WORKDIR/table.md, table.csv    a row per method and ratio, the paper's beside it
WORKDIR/accuracy.png           averages over the ratio
WORKDIR/timings.json           times and host facts

Stopped and given again, it goes on where it was, to the same bytes. Several
processes share the work by `--table_shard=0/4`, `1/4`, ...; the last one to
end writes the table. `--table_manifests=OTHER_WORKDIR` shows the frames of
another table. A row is called reproduced only if it lies within `--tolerance`
points of the paper's, and the answers from all tokens do, too.
"""

import dataclasses
import json
import os
import pathlib
import types
from collections.abc import Mapping, Sequence
from typing import Any

import rich.console
import rich.table
from absl import flags

from cacovid_jax import compressors, errors
from cacovid_jax import config as config_lib
from cacovid_jax.data import readers
from cacovid_jax.evals import (
  benchmarks,
  combined,
  drift,
  evaluation,
  frame_manifest,
  paper,
  results,
  runner,
  shards,
)
from cacovid_jax.models import checkpoints
from experiments import (
  main_table_files,
  paper_rows,
  table_estimate,
  table_flags,
)

BASES = types.MappingProxyType(
  {
    "ov7b": "configs/llava_onevision_7b.py",
    "ov0.5b": "configs/llava_onevision_0_5b.py",
    "qwen3b": "configs/qwen2_5_vl_3b.py",
    "qwen7b": "configs/qwen2_5_vl_7b.py",
  }
)

config_lib.define_flag()
_BASE = flags.DEFINE_enum(
  "base", None, list(BASES), "Config of a released model."
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
  "tolerance", drift.TOLERANCE, "Points between two runs of the same thing."
)
_FRAMES = flags.DEFINE_integer(
  "table_frames", None, "Frames per clip; the config's, or 32.", lower_bound=1
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
_DRY_RUN = flags.DEFINE_bool(
  "dry_run", False, "Say what the table would take, and end."
)
_TFLOPS = flags.DEFINE_float(
  "table_tflops", None, "Speed for --dry_run; measured on this device else."
)
_GBPS = flags.DEFINE_float(
  "table_gbps", None, "Memory speed for --dry_run; measured likewise."
)
_CHIPS = flags.DEFINE_integer(
  "table_chips", 1, "Devices that share one model, for --dry_run's memory.",
  lower_bound=1,
)  # fmt: skip
_PAPER_ROWS = flags.DEFINE_bool(
  "paper_rows", False, "Print the README's table and end."
)


def main(argv):
  """Makes the table that the flags describe."""
  if len(argv) > 1:
    raise errors.UserError(f"unknown argument {argv[1]!r}; flags begin with --")
  if _PAPER_ROWS.value:
    print(paper_rows.markdown())
    return
  plan = plan_from_flags()
  if _DRY_RUN.value:
    dry_run(plan)
    return
  test = preflight(plan)
  if run(plan, test) is None:
    print("this share is done; the last process to end writes the table")
    return
  print((plan.workdir / "table.md").read_text(encoding="utf-8"))
  for name in main_table_files.NAMES:
    print(os.path.join(plan.workdir, name))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
  """What to make.

  Attributes:
    workdir: of the table.
    requests: benchmark -> its evaluation.
    tolerance: points between two runs of the same thing.
  """

  workdir: pathlib.Path
  requests: Mapping[str, evaluation.Request]
  tolerance: float = drift.TOLERANCE

  @property
  def first(self) -> evaluation.Request:
    """The evaluation of one benchmark; in most fields all are alike."""
    return next(iter(self.requests.values()))

  @property
  def methods(self) -> list[runner.Method]:
    return [runner.Method.parse(spec) for spec in self.first.methods]


def dry_run(plan: Plan) -> dict[str, Any]:
  """Prints what a plan would take, and returns it; reads no weights."""
  request = plan.first
  checkpoint = table_estimate.describe(
    request.checkpoint, _BASE.value, request.dtype
  )
  loaded, _ = survey(plan)
  speed = table_estimate.speed_of(_TFLOPS.value, _GBPS.value, request.dtype)
  out = table_estimate.estimate(
    checkpoint, plan.requests, loaded, speed, model_shards=_CHIPS.value
  )
  ratios = ", ".join(f"{ratio:g}" for ratio in request.ratios)
  title = f"{len(plan.methods)} methods at ratios {ratios}, {request.dtype}"
  table_estimate.show(out, speed, title)
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
      BASES[_BASE.value], flags.FLAGS.config_override or []
    )
  elif flags.FLAGS.config:
    config = config_lib.from_flags()
  else:
    config = None
  model = table_flags.MODEL.value
  fields = {"num_frames": paper.NUM_FRAMES}
  fields |= evaluation.request_fields(config)
  methods = table_flags.METHODS.value or (
    paper.METHODS if config is None else fields["methods"]
  )
  if list(methods) == ["all"]:
    methods = all_rows()
  if _FRAMES.value:
    fields["num_frames"] = _FRAMES.value
  if model:
    fields["checkpoint"] = model
  if not fields.get("checkpoint") and not (_BASE.value and _DRY_RUN.value):
    raise errors.UserError("nothing says which base model: add --table_model")
  fields.setdefault("checkpoint", "")
  if _CACHE.value:
    fields["cache"] = _CACHE.value
  if table_flags.POLICY.value:
    fields["policies"] = {"policy": table_flags.POLICY.value}
  name = _BASE.value or "table"
  return make_plan(
    fields,
    table_flags.WORKDIR.value or f"workdirs/main_table_{name}",
    _checked_benchmarks(_BENCHMARKS.value),
    _folders(table_flags.DATA.value, _FOLDERS.value, _BENCHMARKS.value),
    methods=methods,
    ratios=table_flags.ratios(paper.RATIOS),
    seeds=table_flags.seeds(),
    num_questions=_LIMIT.value,
    on_bad_row=_BAD_ROWS.value,
    on_missing=_MISSING.value,
    tolerance=_TOLERANCE.value,
    manifests=_MANIFESTS.value or "",
    shard=shards.Shard.parse(_SHARD.value),
    **table_flags.batch_size(),
  )


def make_plan(
  fields: Mapping[str, Any],
  workdir: str | os.PathLike,
  names: Sequence[str],
  folders: Mapping[str, str],
  *,
  methods: Sequence[str],
  tolerance: float = drift.TOLERANCE,
  manifests: str = "",
  **more,
) -> Plan:
  """Returns a plan.

  Args:
    fields: of `evaluation.Request`, such as a config's.
    workdir: of the table.
    names: benchmarks.
    folders: benchmark -> folder.
    methods: rows.
    tolerance: points.
    manifests: workdir of another table, whose frames are shown; "" for none.
    **more: fields that win over `fields`.
  """
  workdir = pathlib.Path(workdir)
  labels = [runner.split_label(spec)[0] for spec in methods]
  for spec in methods:
    method = runner.Method.parse(spec)
    if method.compressor.oracle:
      raise errors.UserError(
        f"{method.label} knows where the answer lies, which no benchmark tells;"
        " leave it out of --table_methods"
      )
    scored = [need for need in method.needs if need.endswith("scores")]
    if scored and not fields.get("policies") and not _DRY_RUN.value:
      raise errors.UserError(
        f"{method.label} needs a trained policy: add --table_policy=FILE, or"
        f" leave it out: --table_methods="
        f"{','.join(label for label in labels if 'cacovid' not in label)}"
      )
  common = dict(fields) | more | {
    "methods": tuple(methods),
    "oracles": (),
    # Benchmarks have no split to choose options on.
    "select_on": "none",
    "candidates": {},
    "prompt_style": "",
    "media": "",
    "split": "",
  }  # fmt: skip
  requests = {
    name: evaluation.Request(
      **common
      | {
        "benchmark": name,
        "data": folders[name],
        "workdir": os.fspath(workdir / name),
        "frame_manifest": (
          os.path.join(manifests, name, frame_manifest.FILE)
          if manifests
          else ""
        ),
      }
    )
    for name in names
  }
  return Plan(
    workdir=workdir,
    requests=requests,
    tolerance=drift.check_tolerance(tolerance),
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
    named[name] = folder
  if root is None and _DRY_RUN.value:
    root = ""  # What is not here is told by its published size.
  if root is None and any(name not in named for name in names):
    raise errors.UserError(
      "nothing says where the benchmarks lie: add --table_data=ROOT"
    )
  return {name: named.get(name) or os.path.join(root, name) for name in names}


def preflight(plan: Plan) -> dict[str, benchmarks.Benchmark]:
  """Returns the questions of every benchmark, and prints their counts.

  Raises:
    UserError: folders, files or clips are missing; names all of them.
  """
  found, faults = survey(plan)
  if not faults:
    return found
  ready = [name for name in plan.requests if name not in faults]
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
  are to be counted as wrong.
  """
  found, faults = {}, {}
  table = rich.table.Table(title="benchmarks")
  for title in ("benchmark", "questions", "clips", "missing", "left out"):
    table.add_column(title)
  for name, request in plan.requests.items():
    try:
      counted = dataclasses.replace(request, on_missing="count")
      loaded = evaluation.load_benchmark(
        counted, request.split, request.num_questions
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
    if missing and request.on_missing == "raise":
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
  for request in plan.requests.values():
    evaluation.evaluate(request)
  # A benchmark that another process still works on, or ended, is known by its
  # file alone.
  if not all(
    _is_complete(request, len(loaded[name].questions))
    for name, request in plan.requests.items()
  ):
    return None
  out = combine(plan, loaded)
  results.write_json(plan.workdir / "results.json", out)
  main_table_files.write(plan.workdir, out)
  times = {
    name: {
      path.name: json.loads(path.read_text(encoding="utf-8"))
      for path in sorted(pathlib.Path(request.workdir).glob("timings*.json"))
    }
    for name, request in plan.requests.items()
  }
  results.write_json(plan.workdir / "timings.json", times)
  return out


def _is_complete(request, num_questions) -> bool:
  """True if a benchmark's results.json holds all that is asked for."""
  path = pathlib.Path(request.workdir, "results.json")
  if not path.is_file():
    return False
  out = json.loads(path.read_text(encoding="utf-8"))
  keys = set(map(results.ratio_key, request.ratios))
  labels = [runner.split_label(spec)[0] for spec in request.methods]
  return (
    out["vanilla"]["n"] == num_questions
    and out["seeds"] == list(request.seeds)
    and all(keys <= set(out["methods"].get(label, ())) for label in labels)
  )


def combine(
  plan: Plan, loaded: Mapping[str, benchmarks.Benchmark]
) -> dict[str, Any]:
  """Returns results.json of the table from those of its benchmarks."""
  request, methods = plan.first, plan.methods
  parts = [
    combined.read_part(
      name,
      each.workdir,
      loaded[name].questions,
      methods,
      each.ratios,
      each.seeds,
      seed=number,
    )
    for number, (name, each) in enumerate(plan.requests.items())
  ]
  average = combined.average(parts, methods, request.ratios)
  model = paper.model_of(checkpoints.load_config(request.checkpoint))
  absent = [name for name in paper.BENCHMARKS if name not in plan.requests]
  own = _per_cent(average["vanilla"], absent)
  found = drift.vanilla(model, own, plan.tolerance)
  obstacles = _obstacles(plan, parts, absent)
  average["vanilla"]["reproduced"] = drift.reproduced(
    found, paper.row(model, paper.VANILLA, 1.0), own, obstacles
  )
  for method in methods:
    for ratio in request.ratios:
      cell = average["methods"][method.label][results.ratio_key(ratio)]
      row = None
      if paper.is_method(
        method.label, method.compressor.name, method.compressor.options
      ):
        row = paper.row(model, method.label, ratio)
      cell["paper"] = row.reported() if row else None
      if cell["status"] == "ok":
        cell["reproduced"] = drift.reproduced(
          found, row, _per_cent(cell, absent), obstacles
        )
  return {
    "schema": results.SCHEMA,
    "model": model and paper.MODELS[model].name,
    "absent": absent,
    "average": average,
    "benchmarks": {part.name: part.out for part in parts},
    "drift": found,
    "ratios": [results.ratio_key(ratio) for ratio in request.ratios],
    "seeds": list(request.seeds),
    "provenance": {
      key: parts[0].out["provenance"][key]
      for key in ("checkpoint", "decoder", "git_commit", "packages",
                  "policies", "python")
    },
  }  # fmt: skip


def _per_cent(row, absent) -> dict[str, float]:
  """Returns a row's accuracies as the paper has them, by column."""
  found = {name: 100 * value for name, value in row["columns"].items()}
  if not absent:
    found[paper.AVERAGE] = 100 * row["accuracy"]
  return found


def _obstacles(plan, parts, absent) -> list[str]:
  """Returns what makes a comparison with the paper void, in words."""
  request, found = plan.first, []
  if absent:
    titles = ", ".join(paper.BENCHMARKS[name][0] for name in absent)
    found.append(f"not asked: {titles}")
  for part in parts:
    title, expected = paper.BENCHMARKS[part.name]
    asked = len(part.questions)
    # Copies of one benchmark differ in a row or two.
    if asked < 0.99 * expected:
      found.append(f"{asked} of {expected} questions of {title}")
    lost = sum(entry["questions"] for entry in part.out["unreadable"])
    if lost > 0.01 * asked:
      found.append(f"clips of {lost} questions of {title} cannot be used")
  if request.num_frames != paper.NUM_FRAMES:
    found.append(f"{request.num_frames} frames instead of {paper.NUM_FRAMES}")
  if request.max_new_tokens:
    found.append(f"answers of at most {request.max_new_tokens} tokens")
  if request.rule != paper.RULE:
    found.append(f"letters taken by the rule {request.rule}")
  return found


if __name__ == "__main__":
  errors.run(main)
