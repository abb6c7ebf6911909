"""Clips that an evaluation answers in a second, and how busy the device is."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from cacovid_jax import files
from cacovid_jax.evals import provenance
from cacovid_jax.inference import device_watch


class Throughput:
  """Counts what is asked while `running`, with the time that it takes.

  Of the whole time: reading the first clips and compiling are in it. Without a
  watch, how busy the device is remains unknown.
  """

  def __init__(
    self,
    watch: device_watch.DeviceWatch | None = None,
    clock: Callable[[], float] = time.perf_counter,
  ):
    """Nothing has been asked yet; `clock` returns seconds."""
    self._watch, self._clock, self._last = watch, clock, clock()
    self._seconds, self._busy = 0.0, 0.0
    self._questions, self._clips = 0, set()

  @contextlib.contextmanager
  def running(self) -> Iterator[None]:
    """Within it, time counts."""
    start = self._last = self._clock()
    before = self._watch.busy if self._watch else 0.0
    yield
    if self._watch:
      self._watch.settle()
      self._busy += self._watch.busy - before
    self._seconds += self._clock() - start

  def add(self, questions: Sequence) -> float:
    """Counts questions that have been answered, and their clips once each.

    Returns clips per second since the last call.
    """
    self._questions += len(questions)
    clips, last = {question.video for question in questions}, self._last
    self._clips |= clips
    self._last = self._clock()
    return len(clips) / max(self._last - last, 1e-9)

  def report(self) -> dict[str, Any]:
    """Returns the figures; rates are None where nothing was asked.

    `busy_share` is of the time, see `device_watch.DeviceWatch`.
    """
    spent = self._seconds if self._questions else None
    rate = lambda count: count / spent if spent else None  # noqa: E731
    return {
      "seconds": self._seconds,
      "clips": len(self._clips),
      "questions": self._questions,
      "clips_per_second": rate(len(self._clips)),
      "questions_per_second": rate(self._questions),
      "busy_share": rate(self._busy) if self._watch else None,
    }


def told(report: dict[str, Any]) -> str:
  """Returns a report as one line; "" where nothing was asked."""
  if report["clips_per_second"] is None:
    return ""
  line = (
    f"{report['clips']} clips, {report['questions']} questions:"
    f" {report['clips_per_second']:.3g} clips/s,"
    f" {report['questions_per_second']:.3g} questions/s"
  )
  share = report["busy_share"]
  return line if share is None else f"{line}, device busy {share:.0%}"


def write(path, evaluator) -> None:
  """Writes timings.json of an `evaluator.Evaluator`; prints its throughput."""
  engine, report = evaluator.engine, evaluator.throughput.report()
  watch = engine.source.watch
  timings = {
    "seconds": dict(engine.seconds) | dict(watch.seconds if watch else {}),
    "throughput": report,
    "host": provenance.host(),
    "grids": len(set(map(engine.grid_of, engine.questions))),
    "programs": engine.programs.num_compiled,
  }
  files.write_json(path, timings)
  if line := told(report):
    print(line, file=sys.stderr, flush=True)
