"""Max-min diversity subset (DivPrune, https://arxiv.org/abs/2503.02175).

Start from the token whose nearest neighbour is farthest, then add, again and
again, the token farthest from all picked ones, in cosine distance. The subset
is taken over the whole video; the question plays no part. Two differences
from the published code: picked tokens are excluded (there, duplicate tokens
make it pick the same index again), and survivors keep their position ids.
"""

import functools

import jax
import jax.numpy as jnp

from cacovid_jax import errors
from cacovid_jax.compressors import base

# Rows of the distance matrix held at a time while the first token is sought.
_BLOCK = 256


def compress(
  features, *, grid, num_keep, text=None, aux=None, rng=None, scope="video"
):
  """Returns a max-min diverse subset of the video's tokens.

  Args:
    features: float[N, D] video tokens.
    grid: static (T, H, W).
    num_keep: K, static.
    text: unused.
    aux: unused.
    rng: unused.
    scope: "video" picks over all frames at once; "frame" picks in each frame
      on its own, the budget split evenly (another, much faster method).
  """
  del text, aux, rng
  if scope == "video":
    return base.take(features, max_min_subset(features, num_keep=num_keep))
  if scope != "frame":
    raise errors.UserError(
      f"divprune: unknown scope {scope!r}; use 'video' or 'frame'"
    )
  return base.take(
    features, base.per_frame(max_min_subset, features, grid, num_keep)
  )


def max_min_subset(features: jax.Array, *, num_keep: int) -> jax.Array:
  """Returns int32[K] distinct rows of features f[n, D], in picking order."""
  # bfloat16 distances would change the picks.
  x = features.astype(jnp.float32)
  norm = jnp.linalg.norm(x, axis=-1, keepdims=True)
  # A token of zeros gets similarity 0, hence distance 1, to everything.
  x = x / jnp.maximum(norm, 1e-12)
  dot = functools.partial(jnp.matmul, precision="highest")
  num_tokens = x.shape[0]

  def nearest(i):
    distance = 1.0 - dot(x, x[i])
    return jnp.min(distance.at[i].set(jnp.inf))

  first = jnp.argmax(
    jax.lax.map(nearest, jnp.arange(num_tokens), batch_size=_BLOCK)
  )

  def pick(m, state):
    picked, best, last = state
    # -inf survives the minimum, so a picked token is never picked again.
    best = jnp.minimum(best, 1.0 - dot(x, x[last])).at[last].set(-jnp.inf)
    last = jnp.argmax(best).astype(jnp.int32)
    return picked.at[m].set(last), best, last

  first = first.astype(jnp.int32)
  picked = jnp.zeros([num_keep], jnp.int32).at[0].set(first)
  best = jnp.full([num_tokens], jnp.inf, jnp.float32)
  picked, _, _ = jax.lax.fori_loop(1, num_keep, pick, (picked, best, first))
  return picked


COMPRESSOR = base.Compressor(name="divprune", function=compress)
