"""Checkpoints: exact round trips, and every kind of damage found."""

import json
import os
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cacovid_jax import ckpt, errors
from cacovid_jax.training import checkpointing
from tests import disks


def _state(seed=0):
  rng = np.random.default_rng(seed)
  params = {
    "dense": {"kernel": jnp.asarray(rng.normal(size=(7, 5)), jnp.float32)},
    "half": jnp.asarray(rng.normal(size=(9,)), jnp.bfloat16),
    "none": jnp.zeros((0, 3)),
  }
  tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
  return {
    "step": jnp.int32(seed),
    "hash": jnp.asarray([1, 2**32 - 1], jnp.uint32),
    "params": params,
    "opt_state": tx.init(params),
  }


def _assert_same(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    assert x.dtype == y.dtype and x.shape == y.shape
    assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def test_round_trip_is_bit_identical(tmp_path):
  state = _state(3)
  checkpointing.save(tmp_path, 3, state, {"base": "abc"}, config_hash="h")
  step, restored = checkpointing.restore_latest(
    tmp_path, _state(0), config_hash="h"
  )
  assert step == 3
  _assert_same(restored, state)
  manifest = checkpointing.read_manifest(tmp_path, 3)
  assert manifest["metadata"] == {"base": "abc"}
  assert manifest["leaves"]["params.dense.kernel"]["shape"] == [7, 5]


def test_no_directory_means_no_step(tmp_path):
  assert checkpointing.restore_latest(tmp_path / "none", _state()) is None
  assert checkpointing.steps(tmp_path / "none") == []


def test_newest_steps_are_kept(tmp_path):
  for step in (1, 2, 10):
    checkpointing.save(tmp_path, step, _state(step), keep=2)
  assert checkpointing.steps(tmp_path) == [2, 10]
  assert sorted(os.listdir(tmp_path)) == ["10", "2"]


def test_a_step_saved_again_replaces_the_first(tmp_path):
  checkpointing.save(tmp_path, 1, _state(1))
  checkpointing.save(tmp_path, 1, _state(2))
  _assert_same(checkpointing.restore_latest(tmp_path, _state())[1], _state(2))
  assert os.listdir(tmp_path) == ["1"]


def test_every_flipped_bit_is_found(tmp_path):
  path = checkpointing.save(tmp_path, 1, _state(1))
  files = [file for file in sorted(path.rglob("*")) if file.is_file()]
  rng = np.random.default_rng(0)
  flips = 0
  for file in files:
    data = file.read_bytes()
    for position in rng.integers(0, len(data), 30) if data else ():
      damaged = bytearray(data)
      damaged[position] ^= 1 << int(rng.integers(8))
      file.write_bytes(damaged)
      assert not checkpointing.verify(path).ok, (file, position)
      flips += 1
    file.write_bytes(data)
  assert flips >= 200
  assert checkpointing.verify(path).ok


def _truncate(path):
  files = [file for file in (path / "state").rglob("*") if file.is_file()]
  largest = max(files, key=lambda file: file.stat().st_size)
  largest.write_bytes(largest.read_bytes()[:-1])


def _empty(path):
  for file in sorted(path.rglob("*"), reverse=True):
    file.rmdir() if file.is_dir() else file.unlink()


def _drop_manifest(path):
  (path / checkpointing.MANIFEST).unlink()


def _drop_file(path):
  next(file for file in (path / "state").rglob("*") if file.is_file()).unlink()


def _add_file(path):
  (path / "state" / "manifest.new").write_text("x")


@pytest.mark.parametrize(
  "damage, reason",
  [
    (_truncate, "bytes instead of"),
    (_empty, "empty directory"),
    (_drop_manifest, "no manifest.json"),
    (_drop_file, "missing"),
    (_add_file, "not in the manifest"),
  ],
)
def test_restore_walks_back_to_a_step_that_verifies(
  tmp_path, caplog, damage, reason
):
  for step in (1, 2):
    checkpointing.save(tmp_path, step, _state(step))
  damage(tmp_path / "2")
  assert reason in checkpointing.verify(tmp_path / "2").reason
  step, restored = checkpointing.restore_latest(tmp_path, _state())
  assert step == 1
  _assert_same(restored, _state(1))
  assert "step 2 does not verify" in caplog.text
  assert sorted(os.listdir(tmp_path)) == ["1", "2.bad"]
  # The step is computed again, and damaged again: both stay.
  checkpointing.save(tmp_path, 2, _state(2))
  damage(tmp_path / "2")
  checkpointing.restore_latest(tmp_path, _state())
  assert sorted(os.listdir(tmp_path)) == ["1", "2.bad", "2.bad.1"]


def test_a_renamed_step_does_not_verify(tmp_path):
  checkpointing.save(tmp_path, 1, _state(1))
  os.rename(tmp_path / "1", tmp_path / "7")
  assert checkpointing.verify(tmp_path / "7").reason == "written as step 1"
  assert checkpointing.restore_latest(tmp_path, _state()) is None


def test_a_failed_rename_leaves_the_last_step(tmp_path, monkeypatch):
  checkpointing.save(tmp_path, 1, _state(1))

  def fail(*_):
    raise OSError(28, "No space left on device")

  with monkeypatch.context() as patch:
    patch.setattr(os, "rename", fail)
    with pytest.raises(errors.UserError, match="No space left.*free some"):
      checkpointing.save(tmp_path, 2, _state(2))
  assert sorted(os.listdir(tmp_path)) == ["1"]  # Room for others.
  assert checkpointing.restore_latest(tmp_path, _state())[0] == 1
  checkpointing.save(tmp_path, 2, _state(2))
  assert sorted(os.listdir(tmp_path)) == ["1", "2"]


def test_a_disk_that_fills_up_as_orbax_writes_leaves_the_last_step(tmp_path):
  like = {"a": jnp.zeros(100_000)}
  checkpointing.save(tmp_path, 1, {"a": jnp.ones(100_000)})
  drawn = {"a": jax.random.normal(jax.random.key(0), (100_000,))}
  with disks.no_file_above(100_000):
    with pytest.raises(errors.UserError) as error:
      checkpointing.save(tmp_path, 2, drawn)
  assert str(error.value) == (
    f"cannot write checkpoint {tmp_path / '2'}: File too large; free some space"
    " and go on: what was written before is still there"
  )
  assert os.listdir(tmp_path) == ["1"]
  assert checkpointing.restore_latest(tmp_path, like)[0] == 1
  checkpointing.save(tmp_path, 2, drawn)
  assert checkpointing.restore_latest(tmp_path, like)[0] == 2


_KILLED_SAVE = """
import os, signal, sys
import jax.numpy as jnp
from cacovid_jax.training import checkpointing
checkpointing.save(sys.argv[1], 1, {"a": jnp.ones(4)})
rename = os.rename
def rename_or_die(a, b):
  if str(b).endswith("/2"):
    os.kill(os.getpid(), signal.SIGKILL)
  rename(a, b)
os.rename = rename_or_die
checkpointing.save(sys.argv[1], 2, {"a": jnp.ones(4) * 2})
"""


def test_a_kill_before_the_rename_leaves_the_last_step(tmp_path):
  done = subprocess.run(
    [sys.executable, "-c", _KILLED_SAVE, str(tmp_path)],
    env=dict(os.environ, JAX_PLATFORMS="cpu"),
    check=False,
  )
  assert done.returncode == -signal.SIGKILL
  assert sorted(os.listdir(tmp_path)) == ["1", "2.partial"]
  # All files of the step are there, yet without the rename it does not count.
  assert checkpointing.verify(tmp_path / "2.partial").ok
  step, tree = checkpointing.restore_latest(tmp_path, {"a": jnp.zeros(4)})
  assert step == 1
  np.testing.assert_array_equal(tree["a"], np.ones(4))


def test_other_leaves_are_named(tmp_path):
  checkpointing.save(tmp_path, 1, {"a": jnp.ones(3), "b": jnp.ones(2)})
  like = {"a": jnp.ones((3, 1)), "c": jnp.ones(1), "b": jnp.ones(2)}
  with pytest.raises(errors.UserError) as raised:
    checkpointing.restore_latest(tmp_path, like)
  message = str(raised.value)
  assert "c is missing" in message
  assert "a is float32[3], not float32[3, 1]" in message
  with pytest.raises(errors.UserError, match="b is not expected"):
    checkpointing.restore_latest(tmp_path, {"a": jnp.ones(3)})
  with pytest.raises(errors.UserError, match="a is float32.*not bfloat16"):
    like = {"a": jnp.ones(3, jnp.bfloat16), "b": jnp.ones(2)}
    checkpointing.restore_latest(tmp_path, like)


def test_other_config_is_refused(tmp_path):
  tree = {"a": jnp.ones(3)}
  checkpointing.save(tmp_path, 1, tree, config_hash="one")
  with pytest.raises(errors.UserError, match="another config"):
    checkpointing.restore_latest(tmp_path, tree, config_hash="two")


def test_several_devices_and_back_to_one(tmp_path):
  mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
  assert mesh.size == 8
  axes = {"replicated": (), "sharded": ("data",)}
  tree = {
    name: jax.device_put(
      jnp.arange(8),
      jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axis)),
    )
    for name, axis in axes.items()
  }
  checkpointing.save(tmp_path, 5, tree)
  for like in (tree, jax.tree.map(lambda x: jnp.zeros(8, x.dtype), tree)):
    step, restored = checkpointing.restore_latest(tmp_path, like)
    assert step == 5
    for name, leaf in restored.items():
      assert leaf.sharding == like[name].sharding
      np.testing.assert_array_equal(leaf, np.arange(8))


def run_ckpt(*words):
  return ckpt.main(ckpt.COMMAND.parse(["ckpt", *words]))


def test_doctor_lists_steps_and_verdicts(tmp_path, capsys):
  steps = tmp_path / "checkpoints"
  for step in (1, 2):
    checkpointing.save(steps, step, {"a": jnp.ones(3)}, config_hash="cafe")
  assert run_ckpt("doctor", str(tmp_path)) == 0
  (steps / "3.partial").mkdir()
  manifest = steps / "2" / checkpointing.MANIFEST
  manifest.write_bytes(
    manifest.read_bytes().replace(b'"step": 2', b'"step": 3')
  )
  assert run_ckpt("doctor", str(tmp_path)) == 1
  printed = capsys.readouterr().out
  for text in ("cafe", "content changed", "unfinished", "damaged: 2"):
    assert text in printed
  by_name = {verdict.name: verdict for verdict in checkpointing.doctor(steps)}
  assert list(by_name) == ["1", "2", "3.partial"]
  assert json.dumps(by_name["1"].manifest["files"])
  with pytest.raises(errors.UserError, match="no directory"):
    run_ckpt("doctor", str(tmp_path / "none"))
  with pytest.raises(errors.UserError, match="usage"):
    run_ckpt()
