r"""Does a policy choose the same tokens after half-precision storage?

python -m experiments.precision_overlap --policy=workdirs/quickstart

Public checkpoints keep a policy in half precision, training in float32, and
rounding may swap tokens that score almost alike. The policy is written under
the public names in each type and read back; the table tells how many of the
kept tokens are the same. Videos are clips of the embedded benchmark, questions
are random.
"""

import functools
import os
import tempfile
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cacovid_jax import command, errors, evaluate
from cacovid_jax import experiment as experiment_lib
from cacovid_jax.compressors import base
from cacovid_jax.inference import clips
from cacovid_jax.policy import loading, network, selection
from cacovid_jax.synthetic import render, world
from experiments import made_up, reporting

COMMAND = command.Command(
  __doc__,
  evaluate.flags(
    policy="trained_policy",
    model="base_model",
    ratios="keep_ratios",
    num_frames="video_frames",
  )
  | {"num_videos": command.Flag("Videos to draw.", default=8, least=1)},
  defaults={
    "model.path": str(experiment_lib.SHIPPED_MODEL),
    "model.dtype": "float32",
    "data.num_frames": 16,
  },
)


class Overlap(NamedTuple):
  """How alike two policies choose at one ratio."""

  ratio: float
  kept: int  # K tokens of each video, summed up.
  shared: int  # Of these, chosen by both.
  identical: int  # Videos with the very same choice.

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

  Each prompt is (x float[L, D], positions int32[P, L], rows int32[N], grid).
  """
  select = functools.partial(_select, policy=policy, ratios=tuple(ratios))
  chosen = [
    [select(each, *given, grid=grid) for each in (params, other)]
    for *given, grid in prompts
  ]
  found = []
  for i, ratio in enumerate(ratios):
    kept = [len(ours[i]) for ours, _ in chosen]
    shared = [len(np.intersect1d(ours[i], own[i])) for ours, own in chosen]
    identical = sum(s == k for s, k in zip(shared, kept, strict=True))
    found.append(Overlap(ratio, sum(kept), sum(shared), identical))
  return found


@functools.partial(jax.jit, static_argnames=("policy", "grid", "ratios"))
def _select(params, x, positions, video_rows, *, policy, grid, ratios):
  """Returns int32[K] kept tokens, per ratio."""
  given, chosen = ({"params": params}, x, positions, video_rows, grid), []
  for ratio in ratios:
    scores = policy.apply(*given, **network.ratio_argument(policy, ratio))
    chosen.append(selection.select(scores, selection.budget(grid, ratio)))
  return chosen


def draw_prompt(model, params, rng, num_frames):
  """Returns a drawn video and question, see `overlaps`."""
  scene = world.sample_scene(rng, world.VARIANTS["dense"])
  # A clip has a start and an end.
  frames = [*render.clip(scene, max(2, num_frames))][:num_frames]
  inputs = model.processor(np.stack(frames))
  features = made_up.encoder(model, params, inputs)()[clips.FEATURES]
  found = made_up.prompt(model, params, features, inputs.grid, rng)
  return found.x, found.positions, found.video_rows, inputs.grid


def main(args):
  """Compares the stored policies and prints the table."""
  config = args.config
  COMMAND.require(args, "policy")
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
  rows = []
  for dtype in ("float32", "bfloat16", "float16"):
    other = stored(module, trained, jnp.dtype(dtype))
    for row in overlaps(module, trained, other, prompts, ratios):
      same = f"{row.identical} of {args.num_videos} identical"
      ratio, share = f"{row.ratio:.2f}", f"{row.share:.2%}"
      rows.append([dtype, ratio, row.kept, share, same])
  head = ("stored as", "ratio", "tokens kept", "the same", "videos")
  reporting.table(head, rows)


if __name__ == "__main__":
  COMMAND.run(main)
