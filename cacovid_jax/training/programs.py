"""The compiled programs of a run, and the dispatch of one step to them.

Letters: G combinations, I iterations, B videos of a step, M new tokens.

Three schedules, chosen once from the config:
  fixed ratio, device rewards: `fixed_ratio_step`, all iterations inside;
  adaptive ratio, device rewards: `prepare_videos`, and one program per rung;
  host rewards: `prepare_videos`, one rollout program per rung, and `update`.
So at most 2 + rungs programs for each bucket of grids and length of prompts.
They are compiled ahead of time and called as executables, which cannot retrace.
"""

import functools
import logging
import time
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from cacovid_jax.models import token_grid
from cacovid_jax.parallel import mesh as mesh_lib
from cacovid_jax.training import step as step_lib

_log = logging.getLogger(__name__)

# Prefix trees of the arguments' and results' placement.
ONE = P()
EACH = P(step_lib.AXIS)
_METRICS = step_lib.Metrics(mean=ONE, per_video=EACH)


class Shape(NamedTuple):
  """Static sizes of a step: the bucket of its grids, L of its prompts."""

  bucket: token_grid.GridBucket
  length: int


class TrainingPrograms:
  """Programs of a run on one mesh, a set for each `Shape`."""

  def __init__(
    self, configs, mesh, *, host_rewards=False, map_with="shard_map"
  ):
    """Compiles nothing yet; configs, one per bucket, differ in the ladder."""
    self.configs = {config.ladder.bucket: config for config in configs}
    self.mesh = mesh
    self.host_rewards = host_rewards
    # Of what was compiled so far.
    self.compile_seconds: dict[tuple[Shape, str], float] = {}
    self._map_with, self._compiled = map_with, {}

  def limit(self, bucket: token_grid.GridBucket) -> int:
    """Returns how many programs may be compiled for each length of prompts."""
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
    shape = Shape(batch.grid.bucket, batch.prompts.ids.shape[1])
    config = self.configs[shape.bucket]
    call = functools.partial(self.call, shape)
    if self.limit(shape.bucket) == 1:
      return call("fixed_ratio_step", state, constants, batch)
    videos, memory = call("prepare_videos", state, constants, batch)
    outs = []
    max_rung = int(gather(batch.rungs.start).max())
    for _ in range(config.iterations):
      if self.host_rewards:
        ids, masks = call(f"rollout_{max_rung}", constants, videos, memory)
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
      if len(config.ladder) > 1:
        # The one scalar per video that leaves the device.
        max_rung = int(gather(metrics.per_video["next_rung"]).max())
    return state, *_join(outs)

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
    bucket, limit = shape.bucket, self.limit(shape.bucket)
    known = [name for found, name in self._compiled if found == shape]
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
    "rollout": ((ONE, EACH, EACH), (EACH, EACH), ()),
    "update": ((ONE, EACH, EACH, EACH, EACH), (ONE, EACH, _METRICS), (0, 2)),
  }
  function = functools.partial(getattr(step_lib, kind), config, **options)
  if kind == "rollout":

    def ids_and_masks(*args):
      answers, masks = function(*args)
      return answers.ids, masks

    return ids_and_masks, *specs[kind]
  return function, *specs[kind]


def place_batch(batch: step_lib.Batch, mesh: Mesh) -> step_lib.Batch:
  """Puts a batch of host arrays on the mesh, split over `data`."""
  return mesh_lib.put(batch, mesh, EACH)


def gather(array) -> np.ndarray:
  """Returns a whole array of the mesh on this host."""
  if isinstance(array, np.ndarray):
    return array
  if array.is_fully_addressable:
    return jax.device_get(array)
  return multihost_utils.process_allgather(array, tiled=True)


def _join(outs):
  """Returns the iterations' (ids, rewards, metrics) stacked on the host."""
  ids, rewards, metrics = zip(*jax.tree.map(gather, outs), strict=True)

  def stack(trees, axis):
    return jax.tree.map(lambda *leaves: np.stack(leaves, axis), *trees)

  mean, per_video = zip(*metrics, strict=True)
  metrics = step_lib.Metrics(stack(mean, 0), stack(per_video, 1))
  return stack(ids, 1), stack(rewards, 1), metrics
