"""What a main table would take, before a weight is read.

Rows, tokens, operations, memory, programs, time and disk, from the questions,
the base model's config and its tokenizer alone. Without a tokenizer, text is
taken to be a token per four bytes; without a benchmark's folder, its published
number of questions is taken, each about a clip of its own. Answers are taken to
be a letter and an end. Choosing tokens (but for what the policy computes),
decoding video and the host's work are not in the time.
"""

import collections
import functools
import itertools
import math
import os
import pathlib
import types
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import rich.table

from cacovid_jax import command, errors, terminal
from cacovid_jax import config as config_lib
from cacovid_jax import experiment as experiment_lib
from cacovid_jax.compressors import base
from cacovid_jax.data import readers
from cacovid_jax.data import tokenizer as tokenizer_lib
from cacovid_jax.evals import benchmarks, cost, evaluation, paper
from cacovid_jax.inference import clip_queue
from cacovid_jax.inference import methods as methods_lib
from cacovid_jax.inference import prompts as prompts_lib
from cacovid_jax.models import (
  checkpoints,
  hub,
  llava_onevision,
  qwen2_5_vl,
  qwen3_vl,
)
from cacovid_jax.policy import network

FLAGS = types.MappingProxyType({
  "dry_run": command.Flag(
    "Say what the table would take, and end.", default=False
  ),
  "tflops": command.Flag("TFLOP/s for --dry_run; measured on this device else.",
                         "table.tflops", old=("table_tflops",)),
  "gbps": command.Flag("GB/s of memory for --dry_run; measured likewise.",
                       "table.gbps", old=("table_gbps",)),
})  # fmt: skip
_LLAVA = llava_onevision.LlavaOnevisionConfig
_QWEN = qwen2_5_vl.Qwen2_5VLConfig
_QWEN3 = qwen3_vl.Qwen3VLConfig
# Folder that a released model's config names -> what lies there.
RELEASED = types.MappingProxyType({
  "llava_onevision_7b": _LLAVA.llava_onevision_7b,
  "llava_onevision_0_5b": _LLAVA.llava_onevision_0_5b,
  "qwen2_5_vl_3b": _QWEN.qwen2_5_vl_3b,
  "qwen2_5_vl_7b": _QWEN.qwen2_5_vl_7b,
  **{
    f"qwen3_vl_{size}": functools.partial(_QWEN3.released, size)
    for size in qwen3_vl.SIZES
  },
})  # fmt: skip
_BYTES_PER_TOKEN = 4
_TEMPLATE_TOKENS = 30
# Of a question whose benchmark is not here.
_TEXT_TOKENS = 150
# Rows and columns of a 16:9 frame within the paper's 256 tokens of a slice.
_QWEN_SLICE = (12, 21)
_ANSWER_TOKENS = 2  # A letter, and the end.


class Asked(NamedTuple):
  """Questions of one benchmark about clips of one grid."""

  grid: tuple[int, int, int]  # (T, H, W).
  texts: np.ndarray  # int[Q] rows of each prompt that are not of the video.
  longest: int  # Rows that each prompt is padded to, less those of the video.
  num_clips: int  # That they are about.


def without_weights(
  experiment: experiment_lib.Experiment, *, published: bool = True
) -> experiment_lib.Experiment:
  """Returns the experiment with a base model that has no weights.

  With `published`, a folder that is not there is the released model so called.
  """
  path, tokenizer = experiment.config.model.path, None
  # A released one need not be anywhere.
  name, directory = pathlib.PurePath(path).name, hub.find(path)
  if os.path.isfile(os.path.join(directory, "config.json")):
    config = checkpoints.load_config(directory)
    if os.path.isfile(os.path.join(directory, "tokenizer.json")):
      tokenizer = tokenizer_lib.Tokenizer.from_directory(directory)
  elif published and name in RELEASED:
    config = RELEASED[name]()
  else:
    hub.directory(directory)  # Says more of a name.
    raise errors.UserError(
      f"there is no config.json in {directory or 'no folder at all'}; give the"
      " base model by --model, or a released one's config by --config"
    )
  model = checkpoints.make_model(config, experiment.config.model.dtype)
  found = checkpoints.Checkpoint(
    model=experiment_lib.with_options(model, experiment.config.model),
    params=None,
    tokenizer=tokenizer,
    identity={"path": directory, "sha256": ""},
    eos_ids=(),
    pad_id=0,
  )
  # Without a tokenizer there is no template to take.
  changes = {} if tokenizer else {"evals.template": ""}
  return experiment_lib.Experiment.from_config(
    config_lib.replace(experiment.config, changes),
    experiment.workdir,
    shard=experiment.shard,
    split=experiment.split,
    checkpoint=found,
  )


def _asked(experiment, loaded) -> list[Asked]:
  """Returns the questions of a benchmark by the grid of their clips."""
  checkpoint, evals = experiment.checkpoint, experiment.config.evals
  if loaded is None:
    count = paper.BENCHMARKS[evals.benchmark][1]
    count = min(count, evals.num_questions or count)
    grid = _assumed_grid(experiment)
    return [Asked(grid, np.full(count, _TEXT_TOKENS), _TEXT_TOKENS, count)]
  by_grid = collections.defaultdict(list)
  grids = _grids(experiment, loaded)
  for question in loaded.questions:
    by_grid[grids[question.video]].append(question)
  if checkpoint.tokenizer:
    rows = prompts_lib.Prompts(
      checkpoint, loaded.questions, grid_of=lambda q: grids[q.video],
      drop_empty_frames=evals.empty_frames == "drop",
    ).text_rows  # fmt: skip
  else:
    rows = {
      q.id: math.ceil(len(q.prompt.encode()) / _BYTES_PER_TOKEN)
      + _TEMPLATE_TOKENS
      for q in loaded.questions
    }
  found = []
  for grid, questions in by_grid.items():
    lengths = [rows[question.id] for question in questions]
    # With a tokenizer, prompts of all grids are padded alike.
    longest = max(rows.values() if checkpoint.tokenizer else lengths)
    num_clips = len({question.video for question in questions})
    found.append(Asked(grid, np.array(lengths), longest, num_clips))
  return found


def _grids(experiment, loaded) -> dict[str, tuple[int, int, int]]:
  """Returns clip -> grid; frames of Qwen2.5-VL are looked at for it."""
  paths = list(dict.fromkeys(question.video for question in loaded.questions))
  checkpoint = experiment.checkpoint
  model, path = checkpoint.model, checkpoint.identity["path"]
  known = os.path.isfile(os.path.join(path, "config.json"))
  missing = readers.find_missing(paths, loaded.root)
  if model.processor.one_grid or not known or len(missing) == len(paths):
    return dict.fromkeys(paths, _assumed_grid(experiment))
  bare = experiment.replace({"data.feature_cache": ""})
  with clip_queue.open_queue(bare) as source:
    source.survey(paths)
    return {path: tuple(source.grid_of(path)) for path in paths}


def _assumed_grid(experiment) -> tuple[int, int, int]:
  processor = experiment.checkpoint.model.processor
  num_frames = experiment.config.data.num_frames
  if fixed := processor.fixed_grid(num_frames):
    return fixed
  return (-(-num_frames // processor.temporal_patch_size), *_QWEN_SLICE)


def estimate(
  experiments: Mapping[str, experiment_lib.Experiment],
  loaded: Mapping[str, benchmarks.Benchmark],
  speed: cost.Speed,
  data_shards: int = 1,
) -> dict[str, Any]:
  """Returns what a table takes, by benchmark, and the memory of a device.

  By benchmark are its evaluation, see `without_weights`, and its questions
  where they are here. The devices of config.mesh.model share one model;
  `data_shards` of such groups share the questions of a batch.
  """
  found, memory = {}, []
  for name, experiment in experiments.items():
    config, model = experiment.config, experiment.checkpoint.model.config
    methods = [methods_lib.Method.parse(spec) for spec in config.evals.methods]
    parts = _asked(experiment, loaded.get(name))
    taken = [_part(model, config, methods, part, speed) for part in parts]
    found[name] = _sum(taken) | {"published": name not in loaded}
    settings = evaluation.settings(experiment)
    memory += [
      cost.memory(
        model,
        grid=part.grid,
        prompt_rows=part.longest + math.prod(part.grid),
        new_tokens=settings.max_new_tokens,
        batch=math.ceil(settings.batch_size / data_shards),
        dtype=config.model.dtype,
        policy=policy_of(model.text, methods),
        model_shards=config.mesh.model,
      )
      for part in parts
    ]
  largest = max(memory, key=lambda one: one.total)
  return {
    "benchmarks": found,
    "memory": {**largest._asdict(), "total": largest.total},
    "total": _sum(list(found.values())),
  }


def policy_of(text, methods) -> network.PolicyConfig | None:
  """Returns the paper's policy, if a method reads one's scores."""
  if not _score_sets(methods):
    return None
  return network.PolicyConfig(llm=text, num_halvings=num_halvings(text))


def num_halvings(text) -> int:
  """Returns the paper's number of hidden layers, or what the width allows."""
  return min(4, text.hidden_size.bit_length() - 2)


def _score_sets(methods) -> set[str]:
  """Returns which scores methods read; all but "scores" anew for each seed."""
  needs = frozenset().union(*[method.needs for method in methods])
  return {need for need in needs if need.endswith("scores")}


def _part(model, config, methods, part: Asked, speed) -> dict[str, Any]:
  """Returns what one `Asked` takes; model is the base model's config."""
  evals, text, num_video = config.evals, model.text, math.prod(part.grid)
  count, outside = len(part.texts), part.longest
  # Video rows by layer of each thing that is asked: mean seen, and computed.
  seen, computed = [], []
  for cell in methods_lib.conditions(methods, evals.ratios, evals.seeds):
    compressor = cell.method and cell.method.compressor
    given = compressor, text.num_layers, part.grid, cell.ratio
    if able(*given):
      seen.append(np.mean(cost.video_rows(*given)))
      computed.append(cost.computed_rows(*given))
  per_question = 0
  for rows in computed:
    padded = [kept + outside for kept in rows]
    per_question += cost.prefill_flops(text, padded)
    per_question += (_ANSWER_TOKENS - 1) * cost.decode_flops(text, padded)
  if policy := policy_of(text, methods):
    scored = cost.policy_flops(policy, num_video + outside, part.grid)
    for need in _score_sets(methods):
      per_question += scored * (1 if need == "scores" else len(evals.seeds))
  # Attention and keys of the tower come from a second run of it.
  signals = bool(methods_lib.wanted(methods))
  tower = (1 + signals) * part.num_clips * cost.tower_flops(model, part.grid)
  batches = -(-count // evals.batch_size)
  flops = batches * evals.batch_size * per_question + tower
  steps = batches * len(seen) * (_ANSWER_TOKENS - 1)
  weights = cost.weight_bytes(model, config.model.dtype)
  programs = num_programs(methods, evals.ratios, text.num_layers, part.grid)
  features = cost.feature_bytes(model, part.grid, signals)
  return {
    "questions": count,
    "clips": part.num_clips,
    "answers": count * len(seen),
    "video_tokens": count * num_video,
    "llm_tokens": float(sum(part.texts.sum() + count * rows for rows in seen)),
    "programs": programs + 1 + signals,
    "flops": flops,
    "seconds": speed.seconds(flops, steps, weights),
    "feature_bytes": part.num_clips * features,
  }


def _sum(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
  keys = [key for key in parts[0] if key != "published"]
  return {key: sum(part[key] for part in parts) for key in keys}


def able(compressor, num_layers, grid, ratio) -> bool:
  """True if a method can be run at a ratio; None keeps everything."""
  if compressor is None:
    return True
  try:
    base.budget(grid, ratio)
    cost.video_rows(compressor, num_layers, grid, ratio)
  except errors.UserError:
    return False
  return True


def num_programs(
  methods: Sequence[methods_lib.Method],
  ratios: Sequence[float],
  num_layers: int,
  grid: cost.Grid,
) -> int:
  """Returns how many programs clips of one grid need beside the tower.

  Embedding and whole prompts; the question's text and the policy where they
  are read; a choice for every method and ratio; answers, one for every number
  of tokens kept; and one for both, of methods inside the model. On one GPU
  longer answers take one more for every number of tokens kept, to decode.
  """
  found = {"embedding", "whole prompt"}
  if any("text" in method.needs for method in methods):
    found.add("text")
  if _score_sets(methods):
    found.add("policy")
  for method, ratio in itertools.product(methods, ratios):
    compressor = method.compressor
    if able(compressor, num_layers, grid, ratio):
      if compressor.selects_first or not compressor.on_host:
        found.add((method.spec, ratio))
      if compressor.selects_first:
        found.add(compressor.rows(grid, ratio))
  return len(found)


def show(out: Mapping[str, Any], speed: cost.Speed, title: str) -> None:
  """Prints an estimate; LLM tokens are text and video through all layers."""
  console = terminal.Console(width=132)
  table = rich.table.Table(title=title)
  table.add_column(no_wrap=True)
  for head in ("questions", "clips", "answers", "video tokens", "LLM tokens",
               "programs", "PFLOP", "hours", "features GB"):  # fmt: skip
    table.add_column(head, justify="right")
  for name, row in {**out["benchmarks"], "all": out["total"]}.items():
    table.add_row(
      name + (" (published)" if row.get("published") else ""),
      *(str(row[key]) for key in ("questions", "clips", "answers")),
      *(_short(row[key]) for key in ("video_tokens", "llm_tokens")),
      str(row["programs"]),
      f"{row['flops'] / 1e15:.4g}",
      f"{row['seconds'] / 3600:.3g}",
      f"{row['feature_bytes'] / 1e9:.3g}",
    )
  console.print(table)
  sizes = [f"{n} {size / 2**30:.2f}" for n, size in out["memory"].items()]
  console.print(f"memory of a device in GiB: {', '.join(sizes)}")
  console.print(
    f"at {speed.flops / 1e12:.4g} TFLOP/s and {speed.bytes / 1e9:.4g} GB/s"
    f" (--tflops, --gbps); one process"
  )


def _short(count) -> str:
  """Returns a count as 12.3M."""
  for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
    if count >= size:
      return f"{count / size:.1f}{letter}"
  return f"{count:g}"


def speed_of(table, dtype) -> cost.Speed:
  """Returns the speed of config.table; what is not stated is measured here."""
  if None in (table.tflops, table.gbps):
    measured = cost.measure_speed(jnp.dtype(dtype))
  return cost.Speed(
    measured.flops if table.tflops is None else 1e12 * table.tflops,
    measured.bytes if table.gbps is None else 1e9 * table.gbps,
  )
