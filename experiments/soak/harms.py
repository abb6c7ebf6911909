"""Sections in which commands are disturbed: kill, concurrency, disk, memory."""

import concurrent.futures
import contextlib
import os
import pathlib
import shutil
import signal
import statistics
from typing import Any

from experiments.soak import ground as ground_lib

# Kind of kill -> (command, place); of ten runs, two are of two processes and
# three inside validation, export and report.
_KILLS = {
  "train": ("train", ""),
  "two processes": ("two", ""),
  "validation": ("train", "validation"),
  "evaluate": ("evaluate", ""),
  "export": ("train", "export"),
  "report": ("evaluate", "report"),
}
_ORDER = (*_KILLS, "train", "two processes", "train", "train")
_TOGETHER = 8  # Evaluations at once.
_SMALL = 2**30  # Bytes of a file system that may be filled up.
_STEADY = 0.05  # Part by which memory may differ from its median.
_WARM = 100  # Steps that allocate what later ones use again.


def kill(ground: ground_lib.Ground, rng, number: int, size: int):
  """Kills a run once or more often, lets it end and compares its end state."""
  kind = _ORDER[number % len(_ORDER)]
  name, place = _KILLS[kind]
  folder = ground.fresh(f"kill_{number}")
  kills = min(size, int(rng.integers(1, 5)))
  count, faults = _survive(
    ground, name, folder, _harms(ground, name, place, rng, kills)
  )
  return _row(folder, kind, count, faults)


def concurrency(ground: ground_lib.Ground, rng, number: int, size: int):
  """Runs evaluations with kills that share a feature cache, all at once."""
  ground.reference("evaluate")  # Once, before the threads ask for it.
  folder = ground.fresh(f"concurrency_{number}")
  harms = [
    _harms(ground, "evaluate", "", rng, rng.integers(3))
    for _ in range(min(size, _TOGETHER))
  ]

  def one(index):
    workdir, cache = folder / str(index), f"--feature_cache={folder / 'cache'}"
    return _survive(ground, "evaluate", workdir, harms[index], [cache])

  with concurrent.futures.ThreadPoolExecutor(_TOGETHER) as pool:
    kills, faults = zip(*pool.map(one, range(len(harms))), strict=True)
  row = _row(folder, f"{len(harms)} at once", len(harms), sum(faults, []))
  return row | {"kills": sum(kills)}


def disk(ground: ground_lib.Ground, rng, number: int, size: int):
  """Fills the disk under a command, then frees it and gives it again.

  On a file system below 1 GiB it is filled up; else files may not grow.
  """
  del size
  name = ("train", "evaluate")[number % 2]
  reference, expected = ground.reference(name)
  sizes = [p.stat().st_size for p in reference.rglob("*") if p.is_file()]
  folder = ground.fresh(f"disk_{number}")
  space = os.statvfs(folder)
  small = space.f_blocks * space.f_frsize < _SMALL
  left = int(rng.integers(2**12, sum(sizes) if small else max(sizes)))
  with _filled(ground.workdir / "filler", space, left, small):
    ended = ground.run(name, folder, limit=0 if small else left)
  faults = ended.faults(0, 2)
  lines = [x for x in ended.told.splitlines() if x.startswith("error: ")]
  if ended.codes[0] == 2 and len(lines) != 1:
    faults.append(f"{len(lines)} lines of error: {ended.told[-2000:]}")
  faults += ground.run(name, folder).faults(0)
  faults += ground_lib.differences(folder, expected)
  return _row(folder, name, int(ended.codes[0] != 0), faults)


def memory(ground: ground_lib.Ground, rng, number: int, size: int):
  """Trains many steps and looks at the trainer's memory after each."""
  del rng
  folder = ground.fresh(f"memory_{number}")
  keys = {"total_steps": size, "validation.every_steps": 0, "log_every": 1}
  keys |= {"ckpt.every_steps": 100}
  flags = [f"--config.{key}={value}" for key, value in keys.items()]
  ended = ground.run("train", folder, flags=flags)
  found = [used for _, used in ended.places.get("metrics", ())]
  kept = found[min(_WARM, size // 2) :] or [0]
  faults, middle = ended.faults(0), statistics.median(kept)
  faults += [
    f"{used:.0f} bytes, not {middle:.0f} ± {_STEADY:.0%}"
    for used in kept
    if abs(used - middle) > _STEADY * middle
  ]
  row = _row(folder, "training", len(found), faults)
  return row | {"least": min(kept), "most": max(kept)}


def _harms(ground, name, place, rng, count) -> list[ground_lib.Harm]:
  """Returns kills at random moments of a place."""
  seconds = ground.pace(name)[place][0][0]
  signals = rng.choice([signal.SIGKILL, signal.SIGTERM], count)
  return [
    ground_lib.Harm(place, seconds * rng.random(), int(sent), rng.integers(2))
    for sent in signals
  ]


def _survive(ground, name, folder, harms, flags=()) -> tuple[int, list[str]]:
  """Returns (kills, faults) of a command that is given again after each."""
  count, faults = 0, []
  for harm in harms:
    ended = ground.run(name, folder, harm=harm, flags=flags)
    # On its way out, a signal may come too late.
    faults += ended.faults(0, -signal.SIGKILL, -signal.SIGTERM, 143)
    count += ended.killed
  faults += ground.run(name, folder, flags=flags).faults(0)
  expected = ground.reference(name)[1]
  return count, faults + ground_lib.differences(folder, expected)


def _row(folder: pathlib.Path, kind, count, faults) -> dict[str, Any]:
  """Returns what the ledger keeps; the folder is kept if there are faults."""
  if not faults:
    shutil.rmtree(folder)
  return {"kind": kind, "count": count, "faults": len(faults), "told": faults}


@contextlib.contextmanager
def _filled(path: pathlib.Path, space, left: int, small: bool):
  """Leaves that many bytes free on a small file system."""
  if small:
    with open(path, "wb") as file:
      size = space.f_bavail * space.f_frsize - left
      os.posix_fallocate(file.fileno(), 0, max(1, size))
  try:
    yield
  finally:
    path.unlink(missing_ok=True)
