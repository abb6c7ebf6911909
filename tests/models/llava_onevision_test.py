"""Pooling, prompts and the functions that generation and training call."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from cacovid_jax import errors
from cacovid_jax.models import llava_onevision
from tests.models import towers

CONFIG = llava_onevision.LlavaOnevisionConfig.tiny()
MODEL = llava_onevision.LlavaOnevisionModel(CONFIG)


@functools.cache
def _params():
  return jax.jit(MODEL.init)(jax.random.key(0))


def _bilinear(image, out_size):
  """Interpolates image[h, w] one value at a time, half-pixel centres."""
  size = len(image)
  out = np.zeros((out_size, out_size))
  for i in range(out_size):
    for j in range(out_size):
      y = max((i + 0.5) * size / out_size - 0.5, 0)
      x = max((j + 0.5) * size / out_size - 0.5, 0)
      top, left = int(y), int(x)
      down, right = min(top + 1, size - 1), min(left + 1, size - 1)
      dy, dx = y - top, x - left
      out[i, j] = (
        image[top, left] * (1 - dy) * (1 - dx)
        + image[top, right] * (1 - dy) * dx
        + image[down, left] * dy * (1 - dx)
        + image[down, right] * dy * dx
      )
  return out


class PoolTest(parameterized.TestCase):
  @parameterized.parameters((27, 14), (14, 7), (7, 4), (1, 1))
  def test_interpolates_without_a_filter(self, side, out_side):
    x = np.random.default_rng(0).standard_normal((2, side * side, 3))
    x = x.astype(np.float32)
    pooled = llava_onevision.pool(x)
    self.assertEqual(pooled.shape, (2, out_side**2, 3))
    for frame in range(2):
      for channel in range(3):
        expected = _bilinear(x[frame, :, channel].reshape(side, side), out_side)
        np.testing.assert_allclose(
          pooled[frame, :, channel].reshape(out_side, out_side),
          expected,
          atol=1e-5,
        )

  def test_half_precision_is_pooled_in_float32_and_rounded_once(self):
    x = np.random.default_rng(0).standard_normal((1, 49, 4))
    x = jnp.asarray(x, jnp.bfloat16)
    full = llava_onevision.pool(x.astype(jnp.float32))
    np.testing.assert_array_equal(
      llava_onevision.pool(x), full.astype(jnp.bfloat16)
    )


class LlavaOnevisionModelTest(absltest.TestCase):
  def test_grid(self):
    self.assertEqual(MODEL.grid(16, 30, 30), (16, 4, 4))
    released = llava_onevision.LlavaOnevisionConfig.llava_onevision_7b()
    model = llava_onevision.LlavaOnevisionModel(released)
    self.assertEqual(model.grid(32, 384, 384), (32, 14, 14))

  def test_videos_of_a_batch_are_encoded_alone(self):
    pixels = jax.random.normal(jax.random.key(1), (2, 3, 30, 30, 3))
    encode = jax.jit(towers.features(MODEL))
    batch = jax.jit(jax.vmap(towers.features(MODEL), in_axes=(None, 0)))(
      _params(), pixels
    )
    self.assertEqual(batch.shape, (2, 3 * 16, CONFIG.text.hidden_size))
    np.testing.assert_allclose(
      batch[1], encode(_params(), pixels[1]), atol=1e-5
    )

  def test_prompt_holds_text_features_newline_and_text(self):
    features = jax.random.normal(jax.random.key(2), (16, 32))
    ids = jnp.arange(24)
    embed = jax.jit(MODEL.embed_prompt)
    x = embed(_params(), ids, features, 3 + jnp.arange(16))
    table = _params()["language_model"]["embed_tokens"]
    np.testing.assert_array_equal(x[:3], table[:3])
    np.testing.assert_array_equal(x[3:19], features)
    np.testing.assert_array_equal(x[19], _params()["image_newline"])
    np.testing.assert_array_equal(x[20:], table[20:24])

  def test_prefill_then_decode_equals_the_whole_prompt(self):
    x = jax.random.normal(jax.random.key(3), (2, 8, 32))
    positions = jnp.broadcast_to(jnp.arange(8) * 2, (2, 1, 8))  # Pruned.
    lengths = jnp.array([5, 7])
    ids = jnp.array([9, 4])
    prefill = jax.jit(MODEL.prefill, static_argnames="cache_length")
    logits, cache, _ = prefill(
      _params(), x, positions, lengths, cache_length=10
    )
    self.assertEqual(cache.keys.shape, (3, 2, 10, 2, 8))
    step, cache = jax.jit(MODEL.decode_step)(
      _params(), ids, jnp.array([[40], [50]]), cache
    )
    np.testing.assert_array_equal(cache.lengths, [6, 8])
    new = _params()["language_model"]["embed_tokens"][ids]

    @jax.jit
    def read(params, x, positions):
      hidden, _ = MODEL.forward(params, x[None], positions[None, None])
      return MODEL.logits(params, hidden[0])

    whole, where = np.array(x), np.array(positions[:, 0])
    for row, (length, position) in enumerate([(5, 40), (7, 50)]):
      # Rows behind the new one have no influence.
      whole[row, length], where[row, length] = new[row], position
      expected = read(_params(), whole[row], where[row])
      np.testing.assert_allclose(logits[row], expected[length - 1], atol=1e-5)
      np.testing.assert_allclose(step[row], expected[length], atol=1e-5)

  def test_cache_below_the_prompt_is_an_error(self):
    with self.assertRaisesRegex(ValueError, "cache_length 3"):
      MODEL.prefill(
        _params(),
        jnp.zeros((1, 4, 32)),
        jnp.zeros((1, 1, 4), jnp.int32),
        jnp.array([4]),
        cache_length=3,
      )

  def test_is_a_static_argument(self):
    same = llava_onevision.LlavaOnevisionModel(
      llava_onevision.LlavaOnevisionConfig.tiny()
    )
    self.assertEqual(hash(same), hash(MODEL))
    self.assertEqual(same, MODEL)
    other = dataclasses.replace(MODEL, dtype=jnp.bfloat16)
    self.assertNotEqual(other, MODEL)

  def test_every_function_lowers_for_tpu(self):
    for backend in ("auto", "splash"):
      model = dataclasses.replace(MODEL, dtype=jnp.bfloat16, backend=backend)
      params = jax.eval_shape(model.init, jax.random.key(0))
      x = jax.ShapeDtypeStruct((2, 40, 32), jnp.bfloat16)
      positions = jax.ShapeDtypeStruct((2, 1, 40), jnp.int32)
      per_row = jax.ShapeDtypeStruct((2,), jnp.int32)
      pixels = jax.ShapeDtypeStruct((2, 30, 30, 3), jnp.float32)
      prefill = functools.partial(
        model.prefill, cache_length=44, want_attention=True
      )
      _, cache, _ = jax.eval_shape(prefill, params, x, positions, per_row)
      calls = (
        (towers.features(model), (params, pixels)),
        (prefill, (params, x, positions, per_row)),
        (
          model.decode_step,
          (params, per_row, jax.ShapeDtypeStruct((2, 1), jnp.int32), cache),
        ),
      )
      for function, arguments in calls:
        lowered = jax.jit(function).trace(*arguments)
        lowered.lower(lowering_platforms=("tpu",))

  def test_released_sizes_have_the_released_parameter_counts(self):
    def attention_and_mlp(width, kv_width, inner):
      norms = 2 * width
      queries = (width + 1) * width + 2 * (width + 1) * kv_width
      return norms + queries + width * width + 3 * width * inner

    def tower_and_projector(width):
      patches = (14 * 14 * 3 + 1) * 1152 + 729 * 1152
      layer = 4 * 1153 * 1152 + 1153 * 4304 + 4305 * 1152 + 4 * 1152
      return patches + 26 * layer + 1153 * width + (width + 1) * width

    small = tower_and_projector(896) + 896  # The newline.
    small += 24 * attention_and_mlp(896, 128, 4864) + 896
    small += 152000 * 896  # Tied.
    large = tower_and_projector(3584) + 3584
    large += 28 * attention_and_mlp(3584, 512, 18944) + 3584
    large += 2 * 152128 * 3584
    for config, expected in (
      (llava_onevision.LlavaOnevisionConfig.llava_onevision_0_5b(), small),
      (llava_onevision.LlavaOnevisionConfig.llava_onevision_7b(), large),
    ):
      model = llava_onevision.LlavaOnevisionModel(config)
      shapes = jax.eval_shape(model.init, jax.random.key(0))
      count = sum(leaf.size for leaf in jax.tree.leaves(shapes))
      self.assertEqual(count, expected)


class LlavaOnevisionConfigTest(parameterized.TestCase):
  def test_round_trip(self):
    for config in (
      CONFIG,
      llava_onevision.LlavaOnevisionConfig.llava_onevision_0_5b(),
    ):
      self.assertEqual(
        llava_onevision.LlavaOnevisionConfig.from_hf(config.to_hf()), config
      )

  @parameterized.parameters(
    ("model_type", "qwen2_5_vl", "model_type is 'qwen2_5_vl'"),
    ("vision_feature_layer", -2, "vision_feature_layer is -2"),
    ("vision_config", None, "no section vision_config"),
    ("video_token_index", None, "lacks video_token_index"),
    ("projector_hidden_act", "gelu_new", "projector_hidden_act"),
  )
  def test_what_is_not_implemented_stops_with_its_name(self, key, value, text):
    config = CONFIG.to_hf() | {key: value}
    with self.assertRaisesRegex(errors.UserError, text):
      llava_onevision.LlavaOnevisionConfig.from_hf(config)


if __name__ == "__main__":
  absltest.main()
