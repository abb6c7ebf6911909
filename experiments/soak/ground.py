"""What harm is done to: commands on a tiny model, and how each should end."""

import contextlib
import functools
import hashlib
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

import configs
from cacovid_jax import errors, files, metrics
from cacovid_jax.training import checkpointing

_CONFIG = pathlib.Path(configs.__file__).with_name("llava_onevision.py")
_LONGEST = 600.0  # Seconds of a command, of which none takes a tenth.
_TRAIN = (
  "total_steps=6", "iterations=1", "ckpt.every_steps=2", "ratio.adaptive=false",
  "sampling.ratio=0.125", "sampling.num_combinations=4",
  "rollout.max_new_tokens=1", "rollout.reward=margin",
  "optimizer.lr_heads=1e-3", "validation.every_steps=3",
  "validation.num_questions=4", "data.prompt_rows=(176,)",
)  # fmt: skip
_WRITTEN = ("policy/*", "results.json", "report.html")
_TIMES = ("seconds_per_step", "compile_seconds")


class Harm(NamedTuple):
  """A signal to one process of a command."""

  place: str  # Of `child.PLACES`; "" is the start.
  delay: float  # Seconds behind it.
  signal: int
  victim: int  # Number of the process.


class Ended(NamedTuple):
  """How a command ended."""

  codes: Sequence[int]  # Of its processes, the victim's first.
  told: str  # On standard error.
  # Place -> (seconds, bytes of memory behind it) of each time; "" is the whole.
  places: Mapping[str, Sequence[tuple[float, float]]]

  @property
  def killed(self) -> bool:
    """Whether a signal ended it, or let it save and end."""
    return self.codes[0] in (-signal.SIGKILL, -signal.SIGTERM, 143)

  def faults(self, *allowed: int) -> list[str]:
    """Returns what is wrong with exit codes and words."""
    # Those that wait for a killed one are ended.
    codes = self.codes[:1] if self.codes[0] < 0 else self.codes
    out = [f"exit code {x}" for x in codes if x not in allowed]
    out += ["a traceback"] if "Traceback" in self.told else []
    return [f"{x}: {self.told[-2000:]}" for x in out]


class Ground:
  """A folder in which commands run; data and model are made when needed."""

  def __init__(self, workdir, clips=()):
    self.workdir = pathlib.Path(workdir).absolute()
    self.workdir.mkdir(parents=True, exist_ok=True)
    self.clips = clips  # Paths of clips that are no part of it.
    self.reference = functools.cache(self._reference)
    self.pace = functools.cache(self._pace)

  @functools.cached_property
  def data(self) -> pathlib.Path:
    """The folder of the questions and clips, below that of the model."""
    out = self.workdir / "data"
    arguments = ["--clips=4,2,2,0", "--nodecisive", "--variants=dense"]
    arguments += [f"--out={out}", "--tiny_models=llava_onevision"]
    self._expect(self._run([("cacovid_jax.prepare", arguments)]))
    return out / "dense"

  def fresh(self, name: str) -> pathlib.Path:
    """Returns an empty folder."""
    shutil.rmtree(self.workdir / name, ignore_errors=True)
    (self.workdir / name).mkdir()
    return self.workdir / name

  def commands(self, name: str, folder, flags) -> list[tuple[str, list[str]]]:
    """Returns module and arguments of each process of a command.

    Names are `train`, `two` (processes that train) and `evaluate`.
    """
    module, overrides = "cacovid_jax.train", _TRAIN
    if name == "evaluate":
      module, overrides = "cacovid_jax.evaluate", ()
      flags = (f"--policy={self.reference('train')[0]}", *flags)
    model, data = self.data.with_name("llava_onevision"), self.data
    overrides = (f"model.path={model}", f"data.root={data}", *overrides)
    arguments = [f"--config={_CONFIG}:debug", f"--workdir={folder}"]
    arguments += [*(f"--config.{text}" for text in overrides), *flags]
    if name != "two":
      return [(module, arguments)]
    with socket.socket() as free:
      free.bind(("localhost", 0))
      arguments.append(f"--coordinator=localhost:{free.getsockname()[1]}")
    arguments += ["--config.videos_per_step=2", "--num_processes=2"]
    return [(module, [*arguments, f"--process_id={i}"]) for i in range(2)]

  def run(self, name, folder, *, harm=None, limit=0, flags=()) -> Ended:
    """Runs a command of `commands` in a workdir; `limit` is that of `child`."""
    return self._run(self.commands(name, folder, flags), harm, limit)

  def _reference(self, name: str) -> tuple[pathlib.Path, dict[str, str]]:
    """Returns (workdir, end state) of a run without harm."""
    folder = self.fresh(f"reference_{name}")
    self._expect(self.run(name, folder))
    return folder, end_state(folder)

  def _pace(self, name: str) -> Mapping[str, Sequence[tuple[float, float]]]:
    """Returns the places of a run that has nothing to compile."""
    self.reference(name)
    return self._expect(self.run(name, self.fresh(f"again_{name}"))).places

  def _expect(self, ended: Ended) -> Ended:
    """Stops at a run that should have gone well."""
    if faults := ended.faults(0):
      raise errors.UserError(f"a run without harm failed: {faults[0]}")
    return ended

  def _run(self, commands, harm=None, limit=0) -> Ended:
    """Runs the processes of a command to their end, harmed or not."""
    environment = os.environ | {
      "JAX_PLATFORMS": "cpu",
      "XLA_FLAGS": "--xla_force_host_platform_device_count=1",
      "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
      "JAX_COMPILATION_CACHE_DIR": str(self.workdir / "compiled"),
      "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
      "PYTHONPATH": str(_CONFIG.parents[1]),
    }
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as on:
      marks = pathlib.Path(scratch)
      told = on.enter_context(open(marks / "told", "w+", errors="replace"))
      processes = []
      for number, (module, arguments) in enumerate(commands):
        (marks / str(number)).mkdir()
        given = [str(marks / str(number)), str(limit), module, *arguments]
        process = subprocess.Popen(
          [sys.executable, "-m", "experiments.soak.child", *given],
          env=environment,
          stdout=subprocess.DEVNULL,
          stderr=told,
        )
        on.callback(process.kill)
        processes.append(process)
      victim = harm.victim % len(processes) if harm else 0
      first = processes.pop(victim)
      if harm:
        _disturb(first, harm, marks / str(victim) / harm.place)
      codes = [_code(first)]
      for process in processes:
        if codes[0] < 0:  # The others wait for it, a minute or for ever.
          process.kill()
        codes.append(_code(process))
      places = {"": [(time.monotonic() - start, 0.0)]}
      for path in (marks / "0").iterdir():
        rows = map(str.split, path.read_text().splitlines())
        places[path.name] = [tuple(map(float, row)) for row in rows]
      told.seek(0)
      return Ended(codes, told.read(), places)


def _disturb(process, harm: Harm, mark: pathlib.Path) -> None:
  """Sends the signal when its time has come, unless the process has ended."""
  while process.poll() is None and not mark.exists():
    time.sleep(0.002)
  with contextlib.suppress(subprocess.TimeoutExpired):
    process.wait(harm.delay)
    return
  process.send_signal(harm.signal)


def _code(process) -> int:
  """Returns the exit code, 1000 of one that had to be ended."""
  try:
    return process.wait(_LONGEST)
  except subprocess.TimeoutExpired:
    process.kill()
    return 1000


def end_state(folder: pathlib.Path) -> dict[str, str]:
  """Returns part -> sha256 of what a finished workdir holds.

  Parts are exported files, lines of metrics without times (among them rewards)
  and the leaves of the last checkpoint (parameters, optimiser state).
  """
  paths = [p for pattern in _WRITTEN for p in sorted(folder.glob(pattern))]
  found = {
    str(path.relative_to(folder)): files.sha256(path)
    for path in paths
    if path.suffix != ".partial"  # Of a write that a kill cut off.
  }
  for number, line in enumerate(metrics.read(folder)):
    kept = {k: v for k, v in line.items() if k not in _TIMES}
    text = json.dumps(kept, sort_keys=True)
    found[f"metrics line {number}"] = hashlib.sha256(text.encode()).hexdigest()
  if steps := checkpointing.steps(folder / "checkpoints"):
    manifest = checkpointing.read_manifest(folder / "checkpoints", steps[-1])
    like = {
      name: jnp.zeros(leaf["shape"], leaf["dtype"])
      for name, leaf in manifest["leaves"].items()
    }
    _, state = checkpointing.restore_latest(folder / "checkpoints", like)
    for name, leaf in state.items():
      found[name] = hashlib.sha256(np.asarray(leaf).tobytes()).hexdigest()
  return found


def differences(folder: pathlib.Path, expected: Mapping[str, str]) -> list[str]:
  """Returns the parts of a workdir that are not as in a run without harm."""
  found = end_state(folder)
  parts = sorted({*found, *expected})
  return [f"{x} differs" for x in parts if found.get(x) != expected.get(x)]
