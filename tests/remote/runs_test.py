"""Whole runs on a store: killed, continued elsewhere, the same to the bit."""

import os
import pathlib
import signal
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

import tests
from cacovid_jax import ckpt, doctor, errors, evaluate, metrics, pretrain, train
from cacovid_jax.evals import evaluation
from cacovid_jax.remote import mirror as remote
from cacovid_jax.training import checkpointing
from tests import object_store
from tests.evals import tiny as tiny_evals
from tests.training import tiny

URL = "gs://bucket/run"


@pytest.fixture
def store(tmp_path, monkeypatch):
  return object_store.made(tmp_path, monkeypatch)


def run_python(code, *arguments):
  env = os.environ | {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": tests.xla_flags(),
    "PYTHONPATH": str(pathlib.Path(__file__).parents[2]),
  }
  return subprocess.Popen(
    [sys.executable, "-c", code, *map(str, arguments)],
    env=env,
    stderr=subprocess.PIPE,
    text=True,
  )


CHANGES = {
  "total_steps": 4,
  "ckpt.every_steps": 2,
  "policy.module": "tests.policy.bilinear_policy:Bilinear",
}

# The third object of the last step is the last one that it writes.
_KILLED = """
import os, sys, tempfile
from cacovid_jax.remote import mirror
from tests import object_store
from tests.remote import runs_test
from tests.training import tiny

tempfile.tempdir = sys.argv[2]
written = []

def before(operation, path):
  if operation == "write" and "/checkpoints/4/" in path:
    written.append(path)
    if len(written) == 4:
      os.kill(os.getpid(), 9)

object_store.use(sys.argv[1], before)
with mirror.mirrored(runs_test.URL) as workdir:
  tiny.train(workdir, tiny.config(**runs_test.CHANGES))
"""


def test_a_training_that_is_killed_while_it_saves_goes_on(store, tmp_path):
  killed = run_python(_KILLED, store, tmp_path / "mirrors")
  told = killed.communicate(timeout=1500)[1]
  assert killed.returncode == -signal.SIGKILL, told
  half = object_store.names(store, "bucket/run/checkpoints/4/")
  assert len(half) == 3 and "manifest.json" not in " ".join(half)
  assert object_store.names(store, "bucket/run/locks/train/")
  # Another mirror; the lock of the process that has ended is taken over.
  config, seen = tiny.config(**CHANGES), []
  with remote.mirrored(URL) as workdir:
    assert checkpointing.steps(workdir / "checkpoints") == [2]
    again = tiny.train(
      workdir, config, on_step=lambda step, *unused: seen.append(step)
    )
    lines = metrics.read(workdir)
  assert seen == [3, 4]
  whole = tiny.train(tmp_path / "whole", config)
  jax.tree.map(np.testing.assert_array_equal, again.state, whole.state)
  expected = metrics.read(tmp_path / "whole")
  for name in ("step", "loss", "reward_token"):
    assert [x.get(name) for x in lines] == [x.get(name) for x in expected]
  exported = tmp_path / "whole" / "policy" / "policy.safetensors"
  name = "bucket/run/policy/policy.safetensors"
  assert object_store.read(store, name) == exported.read_bytes()
  kept = object_store.names(store)
  assert not [name for name in kept if "/locks/" in name or ".parts/" in name]
  assert [name for name in kept if "/tensorboard/" in name]
  assert not [name for name in kept if ".partial" in name]
  assert ckpt.COMMAND.parse(["ckpt", "doctor", URL]).arguments[1] == URL
  assert ckpt.main(ckpt.COMMAND.parse(["ckpt", "doctor", URL])) == 0


_OF_TWO = """
import sys, tempfile
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from cacovid_jax.parallel import mesh as mesh_lib
from cacovid_jax.parallel import peers
from cacovid_jax.remote import mirror
from cacovid_jax.training import checkpointing
from tests import object_store

root, mirrors, port, number = sys.argv[1:]
tempfile.tempdir = mirrors
with peers.joined(f"localhost:{port}", 2, int(number)):
  object_store.use(root)
  mesh = mesh_lib.make_mesh()

  def tree(scale):
    numbers = np.arange(6.0, dtype=np.float32) * scale
    values = {"w": numbers, "n": np.int32(scale)}
    return mesh_lib.put(values, mesh, PartitionSpec())

  with mirror.mirrored("gs://bucket/run") as workdir:
    for step in (1, 2):
      checkpointing.save(workdir / "checkpoints", step, tree(step), keep=1)
  with mirror.mirrored("gs://bucket/run") as workdir:
    step, found = checkpointing.restore_latest(workdir / "checkpoints", tree(0))
    assert step == 2, step
    assert found["w"].sharding == tree(0)["w"].sharding
    jax.tree.map(np.testing.assert_array_equal, found, tree(2))
"""


def test_the_first_of_two_processes_writes_what_both_read(store, tmp_path):
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
  given = store, tmp_path / "mirrors", port
  two = [run_python(_OF_TWO, *given, number) for number in range(2)]
  try:
    told = [process.communicate(timeout=600)[1] for process in two]
    assert [process.returncode for process in two] == [0, 0], told
  finally:
    for process in two:
      process.kill()
  kept = object_store.names(store, "bucket/run/checkpoints/")
  assert {name.split("/")[3] for name in kept} == {"2"}


class CutOffError(BaseException):
  """Stands for the end of a machine."""


@pytest.fixture(scope="module")
def request_of(tmp_path_factory):
  folder = tmp_path_factory.mktemp("given")
  data = tiny_evals.write_data(folder / "blocks")
  given = {
    "data": data,
    "checkpoint": tiny_evals.write_checkpoint(folder / "checkpoint"),
    "methods": ("random",),
    "ratios": (0.25,),
    "batch_size": 2,
    "max_new_tokens": 3,
  }
  with tiny_evals.shared_programs():
    yield lambda workdir, **options: tiny_evals.experiment(
      workdir, **given | options
    )


def test_an_evaluation_goes_on_elsewhere_with_the_same_bytes(
  store, tmp_path, request_of
):
  evaluation.evaluate(request_of(tmp_path / "local"))
  expected = (tmp_path / "local" / "results.json").read_bytes()
  left = [3]

  def before(operation, path):
    if operation == "write" and "/answers.jsonl.parts/" in path:
      left[0] -= 1
      if not left[0]:
        raise CutOffError

  with pytest.raises(CutOffError), remote.mirrored(URL) as workdir:
    object_store.use(store, before)
    evaluation.evaluate(request_of(workdir))
  object_store.use(store)
  parts = object_store.names(store, "bucket/run/answers.jsonl.parts/")
  assert len(parts) == 2
  with remote.mirrored(URL) as workdir:
    before = (workdir / "answers.jsonl").read_bytes()
    evaluation.evaluate(request_of(workdir))
    assert (workdir / "answers.jsonl").read_bytes().startswith(before)
  for name in ("results.json", "frames.jsonl"):
    with remote.mirrored(URL) as workdir:
      here, there = workdir / name, tmp_path / "local" / name
      assert here.read_bytes() == there.read_bytes()
  assert object_store.read(store, "bucket/run/results.json") == expected


def test_shards_on_two_machines_make_the_table_of_one(
  store, tmp_path, request_of
):
  evaluation.evaluate(request_of(tmp_path / "local"))
  expected = (tmp_path / "local" / "results.json").read_bytes()
  with remote.mirrored(URL) as one, remote.mirrored(URL) as two:
    assert evaluation.evaluate(request_of(one, shard=(0, 2))) is None
    assert evaluation.evaluate(request_of(two, shard=(1, 2))) is not None
  assert object_store.read(store, "bucket/run/results.json") == expected


@pytest.mark.parametrize(
  "command, words, name",
  [
    (evaluate, ["--policy=ours=gs://b/run"], "--policy"),
    (evaluate, ["--feature_cache=gs://b/cache"], "--feature_cache"),
    (evaluate, ["--data", "s3://b/data"], "--data"),
    (train, ["--config.model.path=gs://b/7b"], "--config.model.path"),
    (pretrain, ["--workdir=gs://b/run"], "--workdir"),
  ],
)
def test_what_cannot_be_on_a_store_is_one_line(command, words, name):
  with pytest.raises(errors.UserError) as error:
    command.COMMAND.parse(["command", *words])
  told = errors.one_line(error.value)
  assert told.startswith(f"{name}=") and "only --workdir of train" in told
  assert "gcloud storage rsync -r" in told and "gcsfuse" in told


def test_a_config_file_names_no_store_either(tmp_path):
  with pytest.raises(errors.UserError, match="config.data.root=gs://b/data"):
    tiny.experiment_of(tiny.config(**{"data.root": "gs://b/data"}), tmp_path)


@pytest.mark.parametrize("command", [train, evaluate, doctor])
def test_workdirs_may_be_on_a_store(command):
  flags = command.COMMAND.flags
  assert flags["workdir"].store
  assert [name for name in flags if flags[name].store] == ["workdir"]
