r"""How long every compressor takes to choose tokens, at a released size.

python -m experiments.selection_speed

One video of 32 x 14 x 14 tokens of width 3584 in bfloat16 (LLaVA-OneVision-7B's
32 frames), a quarter kept: made-up scenes, in which half of the places hardly
change. Times are medians after compilation, of everything between features and
chosen rows; what a method reads (scores, attention of the vision tower) is
given. Methods inside the language model are given queries and keys of a layer
and the residual stream: the attention that they read, their choice and the
gathered rows. `in float32` is the share of the kept tokens that stay if the
same features come in float32. Where PyTorch is installed, a plain version of
three methods runs on `--torch_device` in turns with ours; `same` is the share
of tokens that both keep.
"""

import dataclasses
import functools
import math
import time

import jax
import jax.numpy as jnp
import numpy as np
import rich.console

from cacovid_jax import command, compressors
from cacovid_jax.compressors import base, framefusion, layerwise
from cacovid_jax.evals import latency, results, tables
from cacovid_jax.models import llava_onevision, prompt_batch
from experiments import made_up

_VARIANTS = ("cacovid_untrained", "cacovid_other_question")
COMMAND = command.Command(
  __doc__,
  {
    "num_frames": command.Flag(
      "Frames.", "data.num_frames", old=["video_slices"], least=1
    ),
    "side": command.Flag(
      "Rows and columns of tokens.", default=14, old=["video_side"], least=1
    ),
    "ratios": command.Flag(
      "Retention ratio, the first of these.", "evals.ratios", old=["kept_share"]
    ),
    "methods": command.Flag("Rows.", "evals.methods", old=["timed_methods"]),
    "repeats": latency.REPEATS,
    "torch_device": command.Flag(
      "Where PyTorch computes; empty for no peers.",
      default="cuda",
      old=["peer_device"],
    ),
  },
  defaults={
    "data.num_frames": 32,
    "evals.ratios": (0.25,),
    "evals.methods": tuple(
      name for name in compressors.names() if name not in _VARIANTS
    ),
    "table.repeats": 20,
  },
)

# Milliseconds on one H200 at the full size.
GOALS = {"divprune": 15.0, "prunevid": 8.0}
_GOAL = 10.0
PEERS = ("divprune", "visionzip", "prunevid")


def chosen_before(method, grid, ratio):
  """Returns f(inputs) -> `base.Selection`, jitted."""
  num_keep = method.rows(grid, ratio)
  return jax.jit(
    functools.partial(method.select, num_keep=num_keep, ratio=ratio)
  )


def chosen_inside(method, model, grid, ratio):
  """Returns f(x, query, key, inputs) -> `prompt_batch.PrunedPrompts`, jitted.

  Args:
    method: a `layerwise.LayerwiseCompressor`.
    model: of which only the sizes are read.

  The prompt is the video between text; x float[1, L, D], query and key
  float[1, L, heads, H] of the layer before a cut, of any whole prompt.
  """
  num_video = math.prod(grid)
  num_layers = model.config.text.num_layers
  video_rows = made_up.START + jnp.arange(num_video)[None]

  def choose(x, query, key, inputs):
    length = x.shape[1]
    rows = method.enter(
      prompt_batch.whole(
        prompt_batch.PromptBatch(
          x,
          jnp.arange(length)[None, None],
          jnp.array([length]),
          video_rows,
          jnp.array([length]),
        )
      ),
      jax.tree.map(lambda leaf: leaf[None], inputs),
      ratio=ratio,
      num_layers=num_layers,
    )
    if isinstance(method, framefusion.FrameFusion):
      stages = method.stages(num_layers, grid, ratio)
      return framefusion.first_stage(rows, stages=stages)[0]
    for layer, keep in method.plan(num_layers, num_video, ratio):
      if layer == 0:
        continue
      size = rows.x.shape[1]
      attend = layerwise.attention_of(method.attention_fn, rows)
      attended = attend(query[:, :size], key[:, :size], rows.lengths)
      kept, count = method.cut(rows, attended, grid, layer=layer, keep=keep)
      _, rows = prompt_batch.take(rows, kept, count, num_video=num_video)
    return rows

  return jax.jit(choose)


def peer(name, given, num_keep, device, repeats):
  """Returns (median milliseconds, kept tokens int64[K]) of plain PyTorch."""
  import torch

  from experiments import selection_peers

  def tensor(array):
    return torch.from_numpy(np.array(array, np.float32)).to(device)

  x, num_frames = tensor(given.features).to(torch.bfloat16), given.grid[0]
  attention, keys = tensor(given.vision_attention), tensor(given.vision_keys)
  torch.backends.cuda.matmul.allow_tf32 = False
  run = {
    "divprune": lambda: selection_peers.divprune(x, num_keep),
    "visionzip": lambda: selection_peers.visionzip(
      x, attention, keys, num_frames, num_keep
    )[0],
    "prunevid": lambda: selection_peers.prunevid(x, num_frames, num_keep),
  }[name]

  def wait(result):
    # Reading one value waits for all that is under way.
    return int(result[0])

  taken = latency.median_milliseconds(run, repeats, wait)
  return taken, run().cpu().numpy()


def measure(names, grid, config, ratio, repeats, peer_device="", progress=None):
  """Returns one dict per method.

  With name, ms, compile_s, goal; before the language model `in_float32`, the
  share of tokens that are kept in float32 as well; beside a peer peer_ms and
  same.
  """
  of_video = made_up.inputs(grid, config)
  llm, width = config.text, config.text.hidden_size
  unrounded = dataclasses.replace(
    of_video, features=jnp.asarray(made_up.video(grid, width))
  )
  model = llava_onevision.LlavaOnevisionModel(config, jnp.bfloat16)
  keys = jax.random.split(jax.random.key(0), 3)
  num_video, start = math.prod(grid), made_up.START
  length = num_video + made_up.NUM_TEXT
  x = jax.random.normal(keys[0], (1, length, width), jnp.bfloat16)
  x = x.at[0, start : start + num_video].set(of_video.features)
  query, key = (
    jax.random.normal(rng, (1, length, heads, llm.head_dim), jnp.bfloat16)
    for rng, heads in ((keys[1], llm.num_heads), (keys[2], llm.num_kv_heads))
  )
  rows = []
  for name in names:
    method = compressors.get(name)
    if method.selects_first:
      program, given = chosen_before(method, grid, ratio), (of_video,)
    else:
      program = chosen_inside(method, model, grid, ratio)
      given = x, query, key, of_video
    run = functools.partial(program, *given)
    began = time.perf_counter()
    found = jax.block_until_ready(run())
    row = {"name": name, "goal": GOALS.get(name, _GOAL)}
    row["compile_s"] = time.perf_counter() - began
    row["ms"] = latency.median_milliseconds(run, repeats)
    if method.selects_first:
      row["in_float32"] = _share(found.index, program(unrounded).index)
    if name in PEERS and peer_device:
      # Stage one alone: what enters the language model.
      num_keep = base.budget(grid, ratio)
      row["peer_ms"], theirs = peer(
        name, of_video, num_keep, peer_device, repeats
      )
      again = latency.median_milliseconds(run, repeats)
      row["ms"] = min(row["ms"], again)
      row["same"] = _share(found.index, theirs)
    rows.append(row)
    if progress:
      progress(row)
  return rows


def _share(index, others):
  """Returns how many of the kept tokens are among others."""
  return float(np.isin(np.asarray(index), np.asarray(others)).mean())


def table(rows):
  """Returns Markdown of what `measure` found."""

  def share(row, name):
    return f"{row[name]:.1%}" if name in row else ""

  head = ("method", "ms", "goal", "in float32", "PyTorch ms", "same tokens")
  cells = [
    [
      f"`{row['name']}`",
      f"{row['ms']:.2f}",
      f"{row['goal']:g}",
      share(row, "in_float32"),
      tables.number(row.get("peer_ms")),
      share(row, "same"),
    ]
    for row in rows
  ]
  return tables.as_markdown(head, cells)


def main(args):
  """Times the methods that the command line names."""
  evals, repeats = args.config.evals, args.config.table.repeats
  for name in evals.methods:
    compressors.get(name)
  config = llava_onevision.LlavaOnevisionConfig.llava_onevision_7b()
  grid = (args.config.data.num_frames, args.side, args.side)
  ratio = base.check_ratio(results.check_ratios(evals.ratios)[0])
  console = rich.console.Console()
  console.print(
    f"{math.prod(grid)} x {config.text.hidden_size} bfloat16, ratio {ratio:g},"
    f" {jax.devices()[0].device_kind}, jax {jax.__version__}, median of"
    f" {repeats}"
  )

  def progress(row):
    console.print(
      f"{row['name']:14} {row['ms']:9.2f} ms"
      f" (compiled in {row['compile_s']:.1f} s)"
    )

  rows = measure(
    evals.methods, grid, config, ratio, repeats, args.torch_device, progress
  )
  print(f"\n{table(rows)}")


if __name__ == "__main__":
  COMMAND.run(main)
