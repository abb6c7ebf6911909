"""From an experiment to everything that the training loop works with.

Letters: B videos of a step, G combinations, M new tokens.
"""

import dataclasses
import os

import jax
import jax.numpy as jnp
import numpy as np

from cacovid_jax import errors
from cacovid_jax import experiment as experiment_lib
from cacovid_jax.data import frames as frames_lib
from cacovid_jax.data import left_out
from cacovid_jax.inference import features
from cacovid_jax.models import hub, processors, token_grid
from cacovid_jax.parallel import mesh as mesh_lib
from cacovid_jax.policy import loading, network
from cacovid_jax.training import (
  batches,
  optimizer,
  programs,
  ratio,
  rollout,
  seams,
  step,
)


class Run:
  """What the loop works with, made of an `experiment.Experiment`.

  Its config says where questions, store (which gives their clips, as
  `features.FeatureStore` does) and parts (`seams.Seams`) come from unless they
  are given; its workdir gets the list of bad clips.
  """

  def __init__(self, experiment, *, questions=None, store=None, parts=None):
    parts = parts or seams.load(experiment.config)
    if questions is None:
      questions = experiment_lib.read_questions(experiment.config)
    experiment = with_total_steps(experiment, questions)
    config, mesh = experiment.config, experiment.mesh
    self._loaded, self._rollout = experiment.loaded, parts.rollout
    model, tokenizer = self._loaded.model, self._loaded.tokenizer
    from_host = host_rewards(parts.rollout, questions, tokenizer)
    options = dict(config.policy)
    self._init, self._seed = options.pop("init"), config.seed
    policy, digest = loading.make_policy(model.config.text, options)
    processor = make_processor(config, model)
    configs = make_step_configs(config, self._loaded, policy, parts, processor)
    for one in configs:
      seams.check(config, one, questions)
    # Where grids differ, of the largest bucket.
    self.config: step.StepConfig = configs[-1]
    vocab_size = model.config.text.vocab_size
    letters = rollout.first_letters(tokenizer, vocab_size)
    self.constants = step.Constants(
      params=mesh_lib.shard_base_params(self._loaded.params, mesh),
      letters=mesh_lib.put(letters, mesh, programs.ONE),
      seed=mesh_lib.put(np.uint32(config.seed % 2**32), mesh, programs.ONE),
    )
    self.questions, self.mesh = questions, mesh
    self.store = open_store(experiment, processor) if store is None else store
    # start step -> iterator of (step.Batch on the host, questions).
    self.batches = batches.Batches(
      experiment, questions, self.store, [one.ladder for one in configs]
    )
    self.programs = programs.TrainingPrograms(
      configs,
      mesh,
      host_rewards=from_host,
      map_with=config.mesh.get("map", "shard_map"),
    )
    self.base_model = dict(self._loaded.identity)
    self.code = parts.code
    # What policy_config.json says about it.
    self.described_policy = {"policy": options}
    self.described_policy |= {"module_sha256": digest} if digest else {}
    self.described_policy |= {"code": parts.code} if parts.code else {}

  @property
  def described_grid(self) -> list:
    """[T, H, W] of all videos, or the sizes of each bucket."""
    if self.config.ladder.plans:
      return list(self.config.ladder.grid)
    return [dataclasses.astuple(b) for b in self.programs.configs]

  def init_params(self):
    """Returns the policy's first parameters, drawn or those of a file."""
    policy, key = self.config.policy, jax.random.key(self._seed)
    params = policy.init_from_llm(key, self._loaded.params)
    return loading.load(self._init, policy, params) if self._init else params

  def init_state(self) -> step.TrainState:
    """Returns the state before the first step, on the mesh."""
    state = step.TrainState.create(self.init_params(), self.config.tx)
    return mesh_lib.put(state, self.mesh, programs.ONE)

  def reward(self, ids, questions) -> np.ndarray:
    """Returns f32[B,G], of the host, of answers i32[B,G,M] of any type."""
    decode, config = self._loaded.tokenizer.decode, self._rollout
    return np.stack(
      [
        seams.host_reward(config, question, list(map(decode, answers)))
        for answers, question in zip(ids, questions, strict=True)
      ]
    )


def with_total_steps(experiment, questions):
  """Returns the experiment with the steps of one epoch if it leaves them open.

  Its hash is another than the workdir's: no checkpoint of other rows fits.
  """
  config = experiment.config
  if config.total_steps:
    return experiment
  steps = -(-len(questions) // config.videos_per_step)
  return experiment.replace({"total_steps": steps})


def make_processor(config, model) -> processors.Processor:
  """Returns the processor of the checkpoint, with the config's pixel limits."""
  data, path = config.data, hub.find(config.model.path)
  found = model.read_processor(path) if os.path.isdir(path) else model.processor
  if found.one_grid and (data.min_pixels or data.max_pixels):
    raise errors.UserError(
      "config.data.min_pixels and max_pixels are for models whose grids differ"
      " (Qwen2.5-VL); leave them empty for this one"
    )
  one_grid = found.grid_of(frame_rule(config)) is not None
  if one_grid and data.buckets:
    raise errors.UserError(
      "config.data.buckets is for videos whose grids differ (Qwen2.5-VL, or"
      f" data.frame_rule={frames_lib.PUBLIC_RULE}); leave it empty"
    )
  if data.decisive_file and not one_grid:
    raise errors.UserError(
      "config.data.decisive_file names tokens of one grid, but the videos of"
      " this model or data.frame_rule differ; leave it empty"
    )
  return found.with_bounds(data.min_pixels, data.max_pixels)


def frame_rule(config) -> frames_lib.FrameRule:
  """Returns which frames of a clip are trained on."""
  return frames_lib.FrameRule(config.data.num_frames, config.data.frame_rule)


def make_step_configs(config, checkpoint, policy, parts, processor):
  """Returns StepConfigs, one per bucket, rising, or that of the one grid."""
  bounds, rule = ratio.RatioConfig(**config.ratio), frame_rule(config)
  moves = bounds.adaptive or bounds.range
  fixed = None if moves else config.sampling.ratio
  if bounds.adaptive and network.reads_ratio(policy):
    raise errors.UserError(
      "the policy reads the ratio, and config.ratio.adaptive=True moves it"
      " between the iterations of a video, whose old scores are of one; set"
      " config.ratio.adaptive=False, and config.ratio.range=(low, high)"
    )
  if grid := processor.grid_of(rule):
    grids = [grid]
  else:
    grids = token_grid.make_buckets(config.data.buckets, processor, rule)
  iterations = config.iterations
  rates = optimizer.OptimizerConfig(**config.optimizer)
  tx = optimizer.make(rates, config.total_steps * iterations, iterations)
  return [
    step.StepConfig(
      model=checkpoint.model,
      policy=policy,
      tx=tx,
      ladder=ratio.make_ladder(grid, parts.sampler, bounds, fixed=fixed),
      objective=parts.objective,
      rollout=parts.rollout,
      iterations=iterations,
      eos_ids=tuple(checkpoint.eos_ids),
      pad_id=checkpoint.pad_id,
    )
    for grid in grids
  ]


def host_rewards(config, questions, tokenizer) -> bool:
  """Returns whether rewards come from the host; config is the rollout's."""
  if config.marking == "host" or getattr(config.function, "on_host", False):
    return True
  if all(tokenizer.answer_id(row) >= 0 for row in questions):
    return False
  if config.marking == "device" or config.reward != "accuracy":
    name = getattr(config.reward, "__name__", config.reward)
    raise errors.UserError(
      f"rollout.marking={config.marking} with reward={name} needs lettered"
      " questions only; use marking=host and reward=accuracy, or a reward of"
      " your own with on_host = True"
    )
  return True


def open_store(experiment, processor, keep=None) -> features.FeatureStore:
  """Returns the clips that are trained on; the workdir's bad ones refused."""
  data, mesh = experiment.config.data, experiment.mesh
  listed = batches.rejected_path(experiment.workdir)
  refused = left_out.RejectedClips(listed).refused
  hashed = bool(data.feature_cache)
  process = jax.process_index()
  # A device of each place of `data` that is here.
  here = [
    next(x for x in mesh.devices[place] if x.process_index == process)
    for place in mesh_lib.own_places(mesh)
  ]
  params = experiment.loaded.params
  if jax.process_count() > 1:
    # Which clips are encoded depends on what this process has on disk.
    params = {k: v for k, v in params.items() if k != "language_model"}
    params = jax.tree.map(lambda x: jnp.asarray(programs.gather(x)), params)
  return features.open_store(
    experiment,
    processor,
    frame_rule(experiment.config),
    params=params,
    keep=data.memory_items if keep is None else keep,
    reading={"min_side": data.min_side, "refused": refused, "hashed": hashed},
    mesh=mesh_lib.make_mesh(len(here), devices=here) if here[1:] else None,
    only_buckets=True,
  )
