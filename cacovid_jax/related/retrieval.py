"""Encoders of tokens, the loss that pairs them, ranks of the right items.

Axes: Q queries, n items; query i asks for item i, and items behind the Q first
ones are right for none.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from cacovid_jax.evals import statistics


class Tower(nn.Module):
  """A small encoder of tokens: neighbours in front, then a hidden layer."""

  width: int
  hidden: int
  window: int = 1  # Tokens that one sees, itself in the middle.

  @nn.compact
  def __call__(self, x):
    x = nn.Conv(self.hidden, (self.window,), name="neighbours")(x)
    x = nn.gelu(x)
    return nn.Dense(self.width, name="out")(x)


def ranks(scores) -> np.ndarray:
  """Returns int[Q], the place of each query's item, from 1.

  Of scores float[Q, n], larger is better. An item of an equal score counts as
  ahead: a model that scores all alike finds nothing.
  """
  scores = np.asarray(scores)
  num_queries, num_items = scores.shape
  if num_items < num_queries:
    raise ValueError(f"{num_queries} queries but {num_items} items")
  own = np.arange(num_queries)
  right = scores[own, own][:, None]
  # An own score of NaN is behind all others.
  return (~(scores < right)).sum(axis=1)


def measures(scores) -> dict[str, float]:
  """Returns recall at 1, 5 and 10, the median and the mean rank."""
  found = ranks(scores)
  recall = {f"R@{k}": float((found <= k).mean()) for k in (1, 5, 10)}
  middle = {"median rank": float(np.median(found))}
  return recall | middle | {"mean rank": float(found.mean())}


def both_ways(scores) -> dict[str, float]:
  """Returns R@1 of texts that ask for videos, and of videos for texts."""
  scores = np.asarray(scores)
  return {
    "t2v R@1": measures(scores)["R@1"],
    "v2t R@1": measures(scores.T)["R@1"],
  }


def gain(scores, reference) -> statistics.Estimate:
  """Returns R@1 of scores over that of others, by a paired bootstrap."""
  hits = [ranks(one) <= 1 for one in (scores, reference)]
  return statistics.Sample(range(len(hits[0]))).difference(*hits)


def contrast(logits) -> jax.Array:
  """Returns float32[], cross entropy of each row's own column, [n, n]."""
  own = jnp.diagonal(jax.nn.log_softmax(logits, axis=-1))
  return -own.mean()


def drawn(rng, pairs, batch: int):
  """Returns `batch` different ones of pairs, or all: a pytree's first axis."""
  number = len(jax.tree.leaves(pairs)[0])
  rows = jax.random.choice(rng, number, [min(batch, number)], replace=False)
  return jax.tree.map(lambda x: x[rows], pairs)
