"""Diversity by density peaks: picks tokens that are dense and far from denser.

The policy-free rule inside the online combination space sampling.
Axes: n tokens, D width.
Paper: https://arxiv.org/abs/2602.01649 (sampling of frames and content); the
rule itself is density peak clustering, https://doi.org/10.1126/science.1242072
"""

import jax
import jax.numpy as jnp
import numpy as np

from cacovid_jax.models import token_grid


def squared_distances(z, valid=None):
  """Returns float32[n, n] squared distances over D, of z float[n, D].

  The diagonal is exactly zero. Rows that are not valid, bool[n], do not matter.
  """
  valid = np.ones(z.shape[0], bool) if valid is None else valid
  z = token_grid.fill(z.astype(jnp.float32), valid[:, None], 0.0)
  # Distances do not see a shift; small norms lose less to cancellation below.
  z = z - z.sum(axis=0) / valid.sum()
  # The matrix unit's default precision would reorder near neighbours.
  products = jnp.matmul(z, z.T, precision=jax.lax.Precision.HIGHEST)
  norms = jnp.sum(z * z, axis=-1)
  squared = norms[:, None] + norms[None, :] - 2.0 * products
  squared = jnp.maximum(squared, 0.0) / z.shape[-1]
  return jnp.where(jnp.eye(z.shape[0], dtype=bool), 0.0, squared)


def peak_scores(
  features, *, rng=None, num_neighbours=4, noise=1e-6, valid=None
):
  """Returns float32[n], density times distance to the next denser token.

  Of features float[n, D]. `num_neighbours` smallest distances, the token's own
  among them, make the density. With an `rng`, noise, uniform in [0, noise),
  breaks ties. Tokens not valid, bool[n], get -inf and are no neighbours.
  """
  n = features.shape[0]
  valid = np.ones(n, bool) if valid is None else valid
  squared = squared_distances(features, valid)
  reach = token_grid.fill(-squared, valid[None, :], -jnp.inf)
  nearest, _ = jax.lax.top_k(reach, min(num_neighbours, n))
  # A token of a few has as many neighbours only.
  near = np.arange(nearest.shape[1]) < valid.sum()
  nearest = token_grid.fill(nearest, near, 0.0)
  density = jnp.exp(nearest.sum(axis=-1) / near.sum())
  if rng is not None:
    density += jax.random.uniform(rng, density.shape, maxval=noise)
  # The same bits on both sides, however a compiler would round each anew.
  density = jax.lax.optimization_barrier(density)
  denser = density[None, :] > density[:, None]  # [n, n]: column over row
  denser = token_grid.fill(denser, valid[None, :], False)
  closest = jnp.min(jnp.where(denser, squared, jnp.inf), axis=-1)
  pairs = valid[:, None] & valid[None, :]
  largest = token_grid.fill(squared, pairs, 0.0).max()
  closest = jnp.where(denser.any(axis=-1), closest, largest)
  return token_grid.fill(density * jnp.sqrt(closest), valid, -jnp.inf)


def density_peaks(features, num_keep, rng=None, *, num_valid=None, **options):
  """Returns int32[num_keep], tokens with the largest `peak_scores`, ascending.

  Where the number to keep is data, `num_valid` int32[], `num_keep` is the most
  that it can be, and the index is n behind it. It is at most the number of
  valid tokens. The options are those of `peak_scores`.
  """
  scores = peak_scores(features, rng=rng, **options)
  _, index = jax.lax.top_k(scores, num_keep)
  if num_valid is not None:
    kept = np.arange(num_keep) < num_valid
    index = token_grid.fill(index, kept, features.shape[0])
  return jnp.sort(index)
