"""The compiled programs of a run, and the dispatch of one step to them.

Letters: G combinations, I iterations, B videos of a step, M new tokens.

Three schedules, chosen once from the config:
  fixed ratio, device rewards: `fixed_ratio_step`, all iterations inside;
  adaptive ratio, or one drawn for each video, device rewards:
    `prepare_videos`, and one program per rung;
  host rewards: `prepare_videos`, one rollout program per rung, and `update`.
So at most 2 + rungs programs for each `Shape`.
They are compiled ahead of time and called as executables, which cannot retrace;
a run compiles those of all its shapes side by side, before its first step.
"""

import functools
import logging
import os
import time
from collections.abc import Iterable
from concurrent import futures
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from cacovid_jax import progress as progress_lib
from cacovid_jax.models import token_grid
from cacovid_jax.parallel import mesh as mesh_lib
from cacovid_jax.training import step as step_lib

_log = logging.getLogger(__name__)

# Prefix trees of the arguments' and results' placement.
ONE = P()
EACH = P(step_lib.AXIS)
_METRICS = step_lib.Metrics(mean=ONE, per_video=EACH)


class Shape(NamedTuple):
  """Static sizes of a step: the bucket of its grids, L of its prompts.

  And how many rows of text in front of the videos are read once.
  """

  bucket: token_grid.GridBucket
  length: int
  shared_rows: int = 0

  @classmethod
  def of(cls, batch: step_lib.Batch) -> "Shape":
    """Returns that of a batch before its prompts are embedded."""
    length = batch.prompts.ids.shape[1]
    return cls(batch.grid.bucket, length, batch.shared_rows)


class TrainingPrograms:
  """Programs of a run on one mesh, a set for each `Shape`."""

  def __init__(
    self, configs, mesh, *, host_rewards=False, map_with="shard_map"
  ):
    """Compiles nothing yet; configs, one per bucket, differ in the ladder."""
    self.configs = {config.ladder.bucket: config for config in configs}
    self.mesh = mesh
    self.host_rewards = host_rewards
    # Of what was compiled so far; side by side, more than the clock's.
    self.compile_seconds: dict[tuple[Shape, str], float] = {}
    self._map_with, self._compiled = map_with, {}

  def limit(self, bucket: token_grid.GridBucket) -> int:
    """Returns how many programs a `Shape` of this bucket may have."""
    rungs = len(self.configs[bucket].ladder)
    return 1 if rungs == 1 and not self.host_rewards else 2 + rungs

  def run(self, state, constants, batch: step_lib.Batch, reward=None):
    """Runs all iterations on one batch of videos.

    All but `reward` lie on the mesh; the state's buffers are given up. With
    host rewards, `reward` maps ids i32[B,G,M] to f32[B,G].

    Returns (state, ids [B,I,G,M], rewards [B,I,G], Metrics with means [I] and
    per-video arrays [B,I]). The one program leaves them on the device;
    otherwise they are joined on the host.
    """
    shape = Shape.of(batch)
    config = self.configs[shape.bucket]
    call = functools.partial(self.call, shape)
    if self.limit(shape.bucket) == 1:
      return call("fixed_ratio_step", state, constants, batch)
    videos, memory = call("prepare_videos", state, constants, batch)
    outs = []
    drawn = config.ladder.drawn
    first = memory.rung if drawn else batch.rungs.start
    max_rung = int(gather(first).max())
    for _ in range(config.iterations):
      if self.host_rewards:
        ids, masks, memory = call(
          f"rollout_{max_rung}", constants, videos, memory
        )
        rewards = np.asarray(reward(gather(ids)), np.float32)
        placed = mesh_lib.put(rewards, self.mesh, EACH)
        state, memory, metrics = call(
          "update", state, videos, memory, masks, placed
        )
      else:
        state, memory, ids, rewards, metrics = call(
          f"iterate_{max_rung}", state, constants, videos, memory
        )
      outs.append((ids, rewards, metrics))
      if len(config.ladder) > 1 and not drawn:
        # The one scalar per video that leaves the device.
        max_rung = int(gather(metrics.per_video["next_rung"]).max())
    return state, *_join(outs)

  def compile_ahead(
    self, state, constants, batches: Iterable[step_lib.Batch]
  ) -> None:
    """Compiles the programs of batches of some shapes, side by side.

    Those of all rungs that videos can reach in their iterations.

    Args:
      state: on the mesh, as are the constants.
      constants: as of `run`.
      batches: one of each shape, of arrays or `ShapeDtypeStruct`s.

    Raises what compiling one of them raises.
    """
    # Several processes compile alike, in one order.
    pool = futures.ThreadPoolExecutor(
      os.cpu_count() if jax.process_count() == 1 else 1
    )
    try:
      jobs = []
      for batch in batches:
        jobs += self._jobs(pool, state, constants, batch)
      with progress_lib.Progress(len(jobs), description="programs") as bar:
        for done, job in enumerate(futures.as_completed(jobs), start=1):
          job.result()
          bar.update(done)
    finally:
      pool.shutdown(cancel_futures=True)

  def _jobs(self, pool, state, constants, batch) -> list[futures.Future]:
    """Returns the compilations of a batch's programs, after their inputs'."""
    shape, config = Shape.of(batch), self.configs[batch.grid.bucket]
    each = NamedSharding(self.mesh, EACH)
    # As the device will have them, at most 32 bits wide.
    batch = jax.eval_shape(lambda batch: batch, batch)
    batch = jax.tree.map(lambda leaf: _like(leaf, each), batch)

    def submit(name, *args):
      def compile_one():
        given = [arg() if callable(arg) else arg for arg in args]
        return self._compile(shape, name, given)

      return pool.submit(compile_one)

    def result(job, place):
      return lambda: job.result()[place]

    if self.limit(shape.bucket) == 1:
      return [submit("fixed_ratio_step", state, constants, batch)]
    first = submit("prepare_videos", state, constants, batch)
    videos, memory = result(first, 0), result(first, 1)
    rungs = config.ladder.within(config.iterations - 1)
    if not self.host_rewards:
      given = state, constants, videos, memory
      return [first, *(submit(f"iterate_{rung}", *given) for rung in rungs)]
    given = constants, videos, memory
    asked = [submit(f"rollout_{rung}", *given) for rung in rungs]
    masks, memory = result(asked[0], 1), result(asked[0], 2)
    count = len(batch.answer_id), config.ladder.num_combinations
    rewards = jax.ShapeDtypeStruct(count, np.float32, sharding=each)
    learn = submit("update", state, videos, memory, masks, rewards)
    return [first, *asked, learn]

  def call(self, shape: Shape, name: str, *args):
    """Calls a program, compiled on its first call."""
    if (shape, name) not in self._compiled:
      self._compile(shape, name, args)
    return self._compiled[shape, name](*args)

  def jitted(self, bucket: token_grid.GridBucket, name: str):
    """Returns the mapped, jitted function of a program."""
    function, in_specs, out_specs, donated = _definition(
      self.configs[bucket], name
    )
    mapped = mesh_lib.map_over_data(
      function, self.mesh, in_specs, out_specs, how=self._map_with
    )
    return mesh_lib.jit(mapped, "training", donate_argnums=donated)

  def _compile(self, shape, name, args):
    """Compiles a program for arguments like these; returns its results'."""
    bucket, limit = shape.bucket, self.limit(shape.bucket)
    # A copy: other threads add to it.
    known = [name for found, name in list(self._compiled) if found == shape]
    if len(known) >= limit:
      raise RuntimeError(
        f"program {name!r} is one more than the {limit} of this run:"
        f" {sorted(known)}"
      )
    start = time.monotonic()
    # Constants of the traced functions may visit the device.
    with jax.transfer_guard("allow"):
      lowered = self.jitted(bucket, name).trace(*args).lower()
      self._compiled[shape, name] = lowered.compile()
    seconds = time.monotonic() - start
    self.compile_seconds[shape, name] = seconds
    _log.info("compiled %s of %s in %.1f s", name, shape, seconds)
    placed = self._compiled[shape, name].output_shardings
    return jax.tree.map(_like, lowered.out_info, placed)


def _definition(config, name):
  """Returns (function, input specs, output specs, donated arguments)."""
  kind, _, rung = name.rpartition("_")
  options = {"max_rung": int(rung)} if rung.isdigit() else {}
  kind = kind if options else name
  iterated = (ONE, EACH, EACH, EACH, _METRICS)
  specs = {
    "fixed_ratio_step": ((ONE, ONE, EACH), (ONE, EACH, EACH, _METRICS), (0,)),
    "prepare_videos": ((ONE, ONE, EACH), (EACH, EACH), ()),
    "iterate": ((ONE, ONE, EACH, EACH), iterated, (0, 3)),
    "rollout": ((ONE, EACH, EACH), (EACH, EACH, EACH), (2,)),
    "update": ((ONE, EACH, EACH, EACH, EACH), (ONE, EACH, _METRICS), (0, 2)),
  }
  function = functools.partial(getattr(step_lib, kind), config, **options)
  if kind == "rollout":

    def without_logits(*args):
      answers, *others = function(*args)
      return answers.ids, *others

    return without_logits, *specs[kind]
  return function, *specs[kind]


def _like(array, sharding) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)


def place_batch(batch: step_lib.Batch, mesh: Mesh) -> step_lib.Batch:
  """Puts a process's rows of a batch on the mesh, split over `data`."""
  return mesh_lib.put_own(batch, mesh)


def gather(array) -> np.ndarray:
  """Returns a whole array of the mesh on this host."""
  if isinstance(array, np.ndarray):
    return array
  if array.is_fully_addressable:
    return jax.device_get(array)
  with jax.transfer_guard("allow"):  # It is stated here.
    return multihost_utils.process_allgather(array, tiled=True)


def _join(outs):
  """Returns the iterations' (ids, rewards, metrics) stacked on the host."""
  ids, rewards, metrics = zip(*jax.tree.map(gather, outs), strict=True)

  def stack(trees, axis):
    return jax.tree.map(lambda *leaves: np.stack(leaves, axis), *trees)

  mean, per_video = zip(*metrics, strict=True)
  metrics = step_lib.Metrics(stack(mean, 0), stack(per_video, 1))
  return stack(ids, 1), stack(rewards, 1), metrics
