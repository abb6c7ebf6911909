"""Made-up videos, prompts and weights of a released size, to time things with.

Axes: T frames, H W token grid, N video tokens, L rows of a prompt, D width.
"""

import dataclasses
import functools
import math
import os
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cacovid_jax import errors, files
from cacovid_jax import experiment as experiment_lib
from cacovid_jax.compressors import base
from cacovid_jax.data import decode_workers, frames
from cacovid_jax.data import tokenizer as tokenizer_lib
from cacovid_jax.evals import estimate, latency
from cacovid_jax.inference import clips
from cacovid_jax.inference import programs as programs_lib
from cacovid_jax.models import checkpoints, processors, prompt_batch
from cacovid_jax.policy import loading, network
from cacovid_jax.synthetic import tiny_checkpoints
from experiments import clip_matrix

NUM_TEXT = 75  # Tokens of a usual question with options and template.
START = NUM_TEXT // 3  # Row of a prompt at which the video begins.
# Tokens of a time of two digits, "<12.3 seconds>", and a mark, before each
# temporal patch of models that write them, and the mark behind it.
_TIME_ROWS = (7 + 1, 1)
SEED = 0  # Of the random weights.
# A policy takes as long before its training, or for another question.
UNTRAINED = ("cacovid_untrained", "cacovid_other_question")
_NUM_SCENES, _KEY_WIDTH = 4, 72
_SECONDS_PER_PATCH = 2.0


def video(grid, width):
  """Returns float32[N, D] tokens of made-up scenes.

  In a scene half of the places keep their token but for a little noise.
  """
  T, H, W = grid
  rng = np.random.default_rng(0)
  draw = functools.partial(rng.standard_normal, dtype=np.float32)
  scene = np.arange(T) * min(_NUM_SCENES, T) // T
  steady = draw((scene[-1] + 1, H * W, width))[scene]
  moving = rng.random((scene[-1] + 1, H * W)) < 0.5
  change = np.where(moving[scene][..., None], 2.0, 0.2).astype(np.float32)
  tokens = steady + change * draw((T, H * W, width))
  return tokens.reshape(-1, width)


def inputs(grid, config):
  """Returns the `base.CompressorInputs` of a bfloat16 video for any method."""
  num_video, width = math.prod(grid), config.text.hidden_size
  rng = np.random.default_rng(0)

  def draw(*shape):
    return jnp.asarray(rng.standard_normal(shape), jnp.float32)

  def scores():
    return network.Scores(frame=draw(grid[0], 2), token=draw(num_video, 2))

  return base.CompressorInputs(
    features=jnp.asarray(video(grid, width), jnp.bfloat16),
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


@dataclasses.dataclass(frozen=True, eq=False)
class MadeUp(latency.Subject):
  """A made-up prompt, and the video that its features do not come from."""

  pixels: Any  # float32, as the tower takes them.


def checkpoint(config, dtype, directory, float8=False):
  """Returns a `Checkpoint` of random weights of a folder, drawn if it has none.

  `float8` is config.model.float8_tower.
  """
  directory = pathlib.Path(directory)
  if (directory / "config.json").exists():
    told = f"{directory} holds another model; give another --weights"
    errors.check(checkpoints.load_config(directory) == config, told)
  elif directory.is_file() or (directory.is_dir() and any(directory.iterdir())):
    raise errors.UserError(
      f"{directory} holds something else than weights; give an empty or a new"
      " --weights"
    )
  else:
    # The config is written first: a folder without an index was cut off.
    partial = directory.with_name(f"{directory.name}.partial")
    with files.claim(directory, hint="or give another --weights"):
      tiny_checkpoints.write_random(partial, config, SEED)
      os.replace(partial, directory)
  found = checkpoints.load(directory, jnp.dtype(dtype))
  model = found.model.with_float8_tower(float8)
  return dataclasses.replace(found, model=model)


def tokenizer() -> tokenizer_lib.Tokenizer:
  """Returns the shipped model's, for prompts of any length."""
  found = tokenizer_lib.Tokenizer.from_directory(experiment_lib.SHIPPED_MODEL)
  found.max_length = None  # The shipped model takes less than others.
  return found


def subject(checkpoint, grid) -> MadeUp:
  """Returns a prompt to time, about a video of a grid (T, H, W)."""
  model, params = checkpoint.model, checkpoint.params
  config = model.config
  programs = programs_lib.Programs(checkpoint, max_new_tokens=1)
  given = inputs(grid, config)
  features = given.features.astype(model.dtype)
  rng = np.random.default_rng(0)
  batch = prompt(model, params, features, grid, rng)
  if model.num_deep:
    deep = rng.standard_normal((model.num_deep, *features.shape), np.float32)
    batch = batch._replace(deep=jnp.asarray(deep, model.dtype))
  given, batch = jax.tree.map(lambda leaf: leaf[None], (given, batch))
  given = dataclasses.replace(
    given, features=batch.features, deep=batch.deep, text=programs.text(batch)
  )
  followed = policy(checkpoint)
  pixels = rng.standard_normal(config.vision.input_shape(grid), np.float32)
  return MadeUp(
    checkpoint=checkpoint,
    programs=programs,
    grid=grid,
    batch=batch,
    inputs=lambda cell: given,
    policy=lambda method: followed,
    pixels=pixels,
    encode=encoder(model, params, processors.TowerInputs(pixels, grid)),
  )


def policy(checkpoint) -> loading.LoadedPolicy:
  """Returns the policy before its training."""
  text, dtype = checkpoint.model.config.text, checkpoint.model.dtype
  given = {"dtype": dtype, "num_halvings": estimate.num_halvings(text)}
  module = network.Policy.from_llm_config(text, **given)
  params = module.init_from_llm(jax.random.key(0), checkpoint.params)
  return loading.LoadedPolicy.of(module, params)


def encoder(model, params, inputs) -> Callable[[], dict[str, Any]]:
  """Returns f() -> {name of `clips`: array}: the tower, as a store runs it."""
  run = clips.tower_program(model, (), None)
  params = {k: v for k, v in params.items() if k != "language_model"}
  inputs = jax.tree.map(jnp.asarray, model.tower_inputs(inputs))
  return lambda: run(params, inputs)


def rows_beside(model, grid) -> int:
  """Returns how many rows of a `prompt` are not of the video's tokens."""
  times = grid[0] * sum(_TIME_ROWS) if model.processor.tells_time else 0
  return NUM_TEXT + times + model.num_newlines


def prompt(model, params, features, grid, rng) -> prompt_batch.PromptBatch:
  """Returns ONE prompt, a video of features float[N, D] in random text."""
  config = model.config
  patches = np.arange(math.prod(grid)).reshape(grid[0], -1)
  length = patches.size + rows_beside(model, grid)
  end = START + length - NUM_TEXT
  # Ids of text alone: special tokens have the highest ids.
  ids = rng.integers(0, config.text.vocab_size // 2, length)
  if model.processor.tells_time:
    before, behind = _TIME_ROWS
    patches += before + (before + behind) * np.arange(grid[0])[:, None]
    ids[START + patches[:, 0] - 1] = config.vision_start_token_id
    ids[START + patches[:, -1] + 1] = config.vision_end_token_id
  video_rows = START + patches.ravel()
  newlines = np.arange(end - model.num_newlines, end)
  ids[[*video_rows, *newlines]] = config.video_token_id
  told = processors.TowerInputs(None, grid, _SECONDS_PER_PATCH)
  positions, following = model.positions(ids, told)
  ids, video_rows = (jnp.asarray(x, jnp.int32) for x in (ids, video_rows))
  return prompt_batch.PromptBatch(
    x=model.embed_prompt(params, ids, features, video_rows),
    positions=jnp.asarray(positions),
    lengths=jnp.array(length),
    video_rows=video_rows,
    next_position=jnp.array(following),
    features=features,
    ids=ids,
    text_rows=jnp.arange(end, length),
  )


def write_clip(path: pathlib.Path, seconds: int, size=(640, 360), held=1):
  """Writes an H.264 clip that is missing, each picture of it `held` times."""
  if not path.exists():
    files.make_folder(path.parent)
    numbers = (n // held for n in range(25 * seconds))
    pictures = (clip_matrix.moving(n, 80, 64) for n in numbers)
    clip_matrix.encode(path, clip_matrix.CODECS["h264_b"], pictures, size)


def reader(subject, folder) -> Callable[[], Any]:
  """Returns f() that makes pixels of a clip, in a worker as a store does.

  Of a ten-second H.264 clip of 640 x 360, which is made in the folder.
  """
  write_clip(path := pathlib.Path(folder, "clip.mp4"), 10)
  model = subject.checkpoint.model
  joined = getattr(model.config.vision, "temporal_patch_size", 1)
  rule = frames.FrameRule(joined * subject.grid[0])
  processor = model.processor
  if processor.tells_time:  # Its bounds are of whole clips; as in its config.
    tokens = rule.num_frames * processors.PAPER_TOKENS[1]
    processor = processor.with_bounds(0, tokens * processor.factor**2)
  call = decode_workers.WAYS["workers"]
  found = clips.ClipReader(str(folder), processor, rule, call=call)
  return functools.partial(found.read, path.name)
