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
from cacovid_jax.compressors.math import clustering, kmeans, similarity

# The range of the adaptive number of clusters starts here, as published.
FEWEST_CLUSTERS = 12
# Up to so many seeds are drawn one by one; more of them in so many draws.
_ONE_BY_ONE = 64
_DRAWS = 16


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
    x = similarity.unit(jax.lax.stop_gradient(features))
    chosen = kmeans.seeds(inputs.rng, x, num_clusters, per_draw=per_draw)
    used = jnp.ones([num_clusters], bool)

    def inertia(size):
      # The first seeds of k-means++ are a draw of fewer.
      used = jnp.arange(num_clusters) < size
      centres = kmeans.lloyd(x, x[chosen], used, rounds=self.rounds)
      return jnp.sum(1.0 - kmeans.nearest(x, centres, used)[1])

    if self.elbow:
      sizes = jnp.arange(FEWEST_CLUSTERS, num_clusters + 1)
      most = bend(jax.vmap(inertia)(sizes), self.elbow)
      used = jnp.arange(num_clusters) < most
    centres = kmeans.lloyd(x, x[chosen], used, rounds=self.rounds)
    assign, alike = kmeans.nearest(x, centres, used)
    index = clustering.distinct_representatives(alike, assign, num_clusters)
    index = jnp.pad(index, (0, num_keep - num_clusters))
    tokens = features
    if self.codes == "unit":
      tokens = features.astype(jnp.float32)
      tokens /= similarity.norm(jax.lax.stop_gradient(tokens))[:, None]
    out = base.merge(tokens, index, assign, used.sum())
    return out._replace(features=out.features.astype(features.dtype))


def bend(curve, elbow):
  """Returns int32[] clusters at the bend of float32[n], from 12 clusters on."""
  second = curve[:-2] - 2.0 * curve[1:-1] + curve[2:]
  sharpest = jnp.argmax(second).astype(jnp.int32)
  if elbow == "released":
    return jnp.maximum(FEWEST_CLUSTERS, sharpest + 4)
  return sharpest + FEWEST_CLUSTERS + 1
