"""What the progress line says."""

import io
import math
import sys

import pytest

from cacovid_jax import progress as progress_lib


class _Clock:
  """A `time` whose seconds are set by the test."""

  now = 0.0

  def monotonic(self):
    return self.now


def _stream(monkeypatch, stream):
  monkeypatch.setattr(sys, "stderr", stream)
  monkeypatch.setattr(progress_lib, "_LINE_SECONDS", 5)
  return stream


def test_plain_lines_with_means_and_time_left(monkeypatch):
  clock = _Clock()
  monkeypatch.setattr(progress_lib, "time", clock)
  monkeypatch.setattr(progress_lib, "_WINDOW", 2)
  stream = _stream(monkeypatch, io.StringIO())
  with progress_lib.Progress(100, start=10) as progress:
    assert progress.seconds_left() is None
    for step in (11, 12, 13):
      clock.now += 2.0
      progress.update(step, {"reward": float(step), "kl": math.nan})
    assert progress.means() == {"reward": 12.5}
    assert progress.seconds_left() == pytest.approx(87 * 2.0)
  lines = stream.getvalue().splitlines()
  assert lines[0] == "train 11/100  eta 2:58  reward 11"
  assert lines[-1] == "train 13/100  eta 2:54  reward 12.5"


def test_a_note_says_what_takes_so_long(monkeypatch):
  clock = _Clock()
  monkeypatch.setattr(progress_lib, "time", clock)
  stream = _stream(monkeypatch, io.StringIO())
  with progress_lib.Progress(8) as progress:
    progress.update(0, note="compiling")
    for note in ("a", "b", "c"):  # No step is done: nothing is known of speed.
      clock.now += 4.0
      progress.update(0, note=note)
      assert progress.seconds_left() is None
    clock.now += 4.0
    progress.update(2)
    assert progress.seconds_left() == pytest.approx(6 * 8.0)
  lines = stream.getvalue().splitlines()
  assert lines[:2] == ["train 0/8  eta ?  compiling", "train 0/8  eta ?  b"]
  assert lines[-1] == "train 2/8  eta 0:48"


def test_a_terminal_gets_a_bar(monkeypatch):
  class _Terminal(io.StringIO):
    def isatty(self):
      return True

  monkeypatch.setenv("TERM", "xterm")
  stream = _stream(monkeypatch, _Terminal())
  with progress_lib.Progress(3, description="prepare") as progress:
    progress.update(3, {"clips": 3})
  assert "prepare" in stream.getvalue()
  assert "3/3" in stream.getvalue()
