"""Density peak clustering with k nearest neighbours, on masked point sets.

The routine that PruneVID, HoliTom and FlashVID share. A point is dense if its
k nearest points, itself included, are near; it is separate if the nearest
denser point is far. The points with the largest product of the two are the
centres, every other point joins the nearest centre.

How many points there are and how many clusters may be data: shapes are those
of the bound, masks say the rest. One call can cluster several disjoint sets of
its points, each on its own, from one matrix of distances. Callers `jax.vmap`
it over frames. Nothing is drawn: among equal densities the earlier point is
the denser one (the published code adds noise), equal scores and equal
distances go to the earlier point.

Axes: n points, D width, C cluster bound.
Paper: https://doi.org/10.1016/j.knosys.2016.02.001
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from cacovid_jax.compressors import base, rows
from cacovid_jax.policy import diversity


class Clusters(NamedTuple):
  """Clusters of one or several disjoint sets of points.

  Attributes:
    score: float32[n], log(density * separation); -inf where a point is not
      there, and where it coincides with a denser one.
    rank: int32[n], place of a point's score in its set, from 0; the points
      with rank below the number of clusters are the centres. n if not there.
    centre: int32[n], the centre that a point joins, itself for a centre; n if
      not there.
    label: int32[n], rank of that centre, -1 if not there.
  """

  score: jax.Array
  rank: jax.Array
  centre: jax.Array
  label: jax.Array


def cluster(x, num_clusters, *, num_neighbours=7, valid=None, sets=None):
  """Clusters points by their Euclidean distance over the root of D.

  Args:
    x: float[n, D]; distances are taken in float32.
    num_clusters: see `from_distances`.
    num_neighbours: see `from_distances`.
    valid: see `from_distances`.
    sets: see `from_distances`.
  """
  chex.assert_rank(x, 2)
  present = valid
  if sets is not None:
    present = sets >= 0 if valid is None else valid & (sets >= 0)
  squared = diversity.squared_distances(x, present)
  return from_distances(
    squared,
    num_clusters,
    num_neighbours=num_neighbours,
    valid=valid,
    sets=sets,
  )


def from_distances(
  squared, num_clusters, *, num_neighbours=7, valid=None, sets=None
):
  """Clusters points of which the squared distances are known.

  Args:
    squared: float32[n, n] squared distances, symmetric, zero diagonal.
    num_clusters: number of clusters of a set; an int, an int32[], or int32[n]
      which gives at each point the number of its set. Below 1 counts as 1; a
      set of fewer points has each point in a cluster of its own.
    num_neighbours: k; a set of fewer points has as many neighbours only.
    valid: bool[n], the points that are there; None for all.
    sets: int32[n], the set of each point, negative where it is not there;
      None for one set. Points of different sets do not see each other.

  Returns:
    `Clusters`.
  """
  chex.assert_rank(squared, 2)
  n = squared.shape[0]
  points = jnp.arange(n, dtype=jnp.int32)
  if sets is None:
    sets = jnp.zeros([n], jnp.int32)
  present = sets >= 0 if valid is None else valid & (sets >= 0)
  together = (sets[:, None] == sets[None, :]) & present[:, None] & present

  # Logarithms of the densities: their order is the same, and they do not
  # vanish where all points are far apart.
  nearest, _ = jax.lax.top_k(
    jnp.where(together, -squared, -jnp.inf), min(num_neighbours, n)
  )
  size = together.sum(axis=-1)
  near = jnp.arange(nearest.shape[1]) < size[:, None]
  density = jnp.where(near, nearest, 0.0).sum(axis=-1)
  density = density / jnp.maximum(near.sum(axis=-1), 1)

  denser = together & rows.before(density)
  closest = jnp.min(jnp.where(denser, squared, jnp.inf), axis=-1)
  widest = jnp.where(together, squared, 0.0).max(axis=-1)
  widest = jnp.where(together, widest[None, :], 0.0).max(axis=-1)
  separation = jnp.where(denser.any(axis=-1), closest, widest)
  score = density + 0.5 * jnp.log(separation)
  score = jnp.where(present, score, -jnp.inf)

  rank = (together & rows.before(score)).sum(axis=-1, dtype=jnp.int32)
  num_clusters = jnp.maximum(jnp.asarray(num_clusters, jnp.int32), 1)
  is_centre = present & (rank < num_clusters)
  reach = jnp.where(together & is_centre[None, :], squared, jnp.inf)
  centre = jnp.argmin(reach, axis=-1).astype(jnp.int32)
  # A centre that coincides with an earlier one keeps its own cluster.
  centre = jnp.where(is_centre, points, centre)
  return Clusters(
    score=score,
    rank=jnp.where(present, rank, n),
    centre=jnp.where(present, centre, n),
    label=jnp.where(present, rank[centre], -1),
  )


def centres(clusters: Clusters, num_clusters, max_clusters: int):
  """Returns int32[C] the centres of a single set, best score first.

  Args:
    clusters: what `cluster` returned, of one set.
    num_clusters: int or int32[], as given to `cluster`.
    max_clusters: C, static, at least the number of clusters; n fills the rest.
  """
  n = clusters.rank.shape[0]
  num_clusters = jnp.maximum(jnp.asarray(num_clusters, jnp.int32), 1)
  rank = jnp.where(clusters.rank < num_clusters, clusters.rank, max_clusters)
  found = jnp.full([max_clusters], n, jnp.int32)
  return found.at[rank].set(jnp.arange(n, dtype=jnp.int32), mode="drop")


def means(x, clusters: Clusters):
  """Returns float32[n, D]: at each centre the mean of its cluster, else 0.

  Args:
    x: float[n, D] points; those that are not there must be finite.
    clusters: clusters of these points, of any number of sets.
  """
  return base.segment_mean(x, clusters.centre, x.shape[0])
