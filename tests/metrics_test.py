"""Metrics files of interrupted runs."""

import json
import math
import sys
import time

import jax.numpy as jnp
import pytest

from cacovid_jax import errors, metrics


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
