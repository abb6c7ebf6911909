"""Evenly spaced tokens: the rule that looks at nothing."""

import jax.numpy as jnp
import numpy as np

from cacovid_jax.compressors import base


def positions(num_video: int, num_keep: int) -> np.ndarray:
  """Returns int32[K] positions evenly spaced over N, first and last included.

  In float64 on the host, as METHOD.md 7 asks of every spaced position: a
  float32 linspace on device is off by one in places.
  """
  spaced = np.linspace(0, num_video - 1, num_keep, dtype=np.float64)
  return np.round(spaced).astype(np.int32)


def compress(features, *, grid, num_keep, text=None, aux=None, rng=None):
  """Returns `num_keep` tokens evenly spaced over time and space."""
  del grid, text, aux, rng
  index = positions(features.shape[0], num_keep)
  return base.take(features, jnp.asarray(index))


COMPRESSOR = base.Compressor(name="uniform", function=compress)
