"""What a main table would take, before a weight is read.

Rows, tokens, operations, memory, programs, time and disk, from the questions,
the base model's config and its tokenizer alone. Without a tokenizer, text is
taken to be a token per four bytes; without a benchmark's folder, its published
number of questions is taken, each about a clip of its own. Answers are taken to
be a letter and an end. Choosing tokens (but for what the policy computes),
decoding video and the host's work are not in the time.
"""

import collections
import dataclasses
import math
import os
import types
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import rich.console
import rich.table

from cacovid_jax import config as config_lib
from cacovid_jax import errors
from cacovid_jax import experiment as experiment_lib
from cacovid_jax.compressors import base
from cacovid_jax.data import readers
from cacovid_jax.data import tokenizer as tokenizer_lib
from cacovid_jax.evals import (
  benchmarks,
  cost,
  evaluation,
  paper,
  prompting,
  runner,
)
from cacovid_jax.models import checkpoints, llava_onevision, qwen2_5_vl
from cacovid_jax.policy import network

RELEASED = types.MappingProxyType(
  {
    "ov7b": llava_onevision.LlavaOnevisionConfig.llava_onevision_7b,
    "ov0.5b": llava_onevision.LlavaOnevisionConfig.llava_onevision_0_5b,
    "qwen3b": qwen2_5_vl.Qwen2_5VLConfig.qwen2_5_vl_3b,
    "qwen7b": qwen2_5_vl.Qwen2_5VLConfig.qwen2_5_vl_7b,
  }
)
_BYTES_PER_TOKEN = 4
_TEMPLATE_TOKENS = 30
# Of a question whose benchmark is not here.
_TEXT_TOKENS = 150
# Rows and columns of a 16:9 frame within the paper's 256 tokens of a slice.
_QWEN_SLICE = (12, 21)
_ANSWER_TOKENS = 2  # A letter, and the end.


@dataclasses.dataclass(frozen=True, eq=False)
class Asked:
  """Questions of one benchmark about clips of one grid.

  Attributes:
    grid: (T, H, W).
    texts: int[Q] rows of each prompt that are not of the video.
    longest: rows that each prompt is padded to, less those of the video.
    num_clips: that they are about.
  """

  grid: tuple[int, int, int]
  texts: np.ndarray
  longest: int
  num_clips: int


def describe(
  directory: str, base_name: str | None, dtype, template: str = ""
) -> Any:
  """Returns a `Checkpoint` without weights.

  Args:
    directory: of the base model; its config and tokenizer are read.
    base_name: key of `RELEASED`, for a directory that is not there.
    dtype: of the computation.
    template: chat template that prompts are counted with, as in an experiment.
  """
  tokenizer = None
  if os.path.isfile(os.path.join(directory or "", "config.json")):
    config = checkpoints.load_config(directory)
    if os.path.isfile(os.path.join(directory, "tokenizer.json")):
      tokenizer = tokenizer_lib.Tokenizer.from_directory(directory)
  elif base_name:
    config = RELEASED[base_name]()
  else:
    raise errors.UserError(
      f"there is no config.json in {directory or 'no folder at all'}; give the"
      f" base model by --table_model, or one of --base={'|'.join(RELEASED)}"
    )
  found = checkpoints.Checkpoint(
    model=checkpoints.make_model(config, dtype),
    params=None,
    tokenizer=tokenizer,
    identity={"path": directory, "sha256": ""},
    eos_ids=(),
    pad_id=0,
  )
  if tokenizer is None:
    return found
  return experiment_lib.with_template(found, directory, template)


def asked(
  checkpoint: Any,
  experiment: experiment_lib.Experiment,
  loaded: benchmarks.Benchmark | None,
) -> list[Asked]:
  """Returns the questions of a benchmark by the grid of their clips."""
  model = checkpoint.model
  if loaded is None:
    count = paper.BENCHMARKS[experiment.evals.benchmark][1]
    count = min(count, experiment.evals.num_questions or count)
    grid = _assumed_grid(model, experiment.data.num_frames)
    return [Asked(grid, np.full(count, _TEXT_TOKENS), _TEXT_TOKENS, count)]
  by_grid = collections.defaultdict(list)
  grids = _grids(checkpoint, experiment, loaded)
  for question in loaded.questions:
    by_grid[grids[question.video]].append(question)
  texts = None
  if checkpoint.tokenizer:
    texts = prompting.Texts(checkpoint, loaded.questions)
  found = []
  for grid, questions in by_grid.items():
    num_video = math.prod(grid)
    if texts:
      lengths = [
        texts.prompt(question.id, grid).length - num_video
        for question in questions
      ]
      longest = texts.longest(grid)[0] - num_video
    else:
      lengths = [
        -(-len(question.prompt.encode()) // _BYTES_PER_TOKEN) + _TEMPLATE_TOKENS
        for question in questions
      ]
      longest = max(lengths)
    num_clips = len({question.video for question in questions})
    found.append(Asked(grid, np.array(lengths), longest, num_clips))
  return found


def _grids(checkpoint, experiment, loaded) -> dict[str, tuple[int, int, int]]:
  """Returns clip -> grid; frames of Qwen2.5-VL are looked at for it."""
  paths = list(dict.fromkeys(question.video for question in loaded.questions))
  model = checkpoint.model
  path = os.path.join(experiment.config.model.path, "config.json")
  known = os.path.isfile(path)
  missing = readers.check_media(loaded.questions, loaded.root)
  if model.processor.one_grid or not known or len(missing) == len(paths):
    grid = _assumed_grid(model, experiment.data.num_frames)
    return dict.fromkeys(paths, grid)
  bare = experiment_lib.Experiment.from_config(
    config_lib.replace(experiment.config, {"data.feature_cache": ""}),
    checkpoint=checkpoint,
  )
  with evaluation.open_source(bare) as source:
    source.survey(paths)
    return {path: tuple(source.grid_of(path)) for path in paths}


def _assumed_grid(model, num_frames) -> tuple[int, int, int]:
  if fixed := model.processor.fixed_grid(num_frames):
    return fixed
  slices = -(-num_frames // model.processor.temporal_patch_size)
  return (slices, *_QWEN_SLICE)


def estimate(
  checkpoint: Any,
  experiments: Mapping[str, experiment_lib.Experiment],
  loaded: Mapping[str, benchmarks.Benchmark],
  speed: cost.Speed,
  *,
  model_shards: int = 1,
) -> dict[str, Any]:
  """Returns what a table takes, by benchmark, and the memory of a device.

  Args:
    checkpoint: of `describe`.
    experiments: benchmark -> its evaluation.
    loaded: benchmark -> its questions, those that are here.
    speed: of the device.
    model_shards: devices that share one model, for the memory.
  """
  found, memory = {}, []
  for name, experiment in experiments.items():
    methods = [runner.Method.parse(spec) for spec in experiment.evals.methods]
    parts = asked(checkpoint, experiment, loaded.get(name))
    found[name] = _sum(
      [_part(checkpoint, experiment, methods, part, speed) for part in parts]
    )
    found[name]["published"] = name not in loaded
    settings = evaluation.settings(experiment)
    policy = policy_of(checkpoint.model.config.text, methods)
    memory += [
      cost.memory(
        checkpoint.model.config,
        grid=part.grid,
        prompt_rows=part.longest + math.prod(part.grid),
        new_tokens=settings.max_new_tokens,
        batch=experiment.evals.batch_size,
        dtype=experiment.config.model.dtype,
        policy=policy,
        model_shards=model_shards,
      )
      for part in parts
    ]
  largest = max(memory, key=lambda one: one.total)
  return {
    "benchmarks": found,
    "memory": {**dataclasses.asdict(largest), "total": largest.total},
    "total": _sum(list(found.values())),
  }


def policy_of(text, methods) -> network.PolicyConfig | None:
  """Returns the paper's policy, if a method reads one's scores."""
  if not any(_score_sets(method, 1) for method in methods):
    return None
  return network.PolicyConfig(llm=text, num_halvings=num_halvings(text))


def num_halvings(text) -> int:
  """Returns the paper's number of hidden layers, or what the width allows."""
  return min(4, text.hidden_size.bit_length() - 2)


def _score_sets(method, num_seeds) -> dict[str, int]:
  """Returns what scores a method reads, and how often anew."""
  return {
    need: 1 if need == "scores" else num_seeds
    for need in method.needs
    if need.endswith("scores")
  }


def _part(
  checkpoint, experiment, methods, part: Asked, speed
) -> dict[str, Any]:
  config = checkpoint.model.config
  text, num_video = config.text, math.prod(part.grid)
  count, outside = len(part.texts), part.longest
  # Video rows by layer of each thing that is asked: seen, and computed.
  seen, computed = [], []
  evals = experiment.evals
  for cell in runner.cells(methods, evals.ratios, evals.seeds):
    compressor = cell.method and cell.method.compressor
    given = compressor, text.num_layers, part.grid, cell.ratio
    if able(*given):
      seen.append(cost.video_rows(*given))
      computed.append(cost.computed_rows(*given))
  per_question = 0
  for rows in computed:
    padded = [kept + outside for kept in rows]
    per_question += cost.prefill_flops(text, padded)
    per_question += (_ANSWER_TOKENS - 1) * cost.decode_flops(text, padded)
  policy = policy_of(text, methods)
  if policy:
    sets = {}
    for method in methods:
      sets |= _score_sets(method, len(experiment.evals.seeds))
    per_question += sum(sets.values()) * cost.policy_flops(
      policy, num_video + outside, part.grid
    )
  # Attention and keys of the tower come from a second run of it.
  signals = bool(runner.wanted(methods))
  tower = (1 + signals) * part.num_clips
  batches = -(-count // experiment.evals.batch_size)
  flops = (
    batches * experiment.evals.batch_size * per_question
    + tower * cost.tower_flops(config, part.grid)
  )
  steps = batches * len(seen) * (_ANSWER_TOKENS - 1)
  ratios = experiment.evals.ratios
  own = num_programs(methods, ratios, text.num_layers, part.grid)
  weights = cost.weight_bytes(config, experiment.config.model.dtype)
  return {
    "questions": count,
    "clips": part.num_clips,
    "answers": count * len(seen),
    "video_tokens": count * num_video,
    "llm_tokens": float(
      sum(part.texts.sum() + count * np.mean(rows) for rows in seen)
    ),
    "programs": own + 1 + signals,
    "flops": flops,
    "seconds": speed.seconds(flops, steps, weights),
    "feature_bytes": part.num_clips
    * cost.feature_bytes(config, part.grid, signals),
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
  methods: Sequence[runner.Method],
  ratios: Sequence[float],
  num_layers: int,
  grid,
) -> int:
  """Returns how many programs clips of one grid need beside the tower.

  Embedding and whole prompts; the question's text and the policy where a
  method reads them; a choice for every method and ratio; answers, one for
  every number of tokens kept; and one for both, of methods inside the model.
  """
  needs = frozenset().union(*[method.needs for method in methods])
  chosen, inside, answers = set(), set(), set()
  for method in methods:
    for ratio in ratios:
      compressor = method.compressor
      if not able(compressor, num_layers, grid, ratio):
        continue
      if compressor.selects_first:
        chosen.add((method.spec, ratio))
        answers.add(compressor.rows(grid, ratio))
      elif not compressor.on_host:
        inside.add((method.spec, ratio))
  scored = any(need.endswith("scores") for need in needs)
  shared = 2 + ("text" in needs) + scored
  return shared + len(chosen) + len(inside) + len(answers)


def show(out: Mapping[str, Any], speed: cost.Speed, title: str) -> None:
  """Prints an estimate; LLM tokens are text and video through all layers."""
  console = rich.console.Console(width=132)
  table = rich.table.Table(title=title)
  table.add_column(no_wrap=True)
  for head in ("questions", "clips", "answers", "video tokens", "LLM tokens",
               "programs", "PFLOP", "hours", "features GB"):  # fmt: skip
    table.add_column(head, justify="right")
  for name, row in {**out["benchmarks"], "all": out["total"]}.items():
    table.add_row(
      name + (" (published)" if row.get("published") else ""),
      str(row["questions"]),
      str(row["clips"]),
      str(row["answers"]),
      _short(row["video_tokens"]),
      _short(row["llm_tokens"]),
      str(row["programs"]),
      f"{row['flops'] / 1e15:.4g}",
      f"{row['seconds'] / 3600:.3g}",
      f"{row['feature_bytes'] / 1e9:.3g}",
    )
  console.print(table)
  memory = ", ".join(
    f"{name} {value / 2**30:.2f}" for name, value in out["memory"].items()
  )
  console.print(f"memory of a device in GiB: {memory}", highlight=False)
  console.print(
    f"at {speed.flops / 1e12:.4g} TFLOP/s and {speed.bytes / 1e9:.4g} GB/s"
    f" (--table_tflops, --table_gbps); one process",
    highlight=False,
  )


def _short(count) -> str:
  """Returns a count as 12.3M."""
  for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
    if count >= size:
      return f"{count / size:.1f}{letter}"
  return f"{count:g}"


def speed_of(tflops: float | None, gbps: float | None, dtype) -> cost.Speed:
  """Returns the stated speed; what is not stated is measured here."""
  for name, value in (("table_tflops", tflops), ("table_gbps", gbps)):
    if value is not None and not 0 < value < float("inf"):
      raise errors.UserError(f"--{name}={value:g}: give a positive number")
  measured = None
  if tflops is None or gbps is None:
    measured = cost.measure_speed(jnp.dtype(dtype))
  return cost.Speed(
    measured.flops if tflops is None else 1e12 * tflops,
    measured.bytes if gbps is None else 1e9 * gbps,
  )
