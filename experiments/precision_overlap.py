r"""Does a policy choose the same tokens after half-precision storage?

python -m experiments.precision_overlap --policy=workdirs/quickstart

Public checkpoints keep a policy in half precision, training in float32. Where
two tokens score almost alike, rounding may swap them. The policy is written
under the public names in each type, read back, and scores the same videos; the
table tells how many of the kept tokens are the same ones. The videos are drawn:
frames of coloured blocks that change slowly, encoded by the base model, each
with a random question.

Axes: L prompt tokens, D width, P position rows, N video tokens, K kept tokens.
"""

import functools
import os
import tempfile
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import rich.box
import rich.console
import rich.table

from cacovid_jax import command, errors
from cacovid_jax import experiment as experiment_lib
from cacovid_jax.compressors import base
from cacovid_jax.models import processors
from cacovid_jax.policy import loading, network, selection

COMMAND = command.Command(
  __doc__,
  {
    "policy": command.Flag(
      "A policy's file, or the workdir of a training run.",
      "evals.policies",
      old=["trained_policy"],
    ),
    "model": command.Flag(
      "Its base model; the shipped one by default.",
      "model.path",
      old=["base_model"],
    ),
    "ratios": command.Flag(
      "Retention ratios.", "evals.ratios", old=["keep_ratios"]
    ),
    "num_videos": command.Flag("Videos to draw.", default=8, least=1),
    "num_frames": command.Flag(
      "Frames of each video.", "data.num_frames", old=["video_frames"], least=1
    ),
  },
  defaults={
    "model.path": str(experiment_lib.SHIPPED_MODEL),
    "model.dtype": "float32",
    "data.num_frames": 16,
  },
)

_QUESTION_TOKENS = 24
_BEFORE = 4  # Tokens of text before the video.


class VideoPrompt(NamedTuple):
  """What a policy scores: a prompt with the video's features in place."""

  x: Any  # float[L, D].
  positions: Any  # int32[P, L].
  video_rows: Any  # int32[N], rows of the video tokens.
  grid: tuple[int, int, int]  # (T, H, W) of the video.


class Overlap(NamedTuple):
  """How alike two policies choose at one ratio."""

  ratio: float
  kept: int  # K tokens of each video, summed up.
  shared: int  # Of these, chosen by both.
  identical: int  # Videos with the very same choice.
  videos: int

  @property
  def share(self):
    return self.shared / self.kept


def stored(policy, params, dtype):
  """Returns params after a file in the public format, kept in a dtype."""
  with tempfile.TemporaryDirectory() as folder:
    path = os.path.join(folder, "policy.safetensors")
    loading.save(path, policy, params, dtype)
    return loading.load(path, policy)


def overlaps(policy, params, other, prompts, ratios):
  """Returns an `Overlap` per ratio of what two sets of params select.

  Args:
    other: parameters to compare with.
  """
  select = functools.partial(_select, policy=policy, ratios=tuple(ratios))
  chosen = [
    [select(each, *prompt[:3], grid=prompt.grid) for each in (params, other)]
    for prompt in prompts
  ]
  found = []
  for i, ratio in enumerate(ratios):
    kept = [len(ours[i]) for ours, _ in chosen]
    shared = [len(np.intersect1d(ours[i], own[i])) for ours, own in chosen]
    identical = sum(s == k for s, k in zip(shared, kept, strict=True))
    found.append(
      Overlap(ratio, sum(kept), sum(shared), identical, len(prompts))
    )
  return found


@functools.partial(jax.jit, static_argnames=("policy", "grid", "ratios"))
def _select(params, x, positions, video_rows, *, policy, grid, ratios):
  """Returns int32[K] kept tokens, per ratio."""
  scores = policy.apply({"params": params}, x, positions, video_rows, grid)
  budgets = [selection.budget(grid, ratio) for ratio in ratios]
  return [selection.select(scores, budget) for budget in budgets]


def draw_prompt(model, params, rng, num_frames):
  """Returns a `VideoPrompt` of a drawn video and question."""
  config = model.config
  if grid := model.processor.fixed_grid(num_frames):
    values = _blocks(rng, num_frames, config.vision.image_size)
  else:
    side = 8 * config.vision.patch_size * 2
    grid = model.grid(num_frames, side, side)
    values = rng.normal(size=config.vision.input_shape(grid))
    values = values.astype(np.float32)
  inputs = model.tower_inputs(processors.TowerInputs(values, grid))
  block = int(np.prod(grid)) + model.num_newlines
  length = _BEFORE + block + _QUESTION_TOKENS
  # Ids of text alone: special tokens have the highest ids.
  ids = rng.integers(0, config.text.vocab_size // 2, length)
  video_rows = _BEFORE + np.arange(np.prod(grid))
  ids[video_rows] = config.video_token_id
  video_rows = jnp.asarray(video_rows, jnp.int32)
  positions, _ = model.positions(ids, inputs)
  ids = jnp.asarray(ids, jnp.int32)
  x = _embed(params, ids, inputs, video_rows, model=model)
  return VideoPrompt(x, jnp.asarray(positions), video_rows, grid)


@functools.partial(jax.jit, static_argnames="model")
def _embed(params, ids, inputs, video_rows, *, model):
  """Returns a prompt's embeddings float[L, D], its video encoded."""
  features = model.encode(params, inputs).features
  return model.embed_prompt(params, ids, features, video_rows)


def _blocks(rng, num_frames, size, cells=6, change=0.2):
  """Returns float32[T, size, size, 3] in [-1, 1]; few cells change a frame."""
  colours = rng.uniform(-1, 1, (cells, cells, 3))
  frames = []
  for _ in range(num_frames):
    fresh = rng.uniform(-1, 1, colours.shape)
    new = rng.uniform(size=(cells, cells, 1)) < change
    colours = np.where(new, fresh, colours)
    where = np.arange(size) * cells // size
    frames.append(colours[where][:, where])
  return np.stack(frames).astype(np.float32)


def report(found):
  """Returns a table of {type: [Overlap]}."""
  table = rich.table.Table(box=rich.box.SIMPLE)
  for column in ("stored as", "ratio", "tokens kept", "the same", "videos"):
    table.add_column(column, justify="right")
  for dtype, rows in found.items():
    for row in rows:
      same = f"{row.identical} of {row.videos} identical"
      ratio, share = f"{row.ratio:.2f}", f"{row.share:.2%}"
      table.add_row(dtype, ratio, str(row.kept), share, same)
  return table


def main(args):
  """Compares the stored policies and prints the table."""
  config = args.config
  COMMAND.require(config, "policy")
  ratios = [base.check_ratio(ratio) for ratio in config.evals.ratios]
  experiment = experiment_lib.Experiment.from_config(config, split="")
  model, params = experiment.checkpoint.model, experiment.checkpoint.params
  name, policy = next(iter(experiment.policies.items()))
  module, trained = policy.module, policy.params
  if not isinstance(module, network.Policy):
    raise errors.UserError(
      f"{experiment.policy_paths[name]} is a policy of another module; the"
      " public format holds the paper's only"
    )
  rng = np.random.default_rng(0)
  prompts = [
    draw_prompt(model, params, rng, config.data.num_frames)
    for _ in range(args.num_videos)
  ]
  found = {}
  for dtype in ("float32", "bfloat16", "float16"):
    other = stored(module, trained, jnp.dtype(dtype))
    found[dtype] = overlaps(module, trained, other, prompts, ratios)
  rich.console.Console().print(report(found))


if __name__ == "__main__":
  COMMAND.run(main)
