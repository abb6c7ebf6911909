"""Metrics files of interrupted runs."""

import json
import math

import jax.numpy as jnp

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
