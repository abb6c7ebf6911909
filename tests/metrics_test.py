"""Metrics files of interrupted runs."""

import json
import logging
import math
import sys
import time

import jax.numpy as jnp
import pytest

from cacovid_jax import errors, json_lines, metrics
from tests import disks


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


def test_a_damaged_file_is_kept_aside_and_its_sound_rows_are_kept(
  tmp_path, caplog
):
  """Rows behind the damage, too; as an earlier version wrote them."""
  path, aside = tmp_path / metrics.FILE, tmp_path / "metrics.jsonl.damaged"
  data = (
    b'{"step": 1, "loss": 0.5}\n\xdd\xff\n{"step": 2, "loss": null}\n'
    b'{"step": "3"}\n[4]\n{"step": 4, "seconds_per_step": "1"}\n'
    b'{"step": 5, "loss": 2.0}\n{"step": 6'
  )
  path.write_bytes(data)
  rows = [{"step": 1, "loss": 0.5}, {"step": 2, "loss": None}]
  last = {"step": 5, "loss": 2.0}
  with caplog.at_level(logging.WARNING):
    assert metrics.read(tmp_path) == [*rows, last]
    assert path.read_bytes() == data and not aside.exists()
    assert "3 lines have no checksum" in caplog.messages[-1]
    assert metrics.read(tmp_path) == [*rows, last]
    caplog.clear()
    with metrics.MetricsWriter(tmp_path, 4, tensorboard=False):
      pass
  [told] = caplog.messages  # Of the checksums it was said before.
  assert f"{path}: 5 lines damaged or cut off, kept in {aside}" in told
  assert aside.read_bytes() == data + b"\n"
  caplog.clear()
  assert metrics.read(tmp_path) == rows and not caplog.messages


@pytest.mark.parametrize("tensorboard", [False, True])
def test_a_full_disk_ends_in_one_line(tmp_path, tensorboard):
  """Where TensorBoard's file is the longer one, it is the one that is told."""
  writer = metrics.MetricsWriter(tmp_path, tensorboard=tensorboard)
  writer.write_scalars(1, {"loss": 0.5})
  sizes = [p.stat().st_size for p in tmp_path.rglob("*") if p.is_file()]
  name = "tensorboard" if tensorboard else metrics.FILE
  with disks.no_file_above(max(sizes) + 9):
    with pytest.raises(errors.UserError, match=f"{name}: File too large"):
      with writer:
        writer.write_scalars(2, {"loss": 0.5})
  rows = metrics.read(tmp_path)
  assert rows[0] == {"step": 1, "loss": 0.5} and len(rows) == 1 + tensorboard


def test_no_file_reads_as_no_lines(tmp_path):
  assert metrics.read(tmp_path) == []


def test_wandb_gets_the_same_numbers_without_a_network(tmp_path, monkeypatch):
  monkeypatch.setenv("WANDB_MODE", "offline")
  monkeypatch.setenv("WANDB_SILENT", "true")
  monkeypatch.setenv("WANDB__SERVICE_WAIT", "300")  # Seconds, on busy machines.
  with metrics.MetricsWriter(
    tmp_path, tensorboard=False, wandb_project="policies"
  ) as writer:
    writer.write_scalars(1, {"reward_of_tokens": 0.25})
  (log,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
  # A process of its own writes it, now and then after the run has finished.
  for _ in range(3000):
    if b"reward_of_tokens" in log.read_bytes():
      return
    time.sleep(0.1)
  pytest.fail(f"{log} lacks the numbers: {log.read_bytes()!r}")


class _Wandb:
  """Notes what a run is started with and what it is given."""

  def __init__(self):
    self.started, self.logged = [], []

  def init(self, **options):
    self.started.append(options)
    return self

  def log(self, numbers, step):
    self.logged.append((step, numbers))

  def finish(self):
    self.logged.append("finished")


def test_a_resumed_run_goes_on_under_its_wandb_id(tmp_path, monkeypatch):
  wandb = _Wandb()
  monkeypatch.setitem(sys.modules, "wandb", wandb)
  for name, start in (("a", 0), ("a", 1), ("b", 0)):
    with metrics.MetricsWriter(
      tmp_path / name, start, tensorboard=False, wandb_project="policies"
    ) as writer:
      writer.write_scalars(start + 1, {"loss": jnp.float32(0.5)})
  ids = [options["id"] for options in wandb.started]
  assert ids[0] == ids[1] != ids[2]
  assert {options["resume"] for options in wandb.started} == {"allow"}
  assert wandb.logged[:4] == [
    (1, {"loss": 0.5}),
    "finished",
    (2, {"loss": 0.5}),
    "finished",
  ]


def test_wandb_that_is_not_installed_is_told(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "wandb", None)
  with pytest.raises(errors.UserError, match=r"cacovid_jax\[wandb\]"):
    metrics.MetricsWriter(tmp_path, tensorboard=False, wandb_project="policies")


def test_seconds_are_those_of_all_steps(tmp_path):
  """Ten steps of 2 seconds, five of 3; validation has none."""
  lines = [
    {"step": 10, "seconds_per_step": 2.0},
    {"step": 10, "validation_accuracy": 0.5},
    {"step": 15, "seconds_per_step": 3.0},
  ]
  json_lines.append(tmp_path / "metrics.jsonl", lines)
  assert metrics.seconds(tmp_path) == 35
