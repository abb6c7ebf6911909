"""The training loop: batches in, a policy out, and no step of work lost.

A run's state is one pytree and its data order a function of the step, so a run
that was killed continues with the very bits it would have computed.

  WORKDIR/config.json            the resolved config; the workdir belongs to it
  WORKDIR/metrics.jsonl, tensorboard/
  WORKDIR/checkpoints/N/         see `training.checkpointing`
  WORKDIR/policy/policy.safetensors, policy_config.json
  WORKDIR/policy/best.safetensors, best.json   with validation
  WORKDIR/quarantine.jsonl       clips that could not be used
"""

import contextlib
import functools
import itertools
import logging
import pathlib
import time
from typing import Any, NamedTuple

import jax
import msgspec
import numpy as np

from cacovid_jax import config as config_lib
from cacovid_jax import errors, files, metrics, schema
from cacovid_jax import experiment as experiment_lib
from cacovid_jax import progress as progress_lib
from cacovid_jax.policy import loading
from cacovid_jax.training import checkpointing, optimizer, preemption, seams
from cacovid_jax.training import programs as programs_lib
from cacovid_jax.training import run as run_lib
from cacovid_jax.training import step as step_lib

_log = logging.getLogger(__name__)

# Shown beside the progress bar; everything else is in the metrics files.
_SHOWN = ("reward_token", "reward_token_greedy", "reward_frame")


class Result(NamedTuple):
  """What a finished run gives back."""

  state: step_lib.TrainState
  policy: Any
  policy_path: pathlib.Path
  run: run_lib.Run


def train(
  experiment, *, questions=None, store=None, validate=None, on_step=None
) -> Result:
  """Trains the policy of an experiment; continues what its workdir holds.

  Args:
    experiment: `experiment.Experiment` whose mesh shares the videos of a step;
      a workdir of another config is refused.
    questions: rows, instead of those of config.data.
    store: clips, see `inference.features`, instead of those of config.data.
    validate: (policy module, params) -> {"accuracy": ..., ...} on validation
      questions; the best policy is then kept beside the last one.
    on_step: called with (steps done, questions, ids i32[B,I,G,M], rewards
      f32[B,I,G]) after each step, for tools that look at answers; these end
      where the reward stops reading.

  Raises:
    SystemExit: with config.ckpt.exit_code, after a SIGTERM; all is saved.
    UserError: a mistake, too many refused steps in a row, a disk that is full,
      or another trainer in the workdir.
  """
  workdir, process = experiment.workdir, jax.process_index()
  role = workdir / (f"train-{process}" if process else "train")
  less = "lower config.sampling.num_combinations, or set config.mesh.model=2"
  with (
    files.claim(role, "trainer", what=workdir),
    errors.during("training", less),
  ):
    return _train(experiment, questions, store, validate, on_step)


def _train(experiment, questions, store, validate, on_step) -> Result:
  """Trains in a workdir of this process alone; arguments as of `train`."""
  workdir = experiment.workdir
  parts = seams.load(experiment.config)
  config_lib.claim_workdir(workdir, experiment.config)
  if questions is None:
    questions = experiment_lib.read_questions(experiment.config, workdir)
  experiment = run_lib.with_total_steps(experiment, questions)
  config = experiment.config
  run = run_lib.Run(experiment, questions=questions, store=store, parts=parts)
  saver = _Saver(config, workdir, run)
  start, state = saver.restore_or_init()
  is_first = jax.process_index() == 0
  writer = metrics.MetricsWriter(
    workdir, start, wandb_project=config.wandb.project, enabled=is_first
  )
  progress = progress_lib.Progress(config.total_steps, start=start)
  with writer, preemption.watched() as reached, contextlib.ExitStack() as shown:
    steps = config.total_steps - start
    batches = _compiled_for(run, state, run.batches(start), steps)
    shown.enter_context(progress)  # One bar at a time.
    recorder = _Recorder(config, run, writer, progress, on_step)
    for done in range(start + 1, config.total_steps + 1):
      batch, rows = next(batches)
      state, *out = _step(run, state, batch, rows)
      recorder.add(done, rows, out)
      stop = reached(done)
      every = config.validation.every_steps
      if validate is not None and every and done % every == 0:
        recorder.flush(state, saver)
        saver.keep_best(state, done, writer, validate)
      due = done % config.ckpt.every_steps == 0
      if due or stop or done == config.total_steps:
        recorder.flush(state, saver)
        saver.save(state, done)
      recorder.check(state, saver)
      if stop and done < config.total_steps:
        _log.warning("stopped by a signal after step %d, saved", done)
        raise SystemExit(config.ckpt.exit_code)
  params = jax.device_get(state.final_params)
  path = saver.export("policy.safetensors", params, config.total_steps)
  return Result(state, run.config.policy, path, run)


def _compiled_for(run: run_lib.Run, state, batches, steps: int):
  """Returns the batches of so many steps, once programs are compiled.

  Those of all shapes; of the first batch's alone where steps are fewer, since
  most would not be used.
  """
  batches = iter(batches)
  first = list(itertools.islice(batches, 1))
  for batch, _ in first:
    shapes = list(run.batches.shapes(batch))
    if steps < len(shapes):
      shapes = [run.batches.whole(batch)]
    run.programs.compile_ahead(state, run.constants, shapes)
  return itertools.chain(first, batches)


def _step(run: run_lib.Run, state, batch, rows):
  """Returns (state, ids, rewards, metrics) after all iterations of a step."""
  placed = programs_lib.place_batch(batch, run.mesh)
  reward = functools.partial(run.reward, questions=rows)
  # Nothing crosses between host and device that the programs do not state.
  with jax.transfer_guard("disallow"):
    return run.programs.run(state, run.constants, placed, reward)


class _Recorder:
  """Writes metrics one step late, so that the device never waits for them."""

  def __init__(self, config, run, writer, progress, on_step):
    self._config, self._programs = config, run.programs
    self._rates = optimizer.OptimizerConfig(**config.optimizer)
    self._writer, self._progress, self._on_step = writer, progress, on_step
    self._pending, self._window = None, []
    self._bad = []  # [(step, question ids)] refused in a row.
    self._since = time.monotonic()
    self._compiled = sum(run.programs.compile_seconds.values())

  def add(self, step, rows, out):
    """Takes a step's results; records the step before."""
    self._record()
    self._pending = step, rows, out

  def flush(self, state, saver):
    self._record()
    self.check(state, saver)

  def check(self, state, saver):
    """Ends a run of which too many steps in a row were refused."""
    if len(self._bad) < max(self._config.max_bad_steps, 1):
      return
    saver.save(state, int(jax.device_get(state.step)))
    ids = list(dict.fromkeys(x for _, found in self._bad for x in found))
    more = f" and {len(ids) - 10} more" if len(ids) > 10 else ""
    raise errors.UserError(
      f"{len(self._bad)} steps in a row were refused (loss, gradient or reward"
      f" not finite), last step {self._bad[-1][0]}; questions:"
      f" {', '.join(ids[:10])}{more}; lower the learning rates, set"
      " config.objective.log_ratio_clamp, or remove these questions"
    )

  def _record(self):
    if self._pending is None:
      return
    (step, rows, out), self._pending = self._pending, None
    ids, rewards, out = jax.tree.map(programs_lib.gather, out)
    if self._on_step is not None:
      self._on_step(step, rows, ids, rewards)
    means = {name: float(np.mean(x)) for name, x in out.mean.items()}
    if means["skipped_update"] > 0:
      finite = np.asarray(out.per_video["finite"]).all(axis=1)
      bad = [row.id for row, ok in zip(rows, finite, strict=True) if not ok]
      # The gradient alone may fail: then any of the videos can be the cause.
      self._bad.append((step, bad or [row.id for row in rows]))
    else:
      self._bad.clear()
    self._window.append(means)
    shown = {name: means[name] for name in _SHOWN if name in means}
    self._progress.update(step, shown)
    if step % self._config.log_every == 0 or step == self._config.total_steps:
      self._write(step)

  def _write(self, step):
    config, rates = self._config, self._rates
    scalars = {
      name: _finite_mean([means[name] for means in self._window])
      for name in self._window[0]
    }
    total = config.total_steps * config.iterations
    for name in ("lr_heads", "lr_layer"):
      rate = optimizer.schedule(
        getattr(rates, name), rates, total, config.iterations
      )
      scalars[name] = float(rate(step * config.iterations - 1))
    now = time.monotonic()
    compiled = sum(self._programs.compile_seconds.values())
    busy = now - self._since - (compiled - self._compiled)
    scalars["videos"] = step * config.videos_per_step
    scalars["seconds_per_step"] = busy / len(self._window)
    scalars["compile_seconds"] = compiled
    self._writer.write_scalars(step, scalars)
    self._window, self._since, self._compiled = [], now, compiled


class _Best(msgspec.Struct):
  """What best.json says of the policy that validation chose."""

  step: schema.Size
  accuracy: schema.Fraction


class _Saver:
  """Checkpoints of the run, and policies for others to use."""

  def __init__(self, config, workdir, run):
    self._config, self._run = config, run
    self._directory = workdir / "checkpoints"
    self._policy = workdir / "policy"
    self._hash = config_lib.config_hash(config)
    self._saved = None

  def restore_or_init(self):
    """Returns (steps done, state)."""
    state = self._run.init_state()
    found = checkpointing.restore_latest(
      self._directory, state, config_hash=self._hash
    )
    if found is None:
      return 0, state
    step, state = found
    self._saved = step
    manifest = checkpointing.read_manifest(self._directory, step)
    code, accepted = self._run.code, self._config.ckpt.accept_changed_code
    seams.check_code(manifest["metadata"].get("code"), code, accepted)
    _log.info("continuing after step %d", step)
    return step, state

  def save(self, state, step):
    if step == self._saved:
      return
    metadata = {"base_model": self._run.base_model}
    metadata |= {"code": self._run.code} if self._run.code else {}
    given = {"config_hash": self._hash, "keep": self._config.ckpt.keep}
    checkpointing.save(self._directory, step, state, metadata, **given)
    self._saved = step

  def keep_best(self, state, step, writer, validate):
    """Validates, and exports the policy if it is the best one so far."""
    params = jax.device_get(state.final_params)
    found = validate(self._run.config.policy, params)
    writer.write_scalars(
      step, {f"validation_{name}": value for name, value in found.items()}
    )
    if jax.process_index() > 0:  # The first one writes.
      return
    path = self._policy / "best.json"
    best = None
    if path.exists():
      best = schema.read(path, _Best, "delete it to choose anew")
      # Of steps that this run, restored from before, computes again.
      best = best if best.step < step else None
    if best is None or found["accuracy"] > best.accuracy:
      self.export("best.safetensors", params, step)
      files.write_json(path, {"step": step, **found})

  def export(self, name, params, step) -> pathlib.Path:
    """Writes the policy as safetensors under the public names."""
    path = self._policy / name
    if jax.process_index() == 0:
      described = {
        **self._run.described_policy,
        "base_model": self._run.base_model,
        "grid": self._run.described_grid,
        "ratios": list(self._run.config.ladder.ratios),
        "config_hash": self._hash,
        "steps": step,
      }
      loading.export(path, self._run.config.policy, params, described)
    return path


def _finite_mean(values) -> float:
  """Returns the mean of the finite values; NaN if there are none."""
  finite = [value for value in values if np.isfinite(value)]
  return float(np.mean(finite)) if finite else float("nan")
