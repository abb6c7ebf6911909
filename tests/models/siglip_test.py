"""The vision tower's own rules; its values are compared in golden_test."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest

from cacovid_jax import errors
from cacovid_jax.models import siglip


class LayerNormTest(absltest.TestCase):
  def test_large_mean_does_not_cancel(self):
    x = np.array([[1000.0, 1001.0, 1002.0, 1003.0]], np.float32)
    norm = siglip.LayerNorm(1e-6)
    params = norm.init(jax.random.key(0), x)
    expected = (np.arange(4) - 1.5) / np.sqrt(1.25 + 1e-6)
    np.testing.assert_allclose(norm.apply(params, x)[0], expected, atol=1e-5)

  def test_half_precision_rounds_once(self):
    x = np.random.default_rng(0).standard_normal((3, 16)).astype(np.float32)
    x = jnp.asarray(x, jnp.bfloat16)
    params = {"params": {"scale": jnp.full(16, 1.3), "bias": jnp.full(16, 0.7)}}
    half = siglip.LayerNorm(1e-6, jnp.bfloat16).apply(params, x)
    full = siglip.LayerNorm(1e-6, jnp.float32).apply(params, x)
    np.testing.assert_array_equal(half, full.astype(jnp.bfloat16))


class SiglipTowerTest(absltest.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.config = siglip.SiglipConfig.tiny()  # 30 px, patches of 4.
    gen = np.random.default_rng(0)
    cls.pixels = gen.standard_normal((2, 30, 30, 3)).astype(np.float32)
    cls.tower = siglip.SiglipTower(cls.config)
    cls.params = jax.jit(cls.tower.init)(jax.random.key(0), cls.pixels)
    cls.apply = staticmethod(jax.jit(cls.tower.apply))

  def test_patches_are_cut_row_by_row(self):
    _, out = self.apply(self.params, self.pixels)
    params = self.params["params"]
    kernel = np.asarray(params["patch_embedding"]["kernel"])  # [4 * 4 * 3, D]
    patch = 9  # Row 1, column 2 of the 7 x 7 patches.
    cut = self.pixels[1, 4:8, 8:12].reshape(-1)
    expected = cut @ kernel + params["position_embedding"][patch]
    np.testing.assert_allclose(out["embeddings"][1, patch], expected, atol=1e-5)

  def test_pixels_behind_the_last_whole_patch_are_unused(self):
    changed = self.pixels.copy()
    changed[:, 28:] = 9.0
    changed[:, :, 28:] = -9.0
    np.testing.assert_array_equal(
      self.apply(self.params, changed)[0],
      self.apply(self.params, self.pixels)[0],
    )

  def test_frames_do_not_see_each_other(self):
    both, _ = self.apply(self.params, self.pixels)
    second, _ = self.apply(self.params, self.pixels[1:])
    np.testing.assert_allclose(both[1], second[0], atol=1e-5)

  def test_rematerialised_gradients_are_the_same(self):
    def total(tower, params):
      return jnp.sin(tower.apply(params, self.pixels)[0]).sum()

    remat = siglip.SiglipTower(self.config, remat=True)
    gradient = jax.jit(jax.grad(total, argnums=1), static_argnums=0)
    plain = gradient(self.tower, self.params)
    again = gradient(remat, self.params)
    # Sums in another order: float32 rounding of gradients as large as 40.
    chex.assert_trees_all_close(plain, again, rtol=2e-6, atol=2e-5)

  def test_config_round_trip(self):
    config = siglip.SiglipConfig.so400m()
    self.assertEqual(siglip.SiglipConfig.from_hf(config.to_hf()), config)
    self.assertEqual(config.side, 27)

  def test_missing_size_names_the_field(self):
    config = self.config.to_hf()
    del config["patch_size"]
    with self.assertRaisesRegex(errors.UserError, "vision_config.patch_size"):
      siglip.SiglipConfig.from_hf(config)


if __name__ == "__main__":
  absltest.main()
