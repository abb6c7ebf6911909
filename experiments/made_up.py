"""Made-up videos, prompts and weights of a released size, to time things with.

Axes: T frames, H W token grid, N video tokens, L rows of a prompt, D width.
"""

import dataclasses
import functools
import math
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cacovid_jax import errors
from cacovid_jax.compressors import base
from cacovid_jax.evals import estimate, latency
from cacovid_jax.inference import programs as programs_lib
from cacovid_jax.models import (
  checkpoints,
  processors,
  prompt_batch,
  video_llm,
)
from cacovid_jax.policy import loading, network
from cacovid_jax.synthetic import tiny_checkpoints

NUM_TEXT = 75  # Tokens of a usual question with options and template.
START = NUM_TEXT // 3  # Row of a prompt at which the video begins.
SEED = 0  # Of the random weights.
_NUM_SCENES, _KEY_WIDTH = 4, 72
_SECONDS_PER_PATCH = 2.0


def video(grid, width, seed=0):
  """Returns float32[N, D] tokens of made-up scenes.

  In a scene half of the places keep their token but for a little noise.
  """
  T, H, W = grid
  rng = np.random.default_rng(seed)
  draw = functools.partial(rng.standard_normal, dtype=np.float32)
  scene = np.arange(T) * min(_NUM_SCENES, T) // T
  steady = draw((scene[-1] + 1, H * W, width))[scene]
  moving = rng.random((scene[-1] + 1, H * W)) < 0.5
  change = np.where(moving[scene][..., None], 2.0, 0.2).astype(np.float32)
  tokens = steady + change * draw((T, H * W, width))
  return tokens.reshape(-1, width)


def inputs(grid, config, seed=0):
  """Returns the `base.CompressorInputs` of a bfloat16 video for any method."""
  T, num_video = grid[0], math.prod(grid)
  rng = np.random.default_rng(seed)
  width = config.text.hidden_size

  def draw(*shape):
    return jnp.asarray(rng.standard_normal(shape), jnp.float32)

  def scores():
    return network.Scores(frame=draw(T, 2), token=draw(num_video, 2))

  return base.CompressorInputs(
    features=jnp.asarray(video(grid, width, seed), jnp.bfloat16),
    grid=grid,
    scores=scores(),
    untrained_scores=scores(),
    other_scores=scores(),
    attention=jax.nn.softmax(draw(config.text.num_layers, num_video)),
    vision_attention=jax.nn.softmax(draw(num_video)),
    vision_keys=draw(num_video, _KEY_WIDTH),
    text=draw(NUM_TEXT, width).astype(jnp.bfloat16),
    rng=jax.random.key(1),
  )


def subject(config, grid, dtype, directory) -> tuple[latency.Subject, Any]:
  """Returns (a prompt to time, f() that runs the tower over its video).

  Args:
    config: of the base model.
    grid: (T, H, W) of the video's tokens.
    dtype: of weights and computation.
    directory: of the random weights, drawn if they are not there.
  """
  directory = pathlib.Path(directory)
  _draw(directory, config)
  checkpoint = checkpoints.load(directory, jnp.dtype(dtype))
  given = jax.tree.map(lambda leaf: leaf[None], inputs(grid, config))
  features = given.features.astype(checkpoint.model.dtype)
  made = programs_lib.Programs(checkpoint, max_new_tokens=1)
  batch = _prompt(checkpoint, made, features, grid)
  policy = network.Policy.from_llm_config(
    config.text,
    dtype=checkpoint.model.dtype,
    num_halvings=estimate.num_halvings(config.text),
  )
  params = policy.init_from_llm(jax.random.key(0), checkpoint.params)
  followed = loading.LoadedPolicy(policy, params)
  given = dataclasses.replace(given, features=features, text=made.text(batch))
  found = latency.Subject(
    checkpoint=checkpoint,
    programs=made,
    grid=grid,
    batch=batch,
    inputs=lambda cell: given,
    policy=lambda method: followed,
  )
  return found, _tower(checkpoint, grid)


def _draw(directory, config):
  """Writes random weights, unless those of this config are there."""
  if (directory / "config.json").exists():
    if checkpoints.load_config(directory) != config:
      raise errors.UserError(
        f"{directory} holds another model; give another --weights"
      )
    return
  if directory.is_file() or (directory.is_dir() and any(directory.iterdir())):
    raise errors.UserError(
      f"{directory} holds something else than weights; give an empty or a new"
      " --weights"
    )
  # The config is written first: a folder without an index was cut off.
  partial = directory.with_name(f"{directory.name}.partial")
  tiny_checkpoints.write_random(partial, config, SEED)
  os.replace(partial, directory)


def _prompt(checkpoint, made, features, grid) -> prompt_batch.PromptBatch:
  """Returns a prompt of made-up text around the video."""
  model, config = checkpoint.model, checkpoint.model.config
  num_video, start = math.prod(grid), START
  newline = model.num_newlines
  ids = np.random.default_rng(0).integers(0, 32, NUM_TEXT + num_video)
  ids[start : start + num_video] = config.video_token_id
  ids = np.insert(ids, start + num_video, [config.video_token_id] * newline)
  positions, following = model.positions(
    ids, video_llm.VideoFeatures(None, grid, _SECONDS_PER_PATCH)
  )
  behind = np.arange(start + num_video + newline, len(ids), dtype=np.int32)
  ids = jnp.asarray(ids, jnp.int32)[None]
  video_rows = start + jnp.arange(num_video)[None]
  return prompt_batch.PromptBatch(
    x=made.embed(checkpoint.params, ids, features, video_rows),
    positions=jnp.asarray(positions)[None],
    lengths=jnp.array([ids.shape[1]]),
    video_rows=video_rows,
    next_position=jnp.array([following]),
    features=features,
    ids=ids,
    text_rows=jnp.asarray(behind)[None],
  )


def _tower(checkpoint, grid):
  """Returns f(), the compiled tower over made-up pixels."""
  model, vision = checkpoint.model, checkpoint.model.config.vision
  rng = np.random.default_rng(2)
  values = rng.standard_normal(vision.input_shape(grid), np.float32)
  pixels = model.tower_inputs(processors.TowerInputs(values, grid))
  pixels = jax.tree.map(jnp.asarray, pixels)
  encode = jax.jit(lambda *args: model.encode(*args).features)
  return functools.partial(encode, checkpoint.params, pixels)
