"""How many tokens each frame of a video may keep.

An allocator is `allocate(signal, total, low, high)` -> int32[G] counts within
[low, high] that sum to `total` exactly, all three static; the parts G are
frames here, the signals:

  adaptok   the error of each part at each count; the sum of errors is made as
            small as it can be (https://arxiv.org/abs/2505.17011).
  infotok   the error of each part at the full rate; rates are proportional to
            it (https://arxiv.org/abs/2512.16975).
  cacovid   the policy's scores of frames (https://arxiv.org/abs/2602.01649).

Both tokenizers measure errors with a trained decoder, here see `prefix_errors`
and `code_errors`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cacovid_jax import errors
from cacovid_jax.compressors import base, budgets
from cacovid_jax.compressors.math import similarity
from cacovid_jax.policy import network, selection

# InfoTok's least rate of a frame.
_MIN_RATE = 1 / 16
# Numbers a token in the linear code that stands in for InfoTok's tokenizer.
_CODE_WIDTH = 16
_CODE_ROUNDS = 3


def uniform(signal, total, low, high):
  """Returns equal counts; the first parts get what is left over."""
  budgets.check_feasible(total, low, high, len(signal))
  return jnp.asarray(budgets.evenly(total, len(signal)), jnp.int32)


def adaptok(signal, total, low, high):
  """Returns the counts of least total error: a multiple-choice knapsack.

  Exact, by dynamic programming over parts and budgets; of equally good ones
  those with the fewest tokens in the first part, then in the second, and so on.
  The signal float[G, high - low + 1] is the error of a part with low, low + 1,
  ..., high tokens; it need not fall with them.
  """
  num_parts, num_levels = signal.shape
  if num_levels != high - low + 1:
    raise ValueError(
      f"errors of {num_levels} counts for the {high - low + 1} from {low} to"
      f" {high}"
    )
  budgets.check_feasible(total, low, high, num_parts)
  spare = total - num_parts * low
  budget = np.arange(spare + 1)
  # What is left of a budget for the parts behind, and whether there is any.
  left = budget[:, None] - np.arange(num_levels)[None, :]

  def add(best, error):
    """Takes one more part to the front: its level for every budget."""
    cost = jnp.where(left >= 0, best[np.maximum(left, 0)] + error, jnp.inf)
    return jnp.min(cost, axis=-1), jnp.argmin(cost, axis=-1)

  def follow(remaining, level):
    return remaining - level[remaining], level[remaining]

  nothing = jnp.where(budget == 0, 0.0, jnp.inf)
  error = signal.astype(jnp.float32)
  _, levels = jax.lax.scan(add, nothing, error, reverse=True)
  _, chosen = jax.lax.scan(follow, jnp.asarray(spare), levels)
  return low + chosen.astype(jnp.int32)


def infotok(signal, total, low, high):
  """Returns counts in proportion to the rates of errors float[G] >= 0.

  A part has `high` tokens at the full rate, 1.
  """
  weights = rates(signal, total / (signal.shape[0] * high))
  return budgets.largest_remainder_on_device(weights, total, low, high)


def rates(signal, mean):
  """Returns float32[G] rates in (0, 1], proportional to errors float[G].

  Differences from the mean are shrunk until none exceeds 1, so the mean stays
  `mean` unless some are lifted to the least rate, 1/16, of the mean at most.
  """
  error = signal.astype(jnp.float32)
  average = jnp.mean(error)
  above = jnp.where(average > 0, error / jnp.maximum(average, 1e-30) - 1.0, 0.0)
  most = jnp.max(above)
  shrink = jnp.minimum(most, 1.0 / mean - 1.0) / (most + 1e-5)
  least = _MIN_RATE if mean > _MIN_RATE else _MIN_RATE * mean
  return jnp.clip(mean * (1.0 + shrink * above), least, 1.0)


def cacovid(signal, total, low, high):
  """Returns counts by the policy's frame scores float[T, 2], drop and keep."""
  # Between a half and one and a half times an equal share, as `selection` has.
  shares = selection.frame_probs(
    network.keep_gap(signal), low=0.5 / len(signal), high=1.5 / len(signal)
  )
  return budgets.largest_remainder_on_device(shares, total, low, high)


def prefix_errors(frames, order):
  """Returns float32[T, P + 1], error of a frame with its first tokens kept.

  The sum over its tokens of 1 - cosine to the nearest kept one, with negative
  cosines as 0; P at no token kept. The order int32[T, P] has the best first.
  """
  T, P = order.shape
  ranked = jnp.take_along_axis(frames, order[..., None], axis=1)
  alike = jnp.maximum(similarity.between(ranked, split=True), 0.0)
  # Also a token of zeros, that is similar to nothing, is no error once kept.
  alike = jnp.where(jnp.eye(P, dtype=bool), 1.0, alike)
  kept = jnp.sum(1.0 - jax.lax.cummax(alike, axis=2), axis=1)
  return jnp.concatenate([jnp.full([T, 1], P, jnp.float32), kept], axis=1)


def code_errors(frames):
  """Returns float32[T], mean error of a frame's tokens under a linear code.

  Of 16 numbers a token, or a quarter of the width: the video's principal
  directions, by a few rounds of subspace iteration.
  """
  dot = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
  x = frames.reshape(-1, frames.shape[-1]).astype(jnp.float32)
  x = x - x.mean(axis=0)
  num_video, width = x.shape
  size = max(1, min(_CODE_WIDTH, width // 4, num_video // 4))
  start = np.round(np.linspace(0, num_video - 1, size)).astype(int)
  axes = x[start].T
  for _ in range(_CODE_ROUNDS):
    axes = dot(x.T, dot(x, jnp.linalg.qr(axes)[0]))
  axes = jnp.linalg.qr(axes)[0]
  error = jnp.abs(x - dot(dot(x, axes), axes.T))
  error = error.reshape(len(frames), -1).mean(axis=-1)
  # What rounding leaves of a video that the code holds entirely is no signal.
  return jnp.where(error > 1e-5 * jnp.mean(jnp.abs(x)), error, 0.0)


class Allocator(NamedTuple):
  """An allocator, where its signal comes from, and what that reads."""

  allocate: Callable[..., jax.Array]
  measure: Callable[..., jax.Array]  # f(inputs, order, low) -> signal
  requires: frozenset[str] = frozenset()


_ALLOCATORS = {
  "uniform": Allocator(uniform, lambda inputs, order, low: order),
  "adaptok": Allocator(
    adaptok,
    lambda inputs, order, low: prefix_errors(inputs.frames, order)[:, low:],
  ),
  "infotok": Allocator(
    infotok, lambda inputs, order, low: code_errors(inputs.frames)
  ),
  "cacovid": Allocator(
    cacovid,
    lambda inputs, order, low: inputs.scores.frame,
    frozenset(["scores"]),
  ),
}


def names() -> tuple[str, ...]:
  """Returns the allocators that `get` knows."""
  return tuple(_ALLOCATORS)


def get(name: str) -> Allocator:
  """Returns the allocator called `name`."""
  errors.check_known("allocator", name, _ALLOCATORS)
  return _ALLOCATORS[name]


@dataclasses.dataclass(frozen=True, kw_only=True)
class FrameShared(base.Compressor):
  """A compressor whose frames can share the budget by an allocator."""

  # None for the method's own way. A method that has an option `scope` takes one
  # with scope "frame" only.
  allocator: str | None = None

  def __post_init__(self):
    super().__post_init__()
    if self.allocator is None:
      return
    requires = self.requires | get(self.allocator).requires
    object.__setattr__(self, "requires", requires)
    if getattr(self, "scope", "frame") != "frame":
      raise errors.UserError(
        f"{self.name}: allocator {self.allocator!r} shares out the budget"
        " between frames; it needs scope 'frame'"
      )

  def by_rule(self, rule, inputs, num_keep: int) -> base.Selection:
    """Returns the selection of a rule on each frame, or with scope the video.

    `rule(tokens f[n, D], num_keep=k)` gives int32[k], whose prefixes are those
    of fewer.
    """
    if getattr(self, "scope", "frame") == "video":
      index = rule(inputs.features, num_keep=num_keep)
      return base.take(inputs.features, index)
    T, P, _ = inputs.frames.shape
    name = self.allocator or "uniform"
    # Of equal shares, no frame is ranked beyond its own.
    most = -(-num_keep // T) if name == "uniform" else P
    order = jax.vmap(functools.partial(rule, num_keep=most))(inputs.frames)
    return select(name, inputs, order, num_keep)


def frame_counts(name, inputs, order, num_keep):
  """Returns int32[T] counts that sum to K, at least 1 if there are as many.

  The order int32[T, P] of each frame's tokens has the best first.
  """
  T, H, W = inputs.grid
  low = min(1, num_keep // T)
  allocator = get(name)
  signal = allocator.measure(inputs, order, low)
  return allocator.allocate(signal, num_keep, low, H * W)


def select(name, inputs, order, num_keep) -> base.Selection:
  """Returns the selection of each frame's first tokens, see `frame_counts`."""
  T, H, W = inputs.grid
  first = jnp.arange(T, dtype=order.dtype)[:, None] * (H * W)
  counts = frame_counts(name, inputs, order, num_keep)
  best = np.arange(order.shape[1]) < counts[:, None]
  index = jnp.where(best, order + first, T * H * W).reshape(-1)
  keep = jnp.zeros(T * H * W, bool).at[index].set(True, mode="drop")
  return base.take_mask(inputs.features, keep, num_keep)
