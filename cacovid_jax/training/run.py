"""From an experiment to everything that the training loop works with.

Letters: T frames, N video tokens, L prompt tokens, D width, B videos of a step,
A letters.
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from cacovid_jax import errors
from cacovid_jax import experiment as experiment_lib
from cacovid_jax.data import frames as frames_lib
from cacovid_jax.data import left_out
from cacovid_jax.data import question as question_lib
from cacovid_jax.inference import features
from cacovid_jax.models import processors, token_grid
from cacovid_jax.parallel import mesh as mesh_lib
from cacovid_jax.policy import loading
from cacovid_jax.training import (
  batches,
  optimizer,
  programs,
  ratio,
  rollout,
  seams,
  step,
)


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
    store: gives their clips, see `inference.features`.
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
  store: Any

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


def make(experiment, *, questions=None, store=None, parts=None) -> Run:
  """Builds a run.

  Args:
    experiment: `experiment.Experiment`; its workdir gets the list of bad clips.
    questions: rows to train on; read from config.data by default.
    store: what gives a question's clip, as `features.FeatureStore` does; by
      default the clips below config.data.root, encoded by the base model.
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
  checkpoint = experiment.loaded
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
  if store is None:
    store = open_store(experiment, processor)
  stream = batches.Batches(
    experiment, questions, store, [one.ladder for one in configs]
  )
  return Run(
    config=configs[-1],
    programs=programs.Programs(
      configs,
      mesh,
      host_rewards=from_host,
      map_with=config.mesh.get("map", "shard_map"),
      num_lengths=len(stream.prompts.text_rows),
    ),
    mesh=mesh,
    constants=constants,
    init_params=functools.partial(
      loading.init_policy, policy, checkpoint.params, config.seed, init
    ),
    batches=stream,
    reward=functools.partial(host_rewards, checkpoint.tokenizer, parts.rollout)
    if from_host
    else None,
    base_model=dict(checkpoint.identity),
    described_policy={"policy": options}
    | ({"module_sha256": digest} if digest else {})
    | ({"code": parts.code} if parts.code else {}),
    code=parts.code,
    questions=questions,
    store=store,
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


def open_store(experiment, processor, **options) -> features.FeatureStore:
  """Returns the clips that are trained on, encoded.

  Args:
    experiment: of the run; clips that its workdir lists as bad are refused.
    processor: see `make_processor`.
    **options: further ones of `features.FeatureStore`.
  """
  data, mesh = experiment.config.data, experiment.mesh
  listed = batches.rejected_path(experiment.workdir)
  here = [
    device
    for device in mesh.devices[:, 0]
    if device.process_index == jax.process_index()
  ]
  params = experiment.loaded.params
  if jax.process_count() > 1:
    # Which clips are encoded depends on what this process has on disk.
    params = {k: v for k, v in params.items() if k != "language_model"}
    params = jax.tree.map(lambda x: jnp.asarray(programs.gather(x)), params)
  return features.open_store(
    experiment,
    processor,
    frames_lib.FrameRule(data.num_frames, data.frame_rule),
    params=params,
    keep=options.pop("keep", data.memory_items),
    reading={
      "min_side": data.min_side,
      "refused": left_out.RejectedClips(listed).refused,
      "hashed": bool(data.feature_cache),
    },
    mesh=mesh_lib.make_mesh(len(here), devices=here) if here[1:] else None,
    only_buckets=not processor.one_grid,
    **options,
  )
