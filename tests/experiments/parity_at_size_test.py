"""The comparison at released sizes, run here at a tiny one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cacovid_jax import errors
from cacovid_jax.models import checkpoints, llava_onevision, qwen2_5_vl
from cacovid_jax.synthetic import tiny_checkpoints
from experiments import parity_at_size

ONEVISION = llava_onevision.LlavaOnevisionConfig.tiny()
QWEN = qwen2_5_vl.Qwen2_5VLConfig.tiny()


@pytest.mark.parametrize("config", [ONEVISION, QWEN], ids=["ov", "qvl"])
def test_random_checkpoints_are_finite_and_load(tmp_path, config):
  tiny_checkpoints.write_random(str(tmp_path), config)
  params = checkpoints.load(tmp_path, None).params
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    assert leaf.dtype == jnp.bfloat16
    size = np.abs(np.asarray(leaf, np.float32))
    name = jax.tree_util.keystr(path)
    into_residual = ("o_proj", "down_proj", "out_proj", "fc2", "'proj'")
    low, high = 2**-7, 2**-5
    if "scale" in name or "embed_tokens" in name:
      low, high = 0.5, 1.0
    elif "linear_2']['kernel" in name:
      low, high = 2**-2, 2**-1
    elif "kernel" in name and any(part in name for part in into_residual):
      low, high = 2**-11, 2**-10
    assert low <= size.min() <= size.max() < high, name


@pytest.mark.parametrize("config", [ONEVISION, QWEN], ids=["ov", "qvl"])
def test_both_models_are_compared_and_the_files_deleted(
  tmp_path, config, capsys
):
  folder = tmp_path / "made"
  fine = parity_at_size.compare(config, str(folder), num_layers=2, device="cpu")
  printed = capsys.readouterr().out
  assert "MISS" not in printed.split("all in bfloat16")[0]
  assert "hidden_states[2]" in printed and "hidden_states[3]" not in printed
  assert "positions (at least 500)" in printed
  assert fine == ("MISS" not in printed)
  assert not folder.exists()


def test_a_cut_model_ends_its_tower_with_a_full_layer():
  released = qwen2_5_vl.Qwen2_5VLConfig.qwen2_5_vl_7b()
  config = parity_at_size.cut(released, 3)
  assert config.vision.num_layers == config.text.num_layers == 3
  assert config.vision.full_layers == (2,)
  assert config.text.hidden_size == released.text.hidden_size


def test_a_folder_with_files_is_left_alone(tmp_path):
  (tmp_path / "mine").write_text("kept")
  with pytest.raises(errors.UserError, match="is not empty"):
    parity_at_size.compare(ONEVISION, str(tmp_path), num_layers=1, device="cpu")
  assert (tmp_path / "mine").read_text() == "kept"


def test_earlier_spellings_are_taken_for_another_version(capsys):
  words = ["--full_size=qvl-3b", "--on=cuda", "--cut_layers=2"]
  args = parity_at_size.COMMAND.parse(["parity_at_size", *words])
  assert (args.size, args.torch_device, args.layers) == ("qvl-3b", "cuda", 2)
  assert "hint: --full_size is --size now" in capsys.readouterr().err
  with pytest.raises(errors.UserError, match="--layers is 0; .* at least 1"):
    parity_at_size.COMMAND.parse(["parity_at_size", "--layers=0"])
