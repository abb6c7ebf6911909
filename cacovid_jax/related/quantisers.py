"""Quantisers that pass the gradient on: product codes, and scalar levels.

A product code cuts a vector into parts of norm 1 and stands each for the
nearest of K codewords of norm 1, by inner product. Finite scalar quantisation
rounds each number to one of a few levels, without codewords.
Papers: https://arxiv.org/abs/2202.03384, https://arxiv.org/abs/2309.15505.

Axes: n vectors, D width, M parts of D / M numbers, K codewords of each part.
"""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from cacovid_jax import errors
from cacovid_jax.compressors.math import kmeans, similarity

_EXACT = jax.lax.Precision.HIGHEST


def straight_through(x, quantised):
  """Returns the quantised values, whose gradient is that of x."""
  return x + jax.lax.stop_gradient(quantised - x)


def parts(x, num_parts: int):
  """Returns float32[..., M, D / M], the parts of float[..., D] at norm 1."""
  width = x.shape[-1]
  if num_parts < 1 or width % num_parts:
    raise errors.UserError(
      f"{num_parts} parts do not divide a vector of {width} numbers; choose a"
      " number of parts that does"
    )
  return similarity.unit(x.reshape(*x.shape[:-1], num_parts, -1))


def joined(parts):
  """Returns float32[..., D] of norm 1, of parts float32[..., M, D / M]."""
  flat = parts.reshape(*parts.shape[:-2], -1)
  return flat / math.sqrt(parts.shape[-2])


def init_codebook(rng, num_parts: int, num_codewords: int, width: int):
  """Returns float32[M, K, width] random codewords of norm 1."""
  shape = (num_parts, num_codewords, width)
  return similarity.unit(jax.random.normal(rng, shape))


def codes(parts, codebook):
  """Returns int32[..., M], the codeword of each part; the first of equals."""
  alike = jnp.einsum("...md,mkd->...mk", parts, codebook, precision=_EXACT)
  return jnp.argmax(alike, axis=-1).astype(jnp.int32)


def decode(codes, codebook):
  """Returns float32[..., M, D / M], the codewords that codes stand for."""
  return codebook[jnp.arange(codebook.shape[0]), codes]


def quantise(parts, codebook):
  """Returns the codewords of parts; the gradient goes to the parts alone."""
  return straight_through(parts, decode(codes(parts, codebook), codebook))


def search(query, codes, codebook):
  """Returns float32[Q, n], inner products of queries and coded items.

  Of queries float32[Q, D] of norm 1 and codes int[n, M], by a table of each
  query's products with all codewords: M additions an item, nothing decoded.
  """
  num_parts, _, width = codebook.shape
  query = query.reshape(-1, num_parts, width)
  table = jnp.einsum("qmd,mkd->mqk", query, codebook, precision=_EXACT)

  def add(total, part):
    table, codes = part
    return total + table[:, codes], None

  zeros = jnp.zeros((len(query), len(codes)), jnp.float32)
  total, _ = jax.lax.scan(add, zeros, (table, codes.T))
  return total / math.sqrt(num_parts)


def num_bytes(num_parts: int, num_codewords: int) -> float:
  """Returns the bytes of one code."""
  return num_parts * math.log2(num_codewords) / 8


@functools.partial(jax.jit, static_argnames=("rounds", "reseed"))
def refresh(parts, codebook, *, rounds: int = 10, reseed: bool = True):
  """Returns the codebook after rounds of spherical k-means on parts [n, M, d].

  A codeword that is nobody's becomes the part which its codeword fits least,
  the next one the next, and so on; without `reseed` it becomes zeros, as in
  the released code, and stays unused as long as anything is alike.
  """
  check_enough(len(parts), codebook.shape[1])

  def one(x, centres):
    used = jnp.ones(len(centres), bool)
    centres = kmeans.lloyd(x, centres, used, rounds=rounds)
    assign, alike = kmeans.nearest(x, centres, used)
    empty = similarity.segment_count(assign, len(centres)) == 0
    worst = jnp.argsort(alike)[: len(centres)]
    place = jnp.cumsum(empty) - 1
    instead = x[worst[place]] if reseed else jnp.zeros_like(centres)
    return jnp.where(empty[:, None], instead, similarity.unit(centres))

  return jax.vmap(one, in_axes=(1, 0))(parts, codebook)


def check_enough(num_vectors: int, num_codewords: int) -> None:
  """Refuses fewer vectors than codewords."""
  if num_vectors < num_codewords:
    raise errors.UserError(
      f"{num_codewords} codewords cannot be fitted to {num_vectors} clips; give"
      " more clips or fewer codewords"
    )


def fsq(x, levels: Sequence[int]):
  """Returns float32[..., C] in [-1, 1], each channel on one of its levels.

  An even number of levels has none at 1. The gradient is that of the bounded
  values before they are rounded.
  """
  levels = np.asarray(levels)
  half = (levels - 1) * (1 + 1e-3) / 2
  offset = np.where(levels % 2, 0.0, 0.5)
  shift = np.arctanh(offset / half)
  bounded = jnp.tanh(x + shift) * half - offset
  rounded = straight_through(bounded, jnp.round(bounded))
  return rounded / (levels // 2)


def fsq_index(code, levels: Sequence[int]):
  """Returns int32[...], the number of a code float[..., C] of `fsq`."""
  levels = np.asarray(levels)
  digits = jnp.round(code * (levels // 2)).astype(jnp.int32) + levels // 2
  return (digits * _places(levels)).sum(axis=-1)


def fsq_code(index, levels: Sequence[int]):
  """Returns float32[..., C], the code of a number int[...] of `fsq_index`."""
  levels = np.asarray(levels)
  digits = index[..., None] // _places(levels) % levels
  return ((digits - levels // 2) / (levels // 2)).astype(jnp.float32)


def _places(levels):
  return np.cumprod([1, *levels[:-1]])
