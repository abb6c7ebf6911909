"""Where numbers of a run go: JSON lines, TensorBoard, and a progress line."""

import collections
import json
import math
import os
import pathlib
import sys
import time

import rich.console
import rich.progress

FILE = "metrics.jsonl"


class MetricsWriter:
  """Appends scalars to `metrics.jsonl` and to TensorBoard event files.

  A resumed run passes the step it restored: lines of later steps, which it is
  going to compute again, are removed first, so each step is there once. Of
  several processes one writes; the others are not `enabled`.
  """

  def __init__(
    self, workdir, restored_step=0, *, tensorboard=True, enabled=True
  ):
    self._tensorboard = None
    if not enabled:
      self._file = open(os.devnull, "w", encoding="utf-8")
      return
    workdir = pathlib.Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    path = workdir / FILE
    if path.exists():
      _truncate(path, restored_step)
    self._file = open(path, "a", encoding="utf-8")
    if tensorboard:
      import tensorboardX  # Takes PyTorch along where there is one: seconds.

      self._tensorboard = tensorboardX.SummaryWriter(
        str(workdir / "tensorboard"), purge_step=restored_step + 1
      )

  def write_scalars(self, step, scalars):
    """Writes {name: number} of one step; flushed, so that a kill loses none.

    Arrays of one element are taken as their number. JSON has no NaN and no
    infinity: they are written as null.
    """
    numbers = {name: _number(value) for name, value in scalars.items()}
    line = {"step": int(step)}
    for name, value in numbers.items():
      line[name] = value if math.isfinite(value) else None
    self._file.write(json.dumps(line) + "\n")
    self._file.flush()
    if self._tensorboard:
      for name, value in numbers.items():
        self._tensorboard.add_scalar(name, value, int(step))

  def close(self):
    self._file.close()
    if self._tensorboard:
      self._tensorboard.close()

  def __enter__(self):
    return self

  def __exit__(self, *exc_info):
    self.close()


def read(workdir):
  """Returns the lines of `metrics.jsonl` as dicts, without a cut last one."""
  path = pathlib.Path(workdir) / FILE
  return _complete_lines(path) if path.exists() else []


class Progress:
  """A progress bar with time left and running means of metrics.

  On a terminal a live bar; elsewhere a plain line now and then, so that logs
  stay readable.
  """

  def __init__(
    self,
    total,
    *,
    start=0,
    description="train",
    window=20,
    line_seconds=15.0,
    stream=None,
  ):
    """Starts nothing yet; use it as a context manager.

    Args:
      total: number of steps of the whole run.
      start: steps done by an earlier start of the run.
      description: what is being done, in a word.
      window: number of last steps that the running means are over.
      line_seconds: time between two lines where there is no terminal.
      stream: text file to print to; standard error by default.
    """
    self._total, self._start, self._step = total, start, start
    self._description = description
    self._line_seconds = line_seconds
    self._values = collections.defaultdict(
      lambda: collections.deque(maxlen=window)
    )
    self._recent = collections.deque(maxlen=window + 1)  # (time, step)
    self._stream = stream or sys.stderr
    self._console = rich.console.Console(file=self._stream)
    self._bar = self._task = None
    self._last_line = -math.inf
    self._note = ""

  def __enter__(self):
    self._recent.append((time.monotonic(), self._start))
    if self._console.is_terminal:
      self._bar = rich.progress.Progress(
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TextColumn("{task.fields[text]}"),
        console=self._console,
      )
      self._task = self._bar.add_task(
        self._description, total=self._total, completed=self._start, text=""
      )
      self._bar.start()
    return self

  def __exit__(self, *exc_info):
    if self._bar:
      self._bar.stop()
    elif self._step != self._start:
      self._print_line()

  def update(self, step, metrics=None, *, note=""):
    """Shows that `step` steps are done and what they measured.

    Args:
      step: steps done.
      metrics: name -> number.
      note: what is being done now, for steps that take long.
    """
    self._note = note
    if step != self._step:  # A mere note tells nothing of the speed.
      self._recent.append((time.monotonic(), int(step)))
    self._step = int(step)
    for name, value in (metrics or {}).items():
      if math.isfinite(value := _number(value)):
        self._values[name].append(value)
    if self._bar:
      self._bar.update(self._task, completed=self._step, text=self._text())
    elif time.monotonic() - self._last_line >= self._line_seconds:
      self._print_line()

  def means(self):
    """Returns {name: mean over the last `window` steps}."""
    return {
      name: sum(values) / len(values) for name, values in self._values.items()
    }

  def seconds_left(self):
    """Returns the estimate from the rate of the last steps; None at first."""
    (then, first), (now, last) = self._recent[0], self._recent[-1]
    if last <= first:
      return None
    return (self._total - last) * (now - then) / (last - first)

  def _text(self):
    left = self.seconds_left()
    parts = ["eta " + ("?" if left is None else _clock(left))]
    parts += [f"{name} {mean:.3g}" for name, mean in self.means().items()]
    if self._note:
      parts.append(self._note)
    return "  ".join(parts)

  def _print_line(self):
    self._last_line = time.monotonic()
    print(
      f"{self._description} {self._step}/{self._total}  {self._text()}",
      file=self._stream,
      flush=True,
    )


def _number(value):
  return float(value.item() if hasattr(value, "item") else value)


def _clock(seconds):
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return (
    f"{hours}:{minutes:02}:{seconds:02}"
    if hours
    else (f"{minutes}:{seconds:02}")
  )


def _complete_lines(path):
  lines = []
  for text in path.read_text(encoding="utf-8").splitlines():
    try:
      lines.append(json.loads(text))
    except ValueError:
      break  # A kill cut this line, the last one.
  return lines


def _truncate(path, last_step):
  """Removes lines of steps after `last_step`, all or nothing."""
  lines = [line for line in _complete_lines(path) if line["step"] <= last_step]
  partial = path.with_name(path.name + ".partial")
  with open(partial, "w", encoding="utf-8") as file:
    file.writelines(json.dumps(line) + "\n" for line in lines)
    file.flush()
    os.fsync(file.fileno())
  os.replace(partial, path)
