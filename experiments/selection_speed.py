r"""How long every compressor takes to choose tokens, at a released size.

python -m experiments.selection_speed

One video of 32 x 14 x 14 tokens of width 3584 in bfloat16 (LLaVA-OneVision-7B's
32 frames), a quarter kept: made-up scenes, in which half of the places hardly
change. Times are medians after compilation, of everything between features and
chosen rows; what a method reads is given, to those inside the language model
queries and keys of a layer and the residual stream. `in float32` is the share
of the kept tokens that stay if the same features come in float32. Plain PyTorch
versions of three methods (`experiments/selection_peers.py`) run on
`--torch_device` in turns with ours; `same` is the share that both keep.
"""

import dataclasses
import functools
import math
import time

import jax
import jax.numpy as jnp
import numpy as np

from cacovid_jax import command, compressors, evaluate
from cacovid_jax.compressors import base, framefusion, layerwise
from cacovid_jax.evals import latency, results, tables
from cacovid_jax.models import llava_onevision, prompt_batch
from experiments import made_up

COMMAND = command.Command(
  __doc__,
  evaluate.flags(
    num_frames="video_slices", ratios="kept_share", methods="timed_methods"
  )
  | {
    "side": command.Flag(
      "Rows and columns of tokens.", default=14, old=["video_side"], least=1
    ),
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
      n for n in compressors.names() if n not in made_up.UNTRAINED
    ),
    "table.repeats": 20,
  },
)

# Milliseconds on one H200 at the full size.
GOALS = {"divprune": 15.0, "prunevid": 8.0}
_GOAL = 10.0


def chosen_inside(method, num_layers, grid, ratio):
  """Returns f(x, query, key, inputs) -> `prompt_batch.PrunedPrompts`, jitted.

  The prompt is the video between text; x float[1, L, D], query and key
  float[1, L, heads, H] of the layer before a cut, of any whole prompt.
  """
  num_video = math.prod(grid)
  video_rows = made_up.START + jnp.arange(num_video)[None]

  def choose(x, query, key, inputs):
    place, length = jnp.arange(x.shape[1])[None, None], jnp.array([x.shape[1]])
    whole = prompt_batch.PromptBatch(x, place, length, video_rows, length)
    rows = method.enter(
      prompt_batch.whole(whole),
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


def measure(names, grid, config, ratio, repeats, peer_device=""):
  """Yields a dict per method: compile_s, and the columns of `table`."""
  of_video = made_up.inputs(grid, config)
  llm, width = config.text, config.text.hidden_size
  unrounded = dataclasses.replace(
    of_video, features=jnp.asarray(made_up.video(grid, width))
  )
  num_video, start = math.prod(grid), made_up.START
  length = num_video + made_up.NUM_TEXT
  keys = jax.random.split(jax.random.key(0), 3)
  heads = [(n, llm.head_dim) for n in (llm.num_heads, llm.num_kv_heads)]
  x, query, key = (
    jax.random.normal(rng, (1, length, *shape), jnp.bfloat16)
    for rng, shape in zip(keys, [(width,), *heads], strict=True)
  )
  x = x.at[0, start : start + num_video].set(of_video.features)
  if peer_device:
    from experiments import selection_peers
  for name in names:
    method = compressors.get(name)
    if method.selects_first:
      num_keep, given = method.rows(grid, ratio), (of_video,)
      program = functools.partial(method.select, num_keep=num_keep, ratio=ratio)
      program = jax.jit(program)
    else:
      program = chosen_inside(method, llm.num_layers, grid, ratio)
      given = x, query, key, of_video
    run = functools.partial(program, *given)
    began = time.perf_counter()
    found = jax.block_until_ready(run())
    row = {"name": name, "goal": GOALS.get(name, _GOAL)}
    row["compile_s"] = time.perf_counter() - began
    row["ms"] = latency.median_milliseconds(run, repeats)
    if method.selects_first:
      row["in_float32"] = _share(found.index, program(unrounded).index)
    if peer_device and name in selection_peers.METHODS:
      # Stage one alone: what enters the language model.
      budget = base.budget(grid, ratio)
      theirs = selection_peers.prepare(name, of_video, budget, peer_device)
      row["peer_ms"] = latency.median_milliseconds(theirs, repeats, _wait)
      row["ms"] = min(row["ms"], latency.median_milliseconds(run, repeats))
      row["same"] = _share(found.index, theirs().cpu())
      del theirs  # Its tensors leave the device before the next method.
    yield row


def _wait(kept):
  # Reading one value waits for all that is under way.
  int(kept[0])


def _share(index, others):
  """Returns how many of the kept tokens are among others."""
  return float(np.isin(np.asarray(index), np.asarray(others)).mean())


def table(rows):
  """Returns Markdown of what `measure` found."""
  head = ("method", "ms", "goal", "in float32", "PyTorch ms", "same tokens")
  forms = {"name": "`{}`", "ms": "{:.2f}", "goal": "{:g}",
           "in_float32": "{:.1%}", "peer_ms": "{:.1f}",
           "same": "{:.1%}"}  # fmt: skip
  cells = [
    [form.format(row[key]) if key in row else "" for key, form in forms.items()]
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
  print(
    f"{math.prod(grid)} x {config.text.hidden_size} bfloat16, ratio {ratio:g},"
    f" {jax.devices()[0].device_kind}, jax {jax.__version__}, median of"
    f" {repeats}"
  )
  rows = []
  for row in measure(
    evals.methods, grid, config, ratio, repeats, args.torch_device
  ):
    rows.append(row)
    print(
      f"{row['name']:14} {row['ms']:9.2f} ms"
      f" (compiled in {row['compile_s']:.1f} s)",
      flush=True,
    )
  print(f"\n{table(rows)}")


if __name__ == "__main__":
  COMMAND.run(main)
