"""A set-up that is looked at, and what several checks ask of it."""

import dataclasses
import functools
import math
from typing import Any

import jax

from cacovid_jax import errors
from cacovid_jax import experiment as experiment_lib
from cacovid_jax.data import left_out, readers
from cacovid_jax.evals import cost, estimate, evaluation
from cacovid_jax.inference import clip_queue
from cacovid_jax.models import checkpoints, hub
from cacovid_jax.policy import loading
from cacovid_jax.training import batches, run, seams, step

# Questions whose prompts are measured, or whose clips' grids differ.
_SAMPLE = 2000
_FEW = 64


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
  """A set-up and what several checks ask of it, made when first asked for."""

  experiment: experiment_lib.Experiment
  num_clips: int = 4  # That are decoded.
  seconds_per_video: float = 0  # 0 where nobody says.
  device_bytes: int = 0  # 0 is what there is.

  config = property(lambda self: self.experiment.config)
  trains = property(lambda self: self.experiment.split == "videos_per_step")
  model = property(lambda self: self.bare.checkpoint.model)

  @property
  def directory(self) -> str:
    """The folder of the base model, which config.model.path names."""
    return hub.directory(self.config.model.path)

  @functools.cached_property
  def bare(self) -> experiment_lib.Experiment:
    """The experiment with a base model that has no weights."""
    return estimate.without_weights(self.experiment, published=False)

  @functools.cached_property
  def survey(self) -> tuple[int, int, list[str]]:
    """Files, bytes and dtypes of the weights, see `checkpoints.survey`."""
    return checkpoints.survey(self.directory, self.model.config)

  @functools.cached_property
  def identity(self) -> dict[str, str]:
    """What the base model's weights are told apart by; reads all of them."""
    self.survey  # noqa: B018  Damaged ones are of no model.
    return checkpoints.identity(self.directory)

  @property
  def tokenizer(self):
    """The base model's tokenizer; one without is refused."""
    found, folder = self.bare.checkpoint.tokenizer, self.directory
    told = f"{folder}: no tokenizer.json; give a complete checkpoint directory"
    errors.check(found is not None, told)
    return found

  @functools.cached_property
  def left_out(self) -> left_out.SkippedRows:
    """What `rows` leaves out."""
    return left_out.SkippedRows()

  @functools.cached_property
  def rows(self):
    """The questions of the training."""
    return experiment_lib.read_questions(self.config, left_out=self.left_out)

  @functools.cached_property
  def benchmark(self):
    """The questions of the evaluation."""
    return evaluation.load_benchmark(self.experiment)

  @functools.cached_property
  def videos(self) -> list[str]:
    """The distinct clips that are there, in order."""
    if self.trains:
      return sorted({row.video for row in self.rows})
    names = {question.video for question in self.benchmark.questions}
    return sorted(names - {*readers.find_missing(names, self.benchmark.root)})

  @functools.cached_property
  def processor(self):
    """What is done to frames."""
    if self.trains:
      return run.make_processor(self.config, self.model)
    return clip_queue.read_processor(self.bare)

  @functools.cached_property
  def steps(self) -> list[step.StepConfig]:
    """The training's StepConfigs, see `run.make_step_configs`."""
    config = run.with_total_steps(self.bare, self.rows).config
    options = {k: v for k, v in config.policy.items() if k != "init"}
    policy, _ = loading.make_policy(self.model.config.text, options)
    given = policy, seams.load(config), self.processor
    return run.make_step_configs(config, self.bare.checkpoint, *given)

  @functools.cached_property
  def prompts(self) -> tuple[int, ...]:
    """Lengths that the training's prompts are padded to, of a sample."""
    count = len(self.rows)
    rows = [self.rows[i] for i in range(0, count, -(-count // _SAMPLE))]
    ladders = [one.ladder for one in self.steps]
    asked = dataclasses.replace(self.bare.checkpoint, tokenizer=self.tokenizer)
    found = batches.prompt_buckets(self.config, rows, asked, ladders)
    return found.text_rows

  @functools.cached_property
  def state(self) -> step.TrainState:
    """Shapes of the training's state."""

    def make(params):
      made = self.steps[0].policy.init_from_llm(jax.random.key(0), params)
      return step.TrainState.create(made, self.steps[0].tx)

    return jax.eval_shape(make, checkpoints.param_shapes(self.model.config))

  @functools.cached_property
  def estimate(self) -> dict[str, Any]:
    """What the evaluation takes, see `estimate.estimate`."""
    asked, speed = self.benchmark, cost.Speed(math.inf, math.inf)
    if not self.seconds_per_video:
      speed = estimate.speed_of(self.config.table, self.config.model.dtype)
    if not self.processor.one_grid:
      asked = asked.limited(_FEW)
    shards = self.config.mesh.data or self.experiment.mesh.shape["data"]
    return estimate.estimate({"": self.bare}, {"": asked}, speed, shards)

  @property
  def grid(self) -> tuple[int, int, int]:
    """(T, H, W) of the largest video that is trained on."""
    ladder = self.steps[-1].ladder
    if ladder.plans:
      return ladder.grid
    return (ladder.bucket.frames, 1, ladder.bucket.frame_tokens)
