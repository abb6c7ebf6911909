"""A tiny random model, policy and batch that the training tests share."""

import dataclasses
import functools
import tempfile

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from cacovid_jax import base_config
from cacovid_jax import experiment as experiment_lib
from cacovid_jax.data import question as question_lib
from cacovid_jax.data import tokenizer as tokenizer_lib
from cacovid_jax.models import (
  checkpoints,
  llava_onevision,
  prompt_batch,
  video_llm,
)
from cacovid_jax.parallel import mesh as mesh_lib
from cacovid_jax.policy import network, objective, sampling
from cacovid_jax.synthetic import tokenizer as tokenizer_training
from cacovid_jax.training import loop, optimizer, programs, ratio, rollout, step

FRAMES, LENGTH, VIDEO_START = 4, 78, 5
VOCABULARY = 64
GRID = (FRAMES, 4, 4)
NUM_VIDEO = 64


class Policy(nn.Module):
  """Two dense layers: the smallest thing that `training` takes as a policy."""

  @nn.compact
  def __call__(self, x, positions, video_rows, grid, length):
    x = x.astype(jnp.float32)
    v = nn.silu(nn.Dense(16, name="layer")(x))[video_rows]
    pooled = v.reshape(grid[0], -1, v.shape[-1]).mean(axis=1)
    return network.Scores(
      frame=nn.Dense(2, name="frame")(pooled),
      token=nn.Dense(2, name="token")(v),
    )


@functools.cache  # Programs of one config are then compiled once.
def step_config(
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
  """Returns a StepConfig of the tiny model; `fixed=None` adapts the ratio."""
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
  return step.StepConfig(
    model=llava_onevision.LlavaOnevisionModel(config),
    tx=tx,
    ladder=ladder,
    rollout=rollout.RolloutConfig(reward=reward, max_new_tokens=max_new_tokens),
    iterations=iterations,
    eos_ids=(1,),
    pad_id=0,
    **fields,
  )


@functools.cache
def drawn(model):
  """Returns random weights of a model; NumPy has nothing to compile."""
  rng = np.random.default_rng(7)

  def draw(path, leaf):
    if path[-1].key in ("scale", "bias"):
      return np.full(leaf.shape, path[-1].key == "scale", np.float32)
    fan_in = leaf.shape[-2] if len(leaf.shape) > 1 else 1
    return rng.normal(0, fan_in**-0.5, leaf.shape).astype(np.float32)

  shapes = jax.eval_shape(model.init, jax.random.key(0))
  return jax.tree_util.tree_map_with_path(draw, shapes)


def constants(config):
  """Returns random base weights and letters A.. for tokens 2.. ."""
  letters = np.full((VOCABULARY,), -1, np.int32)
  letters[2:28] = np.arange(26) + ord("A")
  params = drawn(config.model)
  return step.Constants(params=params, letters=letters, seed=np.uint32(0))


def batch(videos=2, seed=0, *, ladder=None):
  """Returns a host batch of random features and questions."""
  ladder = step_config().ladder if ladder is None else ladder
  rng = np.random.default_rng(seed)
  shape = (videos,)
  length = rng.integers(LENGTH - 4, LENGTH + 1, shape).astype(np.int32)
  return step.Batch(
    prompts=prompt_batch.PromptBatch(
      x=None,
      features=rng.normal(size=(videos, NUM_VIDEO, 32)).astype(np.float32),
      ids=rng.integers(2, 60, (videos, LENGTH)).astype(np.int32),
      lengths=length,
      video_rows=np.tile(
        VIDEO_START + np.arange(NUM_VIDEO, dtype=np.int32), (videos, 1)
      ),
      positions=np.tile(np.arange(LENGTH, dtype=np.int32), (videos, 1, 1)),
      next_position=length,
    ),
    answer_id=rng.integers(2, 6, shape).astype(np.int32),
    option_ids=np.tile(np.arange(2, 6, dtype=np.int32), (videos, 1)),
    question_hash=rng.integers(0, 2**32, shape, dtype=np.uint32),
    decisive_frames=rng.random((videos, FRAMES)) < 0.3,
    grid=ladder.place(GRID),
    rungs=jax.tree.map(
      lambda leaf: np.stack([leaf] * videos), ladder.rungs(GRID)
    ),
  )


@functools.cache
def _first_params(policy, seed):
  @jax.jit
  def init(rng):
    prompt = jnp.zeros((LENGTH, 32)), jnp.arange(LENGTH)[None]
    rows = VIDEO_START + jnp.arange(NUM_VIDEO)
    return policy.init(rng, *prompt, rows, GRID, jnp.int32(LENGTH))["params"]

  return jax.device_get(init(jax.random.key(seed)))


def state(config, seed=0):
  """Returns the state before the first step."""
  # Copies: a step's buffers are given up.
  params = jax.tree.map(np.array, _first_params(config.policy, seed))
  return step.TrainState.create(params, config.tx)


def mesh(data=1, model=1):
  return mesh_lib.make_mesh(data, model, devices=jax.devices()[: data * model])


@functools.cache
def programs_of(config, data, map_with, model=1):
  made = mesh(data, model)
  return programs.TrainingPrograms([config], made, map_with=map_with)


def run(config, batches, *, data=1, map_with="shard_map", weights=None,
        model=1):  # fmt: skip
  """Returns (programs, state, outputs per batch) of steps from the start."""
  made = programs_of(config, data, map_with, model)
  held = constants(config) if weights is None else weights
  current = mesh_lib.put(state(config), made.mesh, programs.ONE)
  params = mesh_lib.shard_base_params(held.params, made.mesh)
  held = mesh_lib.put(held.replace(params=None), made.mesh, programs.ONE)
  held = held.replace(params=params)
  outs = []
  for one in batches:
    current, *out = made.run(
      current, held, programs.place_batch(one, made.mesh)
    )
    outs.append(jax.device_get(out))
  return made, current, outs


def kept(config, state, batch, *, data=1, model=1):
  """Returns the tokens and frames that a policy draws first, as masks.

  On a mesh; the state is one that `run` gave there.
  """

  def draw(state, constants, batch):
    videos, memory = step.prepare_videos(config, state, constants, batch)
    return step.rollout(config, constants, videos, memory, max_rung=0)[1]

  made, held = mesh(data, model), constants(config)
  params = mesh_lib.shard_base_params(held.params, made)
  specs = (programs.ONE, programs.ONE, programs.EACH), programs.EACH
  placed = programs.place_batch(batch, made)
  mapped = jax.jit(mesh_lib.map_over_data(draw, made, *specs))
  return jax.device_get(mapped(state, held.replace(params=params), placed))


def questions(count=6):
  """Returns lettered questions about clips that do not exist."""
  return [
    question_lib.Question(
      id=f"q{i}",
      video=f"{i}.mp4",
      question=f"What is {i}?",
      options=("red", "blue", "green", "black"),
      answer="ABCD"[i % 4],
      prompt=f"What is {i}?\nA. red\nB. blue\nC. green\nD. black\n",
    )
    for i in range(count)
  ]


def features(path):
  """Returns f32[N,D] features that depend on a clip's name alone."""
  rng = np.random.default_rng(question_lib.question_hash(path))
  return rng.normal(size=(NUM_VIDEO, 32)).astype(np.float32)


class Store:
  """Features of clips that do not exist, by a function of their name."""

  def __init__(self, features_of=features, grid_of=lambda path: GRID):
    self._features_of, self._grid_of = features_of, grid_of

  def load(self, path):
    return path

  def finish(self, paths):
    return [
      video_llm.VideoFeatures(self._features_of(path), self._grid_of(path))
      for path in paths
    ]


@functools.cache
def checkpoint():
  """Returns a random model with a byte-level tokenizer."""
  with tempfile.TemporaryDirectory() as folder:
    tokenizer_training.train(["A B C D red blue"], 300, folder, image_size=14)
    tokenizer = tokenizer_lib.Tokenizer.from_directory(folder)
  sizes = llava_onevision.LlavaOnevisionConfig.tiny()
  sizes = dataclasses.replace(
    sizes,
    text=dataclasses.replace(sizes.text, vocab_size=tokenizer.vocab_size),
    video_token_id=tokenizer.video_id,
  )
  model = llava_onevision.LlavaOnevisionModel(sizes)
  return checkpoints.Checkpoint(
    model=model,
    params=drawn(model),
    tokenizer=tokenizer,
    identity={"path": "nowhere", "sha256": "0"},
    eos_ids=tokenizer.eos_ids,
    pad_id=tokenizer.pad_id,
  )


def config(**changes):
  """Returns the default config at the tiny model's sizes; "a.b" keys."""
  made = base_config.get_config()
  made.total_steps, made.videos_per_step, made.iterations = 4, 2, 2
  made.log_every = 1
  made.sampling.ratio, made.sampling.num_combinations = 0.125, 8
  made.ratio.adaptive = False
  made.rollout.max_new_tokens = 1
  # Graded rewards: a random model's letters are never right.
  made.rollout.reward = "margin"
  made.optimizer.lr_heads, made.optimizer.lr_layer = 1e-2, 1e-3
  made.policy.dtype = made.model.dtype = "float32"
  made.policy.num_halvings = 2
  made.data.num_frames = FRAMES
  made.data.num_threads = 0
  made.mesh.data = 1
  for key, value in changes.items():
    made.update_from_flattened_dict({key: value})
  return made.lock()


def train(workdir, made=None, **arguments):
  """Runs `loop.train` on the tiny model and its questions."""
  arguments = {"questions": questions(), "store": Store()} | arguments
  given = (
    arguments.pop("checkpoint") if "checkpoint" in arguments else checkpoint()
  )
  experiment = experiment_of(
    config() if made is None else made, workdir, checkpoint=given
  )
  return loop.train(experiment, **arguments)


def experiment_of(made, workdir=None, **arguments):
  """Returns the experiment of a training run."""
  return experiment_lib.Experiment.from_config(
    made, workdir, split="videos_per_step", **arguments
  )
