"""Efficient video sampling: tokens that differ from the frame before.

A token is worth 1 - cosine with the token at the same place of the previous
frame; the first frame comes before all others. Attention plays no part, nor
does the question.
Paper: https://arxiv.org/abs/2510.14624
"""

import jax.numpy as jnp

from cacovid_jax.compressors import base, similarity

# Above every dissimilarity, which ends at 2.
_FIRST_FRAME = 255.0


def compress(features, *, grid, num_keep, text=None, aux=None, rng=None):
  """Returns the tokens that changed most; the first frame counts as changed.

  A budget below one frame keeps the first tokens of the first frame, as the
  rule says; the published rounding never goes below one frame.

  Args:
    features: float[N, D] video tokens.
    grid: static (T, H, W).
    num_keep: K, static.
    text: unused.
    aux: unused.
    rng: unused.
  """
  del text, aux, rng
  T, H, W = grid
  cosine = similarity.adjacent(features.reshape(T, H * W, -1))
  # Where nothing moves, ties go to the earlier token and not to rounding.
  changed = 1.0 - similarity.settled(cosine)
  first = jnp.full([1, H * W], _FIRST_FRAME, jnp.float32)
  values = jnp.concatenate([first, changed]).reshape(-1)
  return base.take_top(features, values, num_keep)


def reference_rows(grid, ratio):
  """Returns how many tokens the publication keeps: at least a whole frame."""
  T, H, W = grid
  return max(H * W, int(ratio * T * H * W))


COMPRESSOR = base.Compressor(
  name="evs", function=compress, reference_rows=reference_rows
)
