"""Spherical k-means: points and centres are compared by their cosine.

Axes: N points, D width, K clusters.
"""

import math

import jax
import jax.numpy as jnp

from cacovid_jax.compressors.math import similarity

# Centres that move less are taken for still.
_STILL = 1e-4


def seeds(rng, x, num_seeds, *, per_draw=1):
  """Draws distinct seeds by k-means++ (squared distance to the nearest seed).

  Returns int32[K] of the tokens float32[N, D] of norm 1, or 0, in the order of
  drawing. `per_draw` are drawn without replacement before distances to them
  count; 1 is k-means++ itself.
  """
  num_draws = math.ceil((num_seeds - 1) / per_draw)
  per_draw = min(per_draw, x.shape[0])
  norm = jnp.sum(x * x, axis=-1)

  def away(drawn):
    """Returns float32[N], squared distance to the nearest of int32[m]."""
    products = jnp.matmul(x, x[drawn].T, precision=jax.lax.Precision.HIGHEST)
    squared = norm[:, None] + norm[drawn][None, :] - 2.0 * products
    return jnp.maximum(jnp.min(squared, axis=-1), 0.0)

  def draw(carry, rng):
    distance, used = carry
    # Gumbel noise on logarithms draws by weight, without replacement.
    value = jnp.log(distance + 1e-6) + jax.random.gumbel(rng, norm.shape)
    value = jnp.where(used, -jnp.inf, value)
    _, drawn = jax.lax.top_k(value, per_draw)
    distance = jnp.minimum(distance, away(drawn))
    return (distance, used.at[drawn].set(True)), drawn

  first_rng, rng = jax.random.split(rng)
  first = jax.random.randint(first_rng, [1], 0, x.shape[0])
  used = jnp.zeros(norm.shape, bool).at[first].set(True)
  keys = jax.vmap(lambda i: jax.random.fold_in(rng, i))(jnp.arange(num_draws))
  _, drawn = jax.lax.scan(draw, (away(first), used), keys)
  # The last draw may be of more than are left, which come first in it.
  return jnp.concatenate([first, drawn.reshape(-1)])[:num_seeds]


def nearest(x, centres, used, precision=jax.lax.Precision.HIGHEST):
  """Returns each token's cluster int32[N] and its cosine to it float32[N].

  Of tokens float32[N, D] of norm 1, or 0, centres float32[K, D] of any norm and
  the clusters that there are, `used` bool[K].
  """
  alike = jnp.matmul(x, similarity.unit(centres).T, precision=precision)
  alike = jnp.where(used, alike, -jnp.inf)
  return jnp.argmax(alike, axis=-1).astype(jnp.int32), jnp.max(alike, axis=-1)


def lloyd(x, centres, used, *, rounds):
  """Returns float32[K, D] means after at most `rounds` rounds of k-means.

  A cluster without tokens keeps its centre. Ends once no number of a centre
  moves by 1e-4. Arguments are those of `nearest`.
  """
  # No order of rows hangs on a round, so a faster product may do.
  fast = jax.lax.Precision.HIGH
  cluster = jnp.arange(centres.shape[0], dtype=jnp.int32)

  def step(state):
    centres, _, done = state
    assign, _ = nearest(x, centres, used, precision=fast)
    member = (assign[None, :] == cluster[:, None]).astype(jnp.float32)
    count = member.sum(axis=-1, keepdims=True)
    mean = jnp.matmul(member, x, precision=fast) / jnp.maximum(count, 1.0)
    mean = jnp.where(count > 0, mean, centres)
    return mean, jnp.max(jnp.abs(mean - centres)), done + 1

  def moves(state):
    return (state[1] >= _STILL) & (state[2] < rounds)

  state = (centres, jnp.float32(jnp.inf), jnp.int32(0))
  return jax.lax.while_loop(moves, step, state)[0]
