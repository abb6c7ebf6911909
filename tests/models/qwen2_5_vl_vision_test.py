"""The tower's layout against loops, its attention against a dense mask."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from cacovid_jax import errors
from cacovid_jax.models import qwen2_5_vl_layout as layouts
from cacovid_jax.models import qwen2_5_vl_vision as vision
from cacovid_jax.models import token_grid

CONFIG = vision.VisionConfig.tiny()  # Windows of 2 x 2 tokens.
GRIDS = ((1, 1, 1), (2, 3, 5), (3, 4, 2))


def _tower(config=CONFIG, **kwargs):
  return vision.Tower(config, **kwargs)


@functools.cache
def _params():
  # No bias at zero and no norm at one, which would hide them.
  gen = np.random.default_rng(0)
  patches = jnp.zeros((4, CONFIG.patch_values))
  layout = layouts.layout((1, 1, 1), CONFIG)
  shapes = jax.eval_shape(_tower().init, jax.random.key(0), patches, layout)
  return jax.tree.map(
    lambda leaf: gen.standard_normal(leaf.shape, np.float32) * 0.25,
    shapes["params"],
  )


def _patches(grid, seed=0):
  shape = (int(np.prod(grid)) * 4, CONFIG.patch_values)
  return np.random.default_rng(seed).standard_normal(shape, np.float32)


@jax.jit
def _apply(params, patches, layout):
  return _tower().apply({"params": params}, patches, layout)


def _encode(grid, patches):
  return _apply(_params(), patches, layouts.layout(grid, CONFIG))


def _where(grid, config=CONFIG):
  """Returns (slice, row, column, window) of every patch, one at a time."""
  merge, pixels = config.merge_size, config.patch_size
  found = []
  for t in range(grid[0]):
    for token_row in range(grid[1]):
      for token_column in range(grid[2]):
        for i in range(merge):
          for j in range(merge):
            row, column = token_row * merge + i, token_column * merge + j
            window = (
              t,
              row * pixels // config.window_size,
              column * pixels // config.window_size,
            )
            found.append((t, row, column, window))
  return found


class LayoutTest(parameterized.TestCase):
  def test_windows_of_a_small_grid_by_hand(self):
    # Tokens 0 1 2 / 3 4 5 / 6 7 8 in windows of 2 x 2: the right and the lower
    # ones are cut off. Four patches to a token.
    layout = layouts.layout((1, 3, 3), CONFIG)
    np.testing.assert_array_equal(layout.windows.lengths, [16, 8, 8, 4])
    tokens = layout.windows.rows[:, ::4] // 4
    np.testing.assert_array_equal(tokens[0], [0, 1, 3, 4])
    np.testing.assert_array_equal(tokens[1, :2], [2, 5])
    np.testing.assert_array_equal(tokens[2, :2], [6, 7])
    np.testing.assert_array_equal(tokens[3, :1], [8])
    np.testing.assert_array_equal(layout.slices.lengths, [36])
    np.testing.assert_array_equal(layout.slices.rows, [np.arange(36)])
    # The second token's patches: two rows, the third and fourth column.
    np.testing.assert_array_equal(
      layout.coordinates[:, 4:8], [[0, 0, 1, 1], [2, 3, 2, 3]]
    )
    self.assertEqual(layout.num_tokens, 9)

  @parameterized.product(grid=GRIDS, padded=(False, True))
  def test_segments_are_those_of_a_loop(self, grid, padded):
    sizes = layouts.Sizes.of([*GRIDS, (4, 6, 6)], CONFIG) if padded else None
    layout = layouts.layout(grid, CONFIG, sizes)
    where = _where(grid)
    count = len(where)
    self.assertEqual(layout.num_tokens * 4, count)
    np.testing.assert_array_equal(
      layout.coordinates[:, :count].T, [place[1:3] for place in where]
    )
    for segments, key in (
      (layout.windows, [place[3] for place in where]),
      (layout.slices, [place[0] for place in where]),
    ):
      names = sorted(set(key))
      for number, name in enumerate(names):
        members = [i for i, other in enumerate(key) if other == name]
        self.assertEqual(segments.lengths[number], len(members))
        np.testing.assert_array_equal(
          segments.rows[number, : len(members)], members
        )
      # A segment that does not exist has one key, so that no softmax is empty.
      np.testing.assert_array_equal(segments.lengths[len(names) :], 1)
      np.testing.assert_array_equal(
        segments.rows.ravel()[segments.place[:count]], np.arange(count)
      )

  def test_sizes_hold_every_grid(self):
    sizes = layouts.Sizes.of([(1, 5, 2), (3, 1, 2)], CONFIG)
    self.assertEqual(
      sizes,
      layouts.Sizes(
        num_tokens=10, num_windows=3, num_slices=3, tokens_per_slice=10
      ),
    )

  @parameterized.parameters((3, 12, 20), (2, 7, 14), (4, 5, 5))
  def test_sizes_of_a_bucket_hold_every_grid_within_it(
    self, slices, area, most
  ):
    grids = [
      (t, h, w)
      for t in range(1, slices + 1)
      for h in range(1, area + 1)
      for w in range(1, area // h + 1)
      if t * h * w <= most
    ]
    bucket = token_grid.GridBucket(slices, area, most)
    sizes = layouts.Sizes.of_bucket(bucket, CONFIG)
    needed = layouts.Sizes.of(grids, CONFIG)
    self.assertEqual(sizes.num_windows, needed.num_windows)
    for grid in grids:
      self.assertLen(
        layouts.layout(grid, CONFIG, sizes).windows.place, 4 * most
      )

  def test_released_windows_are_four_tokens_wide(self):
    config = vision.VisionConfig.qwen2_5_vl(3584)
    self.assertEqual(config.window_side, 4)
    self.assertEqual(config.patch_values, 1176)
    layout = layouts.layout((2, 18, 10), config)
    self.assertEqual(layout.windows.rows.shape, (2 * 5 * 3, 64))
    self.assertEqual(layout.slices.rows.shape, (2, 720))

  def test_what_does_not_fit_is_named(self):
    sizes = layouts.Sizes.of([(2, 2, 2)], CONFIG)
    with self.assertRaisesRegex(ValueError, "num_slices 2 of 3"):
      layouts.layout((3, 1, 2), CONFIG, sizes)
    with self.assertRaisesRegex(ValueError, "holds no token"):
      layouts.layout((3, 0, 2), CONFIG)
    with self.assertRaisesRegex(ValueError, "no grid at all"):
      layouts.Sizes.of([], CONFIG)
    with self.assertRaisesRegex(ValueError, "8 patches for a layout of 4"):
      _encode((1, 1, 1), _patches((1, 1, 2)))


class AttentionTest(parameterized.TestCase):
  @parameterized.parameters("windows", "slices")
  def test_equals_dense_attention_with_a_mask(self, kind):
    grid = (2, 3, 5)
    where = _where(grid)
    key = [place[3] if kind == "windows" else place[0] for place in where]
    gen = np.random.default_rng(0)
    q, k, v = gen.standard_normal((3, len(where), 2, 8)).astype(np.float32)
    scores = np.einsum("pnh,snh->nps", q, k, dtype=np.float64) / np.sqrt(8)
    together = np.array([[a == b for b in key] for a in key])
    weights = np.where(together, np.exp(scores), 0)
    weights /= weights.sum(axis=-1, keepdims=True)
    expected = np.einsum("nps,snh->pnh", weights, v)
    segments = getattr(layouts.layout(grid, CONFIG), kind)
    np.testing.assert_allclose(
      vision.attend(q, k, v, segments), expected, atol=1e-5
    )

  def test_rotation_turns_with_rows_then_columns(self):
    gen = np.random.default_rng(0)
    x = gen.standard_normal((5, 2, 16)).astype(np.float32)
    places = gen.integers(0, 40, (2, 5))
    cos, sin = vision.rotary(jnp.asarray(places), 16, 1e4)
    expected = np.zeros_like(x)
    for patch in range(5):
      for pair in range(8):  # Values `pair` and `pair + 8` turn together.
        place = places[pair // 4, patch]
        angle = place / 1e4 ** (pair % 4 / 4)
        one, other = x[patch, :, pair], x[patch, :, pair + 8]
        c, s = np.cos(angle), np.sin(angle)
        expected[patch, :, pair] = one * c - other * s
        expected[patch, :, pair + 8] = other * c + one * s
    np.testing.assert_allclose(
      vision.rotate(jnp.asarray(x), cos, sin), expected, atol=1e-5
    )

  def test_half_precision_is_rotated_in_float32(self):
    x = jax.random.normal(jax.random.key(0), (6, 2, 16), jnp.bfloat16)
    places = jnp.arange(12).reshape(2, 6) * 3
    cos, sin = vision.rotary(places, 16, 1e4)
    self.assertEqual(cos.dtype, jnp.float32)
    full = vision.rotate(x.astype(jnp.float32), cos, sin)
    np.testing.assert_array_equal(
      vision.rotate(x, cos, sin), full.astype(jnp.bfloat16)
    )


class TowerTest(parameterized.TestCase):
  def test_a_padded_batch_equals_its_videos_alone_in_one_program(self):
    sizes = layouts.Sizes.of(GRIDS, CONFIG)
    traces = []

    @jax.jit
    def encode(patches, layout):
      traces.append(1)
      return _apply(_params(), patches, layout)[0]

    for grid in GRIDS:
      patches = _patches(grid)
      alone, _ = _encode(grid, patches)
      # What lies behind a video must not matter.
      padded = np.full((sizes.num_tokens * 4, patches.shape[1]), 1e3)
      padded[: len(patches)] = patches
      features = encode(
        padded.astype(np.float32), layouts.layout(grid, CONFIG, sizes)
      )
      count = len(alone)
      np.testing.assert_allclose(features[:count], alone, atol=2e-5)
      np.testing.assert_array_equal(features[count:], 0)
    self.assertLen(traces, 1)

  def test_videos_of_other_grids_may_be_batched(self):
    grids = GRIDS[1:3]
    sizes = layouts.Sizes.of(grids, CONFIG)
    found = [layouts.layout(grid, CONFIG, sizes) for grid in grids]
    videos = [_patches(grid, seed) for seed, grid in enumerate(grids)]
    most = sizes.num_tokens * 4
    batch = np.stack(
      [np.pad(video, [(0, most - len(video)), (0, 0)]) for video in videos]
    )
    features, _ = jax.jit(jax.vmap(_apply, in_axes=(None, 0, 0)))(
      _params(), batch, jax.tree.map(lambda *leaves: np.stack(leaves), *found)
    )
    for i, grid in enumerate(grids):
      alone, _ = _encode(grid, videos[i])
      np.testing.assert_allclose(features[i, : len(alone)], alone, atol=2e-5)

  def test_slices_do_not_see_each_other(self):
    patches = _patches((2, 2, 3))
    features, _ = _encode((2, 2, 3), patches)
    changed, _ = _encode((2, 2, 3), np.r_[patches[:24], patches[24:] + 1])
    np.testing.assert_array_equal(changed[:6], features[:6])
    self.assertGreater(np.abs(changed[6:] - features[6:]).min(axis=1).max(), 0)

  @parameterized.parameters(((), False), ((1,), True), ((0, 2), True))
  def test_only_full_layers_reach_beyond_a_window(self, full_layers, reaches):
    config = dataclasses.replace(CONFIG, full_layers=full_layers)
    grid = (1, 2, 4)  # Two windows: columns 0-1 and 2-3.
    layout = layouts.layout(grid, config)
    patches = _patches(grid).reshape(2, 4, 4, -1)
    changed = patches.copy()
    changed[:, 2:] += 1.0
    encode = jax.jit(
      lambda x: _tower(config).apply({"params": _params()}, x, layout)[0]
    )
    features, others = (
      np.asarray(encode(x.reshape(32, -1))).reshape(2, 4, -1)
      for x in (patches, changed)
    )
    differs = np.abs(features - others).max(axis=-1) > 1e-4
    self.assertTrue(differs[:, 2:].all())
    self.assertEqual(differs[:, :2].all(), reaches)
    self.assertEqual(differs[:, :2].any(), reaches)

  def test_no_map_of_all_patches_is_ever_made(self):
    grid = (5, 3, 3)
    layout = layouts.layout(grid, CONFIG)
    num_patches = 5 * 3 * 3 * 4
    jaxpr = jax.make_jaxpr(
      lambda patches: _tower().apply({"params": _params()}, patches, layout)
    )(_patches(grid))
    text = str(jaxpr)
    self.assertIn(f"[{num_patches},", text)
    self.assertNotIn(f"{num_patches},{num_patches}", text)

  def test_program_does_not_grow_with_depth(self):
    def size(depth):
      config = dataclasses.replace(CONFIG, num_layers=depth)
      patches = jnp.zeros((4, CONFIG.patch_values))
      layout = layouts.layout((1, 1, 1), config)
      tower = _tower(config)
      params = jax.eval_shape(tower.init, jax.random.key(0), patches, layout)
      return len(jax.jit(tower.apply).lower(params, patches, layout).as_text())

    self.assertLess(size(32), 1.05 * size(2))

  def test_recomputed_layers_give_the_same_gradient(self):
    grid = (1, 2, 3)
    layout, patches = layouts.layout(grid, CONFIG), _patches(grid)

    def gradient(remat):
      def loss(params):
        features, _ = _tower(remat=remat).apply(
          {"params": params}, patches, layout
        )
        return jnp.square(features).mean()

      return jax.jit(jax.grad(loss))(_params())

    for one, other in zip(
      jax.tree.leaves(gradient(False)),
      jax.tree.leaves(gradient(True)),
      strict=True,
    ):
      np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-5)

  def test_half_precision_is_near_float32(self):
    grid = (2, 3, 5)
    layout, patches = layouts.layout(grid, CONFIG), _patches(grid)
    full, _ = _encode(grid, patches)
    tower = _tower(dtype=jnp.bfloat16)
    half, out = jax.jit(tower.apply)({"params": _params()}, patches, layout)
    self.assertEqual(half.dtype, jnp.bfloat16)
    self.assertEqual(out["vision_tower_output"].dtype, jnp.bfloat16)
    error = np.abs(half.astype(np.float32) - full).max()
    self.assertLess(error, 0.05 * np.abs(full).max())

  def test_parameters_have_the_documented_names_and_shapes(self):
    shapes = jax.tree.map(jnp.shape, _params())
    self.assertEqual(
      shapes,
      {
        "patch_embed": {"kernel": (96, 32)},
        "blocks": {
          "norm1": {"scale": (3, 32)},
          "norm2": {"scale": (3, 32)},
          "qkv": {"kernel": (3, 32, 96), "bias": (3, 96)},
          "proj": {"kernel": (3, 32, 32), "bias": (3, 32)},
          "gate_proj": {"kernel": (3, 32, 44), "bias": (3, 44)},
          "up_proj": {"kernel": (3, 32, 44), "bias": (3, 44)},
          "down_proj": {"kernel": (3, 44, 32), "bias": (3, 32)},
        },
        "merger": {
          "ln_q": {"scale": (32,)},
          "linear_1": {"kernel": (128, 128), "bias": (128,)},
          "linear_2": {"kernel": (128, 32), "bias": (32,)},
        },
      },
    )


class VisionConfigTest(parameterized.TestCase):
  def test_round_trip(self):
    for config in (CONFIG, vision.VisionConfig.qwen2_5_vl(2048)):
      self.assertEqual(vision.VisionConfig.from_hf(config.to_hf()), config)

  @parameterized.parameters(
    ("model_type", "siglip_vision_model", "model_type is 'siglip"),
    ("hidden_act", "gelu", "hidden_act is 'gelu'"),
    ("in_chans", 1, "in_chans is 1"),
    ("depth", None, "lacks vision_config.depth"),
    ("fullatt_block_indexes", None, "fullatt_block_indexes is None"),
    ("fullatt_block_indexes", [1, 3], r"indexes\[1\] is 3; .* at most 2"),
    ("window_size", 4, "window_size 4 is below one token of 8 pixels"),
    ("hidden_size", 36, "hidden_size 36 does not split"),
    ("rope_parameters", {"rope_type": "yarn"}, "rope_type is 'yarn'"),
  )
  def test_what_is_not_implemented_stops_with_its_name(self, key, value, text):
    with self.assertRaisesRegex(errors.UserError, text):
      vision.VisionConfig.from_hf(CONFIG.to_hf() | {key: value})


if __name__ == "__main__":
  absltest.main()
