r"""The paper's efficiency table: what compression costs and what it saves.

python -m experiments.efficiency_table --table_size=ov-7b
python -m experiments.efficiency_table --table_size=tiny   # on a CPU

Times one prompt about one video on this device: the tower, the prefill of all
tokens, and for every method the choice of its tokens and the prefill of what
is left, up to the first token of the answer. Weights are random ones in the
released size, drawn once into `--weights_dir`: times do not depend on their
values, but for methods whose work depends on the video (FrameFusion). Medians
of `--timing_repeats` runs after one that compiles.

WORKDIR/table.md, table.csv   a row per method and ratio, the paper's beside it
WORKDIR/prefill.png           milliseconds to the first token, by part
WORKDIR/results.json          all of it, with shapes, dtype, device, versions

Operations and cache are counted, not measured (`evals.cost`). A method inside
the language model chooses and prefills in one program: its choice is the time
beyond prefilling as many tokens chosen before it. What a tower hands out
beside its features (attention, keys) is not timed.
"""

import dataclasses
import functools
import math
import os
import pathlib
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from cacovid_jax import compressors, errors
from cacovid_jax.evals import (
  cost,
  latency,
  paper,
  programs,
  provenance,
  results,
  runner,
)
from cacovid_jax.models import (
  checkpoints,
  llava_onevision,
  qwen2_5_vl,
  random_checkpoint,
)
from cacovid_jax.policy import network
from experiments import efficiency_files, selection_benchmark, table_flags

_LLAVA = llava_onevision.LlavaOnevisionConfig
_QWEN = qwen2_5_vl.Qwen2_5VLConfig


@dataclasses.dataclass(frozen=True)
class Size:
  """A model and a video to time.

  Attributes:
    config: makes the base model's config.
    grid: (T, H, W) of the video's tokens.
    dtype: of weights and computation.
    paper: key of `paper.MODELS` whose times stand beside, or "".
  """

  config: Any
  grid: tuple[int, int, int]
  dtype: str = "bfloat16"
  paper: str = ""


# 32 frames; Qwen2.5-VL joins two of them, and a 16:9 clip has 12 x 21 tokens
# within the paper's 256 of a slice.
SIZES = types.MappingProxyType(
  {
    "ov-7b": Size(_LLAVA.llava_onevision_7b, (32, 14, 14), paper="ov7b"),
    "ov-0.5b": Size(_LLAVA.llava_onevision_0_5b, (32, 14, 14)),
    "qwen-3b": Size(_QWEN.qwen2_5_vl_3b, (16, 12, 21)),
    "qwen-7b": Size(_QWEN.qwen2_5_vl_7b, (16, 12, 21)),
    "tiny": Size(_LLAVA.tiny, (8, 4, 4), "float32"),
    "qwen-tiny": Size(_QWEN.tiny, (4, 4, 6), "float32"),
  }
)
RATIOS = (0.25,)
# Rows beside the methods: label -> (the method it follows, its spec).
VARIANTS = types.MappingProxyType(
  {
    "framefusion_bucketed": ("framefusion", "framefusion?mode=bucketed"),
    "prunevid_llm": ("prunevid", "prunevid?llm_stage=True"),
  }
)
# A policy before its training takes as long as after it.
_LEFT_OUT = ("cacovid_untrained", "cacovid_other_question")
_PAPER_HALVINGS = 4
_NUM_TEXT = 75  # Tokens of a usual question with options and template.
_SECONDS_PER_SLICE = 2.0

_SIZE = flags.DEFINE_enum(
  "table_size", "ov-7b", list(SIZES), "Model and video."
)
_WEIGHTS = flags.DEFINE_string(
  "weights_dir", None, "Folder of random weights; below --table_workdir else."
)


def main(argv):
  """Measures the table that the flags describe."""
  if len(argv) > 1:
    raise errors.UserError(f"unknown argument {argv[1]!r}; flags begin with --")
  ratios = table_flags.ratios(RATIOS)
  specs = table_flags.METHODS.value or default_rows()
  methods = [runner.Method.parse(spec) for spec in specs]
  for method in methods:
    if method.compressor.oracle:
      raise errors.UserError(
        f"{method.label} knows where the answer lies; it is no row of a table"
        " of times"
      )
  name = _SIZE.value
  size = SIZES[name]
  workdir = pathlib.Path(
    table_flags.WORKDIR.value or f"workdirs/efficiency_{name}"
  )
  workdir.mkdir(parents=True, exist_ok=True)
  subject, encode = make(size, _WEIGHTS.value or workdir / "weights")
  out = measure(
    subject, encode, size, methods, ratios, table_flags.REPEATS.value
  )
  out["size"] = name
  results.write_json(workdir / "results.json", out)
  efficiency_files.write(workdir, out)
  print(efficiency_files.markdown(out))
  for written in efficiency_files.NAMES:
    print(os.path.join(workdir, written))


def default_rows() -> list[str]:
  """Returns the specs of all rows: every method, variants behind their own."""
  rows = []
  for name in compressors.names():
    if name not in _LEFT_OUT:
      rows.append(name)
    for label, (follows, spec) in VARIANTS.items():
      if follows == name:
        rows.append(f"{label}={spec}")
  return rows


def make(size: Size, directory) -> tuple[latency.Subject, Any]:
  """Returns (the prompt to time, f() that runs the tower over its video).

  Args:
    size: of model and video.
    directory: of the random weights, drawn if they are not there.
  """
  config, directory = size.config(), pathlib.Path(directory)
  _draw(directory, config)
  checkpoint = checkpoints.load(directory, jnp.dtype(size.dtype))
  model, grid = checkpoint.model, size.grid
  features, aux, _ = selection_benchmark.inputs(grid, config)
  features = features.astype(model.dtype)[None]
  made = programs.Programs(checkpoint, grid, max_new_tokens=1)
  batch = _prompt(checkpoint, made, features, grid)
  policy = network.Policy.from_llm_config(
    config.text, dtype=model.dtype, num_halvings=_halvings(config.text)
  )
  params = policy.init_from_llm(jax.random.key(0), checkpoint.params)
  followed = runner.Policy(policy, params)
  text = made.text(batch)
  aux = jax.tree.map(lambda leaf: leaf[None], aux)
  key = jax.random.split(jax.random.key(1), 1)
  subject = latency.Subject(
    checkpoint=checkpoint,
    programs=made,
    grid=grid,
    batch=batch,
    inputs=lambda cell: (features, text, aux, key),
    policy=lambda method: followed,
  )
  return subject, _tower(checkpoint, grid)


def _draw(directory, config):
  """Writes random weights, unless those of this config are there."""
  if (directory / "config.json").exists():
    if checkpoints.load_config(directory) != config:
      raise errors.UserError(
        f"{directory} holds another model; give another --weights_dir"
      )
    return
  # The config is written first: a folder without an index was cut off.
  partial = directory.with_name(f"{directory.name}.partial")
  random_checkpoint.write(partial, config)
  os.replace(partial, directory)


def _halvings(text) -> int:
  """Returns the paper's number of hidden layers, or what the width allows."""
  return min(_PAPER_HALVINGS, text.hidden_size.bit_length() - 2)


def _prompt(checkpoint, made, features, grid) -> programs.Batch:
  """Returns a prompt of made-up text around the video, as `Batch`."""
  model, config = checkpoint.model, checkpoint.model.config
  num_video, start = math.prod(grid), _NUM_TEXT // 3
  newline = int(isinstance(model, llava_onevision.LlavaOnevisionModel))
  ids = np.random.default_rng(0).integers(0, 32, _NUM_TEXT + num_video)
  ids[start : start + num_video] = config.video_token_id
  ids = np.insert(ids, start + num_video, [config.video_token_id] * newline)
  positions, following = model.positions(
    ids, grid=grid, seconds_per_slice=_SECONDS_PER_SLICE
  )
  behind = np.arange(start + num_video + newline, len(ids), dtype=np.int32)
  ids = jnp.asarray(ids, jnp.int32)[None]
  where = jnp.array([start])
  return programs.Batch(
    features=features,
    ids=ids,
    length=jnp.array([ids.shape[1]]),
    video_start=where,
    positions=jnp.asarray(positions)[None],
    next_position=jnp.array([following]),
    seconds=jnp.array([_SECONDS_PER_SLICE], jnp.float32),
    text_rows=jnp.asarray(behind)[None],
    x=made.embed(checkpoint.params, ids, features, where),
  )


def _tower(checkpoint, grid):
  """Returns f(), the compiled tower over made-up pixels."""
  model, vision = checkpoint.model, checkpoint.model.config.vision
  rng = np.random.default_rng(2)
  if isinstance(model, llava_onevision.LlavaOnevisionModel):
    shape = (grid[0], vision.image_size, vision.image_size, 3)
    more = ()
  else:
    shape = (math.prod(grid) * vision.patches_per_token, vision.patch_values)
    more = (jax.tree.map(jnp.asarray, model.layout(grid)),)
  pixels = jnp.asarray(rng.standard_normal(shape, np.float32))
  return functools.partial(
    jax.jit(model.encode_video), checkpoint.params, pixels, *more
  )


def measure(subject, encode, size, methods, ratios, repeats, progress=None):
  """Returns results.json as a dict: facts, and one row per method and ratio.

  Args:
    subject: of `make`.
    encode: of `make`.
    size: of model and video.
    methods: rows.
    ratios: of each.
    repeats: runs that a time is the median of.
    progress: called with each row.
  """
  model, grid = subject.checkpoint.model, subject.grid
  text, num_rows = model.config.text, subject.batch.x.shape[1]
  outside = num_rows - math.prod(grid)
  watch = latency.Stopwatch(subject, repeats)
  shared = {
    "tower_ms": latency.median_milliseconds(encode, repeats),
    "embed_ms": watch.embed(),
  }
  out = {
    "schema": results.SCHEMA,
    "dtype": str(jnp.dtype(model.dtype)),
    "grid": list(grid),
    "prompt_rows": num_rows,
    "repeats": repeats,
    "host": provenance.host(),
    "packages": provenance.packages(),
    "git_commit": provenance.git_commit(),
    "paper": paper.EFFICIENCY_SOURCE if size.paper else None,
    **{name: round(value, 4) for name, value in shared.items()},
    "tower_tflops": cost.tower_flops(model.config, grid) / 1e12,
    "rows": [],
  }

  def add(label, ratio, times, compressor=None, **more):
    kept = cost.video_rows(compressor, text.num_layers, grid, ratio)
    layers = [count + outside for count in kept]
    row = {
      "method": label,
      "ratio": ratio,
      "status": "ok",
      "kept_tokens": round(float(np.mean(kept)), 2),
      **{name: round(value, 4) for name, value in times.items()},
      "prefill_tflops": cost.prefill_flops(text, layers) / 1e12,
      "kv_mib": cost.kv_bytes(text, layers, model.dtype) / 2**20,
      **more,
    }
    row["total_ms"] = round(row["compression_ms"] + row["prefill_ms"], 4)
    row["first_token_ms"] = round(row["total_ms"] + sum(shared.values()), 4)
    _append(out, row, size, progress)

  none = dict(rule_ms=0.0, reads_ms=0.0, compression_ms=0.0)
  add(paper.VANILLA, 1.0, none | {"prefill_ms": watch.vanilla()})
  for ratio in ratios:
    for method in methods:
      try:
        found, prefill = watch.answered(method, ratio)
        add(
          method.label,
          ratio,
          dict(
            rule_ms=found.rule,
            reads_ms=found.reads,
            compression_ms=found.total,
            prefill_ms=prefill,
          ),
          method.compressor,
          **_notes(method.compressor),
        )
      except errors.UserError as error:
        row = {
          "method": method.label,
          "ratio": ratio,
          "status": errors.one_line(error),
        }
        _append(out, row, size, progress)
  return out


def _notes(compressor) -> dict[str, str]:
  note = getattr(compressor, "note", "")
  return {"note": note} if note else {}


def _append(out, row, size, progress):
  """Adds a row, the paper's times beside it."""
  if size.paper == paper.EFFICIENCY_MODEL:
    row |= _reported(row["method"], row["ratio"])
  out["rows"].append(row)
  if progress:
    progress(row)


def _reported(method, ratio) -> dict[str, float]:
  if method == paper.VANILLA:
    return {"paper_prefill_ms": paper.VANILLA_PREFILL_MS}
  known = paper.COMPRESSION_MS.get(method)
  if known is None or ratio != paper.EFFICIENCY_RATIO:
    return {}
  return {
    "paper_compression_ms": known,
    "paper_prefill_ms": paper.PREFILL_MS,
  }


if __name__ == "__main__":
  errors.run(main)
