"""Tokens drawn uniformly without replacement: the floor of every table."""

import jax

from cacovid_jax.compressors import allocators, base


def compress(
  features,
  *,
  grid,
  num_keep,
  text=None,
  aux=None,
  rng=None,
  allocator=None,
):
  """Returns `num_keep` tokens; every subset of that size is as likely.

  Args:
    features: float[N, D] video tokens.
    grid: static (T, H, W).
    num_keep: K, static.
    text: unused.
    aux: what the allocator needs.
    rng: key of the draw.
    allocator: how frames share the budget, a name of `allocators`; tokens are
      then drawn in each frame. None draws them from the whole video.
  """
  del text
  if allocator is None:
    order = jax.random.permutation(rng, features.shape[0])
    return base.take(features, order[:num_keep])
  order = jax.vmap(lambda key: jax.random.permutation(key, grid[1] * grid[2]))(
    jax.random.split(rng, grid[0])
  )
  return allocators.select(
    allocator, features, order, grid=grid, num_keep=num_keep, aux=aux
  )


COMPRESSOR = base.Compressor(
  name="random",
  function=compress,
  stochastic=True,
  configure=allocators.configure,
)
