"""Reading and writing Hugging Face checkpoint directories."""

import dataclasses
import functools
import hashlib
import json
import os
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import safetensors.numpy
from absl.testing import absltest, parameterized

from cacovid_jax import errors
from cacovid_jax.models import checkpoints, llava_onevision

CONFIG = llava_onevision.LlavaOnevisionConfig.tiny()
TIED = dataclasses.replace(
  CONFIG, text=dataclasses.replace(CONFIG.text, tie_embeddings=True)
)

# (hub, 4.52 to 4.57 modules, 5.x modules, 5.x files) of each group of names.
SPELLINGS = (
  (
    "language_model.model.",
    "model.language_model.",
    "model.language_model.",
    "language_model.model.",
  ),
  (
    "language_model.lm_head.",
    "lm_head.",
    "lm_head.",
    "language_model.lm_head.",
  ),
  (
    "vision_tower.vision_model.",
    "model.vision_tower.vision_model.",
    "model.vision_tower.",
    "vision_tower.",
  ),
  (
    "multi_modal_projector.",
    "model.multi_modal_projector.",
    "model.multi_modal_projector.",
    "multi_modal_projector.",
  ),
  (
    "image_newline",
    "model.image_newline",
    "model.image_newline",
    "image_newline",
  ),
)


@functools.cache
def _params(config=CONFIG):
  model = llava_onevision.LlavaOnevisionModel(config)
  params = jax.jit(model.init)(jax.random.key(0))
  gen = np.random.default_rng(0)
  return jax.tree.map(
    lambda leaf: gen.standard_normal(leaf.shape).astype(np.float32), params
  )


def _assert_equal(actual, expected):
  jax.tree.map(np.testing.assert_array_equal, actual, expected)


class CheckpointsTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.directory = self.create_tempdir().full_path
    self.weights = os.path.join(self.directory, checkpoints.WEIGHTS)

  def _save(self, config=CONFIG, **kwargs):
    kwargs = dict(eos_ids=[5, 6], pad_id=7) | kwargs
    checkpoints.save(self.directory, config, _params(config), **kwargs)
    return dict(checkpoints.read_safetensors(self.directory))

  def _write(self, tensors):
    checkpoints.write_safetensors(self.weights, tensors)

  def test_round_trip_is_exact(self):
    self._save()
    loaded = checkpoints.load(self.directory)
    _assert_equal(loaded.params, _params())
    self.assertEqual(loaded.model.config, CONFIG)
    self.assertEqual(loaded.eos_ids, (5, 6))
    self.assertEqual(loaded.pad_id, 7)
    self.assertIsNone(loaded.tokenizer)
    with open(self.weights, "rb") as file:
      digest = hashlib.sha256(file.read()).hexdigest()
    self.assertEqual(
      loaded.identity, {"path": self.directory, "sha256": digest}
    )

  def test_written_names_and_layouts_are_the_hubs(self):
    tensors = self._save()
    params = _params()
    tower = params["vision_tower"]
    patches = tensors[
      "vision_tower.vision_model.embeddings.patch_embedding.weight"
    ]
    self.assertEqual(patches.shape, (32, 3, 4, 4))
    # Our row (row 1, column 2, channel 0) of a 4 x 4 patch.
    row = (1 * 4 + 2) * 3
    np.testing.assert_array_equal(
      patches[:, 0, 1, 2], tower["patch_embedding"]["kernel"][row]
    )
    up = tensors["language_model.model.layers.2.mlp.up_proj.weight"]
    np.testing.assert_array_equal(
      up, params["language_model"]["layers"]["up_proj"]["kernel"][2].T
    )
    self.assertNotIn(
      "language_model.model.layers.0.self_attn.o_proj.bias", tensors
    )
    # Unused, for readers that ask for it.
    norm = "vision_tower.vision_model.post_layernorm"
    np.testing.assert_array_equal(tensors[f"{norm}.weight"], 1.0)

  @parameterized.parameters(range(4))
  def test_every_known_spelling_of_the_names(self, spelling):
    def respell(name):
      for row in SPELLINGS:
        if name.startswith(row[0]):
          return row[spelling] + name.removeprefix(row[0])
      raise AssertionError(name)

    self._write({respell(k): v for k, v in self._save().items()})
    _assert_equal(checkpoints.load_params(self.directory, CONFIG), _params())

  @parameterized.parameters(np.float16, ml_dtypes.bfloat16)
  def test_half_precision_files(self, dtype):
    self._save(dtype=dtype)
    rounded = jax.tree.map(
      lambda leaf: leaf.astype(dtype).astype(np.float32), _params()
    )
    _assert_equal(checkpoints.load_params(self.directory, CONFIG), rounded)
    loaded = checkpoints.load(self.directory, jnp.bfloat16)
    self.assertEqual(loaded.params["image_newline"].dtype, jnp.bfloat16)
    self.assertEqual(loaded.model.dtype, jnp.bfloat16)

  @parameterized.parameters(True, False)
  def test_tied_embeddings_need_no_head(self, with_copy):
    tensors = self._save(TIED)
    head = "language_model.lm_head.weight"
    self.assertNotIn(head, tensors)
    if with_copy:
      embeddings = tensors["language_model.model.embed_tokens.weight"]
      self._write(tensors | {head: embeddings})
    loaded = checkpoints.load(self.directory)
    self.assertEqual(loaded.model.config, TIED)
    _assert_equal(loaded.params, _params(TIED))

  def test_sharded_weights(self):
    tensors = self._save()
    whole = checkpoints.identity(self.directory)
    os.remove(self.weights)
    names = sorted(tensors)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, chosen in shards.items():
      checkpoints.write_safetensors(
        os.path.join(self.directory, file), {n: tensors[n] for n in chosen}
      )
    index = {n: file for file, chosen in shards.items() for n in chosen}
    path = os.path.join(self.directory, checkpoints.INDEX)
    with open(path, "w") as file:
      json.dump({"weight_map": index}, file)
    _assert_equal(checkpoints.load_params(self.directory, CONFIG), _params())
    self.assertNotEqual(checkpoints.identity(self.directory), whole)

    os.remove(os.path.join(self.directory, "b.safetensors"))
    with self.assertRaisesRegex(errors.UserError, "b.safetensors is missing"):
      checkpoints.load(self.directory)

  def test_index_that_points_elsewhere_is_refused(self):
    self._save()
    path = os.path.join(self.directory, checkpoints.INDEX)
    with open(path, "w") as file:
      json.dump({"weight_map": {"x": "../other.safetensors"}}, file)
    with self.assertRaisesRegex(errors.UserError, "not a plain file name"):
      checkpoints.load(self.directory)

  def test_tensors_that_do_not_fit_are_named(self):
    tensors = self._save()
    del tensors["image_newline"]
    name = "language_model.model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name].T.copy()
    tensors["language_model.model.layers.3.extra"] = np.zeros(3, np.float32)
    tensors["multi_modal_projector.linear_1.bias"] = np.zeros(32, np.int32)
    self._write(tensors)
    with self.assertRaises(errors.UserError) as caught:
      checkpoints.load(self.directory)
    message = str(caught.exception)
    self.assertIn("missing image_newline", message)
    self.assertIn("unknown language_model.model.layers.3.extra", message)
    self.assertIn(f"misshaped {name} (32, 48) instead of (48, 32)", message)
    self.assertIn("multi_modal_projector.linear_1.bias int32", message)
    self.assertNotIn("\n", message)

  def test_long_lists_of_names_are_cut(self):
    tensors = self._save()
    decoder = [n for n in tensors if n.startswith("language_model")]
    self._write({n: v for n, v in tensors.items() if n not in decoder})
    with self.assertRaisesRegex(
      errors.UserError, f"and {len(decoder) - 8} more"
    ):
      checkpoints.load(self.directory)

  def test_the_same_tensor_twice_is_an_error(self):
    tensors = self._save()
    tensors["model.image_newline"] = tensors["image_newline"]
    self._write(tensors)
    with self.assertRaisesRegex(errors.UserError, "unknown .*image_newline"):
      checkpoints.load(self.directory)

  def test_weights_of_a_policy_beside_the_model_are_left_alone(self):
    policy = {"compression_policy.layernorm.weight": np.ones(3, np.float32)}
    self._write(self._save() | policy)
    _assert_equal(checkpoints.load_params(self.directory, CONFIG), _params())

  @parameterized.parameters(
    (b"", "not a readable safetensors file"),
    (b"12345678901234567890", "not a readable safetensors file"),
  )
  def test_broken_weights(self, content, text):
    self._save()
    with open(self.weights, "wb") as file:
      file.write(content)
    with self.assertRaisesRegex(errors.UserError, text):
      checkpoints.load(self.directory)

  def test_truncated_weights(self):
    self._save()
    os.truncate(self.weights, os.path.getsize(self.weights) - 10)
    with self.assertRaisesRegex(errors.UserError, "not a readable"):
      checkpoints.load(self.directory)

  def test_broken_or_missing_files_are_named(self):
    self._save()
    config = os.path.join(self.directory, "config.json")
    shutil.copy(config, config + ".kept")
    with open(config, "w") as file:
      file.write("{")
    with self.assertRaisesRegex(errors.UserError, "config.json is not read"):
      checkpoints.load(self.directory)
    os.remove(config)
    with self.assertRaisesRegex(errors.UserError, "config.json is missing"):
      checkpoints.load(self.directory)
    shutil.copy(config + ".kept", config)
    os.remove(self.weights)
    with self.assertRaisesRegex(errors.UserError, "safetensors is missing"):
      checkpoints.load(self.directory)

  def test_end_ids_come_from_either_config(self):
    self._save()
    os.remove(os.path.join(self.directory, "generation_config.json"))
    loaded = checkpoints.load(self.directory)
    self.assertEqual((loaded.eos_ids, loaded.pad_id), ((5, 6), 7))
    with open(
      os.path.join(self.directory, "generation_config.json"), "w"
    ) as file:
      json.dump({"eos_token_id": 9}, file)
    loaded = checkpoints.load(self.directory)
    self.assertEqual((loaded.eos_ids, loaded.pad_id), ((9,), 7))

  def test_file_says_it_is_for_torch(self):
    self._save()
    with safetensors.safe_open(self.weights, framework="np") as file:
      self.assertEqual(file.metadata(), {"format": "pt"})
    self.assertNoPartialFiles()

  def assertNoPartialFiles(self):  # noqa: N802
    left = [n for n in os.listdir(self.directory) if n.endswith(".partial")]
    self.assertEmpty(left)


if __name__ == "__main__":
  absltest.main()
