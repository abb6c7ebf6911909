"""A progress line with the time left and running means."""

import collections
import contextlib
import functools
import math
import sys
import time

import rich.progress

from cacovid_jax import metrics as metrics_lib
from cacovid_jax import terminal

_WINDOW = 20  # Last steps that the running means are over.
_LINE_SECONDS = 15.0  # Between two lines where there is no terminal.


class Progress:
  """A progress bar with time left and running means, on standard error.

  Where there is no terminal, a plain line now and then, for logs.
  """

  def __init__(self, total, *, start=0, description="train"):
    """Takes all steps of a run, and those done by an earlier start of it."""
    self._total, self._start, self._step = total, start, start
    self._description = description
    last = functools.partial(collections.deque, maxlen=_WINDOW)
    self._values = collections.defaultdict(last)
    self._recent = collections.deque(maxlen=_WINDOW + 1)  # (time, step)
    self._console = terminal.Console(file=sys.stderr)
    self._bar = self._task = None
    self._last_line = -math.inf
    self._note = ""

  def __enter__(self):
    self._recent.append((time.monotonic(), self._start))
    if self._console.is_terminal:
      self._bar = rich.progress.Progress(
        rich.progress.TextColumn("{task.description}", markup=False),
        rich.progress.BarColumn(),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TextColumn("{task.fields[text]}", markup=False),
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
    """Shows how many steps are done, what they measured, what is done now."""
    self._note = note
    if step != self._step:  # A mere note tells nothing of the speed.
      self._recent.append((time.monotonic(), int(step)))
    self._step = int(step)
    for name, value in (metrics or {}).items():
      if math.isfinite(value := metrics_lib.number(value)):
        self._values[name].append(value)
    if self._bar:
      self._bar.update(self._task, completed=self._step, text=self._text())
    elif time.monotonic() - self._last_line >= _LINE_SECONDS:
      self._print_line()

  def means(self):
    """Returns {name: mean over the last steps}."""
    return {n: sum(values) / len(values) for n, values in self._values.items()}

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
    return "  ".join([*parts, self._note] if self._note else parts)

  def _print_line(self):
    self._last_line = time.monotonic()
    done = f"{self._description} {self._step}/{self._total}"
    text = terminal.plain(f"{done}  {self._text()}")
    # A log on a full disk is no reason to end a run.
    with contextlib.suppress(OSError):
      print(text, file=self._console.file, flush=True)


def _clock(seconds):
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  if hours:
    return f"{hours}:{minutes:02}:{seconds:02}"
  return f"{minutes}:{seconds:02}"
