"""Parity of Qwen3-VL with transformers, and that a mistake would show.

The golden folder was made with transformers 5.24: random weights, float32,
eager attention, a left-padded batch of two videos of other grids, each temporal
patch behind text, and the first prompt without two of three video tokens.
"""

import dataclasses
import pathlib
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cacovid_jax import errors
from cacovid_jax.models import checkpoints, qwen2, video_llm
from cacovid_jax.parity import models

FOLDER = pathlib.Path(__file__).parents[1] / "golden" / "qwen3_vl_tiny"
TOWER = ("patch_embed", "vision_tower_output", "video_features")
STAGES = (
  *TOWER,
  "deepstack_features",
  "position_ids",
  "rope_deltas",
  "inputs_embeds",
  *(f"hidden_states[{layer}]" for layer in range(6)),
  "last_hidden_state",
  "logits",
  "generated_ids",
  "pruned_last_hidden_state",
  "pruned_logits",
)


@pytest.fixture(scope="module")
def golden():
  return models.read(FOLDER)


@pytest.fixture(scope="module")
def loaded():
  checkpoint = checkpoints.load(FOLDER)
  return checkpoint.model, checkpoint.params


def missed(*case):
  return [stage.name for stage in models.compare(*case) if not stage.ok]


def test_every_stage_is_within_its_tolerance(loaded, golden):
  found = models.compare(*loaded, golden)
  assert tuple(stage.name for stage in found) == STAGES
  assert not [stage for stage in found if not stage.ok]


def test_layers_apart_and_fused_pass_alike(golden):
  checkpoint = checkpoints.load(FOLDER, layers="separate")
  assert "qkv_proj" in checkpoint.params["language_model"]["layers"]["0"]
  assert not missed(checkpoint.model, checkpoint.params, golden)


def test_without_features_of_layers_the_decoder_strays(loaded, golden):
  with mock.patch.object(qwen2, "add_deep", lambda x, *_: x):
    found = missed(*loaded, golden)
  # The first layer's output is compared before anything is added to it.
  assert found[0] == "hidden_states[2]"
  assert {"logits", "pruned_logits"} <= set(found)


def test_rotary_frequencies_in_blocks_are_noticed(loaded, golden):
  model, params = loaded
  text = dataclasses.replace(model.config.text, rope_interleaved=False)
  config = dataclasses.replace(model.config, text=text)
  model = dataclasses.replace(model, config=config)
  assert missed(model, params, golden)[0] == "hidden_states[1]"


def test_positions_numbered_anew_after_pruning_are_noticed(loaded, golden):
  forward, length = video_llm.VideoLLM.forward, golden["input_ids"].shape[1]

  def renumbered(model, params, x, positions, **kwargs):
    if x.shape[1] < length:
      anew = jnp.arange(x.shape[1], dtype=jnp.int32)
      positions = jnp.broadcast_to(anew, positions.shape)
    return forward(model, params, x, positions, **kwargs)

  with mock.patch.object(video_llm.VideoLLM, "forward", renumbered):
    found = missed(*loaded, golden)
  assert found == ["pruned_last_hidden_state", "pruned_logits"]


def test_files_that_do_not_belong_together_stop_with_one_line(loaded, golden):
  for arrays, text in (
    ({"deepstack_features": np.zeros(3)}, "lacks deepstack_features"),
    (
      {"video_grid_thw": np.array([[4, 6, 8], [3, 8, 4]])},
      r"need \[48, 24\] video tokens",
    ),
    ({"pruned_logits": np.zeros(3)}, "lacks pruned_logits"),
  ):
    with pytest.raises(errors.UserError, match=text) as caught:
      models.compare(*loaded, golden | arrays)
    assert "\n" not in str(caught.value)
  absent = dict(golden)
  del absent["pruned_logits"]
  with pytest.raises(errors.UserError, match="lacks pruned_logits"):
    models.compare(*loaded, absent)
  with jax.default_matmul_precision("highest"):
    ours, theirs = models.logits(*loaded, golden)
  np.testing.assert_allclose(ours, theirs, atol=1e-4)
