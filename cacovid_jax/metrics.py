"""Numbers of a run: JSON lines, TensorBoard and, if asked for, W&B."""

import contextlib
import hashlib
import itertools
import math
import os
import pathlib
import time
from typing import Any

from cacovid_jax import errors, files, json_lines
from cacovid_jax.remote import mirror as remote

FILE = "metrics.jsonl"


class MetricsWriter(contextlib.ExitStack):
  """Appends scalars to `metrics.jsonl`, TensorBoard event files and W&B.

  Lines of steps behind `step`, which a resumed run is going to compute again,
  are removed first; a file with damaged lines is kept aside as it was. Of
  several processes one writes and is `enabled`.
  """

  def __init__(
    self, workdir, step=0, *, tensorboard=True, wandb_project="", enabled=True
  ):
    """Opens the files; W&B is left alone without a project.

    Without a network set WANDB_MODE=offline, and send runs by `wandb sync`.
    """
    super().__init__()
    self._path = self._events = self._wandb = None
    if not enabled:
      return
    self._path = path = pathlib.Path(workdir, FILE)
    files.make_folder(path.parent)
    _remove_behind(path, step)
    if tensorboard:
      self._events = _Events(path.with_name("tensorboard"), step + 1)
      self.callback(self._events.close)
    if wandb_project:
      self._wandb = _start_wandb(path.parent, wandb_project)
      self.callback(self._wandb.finish)

  def write_scalars(self, step, scalars):
    """Writes {name: number} of one step to the disk, so that none is lost.

    JSON has no NaN and no infinity: they are written as null.
    """
    numbers = {name: number(value) for name, value in scalars.items()}
    finite = {n: x if math.isfinite(x) else None for n, x in numbers.items()}
    if self._path:
      json_lines.append(self._path, [{"step": int(step), **finite}])
    if self._events:
      self._events.write(int(step), numbers)
    if self._wandb:
      self._wandb.log(numbers, step=int(step))


def _start_wandb(workdir: pathlib.Path, project: str):
  """Returns the W&B run of a workdir; a run that resumes keeps its id."""
  try:
    import wandb
  except ImportError:
    raise errors.UserError(
      'config.wandb.project needs wandb: pip install "cacovid_jax[wandb]", or'
      " leave it empty"
    ) from None
  mirror = remote.of(workdir)
  named = mirror.store.url if mirror else workdir.resolve()
  digest = hashlib.sha256(os.fsencode(named)).hexdigest()
  return wandb.init(
    project=project, id=digest[:16], name=workdir.name,
    dir=None if mirror else workdir, resume="allow",
  )  # fmt: skip


class _Events:
  """TensorBoard's event file, written by the thread that asks for it.

  tensorboardX's own thread ends on a full disk, and a run then waits for it
  without an end.
  """

  def __init__(self, folder: pathlib.Path, first_step: int):
    # Takes PyTorch along where there is one: seconds.
    from tensorboardX import event_file_writer, summary
    from tensorboardX.proto import event_pb2

    self._folder, self._scalar = folder, summary.scalar
    self._mirror, self._published = remote.of(folder), 0
    self._event, start = event_pb2.Event, event_pb2.SessionLog.START
    files.make_folder(folder)
    with files.writing(folder):
      self._file = event_file_writer.EventsWriter(str(folder / "events"))
    # Hides what an earlier start wrote of the steps from here on.
    self._add(first_step, file_version="brain.Event:2")
    self._add(first_step, session_log=event_pb2.SessionLog(status=start))

  def write(self, step: int, numbers: dict[str, float]) -> None:
    for name, value in numbers.items():
      self._add(step, summary=self._scalar(name, value))
    with files.writing(self._folder):
      self._file.flush()
    self._publish(1.25)

  def close(self) -> None:
    # What is not on disk by now was told when it was written.
    with contextlib.suppress(OSError):
      self._file.close()
    self._publish(1)

  def _publish(self, growth: float) -> None:
    """Writes files to a store each time that they have grown by a quarter.

    Each write is of a whole file: of n events, 5 n are written in all.
    """
    if self._mirror:
      found = list(self._folder.iterdir())
      size = sum(path.stat().st_size for path in found)
      if size > self._published * growth:
        for path in found:
          self._mirror.publish(path)
        self._published = size

  def _add(self, step: int, **content) -> None:
    event = self._event(wall_time=time.time(), step=step, **content)
    with files.writing(self._folder):
      self._file.write_event(event)


def read(workdir) -> list[dict[str, Any]]:
  """Returns the lines of `metrics.jsonl` as dicts, without damaged ones."""
  return json_lines.look(pathlib.Path(workdir) / FILE, _row, "left out")


def seconds(workdir) -> float:
  """Returns what a training took, without compilation and interruptions."""
  lines = [line for line in read(workdir) if "seconds_per_step" in line]
  steps = [0, *(line["step"] for line in lines)]
  pairs = zip(lines, itertools.pairwise(steps), strict=True)
  return sum(x["seconds_per_step"] * (end - begin) for x, (begin, end) in pairs)


def _remove_behind(path: pathlib.Path, step: int) -> None:
  """Removes the lines of steps that come again, all or nothing."""
  data = path.read_bytes() if path.exists() else b""
  lines = json_lines.parse(data, _row)
  rows = [line.value for line in lines if line.value is not None]
  if count := len(lines) - len(rows):
    json_lines.set_aside(path, data, count, "the other lines are kept")
  json_lines.tell_plain(path, lines)
  kept = (row for row in rows if row["step"] <= step)
  files.write(path, map(json_lines.encode, kept))


def _row(record: dict[str, Any]) -> dict[str, Any]:
  if type(record["step"]) is not int:
    raise TypeError("a step is a whole number")
  seconds = record.get("seconds_per_step") or 0
  if not (isinstance(seconds, int | float) and 0 <= seconds < 1e9):
    raise TypeError("seconds are a number")
  return record


def number(value) -> float:
  """Returns a Python float of a number or an array of one element."""
  return float(value.item() if hasattr(value, "item") else value)
