"""`ckpt upgrade`: a workdir of an earlier version goes on with the same bits.

training/config_0cc195c.json is the config.json of a run of commit 0cc195c on
the tiny model (`synthetic_quickstart.py:debug` with a few overrides), whose
manifests had the hash below.
"""

import json
import pathlib
import shutil

import pytest

from cacovid_jax import ckpt, errors
from cacovid_jax import config as config_lib
from cacovid_jax.training import checkpointing
from tests.training import loop_test, tiny

OLD = pathlib.Path(__file__).parent / "training" / "config_0cc195c.json"
HASH = "321b9ca6c00e23cf"


def run(*words):
  return ckpt.main(ckpt.COMMAND.parse(["ckpt", *words]))


def rewrite_hash(step, value):
  """Makes a manifest one of a config with that hash."""
  path = step / checkpointing.MANIFEST
  manifest = checkpointing.read_manifest(step.parent, step.name)
  manifest["config_hash"] = value
  path.write_bytes(checkpointing._encode_manifest(manifest))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """Returns (workdir, result) of a run that was never stopped."""
  workdir = tmp_path_factory.mktemp("whole")
  return workdir, tiny.train(workdir, today())


def today():
  """Returns the recorded config under today's keys."""
  return config_lib.upgraded(config_lib.load(OLD))


@pytest.fixture
def workdir(whole, tmp_path):
  """Returns a workdir of commit 0cc195c, stopped after the second step."""
  step = tmp_path / "checkpoints" / "2"
  shutil.copytree(whole[0] / "checkpoints" / "2", step)
  shutil.copy(OLD, tmp_path / "config.json")
  rewrite_hash(step, HASH)
  return tmp_path


def test_an_older_workdir_names_the_command_and_goes_on_after_it(
  whole, workdir, capsys
):
  old = config_lib.load(OLD)
  assert config_lib.config_hash(old, before=True) == HASH
  with pytest.raises(errors.UserError) as caught:
    tiny.train(workdir, today())
  assert str(caught.value).endswith(
    f"python -m cacovid_jax.ckpt upgrade {workdir}"
  )
  before = (workdir / "config.json").read_bytes()
  assert run("upgrade", str(workdir)) == 0
  assert "config.json, 1 checkpoints upgraded" in capsys.readouterr().out
  assert (workdir / "config.before.json").read_bytes() == before
  manifest = workdir / "checkpoints" / "2" / "manifest.before.json"
  assert f'"config_hash": "{HASH}"' in manifest.read_text()
  assert run("doctor", str(workdir)) == 0
  result = tiny.train(workdir, today())
  loop_test.assert_same(result.state, whole[1].state)
  assert run("upgrade", str(workdir)) == 0
  assert "has today's keys already" in capsys.readouterr().out


def test_an_upgrade_that_was_cut_off_goes_on(workdir):
  step = workdir / "checkpoints" / "2"
  rewrite_hash(step, config_lib.config_hash(today()))
  assert run("upgrade", str(workdir)) == 0
  saved = config_lib.load(workdir / "config.json")
  assert config_lib.dumps(saved) == config_lib.dumps(today())


def test_steps_of_another_config_are_not_touched(workdir):
  rewrite_hash(workdir / "checkpoints" / "2", "cafe")
  before = (workdir / "config.json").read_bytes()
  with pytest.raises(errors.UserError, match="cafe.*nothing was changed"):
    run("upgrade", str(workdir))
  assert (workdir / "config.json").read_bytes() == before
  assert not (workdir / "config.before.json").exists()


def test_one_epoch_is_that_of_the_questions_it_began_with(workdir):
  """Steps know their number, config.json says 0."""
  old = config_lib.replace(config_lib.load(OLD), {"total_steps": 0})
  config_lib.save(old, workdir / "config.json")
  with pytest.raises(errors.UserError, match="left_out.json is missing"):
    run("upgrade", str(workdir))
  # 8 questions, two a step: the four steps of the recorded config.
  (workdir / "left_out.json").write_text(json.dumps({"questions": 8}))
  assert run("upgrade", str(workdir)) == 0
  manifest = checkpointing.read_manifest(workdir / "checkpoints", 2)
  assert manifest["config_hash"] == config_lib.config_hash(today())


def test_renamed_keys_keep_their_values():
  found = today()
  assert found.prepare.variants == ("dense",) and "variant" not in found.prepare
  assert found.prepare.clips == (4, 2, 3, 0)
  assert found.evals.policies == () and found.blind.batch_size == 16
