"""Pretraining by its command, to a checkpoint directory that loads."""

import contextlib
import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

import tests
from cacovid_jax import config as config_lib
from cacovid_jax import errors, metrics
from cacovid_jax.models import checkpoints
from cacovid_jax.parallel import mesh as mesh_lib
from cacovid_jax.synthetic import packing, pretraining

ROOT = pathlib.Path(__file__).parent.parent.parent
SPEC = f"{ROOT / 'configs' / 'synthetic_base.py'}:debug"


def command(*flags):
  environment = os.environ | {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": tests.xla_flags(),
    "JAX_LOG_COMPILES": "1",
  }
  return subprocess.run(
    [sys.executable, "-m", "cacovid_jax.pretrain", *flags],
    cwd=ROOT,
    env=environment,
    capture_output=True,
    text=True,
    check=False,
  )


def test_the_command_leaves_a_complete_checkpoint_directory(tmp_path):
  workdir = tmp_path / "base"
  done = command(f"--config={SPEC}", f"--workdir={workdir}")
  assert done.returncode == 0, done.stderr[-2000:]
  compiled = done.stderr.count("Finished XLA compilation of jit(update)")
  assert compiled == 1
  checkpoint = checkpoints.load(workdir / "base_model")
  tokenizer = checkpoint.tokenizer
  assert checkpoint.model.processor.fixed_grid(16) == (16, 7, 7)
  assert tokenizer.decode([checkpoint.eos_ids[0]]) in ("", "<|im_end|>")
  for leaf in jax.tree.leaves(checkpoint.params):
    assert np.isfinite(leaf).all()
  lines = metrics.read(workdir)
  assert [line["step"] for line in lines] == [1, 2, 2, 2]
  assert all(lines[0][f"loss_{name}"] > 0 for name in ("full", "pruned"))
  rows = json.loads((workdir / "probe.json").read_text())
  assert set(rows) == {"dense", "sparse"}
  for row in rows.values():
    assert all(0 <= value <= 1 for value in row.values())


def test_a_vocabulary_without_room_is_refused(tmp_path, monkeypatch):
  corpus = packing.corpus
  monkeypatch.setattr(packing, "corpus", lambda: corpus(5))
  config = config_lib.load(SPEC, ["vocab_size=300"])
  with pytest.raises(errors.UserError, match="vocab_size"):
    pretraining.pretrain(config, tmp_path / "small")


def test_a_workdir_of_another_config_is_refused(tmp_path):
  config_lib.claim_workdir(tmp_path, config_lib.load(SPEC))
  changed = config_lib.load(SPEC, ["pretrain.lr=1e-4"])
  with pytest.raises(errors.UserError, match=r"pretrain\.lr is .* there"):
    pretraining.pretrain(changed, tmp_path)


def test_a_stopped_run_ends_as_one_that_nothing_stopped(tmp_path, monkeypatch):
  one = mesh_lib.make_mesh(1)
  monkeypatch.setattr(mesh_lib, "make_mesh", lambda: one)
  config = config_lib.load(SPEC)
  weights = "base_model/model.safetensors"
  pretraining.pretrain(config, tmp_path / "whole")
  stopped = contextlib.nullcontext(lambda step: step == 1)
  with monkeypatch.context() as patch:
    patch.setattr(pretraining.preemption, "watched", lambda: stopped)
    with pytest.raises(SystemExit) as end:
      pretraining.pretrain(config, tmp_path / "parts")
  assert end.value.code == 143
  assert not (tmp_path / "parts" / weights).exists()

  def full(*args, **options):
    raise errors.UserError("no room")

  with monkeypatch.context() as patch:  # At the last step, of all three.
    patch.setattr(pretraining.checkpoints, "save", full)
    with pytest.raises(errors.UserError, match="no room"):
      pretraining.pretrain(config, tmp_path / "parts")
  pretraining.pretrain(config, tmp_path / "parts")
  for name in ("probe.json", weights):
    whole, parts = (tmp_path / run / name for run in ("whole", "parts"))
    assert whole.read_bytes() == parts.read_bytes()
  steps = [line["step"] for line in metrics.read(tmp_path / "parts")]
  assert steps == [1, 2, 2, 2]
  monkeypatch.setattr(jax, "device_count", lambda: 3)
  with pytest.raises(errors.UserError, match="began on 8 devices"):
    pretraining.pretrain(config, tmp_path / "parts")


def test_a_batch_that_the_devices_cannot_share_is_refused(tmp_path):
  config = config_lib.load(SPEC)  # Two clips a step; tests have 8 devices.
  with pytest.raises(errors.UserError, match="batch_size 2 .* 8 devices"):
    pretraining.pretrain(config, tmp_path)
