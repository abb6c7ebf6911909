r"""What compression costs and what it saves: the paper's table, and stages.

python -m experiments.efficiency_table --size=ov-7b --peers=transformers,twin
python -m experiments.efficiency_table --size=ov-7b --methods=   # stages alone
python -m experiments.efficiency_table --size=tiny     # on a CPU
python -m experiments.efficiency_table ... --dry_run   # what it would take

Times one prompt about one video on this device: the tower, the prefill of all
tokens, and for every method the choice of its tokens and the prefill of what is
left, up to the first token of the answer. Then `--stages`, by our programs and
by `--peers` in PyTorch on the same weights: load (weights to the device, beside
a plain read of their files), clip (a file's frames to pixels), tower (with
projector and pooling), scores of the policy, select (with scores and gather),
prefill, first token, decode (a token), rollout (32 prompts of a training) and
train (a video at a fixed ratio; train_adaptive at one that grows),
beside what their operations or bytes take at the device's speed, measured in
the same run unless --tflops and --gbps say it. Medians of `--repeats` runs.
Weights are random, drawn once into `--weights`: times do not depend on their
values, but for methods whose work depends on the video (FrameFusion).

WORKDIR/table.md, table.csv   a row per method and ratio, the paper's beside it
WORKDIR/prefill.svg           milliseconds to the first token, by part
WORKDIR/results.json          all of it, with shapes, dtype, device, versions
WORKDIR/stages.md, stages.json, stages.svg   stages, ours beside the peers
WORKDIR/rows.jsonl            every time as it is measured

Given again, it measures what rows.jsonl lacks and what could not be run; times
of another size, device or version are refused.

Operations and cache are counted, not measured (`evals.cost`). A method inside
the language model chooses and prefills in one program: its choice is the time
beyond prefilling as many tokens chosen before it. What a tower hands out
beside its features (attention, keys) is not timed. Peers choose by a plain
top-k and do not train.
"""

import functools
import math
import pathlib
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from cacovid_jax import command, errors, evaluate, files, terminal
from cacovid_jax.data import answer_log
from cacovid_jax.evals import (
  cost,
  estimate,
  latency,
  paper,
  provenance,
  results,
  tables,
)
from cacovid_jax.inference import methods as methods_lib
from cacovid_jax.models import (
  checkpoints,
  llava_onevision,
  qwen2_5_vl,
  qwen3_vl,
)
from configs import llava_onevision as training_config
from experiments import made_up, reporting, stages

_LLAVA = llava_onevision.LlavaOnevisionConfig
_QWEN = qwen2_5_vl.Qwen2_5VLConfig
_QWEN3 = qwen3_vl.Qwen3VLConfig
ROWS = "rows.jsonl"


class Size(NamedTuple):
  """A model and a video to time."""

  config: Any  # Makes the base model's config.
  grid: tuple[int, int, int]  # (T, H, W) of the video's tokens.
  dtype: str = "bfloat16"  # Of weights and computation.
  paper: str = ""  # Key of `paper.MODELS` whose times stand beside, or "".
  training: str = ""  # Argument of the config whose training is timed, or "".


# 32 frames; Qwen joins two of them, and a 16:9 clip has 12 x 21 tokens within
# the paper's 256 of a slice.
SIZES = {
  "ov-7b": Size(
    _LLAVA.llava_onevision_7b, (32, 14, 14), "bfloat16", "ov7b", "size=7b"
  ),
  "ov-0.5b": Size(
    _LLAVA.llava_onevision_0_5b, (32, 14, 14), training="size=0_5b"
  ),
  "qwen-3b": Size(_QWEN.qwen2_5_vl_3b, (16, 12, 21)),
  "qwen-7b": Size(_QWEN.qwen2_5_vl_7b, (16, 12, 21)),
  "qwen3-2b": Size(functools.partial(_QWEN3.released, "2b"), (16, 12, 21)),
  "qwen3-8b": Size(functools.partial(_QWEN3.released, "8b"), (16, 12, 21)),
  "tiny": Size(_LLAVA.tiny, (8, 4, 4), "float32", training="debug"),
  "qwen-tiny": Size(_QWEN.tiny, (4, 4, 6), "float32"),
  "qwen3-tiny": Size(_QWEN3.tiny, (4, 4, 6), "float32"),
}
# Rows beside the methods, by label.
VARIANTS = {
  "framefusion_bucketed": "framefusion?mode=bucketed",
  "prunevid_llm": "prunevid?llm_stage=True",
}

COMMAND = command.Command(
  __doc__,
  evaluate.flags("workdir", "methods", "ratios")
  | command.aliases(
    "table",
    size=command.Flag("Model and video.", choices=[*SIZES], old=["table_size"]),
    weights=command.Flag(
      "Folder of random weights; below --workdir if empty.", old=["weights_dir"]
    ),
  )
  | {
    "repeats": latency.REPEATS,
    "stages": command.Flag("Stages that are timed.", default=(*stages.STAGES,)),
    "kept": command.Flag(
      "Shares of tokens that stages are timed at.",
      default=(1.0, 0.25, 0.2, 0.15, 0.1),
    ),
  }
  | stages.PEERS
  | estimate.FLAGS,
  defaults={
    "evals.methods": tuple(
      s for s in tables.all_rows(VARIANTS) if s not in made_up.UNTRAINED
    ),
    "evals.ratios": (0.25,),
  },
)


def main(args):
  """Measures the table that the command line describes."""
  evals, table = args.config.evals, args.config.table
  ratios = results.check_ratios(evals.ratios)
  methods = [methods_lib.Method.parse(spec) for spec in evals.methods]
  labels = [method.label for method in methods]
  for method in methods:
    if method.compressor.oracle:
      raise errors.UserError(
        f"{method.label} knows where the answer lies; it is no row of a table"
        " of times"
      )
    if labels.count(method.label) > 1:
      raise errors.UserError(f"--methods lists {method.label} twice")
  name, repeats = table.size, table.repeats
  told = f"config.table.size={name}: use {' or '.join(SIZES)}"
  errors.check(name in SIZES, told)
  errors.check(
    {*args.stages} <= {*stages.STAGES},
    f"--stages={','.join(args.stages)}: choose of {', '.join(stages.STAGES)}",
  )
  args.kept = results.check_ratios(args.kept)
  if args.dry_run:
    dry_run(table, methods, ratios)
    return
  peers = stages.load_peers(args, SIZES[name].config())
  workdir = pathlib.Path(args.workdir or f"workdirs/efficiency_{name}")
  float8 = args.config.model.float8_tower
  with reporting.ledger(workdir / ROWS, run_of(name, repeats, float8)) as rows:
    size, weights = SIZES[name], table.weights or workdir / "weights"
    checkpoint = made_up.checkpoint(size.config(), size.dtype, weights, float8)
    subject = made_up.subject(checkpoint, size.grid)
    out = measure(subject, name, methods, ratios, repeats, rows)
    files.write_json(workdir / "results.json", out)
    tables.write_efficiency(workdir, out)
    terminal.tell(tables.efficiency_markdown(out))
    if args.stages:
      measure_stages(args, subject, peers, workdir, rows)
  reporting.files(workdir, (*tables.EFFICIENCY_FILES, "results.json"))


def measure_stages(args, subject, peers, workdir, rows) -> None:
  """Times the stages of the command line and writes `stages.FILES`."""
  table, size = args.config.table, SIZES[args.config.table.size]
  training = size.training and training_config.get_config(size.training)
  engines = {
    stages.OURS: functools.partial(
      stages.Ours, subject, workdir=workdir / "stages", training=training
    )
  }
  for name, make in peers.items():
    engines[name] = functools.partial(make, subject)
  speed = estimate.speed_of(table, size.dtype)
  limit = stages.limits(subject, speed, training)
  cells = stages.cells(args.stages, args.kept)
  found = stages.measure(engines, cells, rows, table.repeats, limit)
  facts = run_of(table.size, table.repeats, args.config.model.float8_tower)
  facts |= {"speed": speed._asdict()}
  stages.write(workdir, found, facts)


def run_of(name: str, repeats: int, float8: bool = False) -> dict[str, Any]:
  """Returns what the times in a ledger depend on, besides the code's commit."""
  size = SIZES[name]
  return {
    "device": provenance.device_kind(),
    "dtype": size.dtype,
    "grid": list(size.grid),
    "packages": provenance.packages(),
    "repeats": repeats,
    "seed": made_up.SEED,
    "size": name,
  } | ({"float8_tower": True} if float8 else {})


def dry_run(table, methods, ratios) -> dict[str, Any]:
  """Prints what a table would take, and returns it; draws no weights."""
  size = SIZES[table.size]
  speed = estimate.speed_of(table, size.dtype)
  config = size.config()
  text, grid = config.text, size.grid
  outside = made_up.rows_beside(checkpoints.make_model(config), grid)
  rows = []
  for cell in _cells(methods, ratios):
    compressor = cell.method and cell.method.compressor
    row = {"method": cell.label, "ratio": cell.ratio, "status": "ok"}
    rows.append(row)
    if not estimate.able(compressor, text.num_layers, grid, cell.ratio):
      row["status"] = "cannot be run at this ratio"
      continue
    kept = cost.computed_rows(compressor, text.num_layers, grid, cell.ratio)
    row |= _counts(text, kept, outside, size.dtype)
    row["prefill_ms"] = 1e3 * speed.seconds(1e12 * row["prefill_tflops"])
  memory = cost.memory(
    config,
    grid=grid,
    prompt_rows=math.prod(grid) + outside,
    new_tokens=1,
    batch=1,
    dtype=size.dtype,
    policy=estimate.policy_of(text, methods),
  )
  tower = speed.seconds(cost.tower_flops(config, grid))
  each = tower + sum(row.get("prefill_ms", 0.0) for row in rows) / 1e3
  out = {
    "rows": rows,
    # And the tower's.
    "programs": 1
    + estimate.num_programs(methods, ratios, text.num_layers, grid),
    # As bfloat16, whatever the computation's type.
    "disk_bytes": cost.weight_bytes(config, "bfloat16"),
    "seconds": (1 + table.repeats) * each,
  }
  names = "method", "ratio", "status", "prefill_tflops", "prefill_ms", "kv_mib"
  reporting.table(
    ("method", "ratio", "", "TFLOP", "ms", "cache MiB"),
    [[row.get(name, "") for name in names] for row in rows],
    f"{table.size}, prefills, as counted",
  )
  print(
    f"weights {out['disk_bytes'] / 1e9:.3g} GB on disk, memory of the device"
    f" {memory.total / 2**30:.2f} GiB, {out['programs']} programs to compile,"
    f" runs {out['seconds']:.3g} s without choosing tokens and compiling, at"
    f" {speed.flops / 1e12:.4g} TFLOP/s (--tflops)"
  )
  return out


def _cells(methods, ratios) -> list[methods_lib.Condition]:
  """Returns all rows, the one that keeps all tokens first."""
  cells = [methods_lib.Condition(m, ratio) for ratio in ratios for m in methods]
  return [methods_lib.Condition(), *cells]


def _counts(text, kept, outside, dtype) -> dict[str, float]:
  """Returns operations and cache of a prefill, of the video rows by layer."""
  layers = [count + outside for count in kept]
  return {
    "prefill_tflops": cost.prefill_flops(text, layers) / 1e12,
    "kv_mib": cost.kv_bytes(text, layers, dtype) / 2**20,
  }


def measure(subject, name, methods, ratios, repeats, rows):
  """Returns results.json as a dict: facts, and one row per method and ratio.

  Of what `made_up.subject` gives; times go to `rows`, an `AnswerLog`.
  """
  model, grid, size = subject.checkpoint.model, subject.grid, SIZES[name]
  watch = latency.Stopwatch(subject, repeats)

  def once(what, function):  # Of what all rows share.
    key = answer_log.Key(what, 1.0, 0, "prompt")
    return reporting.once(rows, key, function)

  weights = {"sha256": subject.checkpoint.identity["sha256"]}
  if once("weights", lambda: weights)["sha256"] != weights["sha256"]:
    raise errors.UserError(
      "these are not the weights that earlier rows were measured with; give"
      " those by --weights, or another --workdir"
    )
  shared = {
    f"{part}_ms": once(part, lambda f=run: {"ms": f()})["ms"]
    for part, run in (
      ("tower", watch.tower),
      ("embed", watch.embed),
    )
  }

  found = []
  for cell in _cells(methods, ratios):
    row = {"method": cell.label, "ratio": cell.ratio, "status": "ok"}
    try:
      row |= _timed(watch, subject, cell, rows, sum(shared.values()))
    except errors.UserError as error:
      row["status"] = errors.one_line(error)
    if size.paper == paper.EFFICIENCY_MODEL:
      row |= _reported(cell.method, cell.ratio)
    found.append(row)
  return {
    "schema": results.SCHEMA,
    "size": name,
    "checkpoint": {"size": name, "seed": made_up.SEED, **weights},
    "dtype": str(jnp.dtype(model.dtype)),
    "grid": list(grid),
    "prompt_rows": subject.batch.x.shape[1],
    "repeats": repeats,
    "host": provenance.host(),
    "packages": provenance.packages(),
    # Of the code that measured; a table that went on may have several.
    "git_commits": sorted(
      {entry["git_commit"] for entry in found if "git_commit" in entry}
    ),
    "paper": paper.EFFICIENCY_SOURCE if size.paper else None,
    **shared,
    "tower_tflops": cost.tower_flops(model.config, grid) / 1e12,
    "rows": found,
  }


def _timed(watch, subject, cell, rows, shared_ms) -> dict[str, Any]:
  """Returns the columns of a row: what is measured, sums of it, and counts."""
  compressor = cell.method and cell.method.compressor
  model, grid = subject.checkpoint.model, subject.grid

  def measured():
    rule, reads, prefill, _ = watch.cost(cell.method, cell.ratio)
    return {"rule_ms": rule, "reads_ms": reads, "prefill_ms": prefill}

  times = reporting.once(rows, cell.key("prompt"), measured)
  compression = times["rule_ms"] + times["reads_ms"]
  both = compression + times["prefill_ms"]
  text = model.config.text
  outside = subject.batch.x.shape[1] - math.prod(grid)
  kept = cost.video_rows(compressor, text.num_layers, grid, cell.ratio)
  note = getattr(compressor, "note", "")
  return {
    **times,
    "kept_tokens": round(float(np.mean(kept)), 2),
    "compression_ms": round(compression, 4),
    **_counts(text, kept, outside, model.dtype),
    "total_ms": round(both, 4),
    "first_token_ms": round(both + shared_ms, 4),
    **({"note": note} if note else {}),
  }


def _reported(method, ratio) -> dict[str, float]:
  """Returns the paper's times of a method; None is answering from all."""
  if method is None:
    return {"paper_prefill_ms": paper.VANILLA_PREFILL_MS}
  known = paper.COMPRESSION_MS.get(method.label)
  if (
    not known or ratio != paper.EFFICIENCY_RATIO or not paper.is_method(method)
  ):
    return {}
  return {"paper_compression_ms": known, "paper_prefill_ms": paper.PREFILL_MS}


if __name__ == "__main__":
  COMMAND.run(main)
