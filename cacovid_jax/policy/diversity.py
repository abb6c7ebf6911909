"""Diversity by density peaks: picks tokens that are dense and far from denser.

The policy-free rule inside the online combination space sampling.
Axes: n tokens, D width.
Paper: https://arxiv.org/abs/2602.01649 (sampling of frames and content); the
rule itself is density peak clustering, https://doi.org/10.1126/science.1242072
"""

import jax
import jax.numpy as jnp


def squared_distances(z):
  """Returns float32[n, n] squared distances over D, of z float[n, D].

  The diagonal is exactly zero.
  """
  z = z.astype(jnp.float32)
  # Distances do not see a shift; small norms lose less to cancellation below.
  z = z - z.mean(axis=0)
  # The matrix unit's default precision would reorder near neighbours.
  products = jnp.matmul(z, z.T, precision=jax.lax.Precision.HIGHEST)
  norms = jnp.sum(z * z, axis=-1)
  squared = norms[:, None] + norms[None, :] - 2.0 * products
  squared = jnp.maximum(squared, 0.0) / z.shape[-1]
  return jnp.where(jnp.eye(z.shape[0], dtype=bool), 0.0, squared)


def peak_scores(features, *, rng=None, num_neighbours=4, noise=1e-6):
  """Returns float32[n], density times distance to the next denser token.

  Args:
    features: float[n, D], one row a token.
    rng: key of the noise that breaks ties between densities; None for none.
    num_neighbours: how many smallest distances make the density; the token
      itself counts as one of them.
    noise: the noise is uniform in [0, noise).
  """
  squared = squared_distances(features)
  n = squared.shape[0]
  nearest, _ = jax.lax.top_k(-squared, min(num_neighbours, n))
  density = jnp.exp(nearest.mean(axis=-1))
  if rng is not None:
    density += jax.random.uniform(rng, density.shape, maxval=noise)
  denser = density[None, :] > density[:, None]  # [n, n]: column over row
  closest = jnp.min(jnp.where(denser, squared, jnp.inf), axis=-1)
  closest = jnp.where(denser.any(axis=-1), closest, squared.max())
  return density * jnp.sqrt(closest)


def density_peaks(
  features, num_keep, rng=None, *, num_neighbours=4, noise=1e-6
):
  """Picks the tokens with the largest density times distance.

  Args:
    features: float[n, D].
    num_keep: how many to keep, static, at most n.
    rng: key of the noise that breaks ties; None for none.
    num_neighbours: see `peak_scores`.
    noise: see `peak_scores`.

  Returns:
    int32[num_keep] token indices, ascending.
  """
  scores = peak_scores(
    features, rng=rng, num_neighbours=num_neighbours, noise=noise
  )
  _, index = jax.lax.top_k(scores, num_keep)
  return jnp.sort(index)
