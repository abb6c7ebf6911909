"""Parity with transformers' intermediates, and that a mistake would show.

The golden folder was made by `make_hf_golden.py` with transformers 5.23: random
weights, float32, eager attention. Tolerances are explained in
`cacovid_jax.parity.models`.
"""

import contextlib
import functools
import io
import os
import shutil
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest

from cacovid_jax import errors
from cacovid_jax.models import checkpoints, llava_onevision, prompt_batch
from cacovid_jax.parity import __main__, models

FOLDER = os.path.join(
  os.path.dirname(__file__), os.pardir, "golden", "llava_onevision_tiny"
)


def _missed(found):
  return [stage.name for stage in found if not stage.ok]


class GoldenTest(absltest.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.golden = models.read(FOLDER)
    config = checkpoints.load_config(FOLDER)
    cls.model = llava_onevision.LlavaOnevisionModel(config)
    cls.params = checkpoints.load_params(FOLDER, config)

  def _compare(self, golden_arrays=None):
    return models.compare(self.model, self.params, golden_arrays or self.golden)

  def test_every_stage_is_within_its_tolerance(self):
    # By the command, whose exit code is 0.
    arguments = __main__.COMMAND.parse(["parity", FOLDER])
    with (
      mock.patch.object(jax.config, "update"),  # Of other tests, too.
      contextlib.redirect_stdout(io.StringIO()) as out,
    ):
      self.assertEqual(__main__.main(arguments), 0)
    *rows, summary = out.getvalue().splitlines()
    self.assertEqual(summary, "15 of 15 stages within tolerance")
    names = [row.split()[0] for row in rows if row.endswith(" ok")]
    for name in (
      "vision_embeddings",
      "vision_tower_output",
      "projected_features",
      "pooled_features",
      "video_features",
      "inputs_embeds",
      *(f"hidden_states[{layer}]" for layer in range(4)),
      "last_hidden_state",
      "logits",
      "generated_ids",
      "dropped_last_hidden_state",
      "dropped_logits",
    ):
      self.assertIn(name, names)

  def test_one_wrong_id_is_noticed_and_values_at_padding_are_not(self):
    arrays = dict(self.golden)
    padding = arrays["attention_mask"] == 0
    self.assertTrue(padding.any())
    for name in ("inputs_embeds", "last_hidden_state", "logits"):
      arrays[name] = np.where(padding[..., None], np.nan, arrays[name])
    arrays["hidden_states"] = np.where(
      padding[..., None], np.nan, arrays["hidden_states"]
    )
    arrays["generated_ids"] = arrays["generated_ids"].copy()
    arrays["generated_ids"][1, -1] += 1
    self.assertEqual(_missed(self._compare(arrays)), ["generated_ids"])

  def test_pooling_with_a_filter_is_noticed(self):
    def filtered(x):
      image = x.reshape(len(x), 7, 7, -1)
      image = jax.image.resize(image, (len(x), 4, 4, x.shape[-1]), "bilinear")
      return image.reshape(len(x), 16, -1)

    with mock.patch.object(llava_onevision, "pool", filtered):
      missed = _missed(self._compare())
    self.assertEqual(missed[0], "pooled_features")
    self.assertIn("logits", missed)

  def test_tanh_gelu_in_the_projector_is_noticed(self):
    tanh = functools.partial(nn.gelu, approximate=True)
    with mock.patch.object(nn, "gelu", lambda x, approximate: tanh(x)):
      missed = _missed(self._compare())
    self.assertEqual(missed[0], "projected_features")

  def test_exact_gelu_in_the_tower_is_noticed(self):
    exact = functools.partial(nn.gelu, approximate=False)
    with mock.patch.object(nn, "gelu", lambda x, approximate: exact(x)):
      missed = _missed(self._compare())
    self.assertEqual(missed[0], "vision_tower_output")

  def test_positions_numbered_anew_after_dropping_are_noticed(self):
    forward = llava_onevision.LlavaOnevisionModel.forward

    def renumbered(model, params, x, positions, **kwargs):
      positions = jnp.broadcast_to(jnp.arange(x.shape[1]), positions.shape)
      return forward(model, params, x, positions, **kwargs)

    with mock.patch.object(
      llava_onevision.LlavaOnevisionModel, "forward", renumbered
    ):
      missed = _missed(self._compare())
    self.assertEqual(missed, ["dropped_last_hidden_state", "dropped_logits"])

  def test_wrong_rows_of_a_pruned_prompt_are_noticed(self):
    kept_rows = prompt_batch.kept_rows

    def shifted(index, *args, **kwargs):
      return kept_rows(index + 1, *args, **kwargs)

    with mock.patch.object(prompt_batch, "kept_rows", shifted):
      missed = _missed(self._compare())
    self.assertEqual(missed, ["dropped_last_hidden_state", "dropped_logits"])

  def test_a_weight_off_by_one_percent_is_noticed(self):
    params = jax.tree.map(np.copy, self.params)
    params["language_model"]["layers"]["o_proj"]["kernel"][1] *= 1.01
    missed = _missed(models.compare(self.model, params, self.golden))
    self.assertEqual(missed[0], "hidden_states[2]")

  def test_folders_that_are_not_golden_stop_with_one_line(self):
    empty = self.create_tempdir().full_path
    with self.assertRaisesRegex(errors.UserError, "holds no golden file"):
      __main__.check(empty)
    with self.assertRaisesRegex(errors.UserError, "is not a folder"):
      __main__.check(os.path.join(empty, "absent"))
    lacking = os.path.join(empty, "lacking")
    shutil.copytree(FOLDER, lacking)
    np.savez(os.path.join(lacking, "golden.npz"), logits=np.zeros(3))
    with self.assertRaisesRegex(errors.UserError, "lacks pixel_values_videos"):
      __main__.check(lacking)
    with np.load(os.path.join(FOLDER, "golden.npz")) as file:
      arrays = dict(file)
    for name, other in (("input_ids", np.array(1)), ("logits", np.array("x"))):
      np.savez(os.path.join(lacking, "golden.npz"), **arrays | {name: other})
      with self.assertRaisesRegex(
        errors.UserError, f"lacks {name}, .* axes; make"
      ):
        __main__.check(lacking)


if __name__ == "__main__":
  absltest.main()
