"""From a config to everything a training run needs.

Letters: T frames, N video tokens, L prompt tokens, D width, B videos of a step,
A letters.
"""

import dataclasses
import functools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from cacovid_jax import errors
from cacovid_jax.data import (
  feature_cache,
  frames,
  pipeline,
  readers,
  video_qa,
)
from cacovid_jax.data import questions as questions_lib
from cacovid_jax.models import checkpoints
from cacovid_jax.parallel import mesh as mesh_lib
from cacovid_jax.policy import modules, objective, sampling
from cacovid_jax.training import (
  optimizer,
  programs,
  ratio,
  rewards,
  rollout,
  step,
)
from cacovid_jax.training import (
  state as state_lib,
)

# Prompts are padded to a multiple of this.
_LENGTH_STEP = 16


@dataclasses.dataclass
class Run:
  """What the loop works with.

  Attributes:
    recipe: everything static.
    programs: compiled programs.
    mesh: device mesh.
    frozen: base weights and letter table, on the mesh.
    init_params: () -> the policy's first parameters.
    batches: start step -> iterator of (step.Batch on the host, questions).
    mark: ids i32[B,G,M], questions -> rewards f32[B,G]; None if marks are made
      on the device.
    base_model: {"path", "sha256"} of the frozen model.
    policy_options: keys of the policy section that its module was built from.
    questions: rows that are trained on.
    source: gives their clips, see `data.pipeline`.
  """

  recipe: step.Recipe
  programs: programs.Programs
  mesh: Mesh
  frozen: step.Frozen
  init_params: Callable[[], Any]
  batches: Callable[[int], Iterator]
  mark: Callable | None
  base_model: dict[str, str]
  policy_options: dict[str, Any]
  questions: Sequence[questions_lib.Question]
  source: Any

  def init_state(self) -> state_lib.TrainState:
    """Returns the state before the first step, on the mesh."""
    state = state_lib.create(self.init_params(), self.recipe.tx)
    return mesh_lib.put(state, self.mesh, programs.ONE)


def make(
  config, workdir, *, checkpoint=None, questions=None, source=None
) -> Run:
  """Builds a run.

  Args:
    config: see `training.defaults`.
    workdir: where the ledger of bad clips goes.
    checkpoint: `models.checkpoints.Checkpoint`; read from config.model.path
      by default.
    questions: rows to train on; read from config.data by default.
    source: what gives a question's clip, see `data.pipeline`; by default the
      clips below config.data.root, encoded by the base model.
  """
  mesh = mesh_lib.make_mesh(config.mesh.data, config.mesh.model)
  _check_videos_per_step(config, mesh)
  if checkpoint is None:
    checkpoint = load_checkpoint(config)
  questions = read_questions(config) if questions is None else questions
  rollout_config = rollout.RolloutConfig(**config.rollout)
  host_marks = _host_marks(rollout_config, questions, checkpoint.tokenizer)
  policy, options = make_policy(config, checkpoint.model.config.text)
  preprocessing = frames.Preprocessing(
    checkpoint.model.config.vision.image_size
  )
  if os.path.isdir(str(config.model.path)):
    preprocessing = frames.Preprocessing.from_directory(config.model.path)
  recipe = make_recipe(
    config, checkpoint, policy, rollout_config, preprocessing
  )
  letters = rollout.first_letters(
    checkpoint.tokenizer, checkpoint.model.config.text.vocab_size
  )
  frozen = step.Frozen(
    params=mesh_lib.shard_base_params(checkpoint.params, mesh),
    letters=mesh_lib.put(letters, mesh, programs.ONE),
    seed=mesh_lib.put(np.uint32(config.seed % 2**32), mesh, programs.ONE),
  )
  if source is None:
    source = _clip_source(config, workdir, checkpoint, preprocessing, recipe)
  return Run(
    recipe=recipe,
    programs=programs.Programs(recipe, mesh, host_marks=host_marks),
    mesh=mesh,
    frozen=frozen,
    init_params=functools.partial(
      init_policy, config, policy, checkpoint.params
    ),
    batches=_Batches(config, workdir, checkpoint, questions, source, recipe),
    mark=functools.partial(host_rewards, checkpoint.tokenizer)
    if host_marks
    else None,
    base_model=dict(checkpoint.identity),
    policy_options=options,
    questions=questions,
    source=source,
  )


def load_checkpoint(config) -> checkpoints.Checkpoint:
  """Returns the frozen base model of config.model."""
  if not config.model.path:
    raise errors.UserError(
      "config.model.path is empty; name a LLaVA-OneVision checkpoint directory"
    )
  checkpoint = checkpoints.load(
    config.model.path,
    dtype=_dtype(config.model.dtype, "model.dtype"),
    backend=config.model.backend,
  )
  if checkpoint.tokenizer is None:
    raise errors.UserError(
      f"{config.model.path}: no tokenizer.json; training needs a complete"
      " checkpoint directory"
    )
  return checkpoint


def read_questions(config) -> Sequence[questions_lib.Question]:
  """Returns the training rows of config.data."""
  data = config.data
  if not data.root or not os.path.isdir(data.root):
    raise errors.UserError(
      f"config.data.root={data.root!r} is no folder; give the one that holds"
      " the questions and clips (cacovid_jax.prepare makes one)"
    )
  if data.tfds:
    return video_qa.open_source(
      os.path.join(data.root, data.tfds), data.train_split
    )
  root = _media_root(config)
  if data.reader == "own":
    rows = readers.read_own(
      data.root, root, split=data.train_split, on_bad_row=data.on_bad_row
    )
    # Of few clips, each counts: none is replaced without a word.
    readers.require_media(rows, root)
    return rows
  if data.reader != "video-r1":
    raise errors.UserError(
      f"config.data.reader={data.reader!r}: choose video-r1 or own"
    )
  return readers.read_video_r1(
    os.path.join(data.root, data.train_file), root, on_bad_row=data.on_bad_row
  )


def make_policy(config, llm):
  """Returns (the policy module of config.policy, the options it was given)."""
  options = dict(config.policy)
  spec, _ = options.pop("module"), options.pop("init")
  found = modules.load_policy_module(spec)
  built = dict(options, dtype=_dtype(options["dtype"], "policy.dtype"))
  return found.from_llm_config(llm, **built), {"module": spec, **options}


def init_policy(config, policy, base_params):
  """Returns the policy's first parameters, float32."""
  params = policy.init_from_llm(jax.random.key(config.seed), base_params)
  if config.policy.init:
    params = modules.load(config.policy.init, policy, params)
  return params


def make_recipe(
  config, checkpoint, policy, rollout_config, preprocessing
) -> step.Recipe:
  """Returns everything static about the run of a config."""
  grid = checkpoint.model.grid(config.data.num_frames)
  constants = dict(config.sampling)
  fixed = constants.pop("ratio")
  ladder_options = dict(config.ratio)
  adaptive = ladder_options.pop("adaptive")
  return step.Recipe(
    model=checkpoint.model,
    policy=policy,
    tx=optimizer.make(
      optimizer.OptimizerConfig(**config.optimizer),
      config.total_steps * config.iterations,
    ),
    grid=grid,
    ladder=ratio.make_ladder(
      grid,
      sampling.SamplingConfig(**constants),
      ratio.RatioConfig(**ladder_options),
      fixed=None if adaptive else fixed,
    ),
    objective=objective.ObjectiveConfig(**config.objective),
    rollout=rollout_config,
    iterations=config.iterations,
    eos_ids=tuple(checkpoint.eos_ids),
    pad_id=checkpoint.pad_id,
    to_pixels=functools.partial(_to_pixels, preprocessing),
  )


def host_rewards(tokenizer, ids, questions) -> np.ndarray:
  """Returns f32[B,G] rewards of answers i32[B,G,M] of any problem type."""
  return np.stack(
    [
      rewards.rewards(
        question.problem_type,
        [tokenizer.decode(answer) for answer in answers],
        question.answer,
      )
      for answers, question in zip(ids, questions, strict=True)
    ]
  )


def _to_pixels(preprocessing, video):
  """Returns f32[T,S,S,3] of u8[T,S,S,3], on the device."""
  mean = jnp.asarray(preprocessing.mean, jnp.float32)
  std = jnp.asarray(preprocessing.std, jnp.float32)
  return (video.astype(jnp.float32) / 255.0 - mean) / std


def _dtype(name: str, key: str):
  if name not in ("float32", "bfloat16"):
    raise errors.UserError(f"config.{key}={name!r}: choose float32 or bfloat16")
  return jnp.dtype(name)


def _media_root(config) -> str:
  return os.path.join(config.data.root, config.data.media)


def _check_videos_per_step(config, mesh) -> None:
  devices = mesh.shape["data"]
  if config.videos_per_step < 1 or config.videos_per_step % devices:
    raise errors.UserError(
      f"config.videos_per_step={config.videos_per_step} does not divide among"
      f" the {devices} devices of the data axis; use a multiple of it, or set"
      " config.mesh.data"
    )
  for key in ("total_steps", "iterations"):
    if config[key] < 1:
      raise errors.UserError(f"config.{key}={config[key]} must be at least 1")


def _host_marks(config, questions, tokenizer) -> bool:
  """Returns whether rewards come from the host."""
  if config.marking == "host":
    return True
  lettered = all(tokenizer.answer_id(row) >= 0 for row in questions)
  if lettered:
    return False
  if config.marking == "device" or config.reward != "accuracy":
    raise errors.UserError(
      f"rollout.marking={config.marking} with reward={config.reward} needs"
      " lettered questions only; use marking=host and reward=accuracy"
    )
  return True


def _clip_source(config, workdir, checkpoint, preprocessing, recipe):
  """Returns the source of pixels, or of features that are kept on disk."""
  clips = pipeline.ClipSource(
    _media_root(config),
    pipeline.FrameRule(config.data.num_frames, config.data.frame_rule),
    preprocessing.image_size,
    resample=preprocessing.resample,
    refused=pipeline.Quarantine(_ledger(workdir)).refused,
  )
  if not config.data.feature_cache:
    return clips
  model, params = checkpoint.model, checkpoint.params
  encode = jax.jit(jax.vmap(model.encode_video, (None, 0)))
  return pipeline.FeatureSource(
    clips,
    functools.partial(encode, params),
    preprocessing,
    identity=f"{checkpoint.identity['sha256']} {jnp.dtype(model.dtype).name}",
    num_tokens=recipe.num_video,
    width=model.config.text.hidden_size,
    cache=feature_cache.FeatureCache(config.data.feature_cache),
    memory_items=config.data.memory_items,
  )


def _ledger(workdir) -> str:
  return os.path.join(workdir, "quarantine.jsonl")


class _Batches:
  """Iterates over a run's batches from any step."""

  def __init__(self, config, workdir, checkpoint, questions, source, recipe):
    self._config, self._recipe = config, recipe
    self._tokenizer = checkpoint.tokenizer
    self._questions, self._source = questions, source
    self._ledger = _ledger(workdir)
    self._letters = np.array(
      [self._tokenizer.letter_id(x) for x in questions_lib.LETTERS], np.int32
    )
    self._decisive = read_decisive(config)
    self._length = self._prompt_length()

  def __call__(self, start: int) -> Iterator:
    config = self._config
    batches = pipeline.train_batches(
      self._questions,
      self._tokenizer,
      self._source,
      batch_size=config.videos_per_step,
      seed=config.seed,
      num_video_tokens=self._recipe.num_video,
      length=self._length,
      num_steps=config.total_steps,
      start_step=start,
      num_threads=config.data.num_threads,
      num_workers=config.data.num_workers,
      quarantine=pipeline.Quarantine(self._ledger),
    )
    for batch in batches:
      yield self._convert(batch), batch["questions"]

  def _prompt_length(self) -> int:
    num_video = self._recipe.num_video
    if self._config.data.max_text_tokens:
      length = num_video + 1 + self._config.data.max_text_tokens
      return -(-length // _LENGTH_STEP) * _LENGTH_STEP
    return pipeline.prompt_length(
      self._questions, self._tokenizer, num_video, _LENGTH_STEP
    )

  def _convert(self, batch) -> step.Batch:
    questions = batch["questions"]
    options = np.full((len(questions), len(self._letters)), -1, np.int32)
    frames_shown = np.zeros((len(questions), self._recipe.grid[0]), bool)
    for row, question in enumerate(questions):
      count = len(question.options)
      options[row, :count] = self._letters[:count]
      tokens = np.asarray(self._decisive.get(question.id, ()), int)
      area = self._recipe.grid[1] * self._recipe.grid[2]
      frames_shown[row, tokens // area] = True
    visual = batch["features"] if "features" in batch else batch["pixels"]
    return step.Batch(
      video=visual,
      ids=batch["ids"],
      length=batch["length"],
      video_start=batch["video_start"],
      answer_id=batch["answer_id"],
      option_ids=options,
      question_hash=batch["question_hash"],
      decisive_frames=frames_shown,
    )


def read_decisive(config) -> dict[str, list[int]]:
  """Returns {question id: decisive token ids} of config.data.decisive_file."""
  if not config.data.decisive_file:
    return {}
  path = os.path.join(config.data.root, config.data.decisive_file)
  found, number = {}, 0
  try:
    with open(path, encoding="utf-8") as file:
      for line in file:
        number += 1
        entry = json.loads(line)
        found[entry["question_id"]] = entry["tokens"]
  except OSError as error:
    raise errors.UserError(
      f"{path}: {error.strerror}; correct config.data.decisive_file or leave"
      " it empty"
    ) from error
  except (ValueError, KeyError, TypeError) as error:
    raise errors.UserError(
      f"{path}: line {number} is not {{'question_id', 'tokens'}} ({error})"
    ) from error
  return found
