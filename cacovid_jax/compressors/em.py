"""Expectation maximisation as a token merger, after EMCL
(https://arxiv.org/abs/2211.11427).

The tokens are points and K unit vectors the bases of a mixture of von
Mises-Fisher distributions of one width,

  z = softmax_k(x . m / lam),   m <- unit(sum_i z_i x_i),

and a row is the mean of all tokens weighted by z, `mass` the sum of z. Unlike
EMCL's, bases start at evenly spaced tokens, and tokens have norm 1.
"""

import dataclasses

import jax
import jax.numpy as jnp

from cacovid_jax.compressors import base, simple
from cacovid_jax.compressors.math import clustering, similarity


@dataclasses.dataclass(frozen=True, kw_only=True)
class EM(base.Compressor, name="em"):
  """K soft means of the video's tokens."""

  # Width of a basis, in units of the cosine.
  lam: float = base.number(0.05, 0, open_low=True)
  rounds: int = base.number(9, 0, whole=True)

  def choose(self, inputs, num_keep, ratio):
    """Returns the means, each at the token that is closest to its basis."""
    features = inputs.features
    # Weights of tokens have no derivative, see `selection_ops.with_deep`.
    x = similarity.unit(jax.lax.stop_gradient(features))
    bases = x[simple.even_positions(features.shape[0], num_keep)]
    bases = fit(x, bases, lam=self.lam, rounds=self.rounds)
    share = responsibilities(x, bases, lam=self.lam)
    assign = jnp.argmax(share, axis=-1).astype(jnp.int32)
    mass = share.sum(axis=0)
    rows = jnp.matmul(
      share.T, features.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST
    )
    closest = jnp.max(share, axis=-1)
    index = clustering.distinct_representatives(closest, assign, num_keep)
    # A basis that every token is far from may have no mass left in float32.
    none = mass[:, None] <= 0
    mean = rows / jnp.where(none, 1.0, mass[:, None])
    rows = jnp.where(none, features[index], mean).astype(features.dtype)
    out = base.arrange(rows, index, assign)
    return out._replace(mass=mass[jnp.argsort(index)])


def fit(x, bases, *, lam, rounds):
  """Returns the bases float32[K, D], of norm 1 or 0, after some rounds.

  No round lowers sum_i log sum_k exp(x_i . m_k / lam) of points float32[N, D].
  """
  # No order hangs on a round, so a faster product may do.
  fast = jax.lax.Precision.HIGH

  def step(_, bases):
    share = responsibilities(x, bases, lam=lam, precision=fast)
    pulled = jnp.matmul(share.T, x, precision=fast)
    norm = jnp.linalg.norm(pulled, axis=-1, keepdims=True)
    # Where nothing pulls, any direction is as good: stay.
    moved = pulled / jnp.where(norm > 0, norm, 1.0)
    return jnp.where(norm > 0, moved, bases)

  return jax.lax.fori_loop(0, rounds, step, bases)


def responsibilities(x, bases, *, lam, precision=jax.lax.Precision.HIGHEST):
  """Returns float32[N, K], rows summing to 1."""
  logits = jnp.matmul(x, bases.T, precision=precision) / lam
  return jax.nn.softmax(logits, axis=-1)
