"""Parity of Qwen2.5-VL with transformers, and that a mistake would show.

The golden folder was made by `make_hf_golden.py` with transformers 5.23: random
weights, float32, eager attention, a left-padded batch of two videos of other
grids; its v4_* arrays follow the position rule of transformers 4.50.
"""

import functools
import os
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest

from cacovid_jax import errors
from cacovid_jax.models import (
  checkpoints,
  qwen2_5_vl,
  qwen2_5_vl_vision,
  video_llm,
)
from cacovid_jax.parity import models

FOLDER = os.path.join(
  os.path.dirname(__file__), os.pardir, "golden", "qwen2_5_vl_tiny"
)
STAGES = (
  "window_index",
  "cu_window_seqlens",
  "patch_embed",
  "vision_tower_output",
  "video_features",
  "position_ids",
  "rope_deltas",
  "v4_position_ids",
  "v4_rope_deltas",
  "inputs_embeds",
  *(f"hidden_states[{layer}]" for layer in range(4)),
  "last_hidden_state",
  "logits",
  "generated_ids",
  "v4_last_hidden_state",
  "v4_logits",
  "pruned_last_hidden_state",
  "pruned_logits",
)


def _missed(found):
  return [stage.name for stage in found if not stage.ok]


class GoldenTest(absltest.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.golden = models.read(FOLDER)
    config = checkpoints.load_config(FOLDER)
    cls.model = qwen2_5_vl.Qwen2_5VLModel(config)
    cls.params = checkpoints.load_params(FOLDER, config)

  def _compare(self, **arrays):
    return models.compare(self.model, self.params, self.golden | arrays)

  def test_every_stage_is_within_its_tolerance(self):
    # As llava_onevision_tiny has them: the first prompt, positions of 5.x,
    # without some video tokens; with an error.
    dropped = self._dropped()
    dropped["dropped_logits"] += 1e-2
    # Values at padding are not compared.
    padding = self.golden["attention_mask"] == 0
    self.assertTrue(padding.any())
    arrays = {
      name: np.where(padding[..., None], np.nan, self.golden[name])
      for name in ("inputs_embeds", "last_hidden_state", "logits", "v4_logits")
    }
    found = self._compare(**arrays, **dropped)
    self.assertEqual(_missed(found), ["dropped_logits"])
    names = [stage.name for stage in found]
    self.assertIn("dropped_last_hidden_state", names)
    self.assertEqual(
      tuple(name for name in names if name not in dropped), STAGES
    )

  def test_the_right_weights_in_the_wrong_tower_are_noticed(self):
    tanh = functools.partial(nn.gelu, approximate=True)
    with mock.patch.object(nn, "gelu", lambda x, approximate: tanh(x)):
      self.assertEqual(_missed(self._compare())[0], "video_features")

    # Every layer sees its whole slice. (One video: the patched function knows
    # its layout.)
    attend = qwen2_5_vl_vision.attend
    slices = self.model.layout((4, 3, 5)).slices

    def over_slices(q, k, v, segments, backend):
      del segments
      return attend(q, k, v, slices, backend)

    with mock.patch.object(qwen2_5_vl_vision, "attend", over_slices):
      missed = _missed(models.compare(self.model, self.params, self._first()))
    self.assertEqual(missed[0], "vision_tower_output")

  def test_a_folder_of_one_video_passes(self):
    self.assertEmpty(
      _missed(models.compare(self.model, self.params, self._first()))
    )

  def test_positions_of_the_other_rule_are_noticed(self):
    rules = {"v5": "4.50", "4.50": "v5"}
    right = qwen2_5_vl.position_ids

    def swapped(*args, rule, **kwargs):
      return right(*args, rule=rules[rule], **kwargs)

    with mock.patch.object(qwen2_5_vl, "position_ids", swapped):
      missed = _missed(self._compare())
    for name in ("position_ids", "v4_position_ids", "logits", "v4_logits"):
      self.assertIn(name, missed)
    self.assertNotIn("pruned_logits", missed)

  def test_positions_numbered_anew_after_pruning_are_noticed(self):
    forward = video_llm.VideoLLM.forward
    batch, length = self.golden["input_ids"].shape

    def renumbered(model, params, x, positions, *, lengths=None, **kwargs):
      # Only the pruned prompts are shorter than the batch's longest.
      is_pruned = lengths is not None and lengths.max() < length
      anew = jnp.broadcast_to(jnp.arange(length), (batch, 3, length))
      positions = jnp.where(is_pruned, anew, positions)
      return forward(model, params, x, positions, lengths=lengths, **kwargs)

    with mock.patch.object(video_llm.VideoLLM, "forward", renumbered):
      missed = _missed(self._compare())
    self.assertEqual(missed, ["pruned_last_hidden_state", "pruned_logits"])

  def _dropped(self):
    """Returns the arrays of the first prompt without every other token."""
    ids, mask = (
      self.golden[name][0] for name in ("input_ids", "attention_mask")
    )
    keep = mask.astype(bool)
    keep[np.flatnonzero(ids == 249)[::2]] = False
    index = np.flatnonzero(keep)

    @jax.jit
    def run(params, x, positions):
      mask = jnp.broadcast_to(keep, (1, len(keep), len(keep)))
      hidden, _ = self.model.forward(params, x, positions, mask=mask)
      return hidden[:, index], self.model.logits(params, hidden)[:, index]

    with jax.default_matmul_precision("highest"):
      hidden, logits = run(
        self.params,
        self.golden["inputs_embeds"][:1],
        self.golden["position_ids"][:, :1].transpose(1, 0, 2),
      )
    return {
      "dropped_keep_index": index,
      "dropped_last_hidden_state": np.asarray(hidden),
      "dropped_logits": np.array(logits),
    }

  def test_files_that_do_not_belong_together_stop_with_one_line(self):
    for arrays, text in (
      (dict(video_grid_thw=np.array([[4, 6, 10]])), "2 prompts and 1 videos"),
      (
        dict(video_grid_thw=np.array([[4, 6, 8], [3, 8, 4]])),
        r"need \[48, 24\] video tokens",
      ),
      (
        dict(pixel_values_videos=self.golden["pixel_values_videos"][:-4]),
        "has 332 patches, video_grid_thw 336",
      ),
      (
        dict(hidden_states=self.golden["hidden_states"][:-1]),
        "3 hidden states, the config's model 4",
      ),
    ):
      with self.assertRaisesRegex(errors.UserError, text):
        self._compare(**arrays)
    with self.assertRaisesRegex(errors.UserError, "lacks pixel_values_videos"):
      models.compare(self.model, self.params, {})

  def _first(self):
    """Returns the arrays of the first video and its prompt alone."""
    arrays = dict(self.golden)
    for name in ("video_grid_thw", "second_per_grid_ts"):
      arrays[name] = arrays[name][:1]
    patches, tokens = 4 * 6 * 10, 4 * 3 * 5
    for name, count in (
      ("pixel_values_videos", patches),
      ("patch_embed", patches),
      ("vision_tower_output", patches),
      ("window_index", tokens),
      ("video_features", tokens),
    ):
      arrays[name] = arrays[name][:count]
    ends = arrays["cu_window_seqlens"]
    arrays["cu_window_seqlens"] = ends[ends <= patches]
    for name in (
      "input_ids",
      "attention_mask",
      "inputs_embeds",
      "rope_deltas",
      "last_hidden_state",
      "logits",
      "v4_rope_deltas",
      "v4_last_hidden_state",
      "v4_logits",
      "generated_ids",
    ):
      arrays[name] = arrays[name][:1]
    for name in ("position_ids", "hidden_states", "v4_position_ids"):
      arrays[name] = arrays[name][:, :1]
    return arrays


if __name__ == "__main__":
  absltest.main()
