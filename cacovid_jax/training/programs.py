"""The compiled programs of a run, and the dispatch of one step to them.

Letters: G combinations, I iterations, B videos of a step, M new tokens.

Three schedules, chosen once from the config:
  fixed ratio, marks on the device: one program, all iterations inside;
  adaptive ratio, marks on the device: `begin`, and one program per rung;
  marks on the host: `begin`, one rollout program per rung, and `update`.
So at most 2 + rungs programs, and as many for each bucket of grids. They are
compiled ahead of time and called as executables, which cannot retrace: another
shape or dtype is an error, never a silent compilation. No program has a host
callback.
"""

import functools
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from cacovid_jax.parallel import mesh as mesh_lib
from cacovid_jax.training import step as step_lib

_log = logging.getLogger(__name__)

# Prefix trees of the arguments' and results' placement.
ONE = P()
EACH = P(step_lib.AXIS)
_METRICS = step_lib.Metrics(mean=ONE, per_video=EACH)


class Programs:
  """Programs of one recipe on one mesh.

  Attributes:
    compile_seconds: {name: seconds} of what was compiled so far.
  """

  def __init__(
    self, recipe: step_lib.Recipe, mesh: Mesh, *, host_marks: bool = False
  ):
    """Compiles nothing yet.

    Args:
      recipe: the run.
      mesh: with axes `data` and `model`.
      host_marks: rewards come from the host, see `run`.
    """
    self.recipe = recipe
    self.mesh = mesh
    self.host_marks = host_marks
    self.one_program = not host_marks and len(recipe.ladder) == 1
    self.compile_seconds: dict[str, float] = {}
    self._compiled: dict[str, Any] = {}

  @property
  def limit(self) -> int:
    """The number of programs that the run may compile."""
    return 1 if self.one_program else 2 + len(self.recipe.ladder)

  def run(
    self,
    state,
    frozen: step_lib.Frozen,
    batch: step_lib.Batch,
    mark: Callable[[np.ndarray], np.ndarray] | None = None,
  ):
    """Runs all iterations on one batch of videos.

    Args:
      state: TrainState; its buffers are given up.
      frozen: base weights and letter table, on the mesh.
      batch: on the mesh, split over `data`.
      mark: with marks on the host, ids i32[B,G,M] -> rewards f32[B,G].

    Returns:
      (state, ids [B,I,G,M], rewards [B,I,G], Metrics with means [I] and
      per-video arrays [B,I]). The one program leaves them on the device;
      otherwise they are joined on the host.
    """
    if self.one_program:
      return self.call("whole", state, frozen, batch)
    videos, memory = self.call("begin", state, frozen, batch)
    outs = []
    if batch.own is None:
      largest = self.recipe.ladder.start
    else:
      largest = int(gather(batch.own.rungs.start).max())
    for _ in range(self.recipe.iterations):
      if self.host_marks:
        ids, masks = self.call(f"rollout_{largest}", frozen, videos, memory)
        rewards = np.asarray(mark(gather(ids)), np.float32)
        placed = mesh_lib.put(rewards, self.mesh, EACH)
        state, memory, metrics = self.call(
          "update", state, videos, memory, masks, placed
        )
      else:
        state, memory, ids, rewards, metrics = self.call(
          f"iterate_{largest}", state, frozen, videos, memory
        )
      outs.append((ids, rewards, metrics))
      if len(self.recipe.ladder) > 1:
        # The one scalar per video that leaves the device.
        largest = int(gather(metrics.per_video["next_rung"]).max())
    return state, *_join(outs)

  def call(self, name: str, *args):
    """Calls a program, compiled on its first call."""
    if name not in self._compiled:
      self._compile(name, args)
    return self._compiled[name](*args)

  def lower(self, name: str, *args, **kwargs):
    """Returns the lowered program (for its text, or another platform)."""
    return self.jitted(name).trace(*args).lower(**kwargs)

  def jitted(self, name: str):
    """Returns the mapped, jitted function of a program."""
    function, in_specs, out_specs, donated = self._definition(name)
    mapped = jax.shard_map(
      function,
      mesh=self.mesh,
      in_specs=in_specs,
      out_specs=out_specs,
      axis_names=mesh_lib.by_hand(self.mesh),
      # With the check, gradients of replicated parameters arrive summed
      # over devices, and the explicit mean would count them again.
      check_vma=False,
    )
    return jax.jit(mapped, donate_argnums=donated)

  def _compile(self, name, args):
    if len(self._compiled) >= self.limit:
      raise RuntimeError(
        f"program {name!r} is one more than the {self.limit} of this run:"
        f" {sorted(self._compiled)}"
      )
    start = time.monotonic()
    # Constants of the traced functions may visit the device.
    with jax.transfer_guard("allow"):
      self._compiled[name] = self.lower(name, *args).compile()
    self.compile_seconds[name] = time.monotonic() - start
    _log.info("compiled %s in %.1f s", name, self.compile_seconds[name])

  def _definition(self, name):
    """Returns (function, input specs, output specs, donated arguments)."""
    kind, _, rung = name.partition("_")
    recipe = self.recipe
    if kind == "whole":
      return (
        functools.partial(step_lib.whole, recipe),
        (ONE, ONE, EACH),
        (ONE, EACH, EACH, _METRICS),
        (0,),
      )
    if kind == "begin":
      return (
        functools.partial(step_lib.begin, recipe),
        (ONE, ONE, EACH),
        (EACH, EACH),
        (),
      )
    if kind == "iterate":
      return (
        functools.partial(step_lib.iterate, recipe, largest=int(rung)),
        (ONE, ONE, EACH, EACH),
        (ONE, EACH, EACH, EACH, _METRICS),
        (0, 3),
      )
    if kind == "rollout":

      def ids_and_masks(frozen, videos, memory):
        answers, masks = step_lib.roll_out(
          recipe, frozen, videos, memory, largest=int(rung)
        )
        return answers.ids, masks

      return ids_and_masks, (ONE, EACH, EACH), (EACH, EACH), ()
    if kind == "update":
      return (
        functools.partial(step_lib.update, recipe),
        (ONE, EACH, EACH, EACH, EACH),
        (ONE, EACH, _METRICS),
        (0, 2),
      )
    raise ValueError(f"no program is called {name!r}")


class BucketPrograms:
  """Programs for videos of several grids: a set of `Programs` per bucket."""

  def __init__(
    self,
    recipes: Sequence[step_lib.Recipe],
    mesh: Mesh,
    *,
    host_marks: bool = False,
  ):
    """Compiles nothing yet.

    Args:
      recipes: one per bucket, alike but for grid and ladder.
      mesh: as of `Programs`.
      host_marks: as of `Programs`.
    """
    self.by_bucket = {
      recipe.bucket: Programs(recipe, mesh, host_marks=host_marks)
      for recipe in recipes
    }

  @property
  def limit(self) -> int:
    """The number of programs that the run may compile."""
    return sum(made.limit for made in self.by_bucket.values())

  @property
  def compile_seconds(self) -> dict[str, float]:
    """{bucket and name: seconds} of what was compiled so far."""
    return {
      f"{bucket.frames}x{bucket.frame_tokens}/{name}": seconds
      for bucket, made in self.by_bucket.items()
      for name, seconds in made.compile_seconds.items()
    }

  def run(self, state, frozen, batch: step_lib.Batch, mark=None):
    """Runs a batch with the programs of its bucket; see `Programs.run`."""
    bucket = batch.own.grid.bucket
    return self.by_bucket[bucket].run(state, frozen, batch, mark)


def place_batch(batch: step_lib.Batch, mesh: Mesh) -> step_lib.Batch:
  """Puts a batch of host arrays on the mesh, split over `data`."""
  return mesh_lib.put(batch, mesh, EACH)


def replicated(mesh: Mesh) -> NamedSharding:
  """Returns the placement of state and letter table."""
  return NamedSharding(mesh, ONE)


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

  def each(*arrays):
    return np.stack(arrays, axis=1)

  return (
    each(*ids),
    each(*rewards),
    step_lib.Metrics(
      mean=jax.tree.map(lambda *a: np.stack(a), *[m.mean for m in metrics]),
      per_video=jax.tree.map(each, *[m.per_video for m in metrics]),
    ),
  )
