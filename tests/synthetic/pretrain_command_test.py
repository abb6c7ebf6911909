"""Pretraining by its command, to a checkpoint directory that loads."""

import contextlib
import json
import os
import pathlib
import shutil
import subprocess
import sys

import chex
import jax
import numpy as np
import pytest
from safetensors import numpy

import tests
from cacovid_jax import config as config_lib
from cacovid_jax import errors, metrics, pretrain
from cacovid_jax.models import checkpoints
from cacovid_jax.parallel import mesh as mesh_lib
from cacovid_jax.synthetic import packing, pretraining, world

ROOT = pathlib.Path(__file__).parent.parent.parent
SPEC = f"{ROOT / 'configs' / 'synthetic_base.py'}:debug"


@pytest.fixture(scope="module")
def one_device():
  """Has pretraining use the first of the devices."""
  one = mesh_lib.make_mesh(1)

  @contextlib.contextmanager
  def patched():
    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(mesh_lib, "make_mesh", lambda: one)
      yield patch

  return patched


@pytest.fixture(scope="module")
def whole(one_device, tmp_path_factory):
  """Returns the workdir of a run that nothing stopped, and its jitted step."""
  workdir, made = tmp_path_factory.mktemp("pretrain") / "whole", []
  make = pretraining.make_update
  words = ["pretrain", f"--config={SPEC}", f"--workdir={workdir}"]
  with one_device() as patch:
    patch.setattr(
      pretraining,
      "make_update",
      lambda *args: made.append(make(*args)) or made[0],
    )
    pretrain.main(pretrain.COMMAND.parse(words))
  return workdir, made[0]


def test_the_command_leaves_a_complete_checkpoint_directory(whole):
  workdir, update = whole
  assert update._cache_size() == 1
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
  monkeypatch.setattr(packing, "corpus", lambda **given: corpus(5, **given))
  config = config_lib.load(SPEC, ["vocab_size=300"])
  with pytest.raises(errors.UserError, match="vocab_size"):
    pretraining.pretrain(config, tmp_path / "small")


def test_a_workdir_of_another_config_is_refused(tmp_path):
  config_lib.claim_workdir(tmp_path, config_lib.load(SPEC))
  changed = config_lib.load(SPEC, ["pretrain.lr=1e-4"])
  with pytest.raises(errors.UserError, match=r"pretrain\.lr is .* there"):
    pretraining.pretrain(changed, tmp_path)


def test_a_stopped_run_ends_as_one_that_nothing_stopped(
  whole, one_device, tmp_path
):
  config, weights = config_lib.load(SPEC), "base_model/model.safetensors"
  stopped = contextlib.nullcontext(lambda step: step == 1)
  with one_device() as patch:
    patch.setattr(pretraining.preemption, "watched", lambda: stopped)
    with pytest.raises(SystemExit) as end:
      pretraining.pretrain(config, tmp_path)
  assert end.value.code == 143
  assert not (tmp_path / weights).exists()

  def full(*args, **options):
    raise errors.UserError("no room")

  with one_device() as patch:  # At the last step, of all three.
    patch.setattr(pretraining.checkpoints, "save", full)
    with pytest.raises(errors.UserError, match="no room"):
      pretraining.pretrain(config, tmp_path)
  # Eight devices are told apart from one, before anything is trained.
  done = subprocess.run(
    [sys.executable, "-m", "cacovid_jax.pretrain", f"--config={SPEC}",
     f"--workdir={tmp_path}"],
    cwd=ROOT, env=os.environ | {"XLA_FLAGS": tests.xla_flags()},
    capture_output=True, text=True, check=False,
  )  # fmt: skip
  assert done.returncode == 2
  assert "began on 8 devices" in done.stderr
  with one_device():
    pretraining.pretrain(config, tmp_path)
  for name in ("probe.json", weights):
    assert (whole[0] / name).read_bytes() == (tmp_path / name).read_bytes()
  assert [line["step"] for line in metrics.read(tmp_path)] == [1, 2, 2, 2]


def test_a_batch_that_the_devices_cannot_share_is_refused(tmp_path):
  config = config_lib.load(SPEC)  # Two clips a step; tests have 8 devices.
  with pytest.raises(errors.UserError, match="batch_size 2 .* 8 devices"):
    pretraining.pretrain(config, tmp_path)


def test_a_run_begins_with_the_weights_that_it_is_given(whole, one_device):
  path = whole[0] / "base_model"
  config = config_lib.load(SPEC, [f"pretrain.init={path}"])
  model = checkpoints.load(path).model
  with one_device():
    given = pretraining.init_state(model, config.pretrain)["params"]
    drawn = pretraining.init_state(model, config_lib.load(SPEC).pretrain)
  stored = numpy.load_file(path / "model.safetensors")
  stored = {name.split("model.")[-1]: x for name, x in stored.items()}
  layers = given["model"]["language_model"]["layers"]
  for i, kernel in enumerate(layers["down_proj"]["kernel"]):
    want = stored[f"layers.{i}.mlp.down_proj.weight"].T
    np.testing.assert_array_equal(kernel, np.float32(want))
  table = given["model"]["language_model"]["embed_tokens"]
  want = stored["embed_tokens.weight"]
  np.testing.assert_array_equal(table, np.float32(want))
  # What only training has is drawn as ever.
  chex.assert_trees_all_equal(given["asked"], drawn["params"]["asked"])
  assert (
    np.abs(
      table - drawn["params"]["model"]["language_model"]["embed_tokens"]
    ).max()
    > 0
  )


@pytest.mark.parametrize("init", ["nowhere", "of_another"])
def test_weights_that_are_not_there_or_do_not_fit_are_refused(
  whole, tmp_path, init
):
  values = ["vocab_size=592", f"pretrain.init={whole[0] / 'base_model'}"]
  if init == "nowhere":
    values = [f"pretrain.init={tmp_path / 'nowhere'}"]
  told = {"nowhere": "nowhere", "of_another": "misshaped .*embed_tokens"}
  with pytest.raises(errors.UserError, match=told[init]) as found:
    pretraining.pretrain(config_lib.load(SPEC, values), tmp_path / "run")
  assert "\n" not in str(found.value)


def test_the_second_stage_of_a_small_qwen3_vl_goes_on_from_the_first():
  spec = str(ROOT / "configs" / "synthetic_base.py")
  first, second = (
    config_lib.load(f"{spec}:family=qwen3_vl{more}").pretrain.to_dict()
    for more in ("", ",stage=2")
  )
  assert second.pop("init") == "workdirs/base_qwen3_vl_1/base_model"
  assert first["init"] == "" and second["weights"]["asked"] == 4.0
  assert second["packing"]["dense_objects"] == first["packing"]["dense_objects"]
  for wrong in ("stage=2", "family=qwen3_vl,stage=3"):
    with pytest.raises(errors.UserError, match="unknown size"):
      config_lib.load(f"{spec}:{wrong}")


def test_a_run_from_given_weights_has_their_words(whole, one_device, tmp_path):
  given = tmp_path / "given"
  shutil.copytree(whole[0] / "base_model", given)
  words = given / "tokenizer.json"
  # To be told from one that is made.
  words.write_text(words.read_text() + "\n")
  config = config_lib.load(SPEC, [f"pretrain.init={given}"])
  with one_device() as patch:
    patch.setattr(pretraining, "train", lambda *unused: iter(()))
    folder = pretraining.pretrain(config, tmp_path / "run")
  assert (folder / words.name).read_bytes() == words.read_bytes()
  words.unlink()
  with pytest.raises(errors.UserError, match=r"given has no tokenizer\.json"):
    pretraining.pretrain(config, tmp_path / "other")


def test_stages_of_the_full_geometry_go_on_from_the_one_before():
  """Eight frames at first: a fourth of the tokens, four times the questions."""
  spec = f"{ROOT / 'configs' / 'synthetic_base.py'}:geometry=full"
  first, second, third = (
    config_lib.load(f"{spec},stage={stage}").pretrain for stage in (1, 2, 3)
  )
  assert not first.init
  assert second.init == "workdirs/base_full_1/base_model"
  assert third.init == "workdirs/base_full_2/base_model"
  tokens = [
    pretrain.packing.batch_size
    * world.VARIANTS[pretrain.packing.variants[0]].stage.num_tokens
    for pretrain in (first, second, third)
  ]
  assert tokens[0] == tokens[1] == tokens[2] == 16 * 6272
  with pytest.raises(errors.UserError, match="use 1 or 2 or 3"):
    config_lib.load(f"{spec},stage=4")
