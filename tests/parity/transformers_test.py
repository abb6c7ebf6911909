"""The check against installed transformers: it passes, and it can fail."""

import pathlib
import shutil
import sys
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers

import cacovid_jax
from cacovid_jax import errors
from cacovid_jax.models import checkpoints
from cacovid_jax.parity import (
  __main__,
  half_precision,
  models,
  reference_patches,
)
from cacovid_jax.parity import stage as stage_lib
from cacovid_jax.parity import transformers as transformers_lib

GOLDEN = pathlib.Path(__file__).parent.parent / "golden"
LLAVA, QWEN = GOLDEN / "llava_onevision_tiny", GOLDEN / "qwen2_5_vl_tiny"
QWEN3 = GOLDEN / "qwen3_vl_tiny"
SHIPPED = pathlib.Path(cacovid_jax.__file__).parent / "assets" / "base_model"


def missed(found):
  return [stage.name for stage in found if not stage.ok]


@pytest.fixture(
  scope="module", params=[LLAVA, QWEN, QWEN3], ids=lambda p: p.name
)
def case(request):
  """Returns (model, params, what transformers computes) of a directory."""
  arrays = transformers_lib.reference(request.param, max_new_tokens=3)
  checkpoint = checkpoints.load(request.param)
  return checkpoint.model, checkpoint.params, arrays


def run_command(directory, *words):
  """Returns the exit code of the command line."""
  words = ["parity", f"--against_transformers={directory}", *words]
  with mock.patch.object(jax.config, "update"):  # Of other tests, too.
    return __main__.main(__main__.COMMAND.parse(words))


def test_the_shipped_base_model_passes(capsys):
  assert run_command(SHIPPED) == 0
  lines = capsys.readouterr().out.splitlines()
  layers = checkpoints.load_config(SHIPPED).text.num_layers
  names = [
    "vision_embeddings",
    "vision_tower_output",
    "projected_features",
    "pooled_features",
    "video_features",
    "inputs_embeds",
    *(f"hidden_states[{layer}]" for layer in range(layers + 1)),
    "last_hidden_state",
    "logits",
    "generated_ids",
    "dropped_last_hidden_state",
    "dropped_logits",
  ]
  assert [line.split()[0] for line in lines[3:-1]] == names
  assert lines[-1] == f"{len(names)} of {len(names)} stages within tolerance"


def test_a_miss_is_exit_code_1(capsys):
  found = [
    stage_lib.Stage("near", 1e-6, 2e-5, True),
    stage_lib.Stage("far", 0.3, 2e-5, False),
  ]
  with mock.patch.object(transformers_lib, "check", return_value=found):
    assert run_command(LLAVA) == 1
  assert "1 of 2 stages within tolerance" in capsys.readouterr().out
  with pytest.raises(errors.UserError, match="no folder given"):
    __main__.main(__main__.COMMAND.parse(["parity"]))


def test_every_stage_of_a_golden_folder_is_there_and_passes(case):
  model, params, arrays = case
  folder = QWEN3 if model.num_deep else QWEN
  folder = LLAVA if "projected_features" in arrays else folder
  # Nothing that the folder's own file has is left out, but sums over it.
  recorded = set(models.read(folder))
  derived = {"generated_logits", "generated_margin", "v4_hidden_states"}
  derived |= {name for name in recorded if name.endswith("mean")}
  derived.add("vision_post_layernorm_unused")
  # Under the name of the other makers here.
  derived |= {name for name in recorded if name.startswith("pruned_")}
  assert recorded - derived <= set(arrays)
  # One of the two prompts is padded, on the left.
  assert (
    arrays["attention_mask"].sum(axis=1) < arrays["input_ids"].shape[1]
  ).any()
  assert not missed(transformers_lib.compare(model, params, arrays))


def test_a_perturbed_weight_is_a_miss_where_it_acts(case):
  model, params, arrays = case
  params = jax.tree.map(np.array, params)
  if "projector" in params:
    params["language_model"]["layers"]["down_proj"]["kernel"][1] *= 1.01
    first = "hidden_states[2]"
  else:
    params["visual"]["merger"]["linear_2"]["kernel"] *= 1.01
    first = "video_features"
  found = missed(transformers_lib.compare(model, params, arrays))
  assert found[0] == first
  assert "logits" in found


def test_the_seed_changes_the_pixels_and_nothing_else_is_random(case):
  _, _, arrays = case
  if "video_grid_thw" not in arrays:
    again = transformers_lib.reference(LLAVA, max_new_tokens=3)
    other = transformers_lib.reference(LLAVA, max_new_tokens=1, seed=1)
    for name, value in arrays.items():
      np.testing.assert_array_equal(value, again[name], err_msg=name)
    assert (other["pixel_values_videos"] != arrays["pixel_values_videos"]).any()
    assert torch.is_grad_enabled()  # What others compute is left alone.


def test_steps_that_rounding_could_decide_are_not_compared():
  with mock.patch.object(transformers_lib, "_TIE", 1e6):
    arrays = transformers_lib.reference(LLAVA, max_new_tokens=3)
  assert arrays["generated_ids"].shape == (2, 1)


def test_agreement_counts_what_is_not_a_tie():
  theirs = np.array([[0, 3, 1], [2, 1, 0], [5, 5.03, 0], [0, 1, 1.005]])
  ours = np.array([[0, 4, 1], [0, 1, 0.5], [6, 5, 0], [0, 1, 2.0]])
  found = half_precision.agreement(ours, theirs)
  # Row 2 is within 1 % of the largest logit, row 3 within 0.01 as well.
  assert found == (4, 2, 1, 1, 1)
  assert found.share == 0.5 and not found.ok
  assert found.strict_share == pytest.approx(1 / 3)
  many = half_precision.Agreement(600, 100, 495, 0, 0)
  assert many.ok and not many._replace(same=494).ok
  assert not half_precision.Agreement(499, 0, 499, 0, 499).ok


@pytest.mark.parametrize("folder", [LLAVA, QWEN], ids=lambda p: p.name)
def test_half_precision_agrees_and_a_wrong_weight_does_not(folder):
  found, control = half_precision.agree(folder)
  assert control.positions == found.positions and control.share > 0.9
  assert found.positions >= 500 and found.share > 0.9
  # The same through a model that reads its positions wrongly.
  arrays = transformers_lib.reference(
    folder, dtype="bfloat16", max_new_tokens=1, num_frames=4
  )
  checkpoint = checkpoints.load(folder, jnp.bfloat16)
  params = jax.tree.map(lambda leaf: leaf, checkpoint.params)
  params["language_model"]["layers"]["q_proj"]["kernel"] *= 0.0
  mine, theirs = models.logits(checkpoint.model, params, arrays)
  assert half_precision.agreement(mine, theirs).share < found.share


def test_the_command_compares_in_half_precision_when_asked(capsys):
  half = half_precision.Agreement(600, 3, 597, 1, 599)
  stage = stage_lib.Stage("near", 1e-6, 2e-5, True)
  with (
    mock.patch.object(transformers_lib, "check", return_value=[stage]),
    mock.patch.object(half_precision, "agree", return_value=[half] * 2),
  ):
    assert run_command(LLAVA, "--half") == 0
  *_, ours, control, _, verdict = capsys.readouterr().out.splitlines()
  assert (
    ours.split()[-3:] == control.split()[-3:] == ["3", "100.00%", "100.00%"]
  )
  assert verdict == "at least 99%: ok"


def test_versions_that_count_whole_seconds_are_asked_for_those():
  core = transformers.Qwen2_5_VLModel
  count = core.get_rope_index

  def whole(self, *args, second_per_grid_ts, **kwargs):
    seconds = second_per_grid_ts.int().float()
    return count(self, *args, second_per_grid_ts=seconds, **kwargs)

  with mock.patch.object(core, "get_rope_index", whole):
    arrays = transformers_lib.reference(QWEN, max_new_tokens=1)
  np.testing.assert_array_equal(arrays["second_per_grid_ts"], [1.0, 2.0])
  checkpoint = checkpoints.load(QWEN)
  found = transformers_lib.compare(checkpoint.model, checkpoint.params, arrays)
  assert not missed(found)


def test_positions_of_4_50_are_those_of_its_recorded_run():
  recorded = models.read(QWEN)
  config = checkpoints.load_config(QWEN)
  merge = config.vision.merge_size
  mine = reference_patches._positions_4_50(
    recorded["input_ids"],
    recorded["attention_mask"],
    recorded["video_grid_thw"] // (1, merge, merge),
    recorded["second_per_grid_ts"],
    config,
  )
  np.testing.assert_array_equal(mine, recorded["v4_position_ids"])


@pytest.mark.parametrize("absent", ["torch", "transformers"])
def test_without_the_extra_one_line_says_what_to_install(absent):
  with mock.patch.dict(sys.modules, {absent: None}):
    with pytest.raises(errors.UserError, match=r"cacovid_jax\[hf\]") as caught:
      transformers_lib.check(LLAVA)
  assert "\n" not in str(caught.value)


def test_directories_that_cannot_be_compared(tmp_path):
  with pytest.raises(errors.UserError, match="config.json is missing"):
    transformers_lib.check(tmp_path)
  with pytest.raises(errors.UserError, match="cannot compute on 'abacus'"):
    transformers_lib.check(LLAVA, device="abacus")
  for name in ("config.json", "generation_config.json"):
    shutil.copy(LLAVA / name, tmp_path)
  with pytest.raises(errors.UserError, match="cannot load"):
    transformers_lib.check(tmp_path)
  weights = safetensors.numpy.load_file(LLAVA / "model.safetensors")
  del weights["image_newline"]
  safetensors.numpy.save_file(
    weights, tmp_path / "model.safetensors", {"format": "pt"}
  )
  with pytest.raises(errors.UserError, match="finds no .*image_newline"):
    transformers_lib.check(tmp_path)
