"""How many tokens each frame of a video may keep.

An allocator is `allocate(signal, total, low, high)` -> int32[G] counts within
[low, high] that sum to `total` exactly; the parts G are frames here. What the
signal is, differs:

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
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from cacovid_jax import errors
from cacovid_jax.compressors import base, budgets, similarity
from cacovid_jax.policy import selection

# InfoTok's least rate of a frame.
_MIN_RATE = 1 / 16
# Numbers a token in the linear code that stands in for InfoTok's tokenizer.
_CODE_WIDTH = 16
_CODE_ROUNDS = 3


def uniform(signal, total, low, high):
  """Returns equal counts; the first parts get what is left over.

  Args:
    signal: [G, ...], of which only the number of parts counts.
    total: static, sum of the counts.
    low: static, least count of a part.
    high: static, most of a part.
  """
  counts = budgets.largest_remainder([1] * signal.shape[0], total, low, high)
  return jnp.asarray(counts, jnp.int32)


def adaptok(signal, total, low, high):
  """Returns the counts of least total error: a multiple-choice knapsack.

  Exact, by dynamic programming over parts and budgets. Of equally good
  allocations the one with the fewest tokens in the first part, then in the
  second, and so on.

  Args:
    signal: float[G, high - low + 1] error of a part with low, low + 1, ...,
      high tokens; need not fall with them.
    total: static, sum of the counts.
    low: static, least count of a part.
    high: static, most of a part.
  """
  num_parts, num_levels = signal.shape
  if num_levels != high - low + 1:
    raise ValueError(
      f"errors of {num_levels} counts for the {high - low + 1} from {low} to"
      f" {high}"
    )
  budgets.check_feasible(total, [low] * num_parts, [high] * num_parts)
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
  """Returns counts in proportion to the rates of the parts' errors.

  Args:
    signal: float[G] errors, not negative.
    total: static, sum of the counts.
    low: static, least count of a part.
    high: static, tokens of a part at the full rate, 1.
  """
  mean = total / (signal.shape[0] * high)
  return budgets.largest_remainder_on_device(
    rates(signal, mean), total, low, high
  )


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
  """Returns counts by the shares that the policy's frame scores give.

  Args:
    signal: float[T, 2] scores of the frames, drop and keep.
    total: static, sum of the counts.
    low: static, least count of a frame.
    high: static, most of a frame.
  """
  num_frames = signal.shape[0]
  scores = signal.astype(jnp.float32)
  # Between a half and one and a half times an equal share, as `selection` has.
  shares = selection.frame_probs(
    scores[:, 1] - scores[:, 0], low=0.5 / num_frames, high=1.5 / num_frames
  )
  return budgets.largest_remainder_on_device(shares, total, low, high)


def prefix_errors(features, order, grid):
  """Returns float32[T, P + 1], error of a frame with its first tokens kept.

  That is the sum over its tokens of 1 - cosine to the nearest kept one, with
  negative cosines as 0; at no token kept it is P.

  Args:
    features: float[N, D] video tokens.
    order: int32[T, P] tokens of each frame, best first.
    grid: static (T, H, W).
  """
  frames = _frames(features, grid)
  ranked = jnp.take_along_axis(frames, order[..., None], axis=1)
  alike = jnp.maximum(similarity.between(ranked, split=True), 0.0)
  # Also a token of zeros, that is similar to nothing, is no error once kept.
  alike = jnp.where(jnp.eye(alike.shape[-1], dtype=bool), 1.0, alike)
  nearest = jax.lax.cummax(alike, axis=2)
  kept = jnp.sum(1.0 - nearest, axis=1)
  none = jnp.full([kept.shape[0], 1], alike.shape[-1], jnp.float32)
  return jnp.concatenate([none, kept], axis=1)


def code_errors(features, grid):
  """Returns float32[T], mean error of a frame's tokens under a linear code.

  The code has 16 numbers a token, a quarter of the width where that is less,
  and is the best for this video: its principal directions, found by a few
  rounds of subspace iteration.
  """
  x = features.astype(jnp.float32)
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
  error = error.reshape(grid[0], -1).mean(axis=-1)
  # What rounding leaves of a video that the code holds entirely is no signal.
  return jnp.where(error > 1e-5 * jnp.mean(jnp.abs(x)), error, 0.0)


def _frames(features, grid):
  return features.reshape(grid[0], grid[1] * grid[2], -1)


@dataclasses.dataclass(frozen=True)
class Allocator:
  """An allocator and where its signal comes from.

  Attributes:
    allocate: `f(signal, total, low, high)` -> int32[T].
    measure: `f(features, order, grid, aux, low, high)` -> signal.
    needs: fields of `Aux` that `measure` reads.
  """

  allocate: Callable[..., jax.Array]
  measure: Callable[..., jax.Array]
  needs: frozenset[str] = frozenset()


_ALLOCATORS = {
  "uniform": Allocator(
    uniform, lambda features, order, grid, aux, low, high: order
  ),
  "adaptok": Allocator(
    adaptok,
    lambda features, order, grid, aux, low, high: prefix_errors(
      features, order, grid
    )[:, low : high + 1],
  ),
  "infotok": Allocator(
    infotok,
    lambda features, order, grid, aux, low, high: code_errors(features, grid),
  ),
  "cacovid": Allocator(
    cacovid,
    lambda features, order, grid, aux, low, high: aux.scores.frame,
    needs=frozenset(["scores"]),
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


def configure(compressor, *, allocator=None, **options):
  """`base.Compressor.configure` of methods with an option `allocator`.

  Some allocators need more of `Aux` than the method itself.
  """
  del options
  if allocator is None:
    return compressor
  needs = compressor.needs | get(allocator).needs
  return dataclasses.replace(compressor, needs=needs)


def frame_counts(name, features, order, *, grid, num_keep, aux=None):
  """Returns int32[T] counts that sum to K.

  Every frame keeps a token if there are as many.

  Args:
    name: of the allocator.
    features: float[N, D] video tokens.
    order: int32[T, P] tokens of each frame, best first.
    grid: static (T, H, W).
    num_keep: K, static.
    aux: with what the allocator needs.
  """
  allocator = get(name)
  low, high = min(1, num_keep // grid[0]), grid[1] * grid[2]
  for need in sorted(allocator.needs):
    if getattr(aux, need, None) is None:
      raise ValueError(f"allocator {name} needs {need}, which was not given")
  signal = allocator.measure(features, order, grid, aux, low, high)
  return allocator.allocate(signal, num_keep, low, high)


def take_by_counts(features, order, counts, num_keep) -> base.Selection:
  """Returns the selection of each frame's first tokens in its order.

  Args:
    features: float[N, D] video tokens.
    order: int32[T, P] tokens of each frame, best first.
    counts: int32[T], whose sum is K.
    num_keep: K, static.
  """
  rank = jnp.argsort(order, axis=-1)  # The order is a permutation.
  keep = (rank < counts[:, None]).reshape(-1)
  return base.take_mask(features, keep, num_keep)


def select(name, features, order, *, grid, num_keep, aux=None):
  """Returns the selection of prefixes; arguments as of `frame_counts`."""
  counts = frame_counts(
    name, features, order, grid=grid, num_keep=num_keep, aux=aux
  )
  return take_by_counts(features, order, counts, num_keep)


def select_per_frame(rule, features, *, grid, num_keep, allocator, aux=None):
  """Returns the selection of a rule that ranks the tokens of one frame.

  Args:
    rule: `rule(frame f[P, D], num_keep=k)` -> int32[k] its k best tokens, best
      first; fewer of them are the first of more.
    features: float[N, D] video tokens.
    grid: static (T, H, W).
    num_keep: K, static.
    allocator: name, or None for equal shares.
    aux: with what the allocator needs.
  """
  if allocator in (None, "uniform"):
    # The same counts, known in advance: no frame is ranked beyond its share.
    index = base.per_frame(rule, features, grid, num_keep)
    return base.take(features, index)
  frames = _frames(features, grid)
  area = frames.shape[1]
  order = jax.vmap(lambda frame: rule(frame, num_keep=area))(frames)
  return select(
    allocator, features, order, grid=grid, num_keep=num_keep, aux=aux
  )
