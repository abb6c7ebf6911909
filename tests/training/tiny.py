"""A tiny random model, policy and batch that the training tests share."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from cacovid_jax.models import llava_onevision
from cacovid_jax.parallel import mesh as mesh_lib
from cacovid_jax.policy import network, objective, sampling
from cacovid_jax.training import (
  optimizer,
  programs,
  ratio,
  rollout,
  step,
)
from cacovid_jax.training import (
  state as state_lib,
)

FRAMES, LENGTH, VIDEO_START = 4, 78, 5
VOCABULARY = 64
GRID = (FRAMES, 4, 4)
NUM_VIDEO = 64


class Policy(nn.Module):
  """Two dense layers: the smallest thing that `training` takes as a policy."""

  @nn.compact
  def __call__(self, x, positions, video_rows, grid, length):
    x = x.astype(jnp.float32)
    v = nn.silu(nn.Dense(16, name="layers_0")(x))[video_rows]
    pooled = v.reshape(grid[0], -1, v.shape[-1]).mean(axis=1)
    return network.Scores(
      frame=nn.Dense(2, name="frame")(pooled),
      token=nn.Dense(2, name="token")(v),
    )


def recipe(
  *,
  fixed=0.125,
  rungs=(0.0625, 0.125, 0.25),
  start=0.125,
  iterations=2,
  reward="accuracy",
  max_new_tokens=1,
  learning_rate=1e-2,
  total_steps=20,
  **fields,
):
  """Returns a Recipe of the tiny model; `fixed=None` is an adaptive ratio."""
  config = llava_onevision.LlavaOnevisionConfig.tiny()
  ladder = ratio.make_ladder(
    GRID,
    sampling.SamplingConfig(num_combinations=8),
    ratio.RatioConfig(rungs=rungs, start=start),
    fixed=fixed,
  )
  tx = optimizer.make(
    optimizer.OptimizerConfig(
      lr_heads=learning_rate, lr_layer=learning_rate / 10
    ),
    total_steps,
  )
  fields = dict(policy=Policy(), objective=objective.ObjectiveConfig()) | fields
  return step.Recipe(
    model=llava_onevision.LlavaOnevisionModel(config),
    tx=tx,
    grid=GRID,
    ladder=ladder,
    rollout=rollout.RolloutConfig(reward=reward, max_new_tokens=max_new_tokens),
    iterations=iterations,
    seed=0,
    eos_ids=(1,),
    pad_id=0,
    **fields,
  )


def frozen(recipe):
  """Returns random base weights and letters A.. for tokens 2.. ."""
  letters = np.full((VOCABULARY,), -1, np.int32)
  letters[2:28] = np.arange(26) + ord("A")
  params = recipe.model.init(jax.random.key(7))
  return step.Frozen(params=params, letters=letters)


def batch(videos=2, seed=0):
  """Returns a host batch of random features and questions."""
  rng = np.random.default_rng(seed)
  shape = (videos,)
  length = rng.integers(LENGTH - 4, LENGTH + 1, shape).astype(np.int32)
  return step.Batch(
    video=rng.normal(size=(videos, NUM_VIDEO, 32)).astype(np.float32),
    ids=rng.integers(2, 60, (videos, LENGTH)).astype(np.int32),
    length=length,
    video_start=np.full(shape, VIDEO_START, np.int32),
    answer_id=rng.integers(2, 6, shape).astype(np.int32),
    option_ids=np.tile(np.arange(2, 6, dtype=np.int32), (videos, 1)),
    question_hash=rng.integers(0, 2**32, shape, dtype=np.uint32),
    decisive_frames=rng.random((videos, FRAMES)) < 0.3,
  )


def state(recipe, seed=0):
  """Returns the state before the first step."""
  params = recipe.policy.init(
    jax.random.key(seed),
    jnp.zeros((LENGTH, 32)),
    jnp.arange(LENGTH)[None],
    VIDEO_START + jnp.arange(NUM_VIDEO),
    GRID,
    jnp.int32(LENGTH),
  )["params"]
  return state_lib.create(params, recipe.tx)


def mesh(data=1, model=1):
  return mesh_lib.make_mesh(data, model, devices=jax.devices()[: data * model])


def run(recipe, batches, *, data=1, host_marks=False, mark=None):
  """Returns (programs, state, outputs per batch) of steps from the start."""
  on = mesh(data)
  made = programs.Programs(recipe, on, host_marks=host_marks)
  current = mesh_lib.put(state(recipe), on, programs.ONE)
  held = mesh_lib.put(frozen(recipe), on, programs.ONE)
  outs = []
  for one in batches:
    current, *out = made.run(current, held, programs.place_batch(one, on), mark)
    outs.append(jax.device_get(out))
  return made, current, outs
