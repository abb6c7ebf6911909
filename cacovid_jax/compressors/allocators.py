"""How many tokens each frame of a video may keep.

An allocator is `allocate(signal, total, low, high)` -> int32[G] counts within
[low, high] that sum to `total` exactly, all three static; the parts G are
frames here. What the signal is, differs:

  uniform   nothing: equal shares.
  adaptok   the error of each part at each count; the sum of errors is made as
            small as it can be (https://arxiv.org/abs/2505.17011).
  infotok   the error of each part at the full rate; rates are proportional to
            it (https://arxiv.org/abs/2512.16975).
  cacovid   the policy's scores of frames (https://arxiv.org/abs/2602.01649).

Any method that ranks the tokens of a frame can be given one: its selections
are the prefixes of an order int32[T, P], best first, and `select` measures the
signal, allocates, and takes the prefixes.

Differences from the publications: both tokenizers measure errors with a trained
decoder. Here, for AdapTok, a token's error is its cosine distance to the
nearest kept token of its frame; for InfoTok, what the best linear code of the
video with few numbers a token leaves of it.

Axes: T frames, P = H*W tokens of a frame, N = T*P, D width, K kept tokens.
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
  """Returns equal counts; the first parts get what is left over.

  Of the signal [G, ...] only the number of parts counts.
  """
  num_parts = signal.shape[0]
  budgets.check_feasible(total, low, high, num_parts)
  return jnp.asarray(budgets.evenly(total, num_parts), jnp.int32)


def adaptok(signal, total, low, high):
  """Returns the counts of least total error: a multiple-choice knapsack.

  Exact, by dynamic programming over parts and budgets. Of equally good
  allocations the one with the fewest tokens in the first part, then in the
  second, and so on. The signal float[G, high - low + 1] is the error of a part
  with low, low + 1, ..., high tokens; it need not fall with them.
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
    level = jnp.argmin(cost, axis=-1)
    return jnp.min(cost, axis=-1), level

  nothing = jnp.where(budget == 0, 0.0, jnp.inf)
  _, levels = jax.lax.scan(
    add, nothing, signal.astype(jnp.float32), reverse=True
  )

  def follow(remaining, level):
    return remaining - level[remaining], level[remaining]

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

  Differences from the mean are shrunk until none exceeds 1, so the mean of the
  rates stays `mean` unless some are lifted to the least rate, 1/16. Where the
  mean itself is below that, 1/16 of it.
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
  num_frames = signal.shape[0]
  # Between a half and one and a half times an equal share, as `selection` has.
  shares = selection.frame_probs(
    network.keep_gap(signal), low=0.5 / num_frames, high=1.5 / num_frames
  )
  return budgets.largest_remainder_on_device(shares, total, low, high)


def prefix_errors(frames, order):
  """Returns float32[T, P + 1], error of a frame with its first tokens kept.

  That is the sum over its tokens of 1 - cosine to the nearest kept one, with
  negative cosines as 0; at no token kept it is P. The order int32[T, P] has the
  best token first.
  """
  ranked = jnp.take_along_axis(frames, order[..., None], axis=1)
  alike = jnp.maximum(similarity.between(ranked, split=True), 0.0)
  # Also a token of zeros, that is similar to nothing, is no error once kept.
  alike = jnp.where(jnp.eye(alike.shape[-1], dtype=bool), 1.0, alike)
  nearest = jax.lax.cummax(alike, axis=2)
  kept = jnp.sum(1.0 - nearest, axis=1)
  none = jnp.full([kept.shape[0], 1], alike.shape[-1], jnp.float32)
  return jnp.concatenate([none, kept], axis=1)


def code_errors(frames):
  """Returns float32[T], mean error of a frame's tokens under a linear code.

  The code has 16 numbers a token, a quarter of the width where that is less,
  and is the best for this video: its principal directions, found by a few
  rounds of subspace iteration.
  """
  x = frames.reshape(-1, frames.shape[-1]).astype(jnp.float32)
  x = x - x.mean(axis=0)
  num_video, width = x.shape
  size = max(1, min(_CODE_WIDTH, width // 4, num_video // 4))
  start = np.round(np.linspace(0, num_video - 1, size)).astype(int)
  axes = x[start].T
  dot = jax.lax.Precision.HIGHEST
  for _ in range(_CODE_ROUNDS):
    code = jnp.matmul(x, jnp.linalg.qr(axes)[0], precision=dot)
    axes = jnp.matmul(x.T, code, precision=dot)
  axes = jnp.linalg.qr(axes)[0]
  code = jnp.matmul(x, axes, precision=dot)
  error = jnp.abs(x - jnp.matmul(code, axes.T, precision=dot))
  error = error.reshape(len(frames), -1).mean(axis=-1)
  # What rounding leaves of a video that the code holds entirely is no signal.
  return jnp.where(error > 1e-5 * jnp.mean(jnp.abs(x)), error, 0.0)


class Allocator(NamedTuple):
  """An allocator, where its signal comes from, and what that reads."""

  allocate: Callable[..., jax.Array]
  measure: Callable[..., jax.Array]  # f(inputs, order, low, high) -> signal
  requires: frozenset[str] = frozenset()


_ALLOCATORS = {
  "uniform": Allocator(uniform, lambda inputs, order, low, high: order),
  "adaptok": Allocator(
    adaptok,
    lambda inputs, order, low, high: prefix_errors(inputs.frames, order)[
      :, low : high + 1
    ],
  ),
  "infotok": Allocator(
    infotok, lambda inputs, order, low, high: code_errors(inputs.frames)
  ),
  "cacovid": Allocator(
    cacovid,
    lambda inputs, order, low, high: inputs.scores.frame,
    frozenset(["scores"]),
  ),
}


def names() -> tuple[str, ...]:
  """Returns the allocators that `get` knows."""
  return tuple(_ALLOCATORS)


def get(name: str) -> Allocator:
  """Returns the allocator called `name`."""
  if name not in _ALLOCATORS:
    raise errors.UserError(
      f"unknown allocator {name!r}; known: {', '.join(names())}"
    )
  return _ALLOCATORS[name]


@dataclasses.dataclass(frozen=True, kw_only=True)
class FrameShared(base.Compressor):
  """A compressor whose frames can share the budget by an allocator.

  Attributes:
    allocator: its name; None for the method's own way. A method that has an
      option `scope` takes one with scope "frame" only.
  """

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

    Args:
      rule: `rule(tokens f[n, D], num_keep=k)` -> int32[k], the best first;
        fewer of them are the first of more.
      inputs: of one video.
      num_keep: K, static, below N.
    """
    if getattr(self, "scope", "frame") == "video":
      index = rule(inputs.features, num_keep=num_keep)
      return base.take(inputs.features, index)
    frames = inputs.frames
    T, P, _ = frames.shape
    if self.allocator not in (None, "uniform"):
      order = jax.vmap(lambda frame: rule(frame, num_keep=P))(frames)
      return select(self.allocator, inputs, order, num_keep)
    # The same counts, known in advance: no frame is ranked beyond its share.
    share, rest = divmod(num_keep, T)
    parts = []
    for first, last, count in ((0, rest, share + 1), (rest, T, share)):
      if first == last or not count:
        continue
      own = functools.partial(rule, num_keep=count)
      start = jnp.arange(first, last, dtype=jnp.int32)[:, None] * P
      parts.append((jax.vmap(own)(frames[first:last]) + start).reshape(-1))
    index = jnp.concatenate(parts).astype(jnp.int32)
    return base.take(inputs.features, index)


def frame_counts(name, inputs, order, num_keep):
  """Returns int32[T] counts that sum to K, of the allocator called `name`.

  Every frame keeps a token if there are as many. The order int32[T, P] of each
  frame's tokens has the best first.
  """
  T, H, W = inputs.grid
  low, high = min(1, num_keep // T), H * W
  allocator = get(name)
  signal = allocator.measure(inputs, order, low, high)
  return allocator.allocate(signal, num_keep, low, high)


def select(name, inputs, order, num_keep) -> base.Selection:
  """Returns the selection of each frame's first tokens, see `frame_counts`."""
  counts = frame_counts(name, inputs, order, num_keep)
  rank = jnp.argsort(order, axis=-1)  # The order is a permutation.
  keep = (rank < counts[:, None]).reshape(-1)
  return base.take_mask(inputs.features, keep, num_keep)
