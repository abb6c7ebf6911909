"""Reading and writing Hugging Face checkpoint directories."""

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import shutil
from unittest import mock

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import safetensors.numpy
from absl.testing import absltest, parameterized
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from cacovid_jax import errors
from cacovid_jax.models import (
  checkpoints,
  llava_onevision,
  qwen2_5_vl,
  safetensors_io,
)
from cacovid_jax.parallel import mesh as mesh_lib
from tests.data import tokenizers_for_tests
from tests.models import tensors as tensor_files

GOLDEN = pathlib.Path(__file__).parent.parent / "golden"
CONFIG = llava_onevision.LlavaOnevisionConfig.tiny()
QWEN = qwen2_5_vl.Qwen2_5VLConfig.tiny()
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


# (hub and 5.x files, 4.52 and later modules), of Qwen2.5-VL.
QWEN_SPELLINGS = (
  ("visual.", "model.visual."),
  ("model.", "model.language_model."),
  ("lm_head.", "lm_head."),
)


def _respell(name, spellings, to, of=0):
  for row in spellings:
    if name.startswith(row[of]):
      return row[to] + name.removeprefix(row[of])
  return name


def _model(config):
  if isinstance(config, qwen2_5_vl.Qwen2_5VLConfig):
    return qwen2_5_vl.Qwen2_5VLModel(config)
  return llava_onevision.LlavaOnevisionModel(config)


def _untied(config):
  text = dataclasses.replace(config.text, tie_embeddings=False)
  return dataclasses.replace(config, text=text)


@functools.cache
def _shapes(config):
  return jax.eval_shape(_model(config).init, jax.random.key(0))


@functools.cache
def _params(config=CONFIG):
  gen = np.random.default_rng(0)
  return jax.tree.map(
    lambda leaf: gen.standard_normal(leaf.shape).astype(np.float32),
    _shapes(config),
  )


def _save_again(checkpoint, directory, **kwargs):
  checkpoints.save(
    directory,
    checkpoint.model.config,
    checkpoint.params,
    eos_ids=checkpoint.eos_ids,
    pad_id=checkpoint.pad_id,
    extra=checkpoint.extra,
    **kwargs,
  )


def _assert_equal(actual, expected):
  jax.tree.map(np.testing.assert_array_equal, actual, expected)


class CheckpointsTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.directory = self.create_tempdir().full_path
    self.weights = os.path.join(self.directory, safetensors_io.WEIGHTS)

  def _save(self, config=CONFIG, **kwargs):
    kwargs = dict(eos_ids=[5, 6], pad_id=7) | kwargs
    checkpoints.save(self.directory, config, _params(config), **kwargs)
    return tensor_files.read(self.directory)

  def _write(self, tensors):
    safetensors_io.write_safetensors(self.weights, tensors)

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
    tensors = self._save()
    spelt = {_respell(k, SPELLINGS, spelling): v for k, v in tensors.items()}
    self.assertLen(spelt, len(tensors))
    self.assertEqual(spelling == 0, spelt.keys() == tensors.keys())
    self._write(spelt)
    _assert_equal(checkpoints.load_params(self.directory, CONFIG), _params())

  @parameterized.parameters(
    (QWEN, 0), (QWEN, 1), (_untied(QWEN), 0), (_untied(QWEN), 1)
  )
  def test_every_known_spelling_of_qwens_names(self, config, spelling):
    tensors = self._save(config)
    self.assertEqual(
      "lm_head.weight" in tensors, not config.text.tie_embeddings
    )
    self._write(
      {_respell(k, QWEN_SPELLINGS, spelling): v for k, v in tensors.items()}
    )
    loaded = checkpoints.load(self.directory)
    self.assertEqual(loaded.model, _model(config))
    _assert_equal(loaded.params, _params(config))

  def test_qwens_layouts_are_the_hubs(self):
    tensors, visual = self._save(QWEN), _params(QWEN)["visual"]
    patches = tensors["visual.patch_embed.proj.weight"]
    self.assertEqual(patches.shape, (32, 3, 2, 4, 4))
    # Our row of channel 2, second frame, row 1, column 3 of a 4 x 4 patch.
    row = ((2 * 2 + 1) * 4 + 1) * 4 + 3
    np.testing.assert_array_equal(
      patches[:, 2, 1, 1, 3], visual["patch_embed"]["kernel"][row]
    )
    np.testing.assert_array_equal(
      tensors["visual.blocks.2.attn.qkv.weight"],
      visual["blocks"]["qkv"]["kernel"][2].T,
    )
    np.testing.assert_array_equal(
      tensors["visual.merger.mlp.2.bias"], visual["merger"]["linear_2"]["bias"]
    )

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

  @parameterized.parameters(
    ("language_model.lm_head.weight", 0), ("lm_head.weight", 5000)
  )
  def test_a_head_that_is_not_the_tied_embeddings_is_refused(self, name, place):
    tensors = self._save(TIED)
    table = tensors["language_model.model.embed_tokens.weight"]
    other = table.copy()
    other.reshape(-1)[place % other.size] += 1
    for head in (other, table[:-1], table.astype(np.float16)):
      self._write(tensors | {name: head})
      with self.assertRaisesRegex(
        errors.UserError, f"ties.*{name} is not .*tie_word_embeddings to false"
      ):
        checkpoints.load(self.directory)
    # As it asks for: then the head is what is used.
    self._write(tensors | {name: other})
    path = pathlib.Path(self.directory, "config.json")
    path.write_text(
      path.read_text().replace('embeddings": true', 'embeddings": false')
    )
    loaded = checkpoints.load(self.directory)
    np.testing.assert_array_equal(
      loaded.params["language_model"]["lm_head"], other
    )

  @parameterized.parameters((CONFIG,), (QWEN,))
  def test_buffers_of_old_writers_are_ignored_by_name(self, config):
    tensors = self._save(config)
    buffers = {
      "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32),
      "language_model.model.rotary_emb.inv_freq": np.ones(4, np.float32),
      "visual.rotary_pos_emb.inv_freq": np.ones(4, np.float32),
      "vision_tower.vision_model.embeddings.position_ids": np.arange(4)[None],
    }
    self._write(tensors | buffers)
    loaded = checkpoints.load(self.directory)
    _assert_equal(loaded.params, _params(config))
    self.assertFalse(buffers.keys() & loaded.extra.keys())
    # Of another name, a tensor is still unknown.
    self._write(tensors | {"model.inv_freqs": np.ones(4, np.float32)})
    with self.assertRaisesRegex(errors.UserError, "unknown model.inv_freqs"):
      checkpoints.load(self.directory)

  def test_sharded_weights(self):
    tensors = self._save()
    whole = checkpoints.identity(self.directory)
    os.remove(self.weights)
    names = sorted(tensors)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, chosen in shards.items():
      safetensors_io.write_safetensors(
        os.path.join(self.directory, file), {n: tensors[n] for n in chosen}
      )
    index = {n: file for file, chosen in shards.items() for n in chosen}
    path = os.path.join(self.directory, safetensors_io.INDEX)
    with open(path, "w") as file:
      json.dump({"weight_map": index}, file)
    _assert_equal(checkpoints.load_params(self.directory, CONFIG), _params())
    self.assertNotEqual(checkpoints.identity(self.directory), whole)

    os.remove(os.path.join(self.directory, "b.safetensors"))
    with self.assertRaisesRegex(errors.UserError, "b.safetensors is missing"):
      checkpoints.load(self.directory)

  def test_index_that_points_elsewhere_is_refused(self):
    self._save()
    path = os.path.join(self.directory, safetensors_io.INDEX)
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

  def test_weights_of_a_policy_beside_the_model_are_carried(self):
    policy = {"compression_policy.layernorm.weight": np.arange(3.0)}
    self._write(self._save() | policy)
    loaded = checkpoints.load(self.directory)
    _assert_equal(loaded.params, _params())
    self.assertContainsSubset(policy.keys(), loaded.extra.keys())
    _save_again(loaded, self.directory)
    written = tensor_files.read(self.directory)
    for name, tensor in policy.items():
      np.testing.assert_array_equal(written[name], tensor)
      self.assertEqual(written[name].dtype, tensor.dtype)

  @parameterized.product(
    folder=["llava_onevision_tiny", "qwen2_5_vl_tiny"],
    spelling=[0, 1],
    dtype=[np.float32, np.float16, ml_dtypes.bfloat16],
    max_shard_bytes=[None, 100_000],
  )
  def test_every_bit_of_a_foreign_checkpoint_returns(
    self, folder, spelling, dtype, max_shard_bytes
  ):
    """Written by transformers; compared by the hub's name of each tensor."""
    rows = QWEN_SPELLINGS if "qwen" in folder else SPELLINGS
    given = safetensors.numpy.load_file(
      GOLDEN / folder / safetensors_io.WEIGHTS
    )
    # In the folders are what 5.x writes.
    written_by = 0 if "qwen" in folder else 3
    hub = {
      _respell(k, rows, 0, of=written_by): v.astype(dtype)
      for k, v in given.items()
    }
    shutil.copytree(GOLDEN / folder, self.directory, dirs_exist_ok=True)
    self._write({_respell(k, rows, spelling): v for k, v in hub.items()})
    loaded = checkpoints.load(self.directory, None)
    self.assertEqual(loaded.model.dtype, dtype)
    out = os.path.join(self.directory, "out")
    _save_again(loaded, out, max_shard_bytes=max_shard_bytes)
    self.assertEqual(
      os.path.exists(os.path.join(out, safetensors_io.INDEX)),
      max_shard_bytes is not None,
    )
    found = tensor_files.read(out)
    self.assertEqual(found.keys(), hub.keys())
    for name, tensor in hub.items():
      self.assertEqual(found[name].dtype, tensor.dtype, name)
      self.assertEqual(found[name].tobytes(), tensor.tobytes(), name)
    with open(os.path.join(out, "config.json")) as file:
      self.assertEqual(json.load(file)["torch_dtype"], jnp.dtype(dtype).name)
    again = checkpoints.load(out, None)
    self.assertEqual(again.model, loaded.model)
    self.assertEqual(
      (again.eos_ids, again.pad_id), (loaded.eos_ids, loaded.pad_id)
    )

  def test_saving_over_the_files_that_extra_is_mapped_from(self):
    self._save(extra={"compression_policy.x": np.arange(5.0)})
    loaded = checkpoints.load(self.directory)
    for max_shard_bytes in (50_000, None):
      _save_again(loaded, self.directory, max_shard_bytes=max_shard_bytes)
      extra = checkpoints.load(self.directory).extra
      np.testing.assert_array_equal(extra["compression_policy.x"], range(5))

  def test_each_parameter_keeps_its_own_type(self):
    tensors = self._save()
    name = "language_model.model.norm.weight"
    self._write(
      {k: v if k == name else v.astype(np.float16) for k, v in tensors.items()}
    )
    params = checkpoints.load_params(self.directory, CONFIG, None)
    language = params["language_model"]
    self.assertEqual(language["norm"]["scale"].dtype, jnp.float32)
    self.assertEqual(language["embed_tokens"].dtype, jnp.float16)

  def test_a_stack_of_two_types_takes_the_one_that_holds_both(self):
    tensors = self._save()
    name = "language_model.model.layers.{}.mlp.up_proj.weight"
    stored = {0: np.float16, 1: ml_dtypes.bfloat16, 2: np.float16}
    for layer, dtype in stored.items():
      key = name.format(layer)
      tensors[key] = tensors[key].astype(dtype)
    self._write(tensors)
    params = checkpoints.load_params(self.directory, CONFIG, None)
    found = params["language_model"]["layers"]["up_proj"]["kernel"]
    self.assertEqual(found.dtype, jnp.float32)
    for layer in stored:
      expected = tensors[name.format(layer)].astype(np.float32).T
      np.testing.assert_array_equal(found[layer], expected)

  def test_double_precision_becomes_single(self):
    tensors = self._save()
    doubled = {k: v.astype(np.float64) for k, v in tensors.items()}
    self._write(doubled)
    params = checkpoints.load_params(self.directory, CONFIG, None)
    _assert_equal(params, _params())

  @parameterized.parameters(CONFIG, QWEN)
  def test_weights_arrive_in_their_sharding(self, config):
    self._save(config)
    mesh = mesh_lib.make_mesh(2, 2, devices=jax.devices()[:4])
    loaded = checkpoints.load(self.directory, mesh=mesh)
    _assert_equal(loaded.params, _params(config))
    placed = mesh_lib.shard_base_params(_params(config), mesh)
    jax.tree.map(
      lambda a, b: self.assertEqual(a.sharding, b.sharding),
      loaded.params,
      placed,
    )
    kernel = loaded.params["language_model"]["layers"]["up_proj"]["kernel"]
    self.assertEqual(
      kernel.sharding, NamedSharding(mesh, P(None, None, "model"))
    )

  @parameterized.parameters("qwen2_vl", "llama", None, 3)
  def test_another_architecture_is_named(self, model_type):
    self._save()
    path = os.path.join(self.directory, "config.json")
    described = checkpoints.read_json(path) | {"model_type": model_type}
    with open(path, "w") as file:
      json.dump(described, file)
    with self.assertRaisesRegex(
      errors.UserError,
      f"model_type is {model_type!r}; give a checkpoint of llava_onevision or"
      " qwen2_5_vl",
    ):
      checkpoints.load(self.directory)

  def test_weights_of_another_model_are_refused(self):
    tensors = self._save(QWEN)
    self._save()
    self._write(tensors)
    with self.assertRaisesRegex(errors.UserError, "missing.*; unknown"):
      checkpoints.load(self.directory)

  def test_nothing_is_read_before_everything_is_accounted_for(self):
    tensors = self._save()
    del tensors["image_newline"]
    self._write(tensors)
    with mock.patch.object(
      safetensors_io.Tensor, "read_rows", side_effect=AssertionError
    ):
      with self.assertRaisesRegex(errors.UserError, "missing image_newline"):
        checkpoints.load(self.directory)

  def test_tokenizer_without_the_video_token(self):
    self._save()
    tokenizers_for_tests.write(pathlib.Path(self.directory))
    path = os.path.join(self.directory, "tokenizer.json")
    with open(path) as file:
      text = file.read()
    with open(path, "w") as file:
      file.write(text.replace("<video>", "<movie>"))
    with self.assertRaisesRegex(errors.UserError, "no video token '<video>'"):
      checkpoints.load(self.directory)

  def test_parameters_are_not_written_twice(self):
    with self.assertRaisesRegex(ValueError, "image_newline"):
      self._save(extra={"image_newline": np.zeros(3)})

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
    with self.assertRaisesRegex(errors.UserError, "config.json: not read"):
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
