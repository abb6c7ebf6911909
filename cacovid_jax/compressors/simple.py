"""Rules of a few lines: what every table is compared with.

Random and even spacing look at nothing, `evs` at the frame before, density
peaks at the neighbours, `last_query` at the language model's attention; the
oracle knows the right tokens.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from cacovid_jax import errors
from cacovid_jax.compressors import allocators, base
from cacovid_jax.compressors.math import similarity
from cacovid_jax.policy import diversity

# Above every dissimilarity, which ends at 2.
_FIRST_FRAME = 255.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Random(allocators.FrameShared, name="random"):
  """Tokens drawn uniformly without replacement: the floor of every table.

  With an allocator they are drawn in each frame.
  """

  stochastic: bool = True

  def choose(self, inputs, num_keep, ratio):
    """Returns tokens drawn with `inputs.rng`."""
    T, H, W = inputs.grid
    if self.allocator is None:
      order = jax.random.permutation(inputs.rng, T * H * W)
      return base.take(inputs.features, order[:num_keep])
    draw = functools.partial(jax.random.permutation, x=H * W)
    order = jax.vmap(draw)(jax.random.split(inputs.rng, T))
    return allocators.select(self.allocator, inputs, order, num_keep)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Uniform(allocators.FrameShared, name="uniform"):
  """Tokens evenly spaced; with an allocator, a frame's by `spread_order`."""

  def choose(self, inputs, num_keep, ratio):
    """Returns evenly spaced tokens; their features are not looked at."""
    T, H, W = inputs.grid
    if self.allocator is None:
      index = jnp.asarray(even_positions(T * H * W, num_keep))
      return base.take(inputs.features, index)
    order = jnp.tile(spread_order(H * W), (T, 1))
    return allocators.select(self.allocator, inputs, order, num_keep)


def even_positions(num_video: int, num_keep: int) -> np.ndarray:
  """Returns int32[K] positions evenly spaced over N, first and last included.

  On the host (METHOD.md 7): a float32 linspace on device is off in places.
  """
  spaced = np.linspace(0, num_video - 1, num_keep, dtype=np.float64)
  return np.round(spaced).astype(np.int32)


def spread_order(num_tokens: int) -> np.ndarray:
  """Returns int32[n], an order of n tokens whose every prefix is spread out.

  That of the numbers with their bits reversed, from the middle on.
  """
  bits = max(num_tokens - 1, 1).bit_length()
  counted = np.arange(2**bits)
  mirrored = sum(((counted >> b) & 1) << (bits - 1 - b) for b in range(bits))
  order = mirrored[mirrored < num_tokens] + num_tokens // 2
  return (order % num_tokens).astype(np.int32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EVS(base.Compressor, name="evs"):
  """Efficient video sampling (https://arxiv.org/abs/2510.14624).

  A token is worth 1 - cosine with the token at the same place of the previous
  frame; the first frame comes before all others. A budget below one frame keeps
  its first tokens. The published rounding never goes below one frame.
  """

  def choose(self, inputs, num_keep, ratio):
    """Returns the tokens that changed most; the first frame has changed."""
    cosine = similarity.adjacent(inputs.frames)
    # Where nothing moves, ties go to the earlier token and not to rounding.
    changed = 1.0 - similarity.settled(cosine)
    values = jnp.pad(changed, [(1, 0), (0, 0)], constant_values=_FIRST_FRAME)
    return base.take_top(inputs.features, values.reshape(-1), num_keep)

  def reference_rows(self, grid, ratio):
    """Returns how many tokens the publication keeps: a whole frame or more."""
    T, H, W = grid
    return max(H * W, int(ratio * T * H * W))


@dataclasses.dataclass(frozen=True, kw_only=True)
class DensityPeaks(allocators.FrameShared, name="density_peaks"):
  """Density peaks: tokens that are dense and far from denser ones.

  The diversity rule of CaCoVID's sampler (METHOD.md 2.2) on its own, without
  noise; scope "video" is one competition over all tokens.
  """

  scope: str = base.choice("frame", "video")

  def choose(self, inputs, num_keep, ratio):
    return self.by_rule(peaks, inputs, num_keep)


def peaks(features, *, num_keep):
  """Returns int32[k] rows of features f[n, D] by falling rho * delta."""
  _, index = jax.lax.top_k(diversity.peak_scores(features), num_keep)
  return index.astype(jnp.int32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LastQuery(base.Compressor, name="last_query"):
  """Tokens that the prompt's last token attends to, in one decoder layer.

  The signal behind FastV (https://arxiv.org/abs/2403.06764), here of a first,
  uncompressed prefill: a strong rule to compare with, no way to save time.
  Negative layers count from the last one.
  """

  requires: frozenset[str] = frozenset(["attention"])
  layer: int = 2

  def choose(self, inputs, num_keep, ratio):
    """Returns the tokens with the largest attention weight of `layer`."""
    num_layers = inputs.attention.shape[0]
    if not -num_layers <= self.layer < num_layers:
      raise errors.UserError(
        f"last_query: layer {self.layer} does not exist; the model has layers"
        f" 0 to {num_layers - 1}"
      )
    return base.take_top(
      inputs.features, inputs.attention[self.layer], num_keep
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecisiveBoxes(base.Compressor, name="decisive_boxes"):
  """The evidence tokens of the question, and an even fill: no method."""

  requires: frozenset[str] = frozenset(["decisive"])
  oracle: bool = True

  def choose(self, inputs, num_keep, ratio):
    """Returns evidence tokens, even ones if too many, and others up to K."""
    evidence = inputs.decisive
    num_evidence = evidence.sum()
    num_other = evidence.shape[0] - num_evidence
    first = jnp.minimum(num_evidence, num_keep)
    keep = spread(evidence, num_evidence, first)
    keep |= spread(~evidence, num_other, num_keep - first)
    return base.take_mask(inputs.features, keep, num_keep)


def spread(members, num_members, count):
  """Returns bool[N] with `count` evenly spaced ones of `members` bool[N].

  Exact in integers, though neither number is static.
  """
  rank = jnp.cumsum(members) - 1
  total = jnp.maximum(num_members, 1)
  step = (rank + 1) * count // total > rank * count // total
  return members & step
