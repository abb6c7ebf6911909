"""From an experiment to everything that the training loop works with.

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
from cacovid_jax import experiment as experiment_lib
from cacovid_jax.data import feature_cache, rejected_clips
from cacovid_jax.data import question as question_lib
from cacovid_jax.models import processors, token_grid
from cacovid_jax.parallel import mesh as mesh_lib
from cacovid_jax.policy import loading
from cacovid_jax.training import (
  optimizer,
  pipeline,
  programs,
  ratio,
  rollout,
  seams,
  step,
)

# Prompts are padded to a multiple of this.
_LENGTH_STEP = 16


@dataclasses.dataclass
class Run:
  """What the loop works with.

  Attributes:
    config: everything static; where grids differ, of the largest bucket.
    programs: compiled programs.
    mesh: device mesh.
    constants: base weights and letter table, on the mesh.
    init_params: () -> the policy's first parameters.
    batches: start step -> iterator of (step.Batch on the host, questions).
    reward: ids i32[B,G,M], questions -> f32[B,G]; None if the device rewards.
    base_model: {"path", "sha256"} of the frozen model.
    described_policy: what policy_config.json says about the policy's module.
    code: {key of the config: sha256} of files of one's own.
    questions: rows that are trained on.
    source: gives their clips, see `training.pipeline`.
  """

  config: step.StepConfig
  programs: programs.Programs
  mesh: Mesh
  constants: step.Constants
  init_params: Callable[[], Any]
  batches: Callable[[int], Iterator]
  reward: Callable | None
  base_model: dict[str, str]
  described_policy: dict[str, Any]
  code: dict[str, str]
  questions: Sequence[question_lib.Question]
  source: Any

  @property
  def described_grid(self) -> list:
    """[T, H, W] of all videos, or the sizes of each bucket."""
    if self.config.ladder.plans:
      return list(self.config.ladder.grid)
    return [dataclasses.astuple(b) for b in self.programs.configs]

  def init_state(self) -> step.TrainState:
    """Returns the state before the first step, on the mesh."""
    state = step.TrainState.create(self.init_params(), self.config.tx)
    return mesh_lib.put(state, self.mesh, programs.ONE)


def make(experiment, *, questions=None, source=None, parts=None) -> Run:
  """Builds a run.

  Args:
    experiment: `experiment.Experiment`; its workdir gets the list of bad clips.
    questions: rows to train on; read from config.data by default.
    source: what gives a question's clip, see `training.pipeline`; by default
      the clips below config.data.root, encoded by the base model.
    parts: `seams.Seams`; those of the config by default.
  """
  parts = parts or seams.load(experiment.config)
  mesh = experiment.mesh
  if questions is None:
    questions = experiment_lib.read_questions(experiment.config)
  experiment = with_total_steps(experiment, questions)
  config = experiment.config
  for key, least in (("total_steps", 0), ("iterations", 1)):
    if config[key] < least:
      raise errors.UserError(
        f"config.{key}={config[key]} must be at least {least}"
      )
  checkpoint, workdir = experiment.loaded, experiment.workdir
  from_host = _from_host(parts.rollout, questions, checkpoint.tokenizer)
  options = dict(config.policy)
  init = options.pop("init")
  policy, digest = loading.make_policy(checkpoint.model.config.text, options)
  processor = make_processor(config, checkpoint.model)
  configs = make_step_configs(config, checkpoint, policy, parts, processor)
  for one in configs:
    seams.check(config, one, questions)
  letters = rollout.first_letters(
    checkpoint.tokenizer, checkpoint.model.config.text.vocab_size
  )
  constants = step.Constants(
    params=mesh_lib.shard_base_params(checkpoint.params, mesh),
    letters=mesh_lib.put(letters, mesh, programs.ONE),
    seed=mesh_lib.put(np.uint32(config.seed % 2**32), mesh, programs.ONE),
  )
  if source is None:
    source = _clip_source(config, workdir, checkpoint, processor, configs)
  return Run(
    config=configs[-1],
    programs=programs.Programs(
      configs,
      mesh,
      host_rewards=from_host,
      map_with=config.mesh.get("map", "shard_map"),
    ),
    mesh=mesh,
    constants=constants,
    init_params=functools.partial(
      loading.init_policy, policy, checkpoint.params, config.seed, init
    ),
    batches=_Batches(config, workdir, checkpoint, questions, source, configs),
    reward=functools.partial(host_rewards, checkpoint.tokenizer, parts.rollout)
    if from_host
    else None,
    base_model=dict(checkpoint.identity),
    described_policy={"policy": options}
    | ({"module_sha256": digest} if digest else {})
    | ({"code": parts.code} if parts.code else {}),
    code=parts.code,
    questions=questions,
    source=source,
  )


def with_total_steps(experiment, questions):
  """Returns the experiment with the steps of one epoch if it leaves them open.

  Its config has another hash than the workdir's: a checkpoint of other rows,
  and so of another schedule, does not fit.
  """
  config = experiment.config
  if config.total_steps:
    return experiment
  steps = -(-len(questions) // config.videos_per_step)
  return experiment.replace({"total_steps": steps})


def make_processor(config, model) -> processors.Processor:
  """Returns what is done to frames before the tower of a model.

  That of the checkpoint's files, with the config's limits on pixels.
  """
  data, path = config.data, str(config.model.path)
  found = model.read_processor(path) if os.path.isdir(path) else model.processor
  if found.one_grid and (data.buckets or data.min_pixels or data.max_pixels):
    raise errors.UserError(
      "config.data.buckets, min_pixels and max_pixels are for models whose"
      " grids differ (Qwen2.5-VL); leave them empty for this one"
    )
  if data.decisive_file and not found.one_grid:
    raise errors.UserError(
      "config.data.decisive_file names tokens of one grid, but the videos of"
      " this model differ; leave it empty"
    )
  return found.with_bounds(data.min_pixels, data.max_pixels)


def make_step_configs(
  config, checkpoint, policy, parts: seams.Seams, processor
) -> list[step.StepConfig]:
  """Returns everything static about the run of a config.

  One per bucket, rising; or one of the grid that all videos have.
  """
  ladder_options = dict(config.ratio)
  adaptive = ladder_options.pop("adaptive")
  if processor.one_grid:
    grids = [processor.fixed_grid(config.data.num_frames)]
  else:
    data = config.data
    grids = token_grid.make_buckets(data.buckets, processor, data.num_frames)
  first = step.StepConfig(
    model=checkpoint.model,
    policy=policy,
    tx=optimizer.make(
      optimizer.OptimizerConfig(**config.optimizer),
      config.total_steps * config.iterations,
      config.iterations,
    ),
    ladder=None,
    objective=parts.objective,
    rollout=parts.rollout,
    iterations=config.iterations,
    eos_ids=tuple(checkpoint.eos_ids),
    pad_id=checkpoint.pad_id,
    to_pixels=functools.partial(processor.normalise, xp=jnp),
  )

  def ladder(grid):
    return ratio.make_ladder(
      grid,
      parts.sampler,
      ratio.RatioConfig(**ladder_options),
      fixed=None if adaptive else config.sampling.ratio,
    )

  return [dataclasses.replace(first, ladder=ladder(grid)) for grid in grids]


def host_rewards(tokenizer, config, ids, questions) -> np.ndarray:
  """Returns f32[B,G] rewards of answers i32[B,G,M] of any problem type."""
  return np.stack(
    [
      seams.host_reward(
        config, question, [tokenizer.decode(answer) for answer in answers]
      )
      for answers, question in zip(ids, questions, strict=True)
    ]
  )


def _from_host(config, questions, tokenizer) -> bool:
  """Returns whether rewards come from the host."""
  if config.marking == "host" or getattr(config.function, "on_host", False):
    return True
  lettered = all(tokenizer.answer_id(row) >= 0 for row in questions)
  if lettered:
    return False
  if config.marking == "device" or config.reward != "accuracy":
    name = getattr(config.reward, "__name__", config.reward)
    raise errors.UserError(
      f"rollout.marking={config.marking} with reward={name} needs lettered"
      " questions only; use marking=host and reward=accuracy, or a reward of"
      " your own with on_host = True"
    )
  return True


def _clip_source(config, workdir, checkpoint, processor, configs):
  """Returns the source of pixels, or of features that are kept on disk.

  Videos of several grids always come as features: their tower runs in programs
  of its own, one per bucket.
  """
  data, model = config.data, checkpoint.model
  root = experiment_lib.media_root(config)
  rule = pipeline.FrameRule(data.num_frames, data.frame_rule)
  refused = rejected_clips.RejectedClips(_ledger(workdir)).refused
  cache = None
  if data.feature_cache:
    cache = feature_cache.FeatureCache(data.feature_cache)
  limits = dict(refused=refused, min_side=data.min_side)
  kept = dict(cache=cache, memory_items=data.memory_items)
  identity = f"{checkpoint.identity['sha256']} {jnp.dtype(model.dtype).name}"
  if not configs[-1].ladder.plans:
    sizes = [one.ladder.bucket for one in configs]
    return pipeline.GridFeatureSource(
      pipeline.ShotSource(root, rule, processor, **limits),
      BucketTower(model, checkpoint.params),
      processor,
      buckets=sizes,
      # Padding may move the last bit: other buckets, other entries.
      identity=f"{identity} {sizes}",
      **kept,
    )
  clips = pipeline.ClipSource(
    root,
    rule,
    processor.image_size,
    resample=processor.resample,
    **limits,
  )
  if cache is None:
    return clips

  @jax.jit
  def encode(params, pixels):
    def one(pixels):
      inputs = processors.TowerInputs(pixels, configs[-1].ladder.grid)
      return model.encode(params, inputs).features

    return jax.vmap(one)(pixels)

  return pipeline.FeatureSource(
    clips,
    functools.partial(encode, _tower_params(checkpoint.params)),
    processor,
    identity=identity,
    num_tokens=configs[-1].num_video,
    width=model.config.text.hidden_size,
    **kept,
  )


def _tower_params(params):
  """Returns the weights that encode clips.

  With several processes, a copy that this process has for itself: which clips
  are encoded depends on what its cache holds.
  """
  params = {k: v for k, v in params.items() if k != "language_model"}
  if jax.process_count() == 1:
    return params
  return jax.tree.map(lambda x: jnp.asarray(programs.gather(x)), params)


class BucketTower:
  """Encodes clips of several grids; a program per bucket."""

  def __init__(self, model, params):
    """Compiles nothing yet.

    Args:
      model: `VideoLLM`.
      params: its parameters.
    """
    self._model = model
    self._encode = jax.jit(lambda *args: model.encode(*args).features)
    self._params = _tower_params(params)

  def __call__(self, inputs, bucket: token_grid.GridBucket):
    """Returns features float[N_max,D] of a processor's `TowerInputs`."""
    return self._encode(self._params, self._model.tower_inputs(inputs, bucket))


def _ledger(workdir) -> str:
  return os.path.join(workdir, "quarantine.jsonl")


class _Batches:
  """Iterates over a run's batches from any step."""

  def __init__(self, config, workdir, checkpoint, questions, source, configs):
    self._config = config
    self._ladders = {one.ladder.bucket: one.ladder for one in configs}
    self._ladder, self._num_video = configs[-1].ladder, configs[-1].num_video
    self._bucketed = not self._ladder.plans
    self._model = checkpoint.model
    self._tokenizer = checkpoint.tokenizer
    self._questions, self._source = questions, source
    self._ledger = _ledger(workdir)
    self._letters = np.array(
      [self._tokenizer.letter_id(x) for x in question_lib.LETTERS], np.int32
    )
    self._decisive = read_decisive(config)
    most = max((max(t) for t in self._decisive.values() if t), default=-1)
    if most >= self._num_video:
      raise errors.UserError(
        f"config.data.decisive_file names token {most}, and a video of"
        f" {config.data.num_frames} frames has {self._num_video}: take as many"
        " frames as the data was prepared for, or leave the file empty"
      )
    self._shapes = self._prompt_shapes()

  def __call__(self, start: int) -> Iterator:
    config = self._config
    batches = pipeline.train_batches(
      self._questions,
      self._tokenizer,
      self._source,
      batch_size=config.videos_per_step,
      seed=config.seed,
      **self._shapes,
      num_steps=config.total_steps,
      start_step=start,
      num_threads=config.data.num_threads,
      num_workers=config.data.num_workers,
      quarantine=rejected_clips.RejectedClips(self._ledger),
    )
    for batch in batches:
      yield self._convert(batch), batch["questions"]

  def _prompt_shapes(self) -> dict[str, Any]:
    """Returns the arguments of `pipeline.train_batches` that say sizes."""
    text, num_video = self._config.data.max_text_tokens, self._num_video
    if self._bucketed:
      if not text:
        text = pipeline.prompt_length(self._questions, self._tokenizer, 1, 1)
        text -= 1
      bucketing = pipeline.Bucketing(
        tuple(self._ladders), text, self._model, _LENGTH_STEP
      )
      return {"bucketing": bucketing}
    if text:
      length = num_video + 1 + text
      length = -(-length // _LENGTH_STEP) * _LENGTH_STEP
    else:
      length = pipeline.prompt_length(
        self._questions, self._tokenizer, num_video, _LENGTH_STEP
      )
    return {"num_video_tokens": num_video, "length": length}

  def _grid_data(self, batch) -> step.VideoGridData:
    """Returns what follows from the grids of a batch's videos."""
    count, length = batch["ids"].shape
    ladder = self._ladders.get(batch.get("bucket"), self._ladder)
    grids = batch.get("grids", [ladder.grid] * count)
    counted = np.tile(np.arange(length, dtype=np.int32), (count, 1, 1))

    def stack(trees):
      return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)

    return step.VideoGridData(
      grid=stack([ladder.place(grid) for grid in grids]),
      # Of one grid for all, rows count on.
      positions=batch.get("positions", counted),
      next_position=batch.get("next_position", batch["length"]),
      rungs=stack([ladder.rungs(grid) for grid in grids]),
    )

  def _convert(self, batch) -> step.Batch:
    questions = batch["questions"]
    options = np.full((len(questions), len(self._letters)), -1, np.int32)
    num_frames = batch.get("bucket", self._ladder.bucket).frames
    frames_shown = np.zeros((len(questions), num_frames), bool)
    for row, question in enumerate(questions):
      count = len(question.options)
      options[row, :count] = self._letters[:count]
      tokens = self._decisive.get(question.id)
      if tokens is not None:
        area = self._ladder.bucket.frame_tokens
        frames_shown[row, np.asarray(tokens, int) // area] = True
    visual = batch["features"] if "features" in batch else batch["pixels"]
    return step.Batch(
      video=visual,
      ids=batch["ids"],
      length=batch["length"],
      video_rows=batch["video_rows"],
      answer_id=batch["answer_id"],
      option_ids=options,
      question_hash=batch["question_hash"],
      decisive_frames=frames_shown,
      grid_data=self._grid_data(batch),
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
