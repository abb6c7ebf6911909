"""Positions, prompts, config files and the functions that others call."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from cacovid_jax import errors
from cacovid_jax.models import (
  generation,
  qwen2_5_vl,
  qwen2_5_vl_layout,
  video_llm,
)
from tests.models import mrope_loop, towers

CONFIG = qwen2_5_vl.Qwen2_5VLConfig.tiny()
MODEL = qwen2_5_vl.Qwen2_5VLModel(CONFIG)
VIDEO = CONFIG.video_token_id

# The published config.json of the 7B model, fields without effect left out.
HUB_7B = {
  "architectures": ["Qwen2_5_VLForConditionalGeneration"],
  "attention_dropout": 0.0,
  "bos_token_id": 151643,
  "eos_token_id": 151645,
  "vision_start_token_id": 151652,
  "vision_end_token_id": 151653,
  "vision_token_id": 151654,
  "image_token_id": 151655,
  "video_token_id": 151656,
  "hidden_act": "silu",
  "hidden_size": 3584,
  "intermediate_size": 18944,
  "max_position_embeddings": 128000,
  "max_window_layers": 28,
  "model_type": "qwen2_5_vl",
  "num_attention_heads": 28,
  "num_hidden_layers": 28,
  "num_key_value_heads": 4,
  "rms_norm_eps": 1e-06,
  "rope_theta": 1000000.0,
  "sliding_window": 32768,
  "tie_word_embeddings": False,
  "torch_dtype": "bfloat16",
  "use_sliding_window": False,
  "vision_config": {
    "depth": 32,
    "hidden_act": "silu",
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "in_chans": 3,
    "out_hidden_size": 3584,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "spatial_patch_size": 14,
    "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31],
    "tokens_per_second": 2,
    "temporal_patch_size": 2,
  },
  "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
  "vocab_size": 152064,
}


@functools.cache
def _params():
  gen = np.random.default_rng(0)
  shapes = jax.eval_shape(MODEL.init, jax.random.key(0))
  return jax.tree.map(
    lambda leaf: gen.standard_normal(leaf.shape, np.float32) * 0.25, shapes
  )


def _video(grid, seconds):
  return video_llm.VideoFeatures(None, grid, seconds)


class PositionIdsTest(parameterized.TestCase):
  @parameterized.product(
    grid=((4, 3, 5), (3, 4, 2), (1, 1, 1), (8, 1, 2)),
    seconds=(1.0, 0.7, 0.083, 2.5),
    rule=("4.50", "v5"),
  )
  def test_equals_a_loop(self, grid, seconds, rule):
    ids = [5, 58, *[VIDEO] * math.prod(grid), 59, 7, 8]
    positions, following = qwen2_5_vl.position_ids(
      ids, _video(grid, seconds), config=CONFIG, rule=rule
    )
    expected, next_expected = mrope_loop.positions(
      ids, VIDEO, grid, seconds, 2, rule
    )
    np.testing.assert_array_equal(positions, expected)
    self.assertEqual(positions.dtype, np.int32)
    self.assertEqual(following, next_expected)

  def test_rules_by_hand(self):
    # Two slices of 1 x 2 tokens, 1.5 s apart: the second is at 2 + 3.
    ids = [1, 2, *[VIDEO] * 4, 3]
    place = functools.partial(
      qwen2_5_vl.position_ids, ids, _video((2, 1, 2), 1.5), config=CONFIG
    )
    positions, following = place()
    np.testing.assert_array_equal(positions[0], [0, 1, 2, 2, 5, 5, 6])
    np.testing.assert_array_equal(positions[1], [0, 1, 2, 2, 2, 2, 6])
    np.testing.assert_array_equal(positions[2], [0, 1, 2, 3, 2, 3, 6])
    self.assertEqual(following, 7)
    # The text of 5.x goes on behind the two columns; time may lie ahead of it.
    positions, following = place(rule="v5")
    np.testing.assert_array_equal(positions[:, -1], [4, 4, 4])
    self.assertEqual(following, 6)

  def test_a_prompt_without_a_video_counts_on(self):
    positions, following = qwen2_5_vl.position_ids(
      [3, 1, 2], None, config=CONFIG
    )
    np.testing.assert_array_equal(positions, [[0, 1, 2]] * 3)
    self.assertEqual(following, 3)

  @parameterized.parameters(
    ([1, VIDEO, 2], (1, 1, 2), 1.0, "1 video tokens, the video 2"),
    ([1, VIDEO, 2, VIDEO], (1, 1, 2), 1.0, "2 video tokens in several places"),
    ([1, VIDEO], None, 1.0, "1 video tokens, the video 0"),
    ([VIDEO, 1], (1, 1, 1), 0.0, "second_per_grid_t is 0.0"),
    ([VIDEO, 1], (1, 1, 1), math.nan, "second_per_grid_t is nan"),
  )
  def test_what_does_not_belong_together_stops(self, ids, grid, seconds, text):
    with self.assertRaisesRegex(errors.UserError, text):
      qwen2_5_vl.position_ids(
        ids, grid and _video(grid, seconds), config=CONFIG
      )

  def test_unknown_rule(self):
    with self.assertRaisesRegex(ValueError, "rule '4.57'"):
      qwen2_5_vl.position_ids([1], None, config=CONFIG, rule="4.57")


class Qwen2_5VLModelTest(absltest.TestCase):  # noqa: N801
  def test_grid(self):
    self.assertEqual(MODEL.grid(5, 24, 40), (3, 3, 5))
    released = qwen2_5_vl.Qwen2_5VLConfig.qwen2_5_vl_3b()
    model = qwen2_5_vl.Qwen2_5VLModel(released)
    self.assertEqual(model.grid(32, 252, 448), (16, 9, 16))
    with self.assertRaisesRegex(ValueError, "250 x 448 pixels"):
      model.grid(32, 250, 448)
    self.assertEqual(model.num_position_rows, 3)

  def test_prompt_holds_text_features_and_text(self):
    # Six features, of which two are padding; no row is added behind them.
    features = jax.random.normal(jax.random.key(2), (6, 32))
    ids = jnp.arange(12)
    table = jnp.asarray(_params()["language_model"]["embed_tokens"])
    for kept in (6, 4):
      place = jnp.arange(6)
      rows = jnp.where(place < kept, 3 + place, len(ids))
      x = MODEL.embed_prompt(_params(), ids, features, rows)
      np.testing.assert_array_equal(x[:3], table[:3])
      np.testing.assert_array_equal(x[3 : 3 + kept], features[:kept])
      np.testing.assert_array_equal(x[3 + kept :], table[3 + kept : 12])

  def test_encoded_video_fits_the_decoder(self):
    grid = (2, 2, 3)
    patches = jax.random.normal(jax.random.key(1), (48, 96))
    sizes = qwen2_5_vl_layout.Sizes.of([(2, 4, 3)], CONFIG.vision)
    encode = jax.jit(towers.features(MODEL))
    features = encode(_params(), patches, MODEL.layout(grid))
    self.assertEqual(features.shape, (12, CONFIG.text.hidden_size))
    padded = encode(
      _params(), jnp.pad(patches, [(0, 48), (0, 0)]), MODEL.layout(grid, sizes)
    )
    self.assertEqual(padded.shape, (24, CONFIG.text.hidden_size))
    np.testing.assert_allclose(padded[:12], features, atol=2e-5)

  def test_prefill_then_decode_equals_the_whole_prompt(self):
    x = jax.random.normal(jax.random.key(3), (2, 8, 32))
    positions = jnp.stack([jnp.arange(8) * 2, jnp.arange(8), jnp.arange(8) % 3])
    positions = jnp.stack([positions, positions + 1])
    lengths, ids = jnp.array([5, 7]), jnp.array([9, 4])
    prefill = jax.jit(MODEL.prefill, static_argnames="cache_length")
    logits, cache, _ = prefill(
      _params(), x, positions, lengths, cache_length=10
    )
    following = jnp.array([[40] * 3, [50] * 3])
    step, cache = jax.jit(MODEL.decode_step)(_params(), ids, following, cache)
    np.testing.assert_array_equal(cache.lengths, [6, 8])
    new = _params()["language_model"]["embed_tokens"][ids]

    @jax.jit
    def read(params, x, positions):
      hidden, _ = MODEL.forward(params, x[None], positions[None])
      return MODEL.logits(params, hidden[0])

    whole, where = np.array(x), np.array(positions)
    for row, length in enumerate((5, 7)):
      # Rows behind the new one have no influence.
      whole[row, length], where[row, :, length] = new[row], following[row]
      expected = read(_params(), whole[row], where[row])
      np.testing.assert_allclose(logits[row], expected[length - 1], atol=1e-5)
      np.testing.assert_allclose(step[row], expected[length], atol=1e-5)

  def test_generation_goes_on_at_the_next_positions(self):
    x = jax.random.normal(jax.random.key(4), (1, 6, 32))
    positions = jnp.array([[[0, 1, 1, 9, 9, 10], [0, 1, 2, 1, 2, 10]]])
    positions = positions[:, jnp.array([0, 1, 1])]
    ids = jax.jit(
      functools.partial(
        generation.greedy, MODEL, max_new_tokens=4, eos_ids=(), pad_id=0
      )
    )(_params(), x, positions, jnp.array([6]), jnp.array([11]))

    @jax.jit
    def read(params, x, positions):
      hidden, _ = MODEL.forward(params, x, positions)
      return MODEL.logits(params, hidden[0])

    # Without a cache, from the whole prompt for every token; rows behind have
    # no influence.
    x = np.pad(x, [(0, 0), (0, 3), (0, 0)])
    positions = np.pad(positions, [(0, 0), (0, 0), (0, 3)])
    table = np.asarray(_params()["language_model"]["embed_tokens"])
    for number in range(4):
      token = read(_params(), x, positions)[5 + number].argmax()
      self.assertEqual(ids[0, number], token)
      if number < 3:
        x[0, 6 + number] = table[token]
        positions[0, :, 6 + number] = 11 + number

  def test_is_a_static_argument(self):
    same = qwen2_5_vl.Qwen2_5VLModel(qwen2_5_vl.Qwen2_5VLConfig.tiny())
    self.assertEqual(hash(same), hash(MODEL))
    self.assertEqual(same, MODEL)
    self.assertNotEqual(dataclasses.replace(MODEL, dtype=jnp.bfloat16), MODEL)

  def test_every_function_lowers_for_tpu(self):
    for backend in ("auto", "splash"):
      model = dataclasses.replace(MODEL, dtype=jnp.bfloat16, backend=backend)
      params = jax.eval_shape(model.init, jax.random.key(0))
      x = jax.ShapeDtypeStruct((2, 40, 32), jnp.bfloat16)
      positions = jax.ShapeDtypeStruct((2, 3, 40), jnp.int32)
      per_row = jax.ShapeDtypeStruct((2,), jnp.int32)
      patches = jax.ShapeDtypeStruct((120, 96), jnp.float32)
      prefill = functools.partial(model.prefill, cache_length=44)
      _, cache, _ = jax.eval_shape(prefill, params, x, positions, per_row)
      next_positions = jax.ShapeDtypeStruct((2, 3), jnp.int32)
      calls = (
        (towers.features(model), (params, patches, model.layout((2, 3, 5)))),
        (prefill, (params, x, positions, per_row)),
        (model.decode_step, (params, per_row, next_positions, cache)),
      )
      for function, arguments in calls:
        lowered = jax.jit(function).trace(*arguments)
        lowered.lower(lowering_platforms=("tpu",))

  def test_released_sizes_have_the_released_parameter_counts(self):
    def decoder_layer(width, kv_width, inner):
      queries = (width + 1) * width + 2 * (width + 1) * kv_width
      return 2 * width + queries + width * width + 3 * width * inner

    def tower(width):
      block = 2 * 1280 + 1281 * 3840 + 1281 * 1280
      block += 2 * 1281 * 3420 + 3421 * 1280
      merger = 1280 + 5121 * 5120 + 5121 * width
      return 1176 * 1280 + 32 * block + merger

    small = tower(2048) + 36 * decoder_layer(2048, 256, 11008) + 2048
    small += 151936 * 2048  # Tied.
    large = tower(3584) + 28 * decoder_layer(3584, 512, 18944) + 3584
    large += 2 * 152064 * 3584
    # As the model cards' weight files count them.
    self.assertEqual((small, large), (3_754_622_976, 8_292_166_656))
    for config, expected in (
      (qwen2_5_vl.Qwen2_5VLConfig.qwen2_5_vl_3b(), small),
      (qwen2_5_vl.Qwen2_5VLConfig.qwen2_5_vl_7b(), large),
    ):
      model = qwen2_5_vl.Qwen2_5VLModel(config)
      shapes = jax.eval_shape(model.init, jax.random.key(0))
      count = sum(leaf.size for leaf in jax.tree.leaves(shapes))
      self.assertEqual(count, expected)


class Qwen2_5VLConfigTest(parameterized.TestCase):  # noqa: N801
  def test_round_trip(self):
    for config in (
      CONFIG,
      qwen2_5_vl.Qwen2_5VLConfig.qwen2_5_vl_3b(),
      qwen2_5_vl.Qwen2_5VLConfig.qwen2_5_vl_7b(),
    ):
      self.assertEqual(
        qwen2_5_vl.Qwen2_5VLConfig.from_hf(config.to_hf()), config
      )

  def test_reads_the_published_flat_file(self):
    self.assertEqual(
      qwen2_5_vl.Qwen2_5VLConfig.from_hf(HUB_7B),
      qwen2_5_vl.Qwen2_5VLConfig.qwen2_5_vl_7b(),
    )

  def test_reads_a_file_with_a_text_section(self):
    outside = (
      "architectures",
      "model_type",
      "vision_config",
      "image_token_id",
      "video_token_id",
      "vision_start_token_id",
      "vision_end_token_id",
    )
    nested = {name: HUB_7B[name] for name in outside}
    text = {k: v for k, v in HUB_7B.items() if k not in outside}
    text |= {
      "model_type": "qwen2_5_vl_text",
      "rope_parameters": {
        "rope_type": "default",
        "rope_theta": text.pop("rope_theta"),
        "mrope_section": text.pop("rope_scaling")["mrope_section"],
      },
    }
    vision = dict(HUB_7B["vision_config"], model_type="qwen2_5_vl_vision")
    vision["in_channels"] = vision.pop("in_chans")
    nested |= {"text_config": text, "vision_config": vision}
    self.assertEqual(
      qwen2_5_vl.Qwen2_5VLConfig.from_hf(nested),
      qwen2_5_vl.Qwen2_5VLConfig.qwen2_5_vl_7b(),
    )
    # Set in either place means tied.
    text["tie_word_embeddings"] = True
    self.assertTrue(
      qwen2_5_vl.Qwen2_5VLConfig.from_hf(nested).text.tie_embeddings
    )

  @parameterized.parameters(
    ("model_type", "qwen2_vl", "model_type is 'qwen2_vl'"),
    ("hidden_act", "gelu", "hidden_act is 'gelu'"),
    ("use_sliding_window", True, "use_sliding_window is True"),
    ("vision_config", None, "no section vision_config"),
    ("video_token_id", None, "lacks video_token_id"),
    ("rope_scaling", None, "mrope_section is None"),
    ("rope_scaling", {"type": "yarn"}, "type 'yarn'"),
    (
      "rope_scaling",
      {"type": "mrope", "mrope_section": [16, 24, 25]},
      r"is \[16, 24, 25\]; give 3 positive numbers whose sum is 64",
    ),
    ("hidden_size", 7168, "out_hidden_size 3584 is not hidden_size 7168"),
    ("text_config", {"model_type": "qwen2"}, "text_config.model_type"),
  )
  def test_what_is_not_implemented_stops_with_its_name(self, key, value, text):
    changed = {"head_dim": 128, **HUB_7B, key: value}
    with self.assertRaisesRegex(errors.UserError, text):
      qwen2_5_vl.Qwen2_5VLConfig.from_hf(changed)

  def test_speed_of_time_is_required(self):
    vision = dict(HUB_7B["vision_config"])
    del vision["tokens_per_second"]
    with self.assertRaisesRegex(errors.UserError, "tokens_per_second"):
      qwen2_5_vl.Qwen2_5VLConfig.from_hf(HUB_7B | {"vision_config": vision})


if __name__ == "__main__":
  absltest.main()
