"""From a config to everything a training run needs.

Letters: T frames, N video tokens, L prompt tokens, D width, B videos of a step,
A letters.
"""

import dataclasses
import functools
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from cacovid_jax import errors
from cacovid_jax.data import feature_cache, readers
from cacovid_jax.data import left_out as left_out_lib
from cacovid_jax.data import question as question_lib
from cacovid_jax.data import rewards as rewards_lib
from cacovid_jax.data import tfds as tfds_lib
from cacovid_jax.models import checkpoints, processors, token_grid
from cacovid_jax.parallel import mesh as mesh_lib
from cacovid_jax.policy import modules, objective, sampling
from cacovid_jax.training import (
  optimizer,
  pipeline,
  programs,
  ratio,
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
    recipe: everything static; where grids differ, of the largest bucket.
    programs: compiled programs, `BucketPrograms` where grids differ.
    mesh: device mesh.
    frozen: base weights and letter table, on the mesh.
    init_params: () -> the policy's first parameters.
    batches: start step -> iterator of (step.Batch on the host, questions).
    mark: ids i32[B,G,M], questions -> rewards f32[B,G]; None if marks are made
      on the device.
    base_model: {"path", "sha256"} of the frozen model.
    policy_options: keys of the policy section that its module was built from.
    questions: rows that are trained on.
    source: gives their clips, see `training.pipeline`.
  """

  recipe: step.Recipe
  programs: programs.Programs | programs.BucketPrograms
  mesh: Mesh
  frozen: step.Frozen
  init_params: Callable[[], Any]
  batches: Callable[[int], Iterator]
  mark: Callable | None
  base_model: dict[str, str]
  policy_options: dict[str, Any]
  questions: Sequence[question_lib.Question]
  source: Any

  @property
  def described_grid(self) -> list:
    """[T, H, W] of all videos, or the sizes of each bucket."""
    if isinstance(self.programs, programs.Programs):
      return list(self.recipe.grid)
    return [dataclasses.astuple(b) for b in self.programs.by_bucket]

  def init_state(self) -> state_lib.TrainState:
    """Returns the state before the first step, on the mesh."""
    state = state_lib.create(self.init_params(), self.recipe.tx)
    return mesh_lib.put(state, self.mesh, programs.ONE)


def make(
  config, workdir, *, checkpoint=None, questions=None, source=None
) -> Run:
  """Builds a run.

  Args:
    config: see `base_config`.
    workdir: where the ledger of bad clips goes.
    checkpoint: `models.checkpoints.Checkpoint`; read from config.model.path
      by default. Weights that do not lie on the mesh are copied there.
    questions: rows to train on; read from config.data by default.
    source: what gives a question's clip, see `training.pipeline`; by default
      the clips below config.data.root, encoded by the base model.
  """
  mesh = make_mesh(config)
  if checkpoint is None:
    checkpoint = load_checkpoint(config)
  questions = read_questions(config) if questions is None else questions
  config = with_total_steps(config, questions)
  rollout_config = rollout.RolloutConfig(**config.rollout)
  host_marks = _host_marks(rollout_config, questions, checkpoint.tokenizer)
  policy, options = make_policy(config, checkpoint.model.config.text)
  processor = make_processor(config, checkpoint.model)
  recipes = make_recipes(config, checkpoint, policy, rollout_config, processor)
  recipe = recipes[-1]
  if isinstance(recipe.grid, token_grid.Bucket):
    made = programs.BucketPrograms(recipes, mesh, host_marks=host_marks)
  else:
    made = programs.Programs(recipe, mesh, host_marks=host_marks)
  letters = rollout.first_letters(
    checkpoint.tokenizer, checkpoint.model.config.text.vocab_size
  )
  frozen = step.Frozen(
    params=mesh_lib.shard_base_params(checkpoint.params, mesh),
    letters=mesh_lib.put(letters, mesh, programs.ONE),
    seed=mesh_lib.put(np.uint32(config.seed % 2**32), mesh, programs.ONE),
  )
  if source is None:
    source = _clip_source(config, workdir, checkpoint, processor, recipes)
  return Run(
    recipe=recipe,
    programs=made,
    mesh=mesh,
    frozen=frozen,
    init_params=functools.partial(
      init_policy, config, policy, checkpoint.params
    ),
    batches=_Batches(config, workdir, checkpoint, questions, source, recipes),
    mark=functools.partial(host_rewards, checkpoint.tokenizer)
    if host_marks
    else None,
    base_model=dict(checkpoint.identity),
    policy_options=options,
    questions=questions,
    source=source,
  )


def with_total_steps(config, questions):
  """Returns the config with the steps of one epoch where it leaves them open.

  The copy has another hash than the workdir's: a checkpoint of other rows, and
  so of another schedule, does not fit.
  """
  if config.total_steps:
    return config
  config = config.copy_and_resolve_references()
  with config.unlocked():
    config.total_steps = -(-len(questions) // config.videos_per_step)
  return config.lock()


def make_mesh(config) -> Mesh:
  """Returns the devices of config.mesh, after a look at the run's sizes."""
  mesh = mesh_lib.make_mesh(config.mesh.data, config.mesh.model)
  _check_videos_per_step(config, mesh)
  return mesh


def load_checkpoint(config) -> checkpoints.Checkpoint:
  """Returns the frozen base model of config.model, on the mesh of the run."""
  if not config.model.path:
    raise errors.UserError(
      "config.model.path is empty; name the checkpoint directory of a"
      " LLaVA-OneVision or a Qwen2.5-VL"
    )
  checkpoint = checkpoints.load(
    config.model.path,
    dtype=_dtype(config.model.dtype, "model.dtype"),
    # Each device reads its own part: none ever holds the whole model.
    mesh=make_mesh(config),
    backend=config.model.backend,
  )
  if checkpoint.tokenizer is None:
    raise errors.UserError(
      f"{config.model.path}: no tokenizer.json; training needs a complete"
      " checkpoint directory"
    )
  return checkpoint


def read_questions(
  config, workdir=None, *, resumes: bool = True
) -> Sequence[question_lib.Question]:
  """Returns the training rows of config.data, whose clips are there.

  Args:
    config: see `base_config`.
    workdir: what is left out is printed, one line for each kind, and listed
      in its `left_out.json`; None for neither.
    resumes: whether other rows than the workdir's are refused.
  """
  left_out = left_out_lib.LeftOut()
  rows = _with_clips(config, _read_rows(config, left_out.report), left_out)
  left_out.num_questions = len(rows)
  if workdir is not None:
    if resumes:
      left_out.check(workdir)
    if jax.process_index() == 0:
      for line in left_out.lines():
        print(line, flush=True)
      left_out.write(workdir)
  return rows


def _read_rows(config, report) -> Sequence[question_lib.Question]:
  data = config.data
  if not data.root or not os.path.isdir(data.root):
    raise errors.UserError(
      f"config.data.root={data.root!r} is no folder; give the one that holds"
      " the questions and clips (cacovid_jax.prepare makes one)"
    )
  if data.tfds:
    return tfds_lib.open_source(
      os.path.join(data.root, data.tfds), data.train_split
    )
  root = _media_root(config)
  if data.reader == "own":
    return readers.read_own(
      data.root,
      root,
      split=data.train_split,
      on_bad_row=data.on_bad_row,
      report=report,
    )
  if data.reader != "video-r1":
    raise errors.UserError(
      f"config.data.reader={data.reader!r}: choose video-r1 or own"
    )
  return readers.read_video_r1(
    os.path.join(data.root, data.train_file),
    root,
    on_bad_row=data.on_bad_row,
    report=report,
  )


def _with_clips(config, rows, left_out):
  """Returns the rows whose clips are there; others are an error or noted."""
  how, root = config.data.on_missing, _media_root(config)
  if how not in ("raise", "skip"):
    raise errors.UserError(
      f"config.data.on_missing={how!r}: choose raise or skip"
    )
  names = [row.video for row in rows]
  missing = left_out.missing = readers.find_missing(names, root)
  found = [place for place, name in enumerate(names) if name not in missing]
  if missing and (how == "raise" or not found):
    raise readers.missing_error(
      names, root, missing, "leave them out with config.data.on_missing=skip"
    )
  if not missing:
    return rows
  if isinstance(rows, tfds_lib.QuestionSource):
    return rows.take(found)
  return [rows[place] for place in found]


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


def make_recipes(
  config, checkpoint, policy, rollout_config, processor
) -> list[step.Recipe]:
  """Returns everything static about the run of a config.

  One recipe per bucket, rising; or one of the grid that all videos have.
  """
  constants = dict(config.sampling)
  fixed = constants.pop("ratio")
  ladder_options = dict(config.ratio)
  adaptive = ladder_options.pop("adaptive")
  if processor.one_grid:
    grids = [processor.fixed_grid(config.data.num_frames)]
    make_ladder = ratio.make_ladder
  else:
    grids = make_buckets(config, processor)
    make_ladder = ratio.make_bucket_ladder
  first = step.Recipe(
    model=checkpoint.model,
    policy=policy,
    tx=optimizer.make(
      optimizer.OptimizerConfig(**config.optimizer),
      config.total_steps * config.iterations,
    ),
    grid=grids[0],
    ladder=None,
    objective=objective.ObjectiveConfig(**config.objective),
    rollout=rollout_config,
    iterations=config.iterations,
    eos_ids=tuple(checkpoint.eos_ids),
    pad_id=checkpoint.pad_id,
    to_pixels=functools.partial(processor.normalise, xp=jnp),
  )

  def ladder(grid):
    return make_ladder(
      grid,
      sampling.SamplingConfig(**constants),
      ratio.RatioConfig(**ladder_options),
      fixed=None if adaptive else fixed,
    )

  return [
    dataclasses.replace(first, grid=grid, ladder=ladder(grid)) for grid in grids
  ]


def make_buckets(config, processor) -> list[token_grid.Bucket]:
  """Returns the buckets of config.data, the smallest first.

  By default one for the largest slices that the pixels' limits allow, and one
  for those half way (in proportion) from the smallest: limits of 128 and 256
  tokens give buckets of 181 and 256.
  """
  slices = -(-config.data.num_frames // processor.temporal_patch_size)
  sizes = [tuple(sizes) for sizes in config.data.buckets]
  if not sizes:
    least, most = processor.patch_tokens(config.data.num_frames)
    middle = int(math.sqrt(least * most))
    sizes = [(slices, area) for area in sorted({middle, most})]
  try:
    found = {token_grid.Bucket(*map(int, one)) for one in sizes}
  except (TypeError, ValueError) as error:
    raise errors.UserError(
      f"config.data.buckets={tuple(sizes)}: give (slices, tokens of a slice) or"
      " (slices, tokens of a slice, tokens) for each"
    ) from error
  short = [bucket for bucket in found if bucket.frames < slices]
  if short:
    raise errors.UserError(
      f"config.data.buckets: {short[0]} has fewer slices than the {slices} of"
      f" {config.data.num_frames} frames; no clip would use it"
    )
  return sorted(found, key=lambda b: (b.tokens, b.frames * b.frame_tokens))


def host_rewards(tokenizer, ids, questions) -> np.ndarray:
  """Returns f32[B,G] rewards of answers i32[B,G,M] of any problem type."""
  return np.stack(
    [
      rewards_lib.rewards(
        question.problem_type,
        [tokenizer.decode(answer) for answer in answers],
        question.answer,
      )
      for answers, question in zip(ids, questions, strict=True)
    ]
  )


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
  for key, least in (("total_steps", 0), ("iterations", 1)):
    if config[key] < least:
      raise errors.UserError(
        f"config.{key}={config[key]} must be at least {least}"
      )


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


def _clip_source(config, workdir, checkpoint, processor, recipes):
  """Returns the source of pixels, or of features that are kept on disk.

  Videos of several grids always come as features: their tower runs in programs
  of its own, one per bucket.
  """
  data, model = config.data, checkpoint.model
  rule = pipeline.FrameRule(data.num_frames, data.frame_rule)
  refused = pipeline.Quarantine(_ledger(workdir)).refused
  cache = None
  if data.feature_cache:
    cache = feature_cache.FeatureCache(data.feature_cache)
  limits = dict(refused=refused, min_side=data.min_side)
  kept = dict(cache=cache, memory_items=data.memory_items)
  identity = f"{checkpoint.identity['sha256']} {jnp.dtype(model.dtype).name}"
  if isinstance(recipes[-1].grid, token_grid.Bucket):
    sizes = [recipe.grid for recipe in recipes]
    return pipeline.GridFeatureSource(
      pipeline.ShotSource(_media_root(config), rule, processor, **limits),
      BucketTower(model, checkpoint.params),
      processor,
      buckets=sizes,
      # Padding may move the last bit: other buckets, other entries.
      identity=f"{identity} {sizes}",
      **kept,
    )
  clips = pipeline.ClipSource(
    _media_root(config),
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
      inputs = processors.TowerInputs(pixels, recipes[-1].grid)
      return model.encode(params, inputs).features

    return jax.vmap(one)(pixels)

  return pipeline.FeatureSource(
    clips,
    functools.partial(encode, _tower_params(checkpoint.params)),
    processor,
    identity=identity,
    num_tokens=recipes[-1].num_video,
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

  def __call__(self, inputs, bucket: token_grid.Bucket):
    """Returns features float[N_max,D] of a processor's `TowerInputs`."""
    return self._encode(self._params, self._model.tower_inputs(inputs, bucket))


def _ledger(workdir) -> str:
  return os.path.join(workdir, "quarantine.jsonl")


class _Batches:
  """Iterates over a run's batches from any step."""

  def __init__(self, config, workdir, checkpoint, questions, source, recipes):
    self._config = config
    self._recipes = {recipe.bucket: recipe for recipe in recipes}
    self._bucketed = isinstance(recipes[-1].grid, token_grid.Bucket)
    self._grid, self._num_video = recipes[-1].grid, recipes[-1].num_video
    self._model = checkpoint.model
    self._tokenizer = checkpoint.tokenizer
    self._questions, self._source = questions, source
    self._ledger = _ledger(workdir)
    self._letters = np.array(
      [self._tokenizer.letter_id(x) for x in question_lib.LETTERS], np.int32
    )
    self._decisive = read_decisive(config)
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
      quarantine=pipeline.Quarantine(self._ledger),
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
        tuple(self._recipes), text, self._model, _LENGTH_STEP
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

  def _own(self, batch) -> step.Own | None:
    """Returns what the videos of a batch have of their own in its bucket."""
    if not self._bucketed:
      return None
    recipe, grids = self._recipes[batch["bucket"]], batch["grids"]

    def stack(trees):
      return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)

    return step.Own(
      grid=stack([token_grid.place(grid, recipe.bucket) for grid in grids]),
      positions=batch["positions"],
      following=batch["following"],
      rungs=stack([recipe.ladder.rungs(grid) for grid in grids]),
    )

  def _convert(self, batch) -> step.Batch:
    questions = batch["questions"]
    options = np.full((len(questions), len(self._letters)), -1, np.int32)
    num_frames = batch["bucket"].frames if self._bucketed else self._grid[0]
    frames_shown = np.zeros((len(questions), num_frames), bool)
    for row, question in enumerate(questions):
      count = len(question.options)
      options[row, :count] = self._letters[:count]
      tokens = self._decisive.get(question.id)
      if tokens is not None:
        area = self._grid[1] * self._grid[2]
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
      own=self._own(batch),
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
