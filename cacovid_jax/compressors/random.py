"""Tokens drawn uniformly without replacement: the floor of every table."""

import jax

from cacovid_jax.compressors import base


def compress(features, *, grid, num_keep, text=None, aux=None, rng=None):
  """Returns `num_keep` tokens; every subset of that size is as likely."""
  del grid, text, aux
  order = jax.random.permutation(rng, features.shape[0])
  return base.take(features, order[:num_keep])


COMPRESSOR = base.Compressor(name="random", function=compress, stochastic=True)
