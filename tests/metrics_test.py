"""Metrics files of interrupted runs, and what the progress line says."""

import io
import json
import math

import jax.numpy as jnp
import pytest

from cacovid_jax import metrics


def test_scalars_are_json_lines_and_tensorboard_events(tmp_path):
  with metrics.MetricsWriter(tmp_path) as writer:
    writer.write_scalars(1, {"loss": jnp.float32(0.5), "reward": 1})
    writer.write_scalars(2, {"loss": math.nan})
  assert metrics.read(tmp_path) == [
    {"step": 1, "loss": 0.5, "reward": 1.0},
    {"step": 2, "loss": None},
  ]
  assert list((tmp_path / "tensorboard").glob("events.out.tfevents.*"))


def test_a_resumed_run_removes_the_steps_it_computes_again(tmp_path):
  with metrics.MetricsWriter(tmp_path, tensorboard=False) as writer:
    for step in (1, 2, 3):
      writer.write_scalars(step, {"loss": step})
  with open(tmp_path / metrics.FILE, "a") as file:
    file.write('{"step": 4, "lo')  # Killed while writing.
  with metrics.MetricsWriter(tmp_path, 2, tensorboard=False) as writer:
    writer.write_scalars(3, {"loss": 30})
  lines = (tmp_path / metrics.FILE).read_text().splitlines()
  assert [json.loads(line)["loss"] for line in lines] == [1, 2, 30]


def test_no_file_reads_as_no_lines(tmp_path):
  assert metrics.read(tmp_path) == []


class _Clock:
  """A `time` whose seconds are set by the test."""

  now = 0.0

  def monotonic(self):
    return self.now


def test_plain_lines_with_means_and_time_left(monkeypatch):
  clock = _Clock()
  monkeypatch.setattr(metrics, "time", clock)
  stream = io.StringIO()
  with metrics.Progress(
    100, start=10, window=2, line_seconds=5, stream=stream
  ) as progress:
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
  monkeypatch.setattr(metrics, "time", clock)
  stream = io.StringIO()
  with metrics.Progress(8, line_seconds=5, stream=stream) as progress:
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
  stream = _Terminal()
  with metrics.Progress(3, description="prepare", stream=stream) as progress:
    progress.update(3, {"clips": 3})
  assert "prepare" in stream.getvalue()
  assert "3/3" in stream.getvalue()
