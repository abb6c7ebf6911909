"""A tiny checkpoint and benchmark that the tests of this folder share."""

import pytest

from cacovid_jax.synthetic import tiny_checkpoints
from tests.evals import tiny


@pytest.fixture(scope="session")
def checkpoint_dir(tmp_path_factory):
  return tiny.write_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="session")
def qwen3_vl_dir(tmp_path_factory):
  folder = tmp_path_factory.mktemp("tiny") / "qwen3_vl"
  tiny_checkpoints.write_tiny(folder, "qwen3_vl")
  return str(folder)


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
  return tiny.write_data(tmp_path_factory.mktemp("blocks"))


@pytest.fixture(scope="session")
def checkpoint(checkpoint_dir):
  return tiny.load_checkpoint(checkpoint_dir)


@pytest.fixture(scope="session")
def policy_file(tmp_path_factory, checkpoint):
  return tiny.write_policy(tmp_path_factory.mktemp("policy"), checkpoint)


@pytest.fixture(scope="module")
def one_compilation():
  with tiny.shared_programs():
    yield
