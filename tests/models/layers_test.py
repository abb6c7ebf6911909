"""Forms of a stack of layers: all of them are the same model."""

import dataclasses
import functools
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cacovid_jax import compressors
from cacovid_jax.models import (
  checkpoints,
  generation,
  layers,
  llava_onevision,
  processors,
  products,
  qwen2_5_vl,
)
from cacovid_jax.parallel import mesh as mesh_lib
from cacovid_jax.parity import models
from cacovid_jax.policy import network
from tests.compressors import layerwise_test

CONFIGS = {
  "llava": llava_onevision.LlavaOnevisionConfig.tiny(),
  "qwen": qwen2_5_vl.Qwen2_5VLConfig.tiny(),
}
FORMS = (layers.STACKED, layers.SEPARATE, layers.FUSED)
NEW = 5


@functools.cache
def case(kind, dtype="float32"):
  """Returns (model, params with noise on biases and scales too, inputs)."""
  model = checkpoints.make_model(CONFIGS[kind], dtype)
  gen = np.random.default_rng(0)
  params = jax.tree.map(
    lambda x: x + 0.1 * gen.standard_normal(x.shape).astype(x.dtype),
    jax.jit(model.init)(jax.random.key(0)),
  )
  shape = CONFIGS[kind].vision.input_shape((2, 4, 4))
  values = gen.standard_normal(shape).astype(np.float32)
  inputs = model.tower_inputs(processors.TowerInputs(values, (2, 4, 4)))
  return model, jax.tree.map(lambda x: x.astype(dtype), params), inputs


def read_and_answer(model, params, inputs):
  """Returns what both stacks compute: tower, prefill, decoding."""
  video = model.encode(params, inputs, signals=("vision_keys",))
  x = jnp.stack([video.features[:12], video.features[-12:]])
  lengths = jnp.array([12, 9])
  shape = 2, model.num_position_rows, 12
  positions = jnp.broadcast_to(jnp.arange(12), shape)
  options = dict(cache_length=12 + NEW - 1, want_hidden=True)
  logits, cache, out = model.prefill(params, x, positions, lengths, **options)
  step, cache = model.decode_step(
    params, jnp.array([3, 4]), jnp.broadcast_to(lengths[:, None], shape[:2]),
    cache,
  )  # fmt: skip
  rows = list(map(layers.joined, cache[:2]))
  ids = generation.greedy(
    model, params, x, positions, lengths, lengths, max_new_tokens=NEW,
    eos_ids=(0,), pad_id=0,
  )  # fmt: skip
  return (video.features, video.signals, out, logits, step, rows), ids


@functools.cache
def answered(kind, dtype, form):
  model, params, inputs = case(kind, dtype)
  params = layers.convert(params, form)
  return jax.jit(functools.partial(read_and_answer, model))(params, inputs)


def assert_equal(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("form", FORMS[1:])
def test_a_form_computes_what_stacked_layers_do(kind, form):
  exact, ids = answered(kind, "float32", layers.STACKED)
  values, found_ids = answered(kind, "float32", form)
  np.testing.assert_array_equal(found_ids, ids)
  half, other_half = (
    answered(kind, "bfloat16", one)[0] for one in (layers.STACKED, form)
  )
  for a, b, c, d in zip(
    *map(jax.tree.leaves, (exact, values, half, other_half)), strict=True
  ):
    np.testing.assert_allclose(b, a, atol=1e-5 * np.abs(a).max())
    # Roundings differ, and are as large on average.
    far, as_far = (np.linalg.norm(np.asarray(x, "f4") - a) for x in (c, d))
    assert 0 < as_far < 1.5 * far


@pytest.mark.parametrize("kind", CONFIGS)
def test_conversions_there_and_back_lose_nothing(kind):
  _, params, _ = case(kind)
  for form in FORMS:
    there = layers.convert(params, form)
    assert layers.form_of(there["language_model"]["layers"]) == form
    for other in FORMS:
      back = layers.convert(layers.convert(there, other), layers.STACKED)
      assert_equal(back, params)


@pytest.mark.parametrize("kind", CONFIGS)
def test_files_are_read_and_written_in_every_form(kind, tmp_path):
  model, params, _ = case(kind)
  config, ending = model.config, dict(eos_ids=(5,), pad_id=7)
  checkpoints.save(tmp_path, config, params, **ending)
  written = (tmp_path / "model.safetensors").read_bytes()
  for shards, form in ((1, layers.FUSED), (2, layers.SEPARATE)):
    mesh = mesh_lib.make_mesh(1, shards, devices=jax.devices()[:shards])
    loaded = checkpoints.load(tmp_path, mesh=mesh, layers="separate")
    assert_equal(loaded.params, layers.convert(params, form))
    policy = network.Policy.from_llm_config(config.text, num_halvings=2)
    first = [
      policy.init_from_llm(jax.random.key(0), x)
      for x in (loaded.params, params)
    ]
    assert_equal(*first)
    checkpoints.save(tmp_path / form, config, loaded.params, **ending)
    assert (tmp_path / form / "model.safetensors").read_bytes() == written
  # Of two devices, that share each layer's weights as they share a stack's.
  kernel = loaded.params["language_model"]["layers"]["1"]["up_proj"]["kernel"]
  assert kernel.sharding.spec == mesh_lib.P(None, "model")
  run = jax.jit(functools.partial(read_and_answer, loaded.model))
  values, ids = run(loaded.params, case(kind)[2])
  expected, expected_ids = answered(kind, "float32", layers.STACKED)
  np.testing.assert_allclose(values[0], expected[0], atol=1e-4)
  np.testing.assert_array_equal(ids, expected_ids)


@pytest.mark.parametrize("spec", ["fastv", "framefusion", "prunevid"])
def test_methods_inside_the_model_keep_the_same_tokens(spec):
  found = []
  for form in (layers.STACKED, layers.FUSED):
    found.append(
      layerwise_test.generate(
        layers.convert(layerwise_test.params_of("llava"), form),
        *map(jnp.asarray, layerwise_test.prompts("llava")),
        model=layerwise_test.model_of("llava"),
        compressor=compressors.get(spec), grid=layerwise_test.GRID, ratio=0.5,
        max_new_tokens=NEW, eos_ids=(), pad_id=0,
      )
    )  # fmt: skip
  assert_equal(*found)


def moved_weights(program, params, *args):
  """Returns how often a compiled program copies or slices a weight or cache."""
  sizes = {"2,16,2,16"}  # Of the cache, below.
  for leaf in jax.tree.leaves(params["language_model"]["layers"]):
    dims = leaf.shape[-2:]  # A layer's, of a stack, too.
    if len(dims) == 2 and min(dims) > 8:
      sizes |= {"{},{}".format(*dims), "1,{},{}".format(*dims)}
  text = jax.jit(program).lower(params, *args).compile().as_text()
  moves = re.findall(r"\[([\d,]*)\]\S* (?:copy|dynamic-slice)\(", text)
  return sum(move in sizes for move in moves)


def test_separate_layers_are_not_copied():
  model, _, _ = case("llava")
  text = dataclasses.replace(
    model.config.text, hidden_size=64, intermediate_size=160, head_dim=16
  )
  model = checkpoints.make_model(dataclasses.replace(model.config, text=text))
  params = jax.jit(model.init)(jax.random.key(0))
  x, lengths = jnp.ones((2, 12, 64)), jnp.array([12, 9])
  positions = jnp.broadcast_to(jnp.arange(12), (2, 1, 12))

  def prefill(params, x):
    return model.prefill(params, x, positions, lengths, cache_length=16)[0]

  def greedy(params, x):
    return generation.greedy(
      model, params, x, positions, lengths, lengths, max_new_tokens=NEW,
      eos_ids=(0,), pad_id=0,
    )  # fmt: skip

  for program in (prefill, greedy):
    assert moved_weights(program, params, x) >= 5
    for form in FORMS[1:]:
      assert not moved_weights(program, layers.convert(params, form), x)


@pytest.mark.parametrize("folder", ["llava_onevision_tiny", "qwen2_5_vl_tiny"])
def test_golden_values_are_met_by_separate_layers(folder):
  path = pathlib.Path(__file__).parents[1] / "golden" / folder
  loaded = checkpoints.load(path, layers="separate")
  stages = models.compare(loaded.model, loaded.params, models.read(path))
  assert len(stages) >= 15 and all(stage.ok for stage in stages)


def test_auto_is_separate_for_large_weights_on_accelerators():
  for platform, num_bytes, expected in (
    ("cpu", 2e10, layers.STACKED),
    ("gpu", 5e6, layers.STACKED),
    ("gpu", 2e9, layers.FUSED),
    ("tpu", 2e9, layers.FUSED),
  ):
    assert layers.choose("auto", num_bytes, platform) == expected
  assert layers.choose("auto", 2e9, "gpu", shards=2) == layers.SEPARATE
  assert layers.choose("separate", 1, "cpu") == layers.FUSED
  assert layers.choose("stacked", 2e9, "gpu") == layers.STACKED
  with pytest.raises(ValueError, match="'fused' is not one of auto"):
    layers.choose("fused", 2e9, "gpu")


@pytest.mark.parametrize("kind", CONFIGS)
def test_rows_that_a_gpu_wants_change_no_answer(kind, monkeypatch):
  model, params, inputs = case(kind)
  features = model.encode(params, inputs).features
  x, lengths = jnp.stack([features[:11], features[-11:]]), jnp.array([11, 7])
  where = jnp.broadcast_to(jnp.arange(11), (2, model.num_position_rows, 11))

  def answers(params, x):
    options = dict(want_hidden=True, want_attention=True)
    logits, cache, out = model.prefill(
      params, x, where, lengths, cache_length=11 + NEW - 1, **options
    )
    ids = generation.greedy(
      model, params, x, where, lengths, lengths, max_new_tokens=NEW,
      eos_ids=(0,), pad_id=0,
    )  # fmt: skip
    front = x[:, :3], where[:, :, :3], jnp.array([3, 3])
    _, first, _ = model.prefill(params, *front, cache_length=3)
    keys = layers.joined(first.keys), layers.joined(first.values)
    behind, _, _ = model.prefill(
      params, x[:, 3:], where[:, :, 3:], lengths, cache_length=11, earlier=keys
    )
    return (logits, out, keys, behind), ids, layers.joined(cache.keys)

  plain, ids, keys = jax.jit(answers)(params, x)
  real = products.padded_rows
  assert real(11) == 11
  monkeypatch.setattr(
    products, "padded_rows", lambda *args, backend: real(*args, backend="cudnn")
  )
  padded, padded_ids, more_keys = jax.jit(lambda *x: answers(*x))(params, x)
  np.testing.assert_array_equal(padded_ids, ids)
  assert (keys.shape[2], more_keys.shape[2]) == (15, 16)
  for a, b in zip(*map(jax.tree.leaves, (plain, padded)), strict=True):
    assert a.shape == b.shape
    valid = a.shape[:3] == (len(keys), 2, 11)
    a, b = (x[:, 0] if valid else x for x in (a, b))
    np.testing.assert_allclose(b, a, atol=1e-5 * np.abs(a).max())


def test_rows_that_a_gpu_wants():
  wanted = functools.partial(products.padded_rows, backend="cudnn")
  assert [wanted(n) for n in (1, 8, 703, 1644)] == [8, 8, 704, 1648]
  # Of several prompts, even ones whose rows together are multiples of eight.
  assert [wanted(203, n) for n in (2, 4, 8, 32)] == [204, 204, 204, 204]
  assert wanted(100, 32, before=3) == 101  # Keys are even, not these rows.
  assert wanted(100, 1, before=3) == 104  # Products count more.
  assert products.padded_rows(703, backend="xla") == 703
