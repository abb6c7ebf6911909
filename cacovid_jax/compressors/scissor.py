"""Semantic connected components (LLaVA-Scissor,
https://arxiv.org/abs/2506.21862).

Tokens of a frame that are linked by cosine similarities above a threshold melt
into their mean; the means of all frames are linked and melted once more; then
every token joins its most similar representative. Components need not be
regions: distant patches may be linked. The share of the largest component is
`mass.max() / N` of the selection; near 1 it tells of chains of similar tokens
that swallowed a slow scene.

Differences from the publication, which approximates components by sampling
and leaves the number of tokens to the threshold: components are exact, and the
budget is met by cutting spanning trees (`mode="mst"`).

Axes: T frames, P = H*W tokens of a frame, N = T*P, D width, K kept tokens.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from cacovid_jax.compressors import base, selection_ops
from cacovid_jax.compressors.math import clustering, similarity

_BISECTIONS = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scissor(base.Compressor):
  """The video as its semantic clustering.

  Attributes:
    mode: "mst" cuts maximum spanning trees so that K components are left, the
      same as at a threshold that leaves K; "bisect" looks for the largest
      threshold that leaves K or more and keeps the K largest components, as
      does "tau" with the threshold given, which may leave fewer than K. None
      is "mst" with an exact budget, else "tau".
    tau: cosine above which tokens are linked; in "mst" the frames' components
      are those of `tau` while they are K or more, otherwise as many as lie
      halfway, by ratio, between N and K.
  """

  name: str = "scissor"
  mode: str | None = base.choice(None, "mst", "bisect", "tau")
  tau: float = 0.9

  def choose(self, inputs, num_keep, ratio):
    """Returns the means of the clustering."""
    frames, tau = inputs.frames, self.tau
    mode = self.mode or ("mst" if self.exact_budget else "tau")
    if mode == "bisect":
      tau = _bisect(frames, num_keep)
    if mode == "mst":
      melted = _by_trees(frames, num_keep, tau)
    else:
      melted = _by_threshold(frames, tau)
    return _merge(inputs.features, *melted, num_keep)

  def reference_rows(self, grid, ratio):
    """Returns the most rows that a threshold leaves: those of the budget."""
    return base.budget(grid, ratio)


def _by_trees(frames, num_keep, tau):
  """Returns what `_by_threshold` does, of exactly K clustering."""
  num_video = frames.shape[0] * frames.shape[1]
  alike = similarity.symmetric(frames)
  forest = jax.vmap(clustering.maximum_spanning_forest)(alike)
  start = _first_tokens(frames)
  forest = clustering.Forest(
    (forest.first + start).reshape(-1),
    (forest.second + start).reshape(-1),
    forest.weight.reshape(-1),
  )
  above = jnp.sum(forest.weight > tau)
  between = num_video - round(math.sqrt(num_keep * num_video))
  num_edges = jnp.where(num_video - above >= num_keep, above, between)
  spatial = clustering.cut(forest, num_edges)
  links = _links(alike, _threshold(forest, num_edges, tau))
  means, hub, valid = _melted(frames, links, spatial)

  alike = similarity.symmetric(means)
  forest = clustering.maximum_spanning_forest(alike, valid)
  num_edges = valid.sum() - num_keep
  label = clustering.cut(forest, num_edges)
  links = _links(alike, _threshold(forest, num_edges, tau))
  return means, spatial, hub, label, jnp.sum(links & valid[None, :], axis=-1)


def _by_threshold(frames, tau):
  """Links and melts tokens within frames, then the means of all frames.

  Returns:
    float32[N, D] means of the frames' components, each in the slot of its
    first token; int32[N] that slot for each token; int32[N] hub of the
    component in each slot, the token with the most links, N where there is
    none; int32[N] component that each slot belongs to, by its first slot;
    int32[N] how many other slots each is linked to.
  """
  links = _links(similarity.symmetric(frames), tau)
  spatial = jax.vmap(clustering.connected_components)(links)
  spatial = (spatial + _first_tokens(frames)).reshape(-1)
  means, hub, valid = _melted(frames, links, spatial)

  links = _links(similarity.symmetric(means), tau)
  links &= valid[:, None] & valid[None, :]
  label = clustering.connected_components(links)
  return means, spatial, hub, label, jnp.sum(links, axis=-1)


def _bisect(frames, num_keep):
  """Returns float32[], close to the largest tau that leaves K clustering."""

  def halve(_, bounds):
    low, high = bounds
    tau = (low + high) / 2
    _, spatial, _, label, _ = _by_threshold(frames, tau)
    slot = jnp.arange(spatial.shape[0])
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


def _first_tokens(frames):
  """Returns int32[T, 1], the first token of each frame."""
  T, P, _ = frames.shape
  return jnp.arange(T, dtype=jnp.int32)[:, None] * P


def _links(alike, threshold):
  """Returns bool[..., n, n], True between tokens that are linked."""
  return (alike > threshold) & ~jnp.eye(alike.shape[-1], dtype=bool)


def _threshold(forest, num_edges, tau):
  """Returns a threshold whose components are those of the cut forest.

  That is `tau` where it is one, else the strongest similarity cut. Where that
  one equals a similarity that was kept, no threshold gives the same
  components, and it serves only to count links.
  """
  ends = [-jnp.inf, jnp.inf]
  weight = jnp.sort(jnp.append(forest.weight, jnp.array(ends)))[::-1]
  num_edges = jnp.minimum(num_edges, jnp.sum(forest.weight > -jnp.inf))
  kept, removed = weight[num_edges], weight[num_edges + 1]
  return jnp.where((removed <= tau) & (tau < kept), tau, removed)


def _melted(frames, links, spatial):
  """Returns means, hubs and whether they are there, of each slot.

  The first two are those of `_by_threshold`, the last one bool[N].
  """
  T, P, D = frames.shape
  local = spatial.reshape(T, P) - _first_tokens(frames)
  means = similarity.segment_mean(frames, local, P).reshape(T * P, D)
  degree = jnp.sum(links, axis=-1).reshape(-1)
  hub = clustering.best_member(degree, spatial, T * P)
  valid = spatial == jnp.arange(T * P)
  return means, hub, valid
