"""Rotary embeddings against loops in NumPy."""

import jax.numpy as jnp
import numpy as np
from absl.testing import absltest

from cacovid_jax.models import rope


def _rotate(x, position, theta):
  """Rotates one head float[H]: pair (i, i + H / 2) by position * frequency."""
  half = len(x) // 2
  out = np.empty_like(x)
  for i in range(half):
    angle = position * theta ** (-2.0 * i / len(x))
    out[i] = x[i] * np.cos(angle) - x[i + half] * np.sin(angle)
    out[i + half] = x[i + half] * np.cos(angle) + x[i] * np.sin(angle)
  return out


class RopeTest(absltest.TestCase):
  def test_each_pair_of_halves_is_rotated_by_its_own_frequency(self):
    x = np.random.default_rng(0).standard_normal((5, 3, 8)).astype(np.float32)
    positions = np.array([0, 1, 7, 100, 5000])
    cos, sin = rope.angles(jnp.asarray(positions)[None], 8, 1e4)
    expected = [
      [_rotate(head, position, 1e4) for head in token]
      for token, position in zip(x.astype(np.float64), positions, strict=True)
    ]
    np.testing.assert_allclose(rope.apply(x, cos, sin), expected, atol=1e-3)
    np.testing.assert_allclose(
      rope.apply(x, cos, sin)[:3], expected[:3], atol=1e-5
    )

  def test_equal_rows_with_sections_are_plain_rope(self):
    positions = jnp.array([0, 3, 9])
    plain = rope.angles(positions[None], 16, 1e6)
    rows = jnp.broadcast_to(positions, (3, 3))
    sectioned = rope.angles(rows, 16, 1e6, sections=(2, 3, 3))
    np.testing.assert_array_equal(plain, sectioned)

  def test_each_section_follows_its_own_row(self):
    rows = jnp.array([[1], [10], [100]])
    cos, _ = rope.angles(rows, 16, 1e4, sections=(2, 3, 3))
    position = np.array([1, 1, 10, 10, 10, 100, 100, 100])
    phase = position * 1e4 ** (-np.arange(8) / 8)
    expected = np.cos(np.concatenate([phase, phase]))
    np.testing.assert_allclose(cos[0], expected, atol=1e-5)

  def test_sections_that_do_not_fill_the_head_are_an_error(self):
    with self.assertRaisesRegex(ValueError, "do not split 8 frequencies"):
      rope.angles(jnp.zeros((3, 4)), 16, 1e4, sections=(2, 3, 4))

  def test_half_precision_rounds_the_angles_first(self):
    x = jnp.asarray(np.random.default_rng(1).standard_normal((2, 1, 8)))
    x = x.astype(jnp.bfloat16)
    cos, sin = rope.angles(jnp.array([[3, 4]]), 8, 1e4)
    rounded = (cos.astype(jnp.bfloat16), sin.astype(jnp.bfloat16))
    np.testing.assert_array_equal(
      rope.apply(x, cos, sin), rope.apply(x, *rounded)
    )


if __name__ == "__main__":
  absltest.main()
