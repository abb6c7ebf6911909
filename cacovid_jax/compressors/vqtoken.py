"""A codebook of a video's own tokens (VQToken, k-means mode,
https://arxiv.org/abs/2503.16980).

Spherical k-means with k-means++ seeds. The publication's language model is
fine-tuned to its codes; here a row is by default the mean of the tokens as they
are, which a frozen model can read. Above 64 clusters, seeds are drawn in 16
draws; the number of clusters is the budget, unless `elbow` is set.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from cacovid_jax import errors
from cacovid_jax.compressors import base
from cacovid_jax.compressors.math import clustering, similarity

# The range of the adaptive number of clusters starts here, as published.
FEWEST_CLUSTERS = 12
# Up to so many seeds are drawn one by one; more of them in so many draws.
_ONE_BY_ONE = 64
_DRAWS = 16
# Centres that move less are taken for still.
_STILL = 1e-4


@dataclasses.dataclass(frozen=True, kw_only=True)
class VQToken(base.Compressor, name="vqtoken"):
  """The means of K clusters of the video's tokens, at the places of medoids."""

  stochastic: bool = True
  rounds: int = 20  # At most; fewer once nothing moves.
  codes: str = base.choice("raw", "unit")  # Means of tokens, or at norm 1.
  # None keeps K rows. The others take the bend of the inertia over 12, 13, ...
  # clusters as their number, up to `max_clusters` and K, and mark the other
  # rows as padding; "released" repeats the published code, which looks for the
  # bend 9 too early and never below 12.
  elbow: str | None = base.choice(None, "corrected", "released")
  max_clusters: int = 32
  # How many k-means++ draws before it looks at the distances to them; None for
  # 1 up to K = 64, for K / 16 above.
  seeds_per_draw: int | None = base.number(None, 1, whole=True)

  def choose(self, inputs, num_keep, ratio):
    features = inputs.features
    num_clusters, fewest = num_keep, FEWEST_CLUSTERS + 2
    if self.elbow:
      num_clusters = min(num_keep, self.max_clusters)
      if num_clusters < fewest:
        raise errors.UserError(
          f"vqtoken: an elbow needs room for {fewest} clusters or more, not"
          f" {num_clusters}; raise the retention ratio or max_clusters, or"
          " leave elbow out"
        )
    many = num_clusters > _ONE_BY_ONE
    per_draw = self.seeds_per_draw
    if per_draw is None:
      per_draw = math.ceil(num_clusters / _DRAWS) if many else 1
    x = similarity.unit(features)
    chosen = seeds(inputs.rng, x, num_clusters, per_draw=per_draw)
    used = jnp.ones([num_clusters], bool)

    def inertia(size):
      # The first seeds of k-means++ are a draw of fewer.
      used = jnp.arange(num_clusters) < size
      centres = lloyd(x, x[chosen], used, rounds=self.rounds)
      return jnp.sum(1.0 - nearest(x, centres, used)[1])

    if self.elbow:
      sizes = jnp.arange(FEWEST_CLUSTERS, num_clusters + 1)
      most = bend(jax.vmap(inertia)(sizes), self.elbow)
      used = jnp.arange(num_clusters) < most
    centres = lloyd(x, x[chosen], used, rounds=self.rounds)
    assign, alike = nearest(x, centres, used)
    index = clustering.distinct_representatives(alike, assign, num_clusters)
    index = jnp.pad(index, (0, num_keep - num_clusters))
    tokens = features if self.codes == "raw" else x
    out = base.merge(tokens, index, assign, used.sum())
    return out._replace(features=out.features.astype(features.dtype))


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


def bend(curve, elbow):
  """Returns int32[] clusters at the bend of float32[n], from 12 clusters on."""
  second = curve[:-2] - 2.0 * curve[1:-1] + curve[2:]
  sharpest = jnp.argmax(second).astype(jnp.int32)
  if elbow == "released":
    return jnp.maximum(FEWEST_CLUSTERS, sharpest + 4)
  return sharpest + FEWEST_CLUSTERS + 1
