"""Rotary position embeddings, plain and with several position rows.

Axes: P position rows (1 plain, 3 for time / height / width), L positions,
N heads, H head dimension. Papers: https://arxiv.org/abs/2104.09864,
https://arxiv.org/abs/2409.12191 (section 2.1, several position rows).
"""

import chex
import jax.numpy as jnp
import numpy as np


def angles(positions, head_dim, theta, sections=None, *, interleaved=False):
  """Returns (cos, sin), both float32[..., L, H], that rotate queries and keys.

  Their halves are equal, as the rotate-half form wants them. Of position ids
  int32[P, ..., L], P = 1 without `sections`; H is even, theta the base of the
  geometric row of wavelengths.

  `sections` are how many of the H / 2 frequencies each position row drives, in
  order. Interleaved, the rows take turns (0, 1, 2, 0, 1, 2, ...) until a later
  one has all of its own; the first row drives the rest (Qwen3-VL).
  """
  exponents = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
  frequencies = 1.0 / theta**exponents
  if sections is None:
    chex.assert_axis_dimension(positions, 0, 1)
    rows = positions[0][..., None]
  else:
    if len(sections) != positions.shape[0] or sum(sections) != head_dim // 2:
      raise ValueError(
        f"sections {tuple(sections)} do not split {head_dim // 2} frequencies "
        f"over {positions.shape[0]} position rows"
      )
    driver = np.repeat(np.arange(len(sections)), sections)
    if interleaved:
      driver[:] = 0
      for row, size in enumerate(sections[1:], start=1):
        driver[row : len(sections) * size : len(sections)] = row
    rows = jnp.moveaxis(positions[driver], 0, -1)
  # float32 holds every position below 2**24 exactly.
  phase = rows.astype(jnp.float32) * frequencies
  phase = jnp.concatenate([phase, phase], axis=-1)
  return jnp.cos(phase), jnp.sin(phase)


def apply(x, cos, sin):
  """Returns x float[..., L, N, H] rotated by cos, sin float[..., L, H].

  The cosines are rounded to x's dtype first, as the released models do.
  """
  cos = cos.astype(x.dtype)[..., None, :]
  sin = sin.astype(x.dtype)[..., None, :]
  first, second = jnp.split(x, 2, axis=-1)
  return x * cos + jnp.concatenate([-second, first], axis=-1) * sin
