"""Checkpoints by name in a Hugging Face cache that the tests lay out."""

import os
import pathlib
import re

import numpy as np
import pytest

from cacovid_jax import base_config, errors
from cacovid_jax import config as config_lib
from cacovid_jax import experiment as experiment_lib
from cacovid_jax.evals import estimate
from cacovid_jax.models import checkpoints, hub, safetensors_io
from cacovid_jax.policy import loading
from cacovid_jax.synthetic import tiny_checkpoints
from cacovid_jax.training import run

NAME = "some-org/tiny-7b.ov"
SHARD = "model-00002-of-00003.safetensors"
REVISION = "0123456789abcdef0123456789abcdef01234567"


def lay_out(cache: pathlib.Path, source: pathlib.Path) -> pathlib.Path:
  """Puts a directory's files into a cache as the hub does; returns it there."""
  folder = cache / "models--some-org--tiny-7b.ov"
  snapshot, blobs = folder / "snapshots" / REVISION, folder / "blobs"
  for made in (snapshot, blobs, folder / "refs"):
    made.mkdir(parents=True)
  (folder / "refs" / "main").write_text(REVISION)
  for number, file in enumerate(sorted(source.iterdir())):
    blob = blobs / f"{number:064x}"
    blob.write_bytes(file.read_bytes())
    (snapshot / file.name).symlink_to(f"../../blobs/{blob.name}")
  return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
  """Returns a checkpoint in several files."""
  directory = tmp_path_factory.mktemp("tiny") / "checkpoint"
  tiny_checkpoints.write_tiny(directory, "llava_onevision")
  tensors = safetensors_io.list_directory(directory)
  tensors = {tensor.name: np.array(tensor.view()) for tensor in tensors}
  safetensors_io.write_directory(directory, tensors, 100_000)
  return directory


@pytest.fixture
def folder(tiny, tmp_path, monkeypatch):
  """Returns the repository's folder in the cache."""
  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
  return lay_out(tmp_path / "hub", tiny)


def test_where_the_cache_is(monkeypatch, tmp_path):
  for name in ("HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
    monkeypatch.delenv(name, raising=False)
  monkeypatch.setenv("HOME", str(tmp_path))
  assert hub.cache() == tmp_path / ".cache" / "huggingface" / "hub"
  monkeypatch.setenv("XDG_CACHE_HOME", "~/xdg")
  assert hub.cache() == tmp_path / "xdg" / "huggingface" / "hub"
  monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
  assert hub.cache() == tmp_path / "home" / "hub"
  monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "c"))
  assert hub.cache() == tmp_path / "c"


def test_nobody_has_a_home(monkeypatch):
  monkeypatch.setenv("HF_HUB_CACHE", "~/hub")
  monkeypatch.delenv("HOME")
  monkeypatch.setattr(os, "getuid", lambda: 2**31 - 2)
  assert hub.cache() == pathlib.Path("~/hub")
  assert hub.find("org/unknown") == "org/unknown"


def test_a_name_is_the_snapshot_of_main(folder):
  found = folder / "snapshots" / REVISION
  assert hub.find(NAME) == hub.directory(NAME) == str(found)
  # What cannot be a name is a path, there or not.
  for path in ("", "x", "/a/b", "a/b/c", "../b", str(found), ".cache/b"):
    assert hub.find(path) == hub.directory(path) == path


def test_a_path_that_exists_wins(folder):
  os.makedirs(NAME)
  assert hub.directory(NAME) == NAME


def test_weights_are_loaded_by_name(folder, tiny):
  by_name, by_path = map(checkpoints.load, (NAME, tiny))
  assert by_name.identity["sha256"] == by_path.identity["sha256"]
  assert by_name.identity["path"] == NAME
  assert by_path.identity["path"] == str(tiny)
  assert checkpoints.load_config(NAME) == checkpoints.load_config(tiny)


def test_a_config_may_name_it(folder):
  changes = {"model.path": NAME, "mesh.data": 1, "data.num_frames": 4}
  changes |= {"evals.template": "tokenizer"}
  config = config_lib.replace(base_config.get_config(), changes)
  experiment = experiment_lib.Experiment.from_config(config)
  assert experiment.checkpoint.tokenizer is not None
  # The name stays in the config: a run is the same on another machine.
  assert experiment.config.model.path == NAME
  bare = estimate.without_weights(experiment)
  assert bare.checkpoint.model.config == experiment.checkpoint.model.config
  made = run.make_processor(config, experiment.checkpoint.model)
  own = experiment.checkpoint.model.read_processor(hub.directory(NAME))
  assert made == own.with_bounds(0, 0)
  assert experiment_lib.with_shipped(config).model.path == NAME
  # No policy is among these weights.
  assert not loading.has_policy(NAME)
  with pytest.raises(errors.UserError, match="there is no policy in .*hub"):
    loading.load_policy(NAME, experiment.checkpoint)


def _without_shard(folder):
  (folder / "snapshots" / REVISION / SHARD).unlink()


def _dangling(folder):
  for file in (folder / "snapshots" / REVISION).glob("tokenizer.json"):
    file.resolve().unlink()


def _unfinished(folder):
  (folder / "blobs" / f"{'f' * 64}.incomplete").write_bytes(b"1")


def _no_snapshot(folder):
  (folder / "refs" / "main").write_text("another")


def _no_ref(folder):
  (folder / "refs" / "main").unlink()


def _climbing_ref(folder):
  (folder / "refs" / "main").write_text("../../../..")


@pytest.mark.parametrize(
  "harm, told",
  [
    (_without_shard, f"{SHARD} is missing"),
    (_dangling, "tokenizer.json leads to a file that is not there"),
    (_unfinished, "f.incomplete is a part of a file (remove it if"),
    (_no_snapshot, "another, which refs/main names"),
    (_no_ref, "main, and no refs/main; finish"),
    (_climbing_ref, "there is no "),
  ],
)
def test_half_a_download_is_one_line_with_the_remedy(folder, harm, told):
  harm(folder)
  for call in (hub.find, hub.directory, checkpoints.load):
    with pytest.raises(errors.UserError, match=re.escape(told)) as caught:
      call(NAME)
    assert f"finish it by: hf download {NAME}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_rest_of_an_earlier_attempt_does_not_count(folder):
  blob = next((folder / "blobs").iterdir())
  blob.with_name(f"{blob.name}.incomplete").write_bytes(b"1")
  assert hub.directory(NAME).endswith(REVISION)


def test_an_unknown_name_tells_where_was_looked(folder, tmp_path):
  assert hub.find("org/unknown") == "org/unknown"
  with pytest.raises(errors.UserError) as caught:
    checkpoints.load("org/unknown")
  told = str(caught.value)
  assert str(tmp_path / "hub") in told and "HF_HOME" in told
  assert (
    "if it is a name on the hub, get it by: hf download org/unknown" in told
  )
