"""Semantic connected components (LLaVA-Scissor,
https://arxiv.org/abs/2506.21862).

Tokens of a frame that are linked by cosine similarities above a threshold melt
into their mean; the means of all frames are linked and melted once more; then
every token joins its most similar representative. Unlike in the publication
components are exact, and meet the budget by cutting spanning trees.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from cacovid_jax.compressors import base, selection_ops
from cacovid_jax.compressors.math import clustering, similarity

_BISECTIONS = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scissor(base.Compressor, name="scissor"):
  """The video as its semantic clustering."""

  # "mst" cuts maximum spanning trees so that K components are left, the same as
  # at a threshold that leaves K; "bisect" keeps the K largest components at the
  # largest threshold that leaves as many, "tau" at the one given, which may
  # leave fewer. None is "mst" with an exact budget, else "tau".
  mode: str | None = base.choice(None, "mst", "bisect", "tau")
  # Cosine above which tokens are linked; in "mst" the frames' components are
  # those of `tau` while they are K or more, otherwise as many as lie halfway,
  # by ratio, between N and K.
  tau: float = 0.9

  def choose(self, inputs, num_keep, ratio):
    frames, tau = inputs.frames, self.tau
    alike = similarity.symmetric(jax.lax.stop_gradient(frames))
    mode = self.mode or ("mst" if self.exact_budget else "tau")
    if mode == "bisect":
      tau = _bisect(frames, alike, num_keep)
    exactly = num_keep if mode == "mst" else None
    melted = _melt_twice(frames, alike, tau, exactly)
    return _merge(inputs.features, *melted, num_keep)

  def reference_rows(self, grid, ratio):
    """Returns the most rows that a threshold leaves: those of the budget."""
    return base.budget(grid, ratio)


def _melt_twice(frames, alike, tau, num_keep=None):
  """Links and melts tokens within frames, then the means of all frames.

  Of cosines within frames float32[T, P, P], above `tau`, or with `num_keep` so
  that exactly K components are left.

  Returns float32[N, D] means of the frames' components, in the slots of their
  first tokens; int32[N] each: that slot for every token; the hub of the
  component in each slot, the token with the most links, N where there is none;
  the component of each slot, by its first slot; its links to other slots.
  """
  T, P, D = frames.shape
  start = jnp.arange(0, T * P, P, dtype=jnp.int32)[:, None]
  if num_keep is None:
    links = _links(alike, tau)
    spatial = jax.vmap(clustering.connected_components)(links) + start
    spatial = spatial.reshape(-1)
  else:
    forest = jax.vmap(clustering.maximum_spanning_forest)(alike)
    parts = forest.first + start, forest.second + start, forest.weight
    forest = clustering.Forest(*(part.reshape(-1) for part in parts))
    num_edges = jnp.sum(forest.weight > tau)
    between = T * P - round(math.sqrt(num_keep * T * P))
    num_edges = jnp.where(T * P - num_edges >= num_keep, num_edges, between)
    spatial = clustering.cut(forest, num_edges)
    links = _links(alike, _threshold(forest, num_edges, tau))
  means = similarity.segment_mean(frames, spatial.reshape(T, P) % P, P)
  means = means.reshape(T * P, D)
  hub = clustering.best_member(links.sum(axis=-1).reshape(-1), spatial, T * P)
  valid = spatial == jnp.arange(T * P)

  alike = similarity.symmetric(jax.lax.stop_gradient(means))
  if num_keep is None:
    links = _links(alike, tau) & valid[:, None] & valid
    label = clustering.connected_components(links)
  else:
    forest = clustering.maximum_spanning_forest(alike, valid)
    num_edges = valid.sum() - num_keep
    label = clustering.cut(forest, num_edges)
    links = _links(alike, _threshold(forest, num_edges, tau)) & valid
  return means, spatial, hub, label, jnp.sum(links, axis=-1)


def _bisect(frames, alike, num_keep):
  """Returns float32[], close to the largest tau that leaves K components."""

  def halve(_, bounds):
    low, high = bounds
    tau = (low + high) / 2
    _, spatial, _, label, _ = _melt_twice(frames, alike, tau)
    slot = jnp.arange(len(label))
    enough = jnp.sum((spatial == slot) & (label == slot)) >= num_keep
    # At the upper end there are always enough: at 1 every token is alone.
    return jnp.where(enough, low, tau), jnp.where(enough, tau, high)

  bounds = jnp.float32(-1.0), jnp.float32(1.0)
  return jax.lax.fori_loop(0, _BISECTIONS, halve, bounds)[1]


def _merge(features, means, spatial, hub, label, degree, num_keep):
  """Returns the selection once every token joined its representative."""
  num_video = features.shape[0]
  slot = jnp.arange(num_video, dtype=jnp.int32)
  # Size of each component in tokens, largest first; the first among equals.
  size = jnp.zeros([num_video], jnp.int32).at[label[spatial]].add(1)
  size, root = jax.lax.top_k(size, num_keep)
  num_valid = jnp.sum(size > 0)
  root = jnp.where(size > 0, root, num_video)
  row = jnp.full([num_video], num_keep, jnp.int32)
  row = row.at[root].set(slot[:num_keep], mode="drop")
  row = jnp.where(spatial == slot, row[label], num_keep)

  # A component stands where its hub stands: that of the slot with most links.
  place = clustering.best_member(degree, row, num_keep, tie=hub)
  index = jnp.append(hub, num_video)[place]
  order = jnp.argsort(index)
  index = index[order]
  row = jnp.append(selection_ops.inverse(order), num_keep)[row]

  # Equal votes: a large and a small component of a frame count the same.
  own = similarity.segment_mean(means, row, num_keep)
  alike = similarity.between(features.astype(own.dtype), own, split=True)
  alike = jnp.where(slot[:num_keep] < num_valid, alike, -jnp.inf)
  assign = jnp.argmax(alike, axis=-1).astype(jnp.int32)
  count = similarity.segment_count(assign, num_keep)
  total = own + similarity.segment_sum(features, assign, num_keep)
  rows = (total / (1.0 + count)[:, None]).astype(features.dtype)
  return base.arrange(rows, index, assign, num_valid)


def _links(alike, threshold):
  """Returns bool[..., n, n], True between tokens that are linked."""
  return (alike > threshold) & ~jnp.eye(alike.shape[-1], dtype=bool)


def _threshold(forest, num_edges, tau):
  """Returns a threshold whose components are those of the cut forest.

  That is `tau` where it is one, else the strongest similarity cut. Where that
  one equals a similarity that was kept, no threshold gives the same components,
  and it serves only to count links.
  """
  ends = jnp.array([-jnp.inf, jnp.inf])
  weight = jnp.sort(jnp.append(forest.weight, ends))[::-1]
  num_edges = jnp.minimum(num_edges, jnp.sum(forest.weight > -jnp.inf))
  kept, removed = weight[num_edges], weight[num_edges + 1]
  return jnp.where((removed <= tau) & (tau < kept), tau, removed)
