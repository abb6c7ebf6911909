"""Attention and keys of the towers against full maps made in NumPy."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from cacovid_jax.models import (
  attention,
  llava_onevision,
  qwen2_5_vl,
  siglip,
  video_llm,
)
from cacovid_jax.models import qwen2_5_vl_layout as layouts
from cacovid_jax.models import qwen2_5_vl_vision as qwen_vision
from tests.models import towers

WANT = ("vision_attention", "vision_keys")
LLAVA = llava_onevision.LlavaOnevisionModel(
  llava_onevision.LlavaOnevisionConfig.tiny()
)
FRAMES = 3


def softmax(x):
  x = np.exp(x - x.max(axis=-1, keepdims=True))
  return x / x.sum(axis=-1, keepdims=True)


def full_map(q, k, visible=None):
  """Returns float64[N, T, S] of q[T, N, H] and k[S, N, H]."""
  scores = np.einsum("tnh,snh->nts", q, k, dtype=np.float64)
  scores /= np.sqrt(q.shape[-1])
  if visible is not None:
    scores = np.where(visible, scores, -np.inf)
  return softmax(scores)


def random_params(model, seed, scale):
  shapes = jax.eval_shape(model.init, jax.random.key(0))
  gen = np.random.default_rng(seed)
  return jax.tree.map(
    lambda leaf: gen.standard_normal(leaf.shape, np.float32) * scale, shapes
  )


class AttentionReceivedTest(parameterized.TestCase):
  @parameterized.parameters(16, 5, 1)
  def test_is_the_column_sum_of_the_full_map(self, chunk):
    gen = np.random.default_rng(0)
    q, k = gen.standard_normal((2, 4, 16, 3, 8)).astype(np.float32) * 2
    lengths = np.array([16, 1, 7, 15], np.int32)
    with absltest.mock.patch.object(attention, "_RECEIVED_CHUNK", chunk):
      got = attention.attention_received(q, k, lengths)
      every = attention.attention_received(q, k)
    for i, length in enumerate(lengths):
      valid = slice(0, length)
      seen = full_map(q[i, valid], k[i, valid]).mean(axis=0).sum(axis=0)
      np.testing.assert_allclose(got[i, valid], seen, atol=1e-5)
      np.testing.assert_array_equal(got[i, length:], 0)
      seen = full_map(q[i], k[i]).mean(axis=0).sum(axis=0)
      np.testing.assert_allclose(every[i], seen, atol=1e-5)

  @parameterized.parameters((100, 3 * 50 * 50), (20, 3 * 20 * 50))
  def test_only_a_part_of_one_map_exists_at_a_time(self, chunk, most):
    q = jnp.zeros((2, 50, 3, 8))
    with absltest.mock.patch.object(attention, "_RECEIVED_CHUNK", chunk):
      # A function of its own: traces are kept by function.
      received = functools.partial(attention.attention_received)
      text = str(jax.make_jaxpr(received)(q, q))
    sizes = {
      int(np.prod([int(side) for side in shape.split(",")]))
      for shape in re.findall(r"f32\[([\d,]+)\]", text)
    }
    self.assertEqual(max(sizes), most)

  def test_half_precision_is_read_in_float32(self):
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 9, 2, 8), jnp.bfloat16)
    got = attention.attention_received(q, k)
    self.assertEqual(got.dtype, jnp.float32)
    full = attention.attention_received(
      q.astype(jnp.float32), k.astype(jnp.float32)
    )
    np.testing.assert_array_equal(got, full)

  def test_zeros_give_every_patch_the_same(self):
    zeros = jnp.zeros((2, 5, 2, 4))
    got = attention.attention_received(zeros, zeros)
    np.testing.assert_allclose(got, np.ones((2, 5)), rtol=1e-6)

  def test_unknown_names_list_the_known_ones(self):
    with self.assertRaisesRegex(ValueError, "'depth'.*vision_keys"):
      video_llm.check_signals(["depth"])
    self.assertEqual(video_llm.check_signals({"vision_keys"}), ("vision_keys",))


@functools.cache
def llava_case():
  params = random_params(LLAVA, 0, 0.3)
  gen = np.random.default_rng(1)
  pixels = gen.standard_normal((FRAMES, 30, 30, 3)).astype(np.float32)
  encode = jax.jit(functools.partial(towers.encode, LLAVA, signals=WANT))
  return params, pixels, *encode(params, pixels)


class SiglipSignalsTest(absltest.TestCase):
  def test_are_those_of_the_last_layer_pooled_like_the_features(self):
    params, pixels, _, signals = llava_case()
    config = LLAVA.config.vision
    tower = params["vision_tower"]
    # What the last layer reads, from a tower without it.
    below = siglip.SiglipTower(
      dataclasses.replace(config, num_layers=config.num_layers - 1)
    )
    first = {**tower, "layers": jax.tree.map(lambda x: x[:-1], tower["layers"])}
    x, _ = jax.jit(below.apply)({"params": first}, pixels)
    x = np.asarray(x, np.float64)
    layer = jax.tree.map(lambda leaf: leaf[-1], tower["layers"])
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(
      x.var(-1, keepdims=True) + config.layer_norm_eps
    )
    norm = layer["layer_norm1"]
    x = x * norm["scale"] + norm["bias"]
    heads = (config.num_heads, config.hidden_size // config.num_heads)
    q, k = (
      (x @ layer[name]["kernel"] + layer[name]["bias"]).reshape(
        *x.shape[:2], *heads
      )
      for name in ("q_proj", "k_proj")
    )
    side, out_side = config.side, LLAVA.config.pooled_side
    weights = bilinear_weights(side, out_side)
    for t in range(FRAMES):
      seen = full_map(q[t], k[t]).mean(axis=(0, 1))
      self.assertAlmostEqual(seen.sum(), 1.0)
      rows = slice(t * out_side**2, (t + 1) * out_side**2)
      np.testing.assert_allclose(
        signals["vision_attention"][rows], weights @ seen, atol=1e-5
      )
      np.testing.assert_allclose(
        signals["vision_keys"][rows], weights @ k[t].mean(axis=1), atol=1e-4
      )

  def test_leave_the_features_as_they_are(self):
    params, pixels, features, signals = llava_case()
    plain = jax.jit(towers.features(LLAVA))(params, pixels)
    np.testing.assert_allclose(features, plain, rtol=1e-5, atol=1e-5)
    self.assertEqual(signals["vision_attention"].shape, (len(features),))
    self.assertEqual(signals["vision_keys"].shape, (len(features), 8))

  def test_only_what_is_wanted_is_given(self):
    params, pixels, _, signals = llava_case()
    encode = jax.jit(
      functools.partial(towers.encode, LLAVA, signals=["vision_keys"])
    )
    _, found = encode(params, pixels)
    self.assertEqual(list(found), ["vision_keys"])
    np.testing.assert_allclose(
      found["vision_keys"], signals["vision_keys"], atol=1e-5
    )

  def test_half_precision_gives_float32_signals(self):
    params, pixels, _, signals = llava_case()
    model = dataclasses.replace(LLAVA, dtype=jnp.bfloat16)
    features, found = jax.jit(
      functools.partial(towers.encode, model, signals=WANT)
    )(params, pixels)
    self.assertEqual(features.dtype, jnp.bfloat16)
    for name in WANT:
      self.assertEqual(found[name].dtype, jnp.float32)
      scale = np.abs(signals[name]).max()
      np.testing.assert_allclose(found[name], signals[name], atol=0.1 * scale)

  def test_videos_of_a_batch_are_seen_alone(self):
    params, pixels, _, signals = llava_case()
    batch = np.stack([pixels[::-1], pixels])
    encode = functools.partial(towers.encode, LLAVA, signals=WANT)
    _, found = jax.jit(jax.vmap(encode, in_axes=(None, 0)))(params, batch)
    for name in WANT:
      np.testing.assert_allclose(found[name][1], signals[name], atol=1e-5)


def bilinear_weights(size, out_size):
  """Returns float[out_size**2, size**2], one weight at a time."""
  weights = np.zeros((out_size, out_size, size, size))
  for i in range(out_size):
    for j in range(out_size):
      y = max((i + 0.5) * size / out_size - 0.5, 0)
      x = max((j + 0.5) * size / out_size - 0.5, 0)
      top, left = int(y), int(x)
      down, right = min(top + 1, size - 1), min(left + 1, size - 1)
      for row, a in ((top, 1 - (y - top)), (down, y - top)):
        for column, b in ((left, 1 - (x - left)), (right, x - left)):
          weights[i, j, row, column] += a * b
  return weights.reshape(out_size**2, size**2)


def qwen_model(full_layers):
  config = qwen2_5_vl.Qwen2_5VLConfig.tiny()
  vision = dataclasses.replace(config.vision, full_layers=full_layers)
  return qwen2_5_vl.Qwen2_5VLModel(dataclasses.replace(config, vision=vision))


class QwenSignalsTest(parameterized.TestCase):
  GRID = (2, 3, 5)

  def case(self, full_layers, sizes=None):
    model = qwen_model(full_layers)
    params = random_params(model, 0, 0.25)
    layout = model.layout(self.GRID, sizes)
    count = int(np.prod(self.GRID)) * 4
    shape = (count, model.config.vision.patch_values)
    patches = np.random.default_rng(2).standard_normal(shape, np.float32)
    extra = len(layout.windows.place) - count
    padded = np.pad(patches, [(0, extra), (0, 0)], constant_values=9.0)
    encode = jax.jit(functools.partial(towers.encode, model, signals=WANT))
    return model, params, patches, encode(params, padded, layout)

  @parameterized.parameters(((1, 2), False), ((1,), True))
  def test_are_those_of_the_last_layer_averaged_over_groups(
    self, full_layers, windows
  ):
    model, params, patches, (_, signals) = self.case(full_layers)
    config = model.config.vision
    tower = params["visual"]
    below = qwen_vision.Tower(dataclasses.replace(config, num_layers=2))
    first = {**tower, "blocks": jax.tree.map(lambda x: x[:2], tower["blocks"])}
    layout = model.layout(self.GRID)
    _, out = jax.jit(below.apply)({"params": first}, patches, layout)
    x = np.asarray(out["vision_tower_output"], np.float64)
    block = jax.tree.map(lambda leaf: leaf[-1], tower["blocks"])
    x = x / np.sqrt(np.square(x).mean(-1, keepdims=True) + 1e-6)
    x = x * block["norm1"]["scale"]
    qkv = x @ block["qkv"]["kernel"] + block["qkv"]["bias"]
    qkv = qkv.reshape(len(x), 3, config.num_heads, config.head_dim)

    # One patch at a time: where it lies, how it is turned, whom it sees.
    slices, height, width = self.GRID
    place, segment = [], []
    for t in range(slices):
      for token_row in range(height):
        for token_column in range(width):
          for i in range(4):
            place.append((token_row * 2 + i // 2, token_column * 2 + i % 2))
            window = (token_row // 2, token_column // 2) if windows else ()
            segment.append((t, *window))
    frequencies = config.head_dim // 4
    q, k = (np.zeros(qkv[:, 0].shape) for _ in range(2))
    for out, value in ((q, qkv[:, 0]), (k, qkv[:, 1])):
      for patch, (row, column) in enumerate(place):
        for pair in range(config.head_dim // 2):
          step = row if pair < frequencies else column
          angle = step / 1e4 ** (pair % frequencies / frequencies)
          other = pair + config.head_dim // 2
          a, b = value[patch, :, pair], value[patch, :, other]
          out[patch, :, pair] = a * np.cos(angle) - b * np.sin(angle)
          out[patch, :, other] = b * np.cos(angle) + a * np.sin(angle)
    visible = np.array([[a == b for b in segment] for a in segment])
    seen = full_map(q, k, visible).mean(axis=0).sum(axis=0)
    np.testing.assert_allclose(
      signals["vision_attention"], seen.reshape(-1, 4).mean(axis=1), atol=1e-4
    )
    np.testing.assert_allclose(
      signals["vision_keys"],
      k.mean(axis=1).reshape(-1, 4, config.head_dim).mean(axis=1),
      atol=1e-4,
    )

  def test_padding_changes_nothing_and_is_zero(self):
    model, _, _, (features, signals) = self.case((1, 2))
    sizes = layouts.Sizes.of([self.GRID, (3, 4, 5)], model.config.vision)
    _, _, _, (padded_features, padded) = self.case((1, 2), sizes)
    count = len(features)
    np.testing.assert_allclose(padded_features[:count], features, atol=1e-4)
    for name in WANT:
      np.testing.assert_allclose(padded[name][:count], signals[name], atol=1e-4)
      np.testing.assert_array_equal(padded[name][count:], 0)

  def test_leave_the_features_as_they_are(self):
    model, params, patches, (features, signals) = self.case((1, 2))
    plain = jax.jit(towers.features(model))(
      params, patches, model.layout(self.GRID)
    )
    np.testing.assert_allclose(features, plain, rtol=1e-5, atol=1e-5)
    self.assertEqual(signals["vision_attention"].shape, (len(plain),))


class LoweringTest(absltest.TestCase):
  def test_released_sizes_lower_for_every_platform(self):
    released = llava_onevision.LlavaOnevisionConfig.llava_onevision_7b()
    model = llava_onevision.LlavaOnevisionModel(released, dtype=jnp.bfloat16)
    params = jax.eval_shape(model.init, jax.random.key(0))
    pixels = jax.ShapeDtypeStruct((32, 384, 384, 3), jnp.float32)
    encode = jax.jit(functools.partial(towers.encode, model, signals=WANT))
    traced = encode.trace(params, pixels)
    features, signals = traced.out_info
    self.assertEqual(features.shape, (6272, 3584))
    self.assertEqual(signals["vision_attention"].shape, (6272,))
    self.assertEqual(signals["vision_keys"].shape, (6272, 72))
    traced.lower(lowering_platforms=("tpu",))

    model = qwen2_5_vl.Qwen2_5VLModel(
      qwen2_5_vl.Qwen2_5VLConfig.qwen2_5_vl_3b(), dtype=jnp.bfloat16
    )
    layout = model.layout((4, 18, 10))
    params = jax.eval_shape(model.init, jax.random.key(0))
    patches = jax.ShapeDtypeStruct((2880, 1176), jnp.float32)
    encode = jax.jit(functools.partial(towers.encode, model, signals=WANT))
    traced = encode.trace(params, patches, layout)
    self.assertEqual(traced.out_info[1]["vision_keys"].shape, (720, 80))
    traced.lower(lowering_platforms=("tpu",))


if __name__ == "__main__":
  absltest.main()
