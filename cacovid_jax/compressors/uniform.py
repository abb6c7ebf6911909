"""Evenly spaced tokens: the rule that looks at nothing."""

import jax.numpy as jnp
import numpy as np

from cacovid_jax.compressors import allocators, base


def positions(num_video: int, num_keep: int) -> np.ndarray:
  """Returns int32[K] positions evenly spaced over N, first and last included.

  In float64 on the host, as METHOD.md 7 asks of every spaced position: a
  float32 linspace on device is off by one in places.
  """
  spaced = np.linspace(0, num_video - 1, num_keep, dtype=np.float64)
  return np.round(spaced).astype(np.int32)


def spread_order(num_tokens: int) -> np.ndarray:
  """Returns int32[n], an order of n tokens whose every prefix is spread out.

  That of the numbers with their bits reversed, from the middle on.
  """
  bits = max(num_tokens - 1, 1).bit_length()
  counted = np.arange(2**bits)
  mirrored = sum(((counted >> b) & 1) << (bits - 1 - b) for b in range(bits))
  order = mirrored[mirrored < num_tokens] + num_tokens // 2
  return (order % num_tokens).astype(np.int32)


def compress(
  features,
  *,
  grid,
  num_keep,
  text=None,
  aux=None,
  rng=None,
  allocator=None,
):
  """Returns `num_keep` tokens evenly spaced over time and space.

  Args:
    features: float[N, D] video tokens; without allocator not looked at.
    grid: static (T, H, W).
    num_keep: K, static.
    text: unused.
    aux: what the allocator needs.
    rng: unused.
    allocator: how frames share the budget, a name of `allocators`; the tokens
      of a frame are then the first of `spread_order`. None spaces them evenly
      over the whole video.
  """
  del text, rng
  if allocator is None:
    index = positions(features.shape[0], num_keep)
    return base.take(features, jnp.asarray(index))
  order = jnp.tile(spread_order(grid[1] * grid[2]), (grid[0], 1))
  return allocators.select(
    allocator, features, order, grid=grid, num_keep=num_keep, aux=aux
  )


COMPRESSOR = base.Compressor(
  name="uniform", function=compress, configure=allocators.configure
)
