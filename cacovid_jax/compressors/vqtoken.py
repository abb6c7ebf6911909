"""A codebook of a video's own tokens (VQToken, k-means mode,
https://arxiv.org/abs/2503.16980).

Spherical k-means: tokens of norm 1, k-means++ seeds, assignment by cosine,
means. Each row of the selection is the mean of a cluster, at the place of its
medoid; the index map of the publication is `assign`.

Differences from the publication, whose language model is fine-tuned to its
codes: by default a row is the mean of the tokens as they are, which a frozen
language model can read (`codes="unit"` for the mean of the tokens at norm 1);
above 64 clusters, seeds are drawn several at a time, in 16 draws; the number of
clusters is the budget, unless `elbow` is set.

Axes: N video tokens, D width, K clusters and kept tokens.
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
class VQToken(base.Compressor):
  """The means of K clusters of the video's tokens.

  Attributes:
    rounds: at most so many rounds; fewer once nothing moves.
    codes: "raw" for means of the tokens, "unit" for means of the tokens at
      norm 1.
    elbow: None keeps K rows. "corrected" and "released" take the bend of the
      inertia over 12, 13, ... clusters as their number, up to `max_clusters`
      and K, and mark the other rows as padding; "released" repeats the
      published code, which looks for the bend 9 too early and never below 12.
    max_clusters: the most clusters that `elbow` tries.
    seeds_per_draw: how many seeds k-means++ draws before it looks at the
      distances to them; None for 1 up to K = 64, for K / 16 above.
  """

  name: str = "vqtoken"
  stochastic: bool = True
  rounds: int = 20
  codes: str = base.choice("raw", "unit")
  elbow: str | None = base.choice(None, "corrected", "released")
  max_clusters: int = 32
  seeds_per_draw: int | None = base.number(None, 1, whole=True)

  def choose(self, inputs, num_keep, ratio):
    """Returns the means, each at the place of its medoid."""
    features = inputs.features
    num_clusters = self._num_clusters(num_keep)
    per_draw = self.seeds_per_draw
    if per_draw is None:
      one_by_one = num_clusters <= _ONE_BY_ONE
      per_draw = 1 if one_by_one else math.ceil(num_clusters / _DRAWS)
    x = similarity.unit(features)
    chosen = seeds(inputs.rng, x, num_clusters, per_draw=per_draw)
    used = jnp.ones([num_clusters], bool)
    if self.elbow:
      bend = _bend(x, chosen, self.rounds, self.elbow)
      used = jnp.arange(num_clusters) < bend
    centres = lloyd(x, x[chosen], used, rounds=self.rounds)
    assign, alike = nearest(x, centres, used)
    index = clustering.distinct_representatives(alike, assign, num_clusters)
    out = base.merge(
      features if self.codes == "raw" else x,
      jnp.pad(index, (0, num_keep - num_clusters)),
      assign,
      used.sum(),
    )
    return out._replace(features=out.features.astype(features.dtype))

  def _num_clusters(self, num_keep):
    if not self.elbow:
      return num_keep
    num_clusters = min(num_keep, self.max_clusters)
    if num_clusters < FEWEST_CLUSTERS + 2:
      raise errors.UserError(
        f"vqtoken: an elbow needs room for {FEWEST_CLUSTERS + 2} clusters or"
        f" more, not {num_clusters}; raise the retention ratio or max_clusters,"
        " or leave elbow out"
      )
    return num_clusters


def seeds(rng, x, num_seeds, *, per_draw=1):
  """Draws distinct seeds by k-means++ (squared distance to the nearest seed).

  Returns int32[K] of the tokens float32[N, D] of norm 1, or 0, in the order of
  drawing; a draw of fewer gives the first of them. `per_draw` are drawn without
  replacement before distances to them count; 1 is k-means++ itself.
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

  Args:
    x: float32[N, D] tokens of norm 1, or 0.
    centres: float32[K, D] of any norm.
    used: bool[K], the clusters that there are.
    precision: of the products.
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

  return jax.lax.while_loop(
    lambda state: (state[1] >= _STILL) & (state[2] < rounds),
    step,
    (centres, jnp.float32(jnp.inf), jnp.int32(0)),
  )[0]


def _bend(x, chosen, rounds, elbow):
  """Returns int32[], the number of clusters where the inertia bends most."""
  most = chosen.shape[0]
  sizes = jnp.arange(FEWEST_CLUSTERS, most + 1)

  def inertia(size):
    # The first seeds of k-means++ are a draw of fewer.
    used = jnp.arange(most) < size
    centres = lloyd(x, x[chosen], used, rounds=rounds)
    return jnp.sum(1.0 - nearest(x, centres, used)[1])

  return bend(jax.vmap(inertia)(sizes), elbow)


def bend(curve, elbow):
  """Returns int32[] clusters at the bend of float32[n], from 12 clusters on."""
  second = curve[:-2] - 2.0 * curve[1:-1] + curve[2:]
  sharpest = jnp.argmax(second).astype(jnp.int32)
  if elbow == "released":
    return jnp.maximum(FEWEST_CLUSTERS, sharpest + 4)
  return sharpest + FEWEST_CLUSTERS + 1
