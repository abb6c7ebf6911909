"""From a retention ratio to the numbers that each method turns on.

The ratio of a method that acts inside the language model is the equivalent
one: video tokens seen by a layer's attention, averaged over the layers, as a
share of the video. A method that acts in front has the same number in every
layer.

Letters: L decoder layers, M video tokens, G parts that share a budget. All
results are whole numbers of the host and never exceed the ratio asked for,
`largest_remainder_on_device` apart, whose weights are data.
"""

import fractions
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cacovid_jax import errors

# The depth that published layer numbers are meant for.
_PUBLISHED_LAYERS = 28


def scale_layer(layer: int, num_layers: int) -> int:
  """Returns the layer of an L-layer model that stands for `layer` of 28."""
  return max(1, round(layer * num_layers / _PUBLISHED_LAYERS))


def keep_behind(
  ratio: float, num_layers: int, num_video: int, *, layer: int, entering=None
) -> int:
  """Returns how many tokens may go on at `layer` for a mean of `ratio`.

  The most that keep the equivalent ratio at or below `ratio`; it then falls
  short of it by less than 1 / M.

  Args:
    ratio: retention ratio in (0, 1].
    num_layers: L.
    num_video: M.
    layer: first layer that sees the smaller number, 0 to L - 1.
    entering: tokens in front of it; None for M.

  Raises:
    UserError: the layers in front take more than the whole budget.
  """
  entering = num_video if entering is None else entering
  if not 0 <= layer < num_layers:
    raise errors.UserError(
      f"layer {layer} has no layer of {num_layers} behind it; choose one below"
      f" {num_layers}"
    )
  total = _exact(ratio) * num_layers * num_video
  keep = math.floor((total - layer * entering) / (num_layers - layer))
  if keep < 1:
    lowest = lowest_ratio(num_layers, num_video, layer=layer, entering=entering)
    raise errors.UserError(
      f"ratio {ratio} is infeasible: {entering} tokens in the first {layer} of"
      f" {num_layers} layers are more than {ratio} of {num_video} in all; use"
      f" at least {lowest:.4f}"
    )
  return min(keep, entering)


def lowest_ratio(
  num_layers: int, num_video: int, *, layer: int = 0, entering=None
) -> float:
  """Returns the smallest ratio of `keep_behind`, rounded up to 4 places."""
  entering = num_video if entering is None else entering
  tokens = layer * entering + (num_layers - layer)
  return math.ceil(tokens * 10**4 / (num_layers * num_video)) / 10**4


def fastv_fraction(ratio: float, num_layers: int, layer: int = 2) -> float:
  """Returns x, the share that FastV keeps: K + x (L - K) = ratio * L.

  Args:
    ratio: retention ratio in (0, 1].
    num_layers: L.
    layer: K, layers that see every token.

  Raises:
    UserError: K layers alone take more than the budget.
  """
  if not 0 <= layer < num_layers or _exact(ratio) * num_layers < layer:
    raise errors.UserError(
      f"ratio {ratio} is infeasible with {layer} of {num_layers} layers in"
      f" full; use more than {min(layer, num_layers) / num_layers:.4f}"
    )
  share = (_exact(ratio) * num_layers - layer) / (num_layers - layer)
  return float(share)


def two_stages(
  ratio: float, num_layers: int, num_video: int, *, layer: int, share: float
) -> tuple[int, int]:
  """Returns (entering, keep) of a method that acts before the LLM and in it.

  `entering` tokens are seen by the layers up to `layer`, `keep` of them, about
  `share`, by those behind it; together at most `ratio` in the mean of layers
  and short of it by less than 1 / M.

  Raises:
    UserError: fewer than one token could go on.
  """
  if not 0 <= layer < num_layers:
    raise errors.UserError(
      f"layer {layer} has no layer of {num_layers} behind it; choose one below"
      f" {num_layers}"
    )
  seen = layer + _exact(share) * (num_layers - layer)
  total = _exact(ratio) * num_layers * num_video
  entering = min(math.floor(total / seen), num_video)
  if total < num_layers:
    raise errors.UserError(
      f"ratio {ratio} keeps no token of {num_video}; use at least"
      f" {lowest_ratio(num_layers, num_video, entering=1):.4f}"
    )
  # At the smallest budgets the share alone would leave none behind.
  most = num_video
  if layer:
    most = math.floor((total - (num_layers - layer)) / layer)
  entering = max(1, min(entering, most))
  return entering, keep_behind(
    ratio, num_layers, num_video, layer=layer, entering=entering
  )


def largest_remainder(
  weights: Sequence[float], total: int, low: Any = 0, high: Any = None
) -> list[int]:
  """Shares out `total` in proportion to weights, each count within bounds.

  Parts at a bound stay there and the others are proportional to their weights;
  what rounding down leaves goes to the largest remainders, of equal ones to
  the first. What no part with a weight can take is shared evenly.

  Args:
    weights: finite, not negative, G of them.
    total: tokens in all.
    low: int or G ints, the least of each part.
    high: int or G ints, the most of each part; None for `total`.

  Returns:
    G ints, whose sum is `total` exactly.

  Raises:
    UserError: no counts within the bounds have that sum.
  """
  count = len(weights)
  low = _each(low, count)
  high = _each(total if high is None else high, count)
  check_feasible(total, low, high)
  exact = [fractions.Fraction(float(w)) for w in weights]
  if any(w < 0 for w in exact):
    raise ValueError(f"weights {list(weights)} are not all positive or 0")

  weighted = [g for g in range(count) if exact[g]]
  reach = sum(high[g] if exact[g] else low[g] for g in range(count))
  if total > reach or not weighted:
    for g in weighted:
      low[g] = high[g]
    exact = [fractions.Fraction(not w) for w in exact]
    weighted = [g for g in range(count) if exact[g]]

  def at(level):
    return [
      min(max(level * w, lo), hi)
      for w, lo, hi in zip(exact, low, high, strict=True)
    ]

  # The sum grows with the level, in a straight line between these.
  levels = sorted(
    {fractions.Fraction(0)}
    | {bound[g] / exact[g] for g in weighted for bound in (low, high)}
  )
  first, last = 0, len(levels) - 1
  while first < last:
    middle = (first + last) // 2
    if sum(at(levels[middle])) < total:
      first = middle + 1
    else:
      last = middle
  parts = at(levels[first])
  surplus = sum(parts) - total
  if surplus:
    below = at(levels[first - 1])
    rise = sum(parts) - sum(below)
    parts = [
      p - (p - b) * surplus / rise for p, b in zip(parts, below, strict=True)
    ]
  counts = [math.floor(p) for p in parts]
  order = sorted(range(count), key=lambda g: (counts[g] - parts[g], g))
  for g in order[: total - sum(counts)]:
    counts[g] += 1
  return counts


def largest_remainder_on_device(
  weights: jax.Array, total: Any, low: Any = 0, high: Any = None
) -> jax.Array:
  """`largest_remainder` with weights that are data; int32[G].

  The sum is exact whatever float32 makes of the proportions. Of float weights,
  remainders that differ by rounding only may win in another order than on the
  host; shares of integer weights are exact, as long as their products with the
  budget fit into int32.

  Args:
    weights: float[G] or int[G], finite, not negative.
    total: int, or int32[].
    low: int or G ints, or int32[G].
    high: int or G ints, or int32[G]; None for `total`.

  Raises:
    UserError: as `largest_remainder`, where total and bounds are static. Of
      bounds that are data, the nearest possible sum is taken.
  """
  (count,) = weights.shape
  high = total if high is None else high
  if not any(isinstance(x, jax.core.Tracer) for x in (total, low, high)):
    check_feasible(int(total), _each(low, count), _each(high, count))
  low = jnp.broadcast_to(jnp.asarray(low, jnp.int32), [count])
  high = jnp.broadcast_to(jnp.asarray(high, jnp.int32), [count])
  total = jnp.asarray(total, jnp.int32)
  w = weights.astype(jnp.float32)
  # The largest weight becomes 1: levels stay within float32.
  w = w / jnp.maximum(jnp.max(w), jnp.finfo(jnp.float32).tiny)
  lowest, highest = low.astype(jnp.float32), high.astype(jnp.float32)

  def at(level):
    # At an infinite level, weight 0 stays at its lower bound.
    wanted = jnp.where(w > 0, level * w, 0.0)
    return jnp.clip(wanted, lowest, highest)

  divisor = jnp.where(w > 0, w, 1.0)
  levels = jnp.sort(
    jnp.concatenate(
      [
        jnp.where(w > 0, lowest / divisor, 0.0),
        jnp.where(w > 0, highest / divisor, 0.0),
      ]
    )
  )
  sums = jax.vmap(lambda level: at(level).sum())(levels)
  after = jnp.minimum(jnp.sum(sums < total), len(levels) - 1)
  before = jnp.maximum(after - 1, 0)
  rise = sums[after] - sums[before]
  step = (total - sums[before]) / jnp.where(rise > 0, rise, 1.0)
  step = jnp.where(rise > 0, jnp.clip(step, 0.0, 1.0), 0.0)
  parts = at(levels[before]) * (1 - step) + at(levels[after]) * step
  counts = jnp.clip(jnp.floor(parts).astype(jnp.int32), low, high)
  remainder = parts - counts
  if jnp.issubdtype(weights.dtype, jnp.integer):
    # Between the bounds in whole numbers: rounding must not decide on ties.
    free = (parts > lowest) & (parts < highest) & (weights > 0)
    left = total - jnp.where(free, 0, counts).sum()
    whole = jnp.maximum(jnp.where(free, weights, 0).sum(), 1)
    exact = jnp.clip(left * weights // whole, low, high)
    counts = jnp.where(free, exact, counts)
    rest = (left * weights % whole).astype(jnp.float32)
    remainder = jnp.where(free, rest, 0.0)

  def unfinished(state):
    counts, _ = state
    missing = total - counts.sum()
    return ((missing > 0) & jnp.any(counts < high)) | (
      (missing < 0) & jnp.any(counts > low)
    )

  def adjust(state):
    """Gives each of the first ones a token, or its even share of many."""
    counts, remainder = state
    missing = total - counts.sum()
    up = missing > 0
    room = jnp.where(up, high - counts, counts - low)
    key = jnp.where(up, -remainder, remainder)
    order = jnp.argsort(jnp.where(room > 0, key, jnp.inf))
    place = jnp.zeros([count], jnp.int32).at[order].set(jnp.arange(count))
    missing = jnp.abs(missing)
    even = jnp.maximum(missing // jnp.maximum(jnp.sum(room > 0), 1), 1)
    amount = jnp.where(place < missing, jnp.minimum(room, even), 0)
    counts = counts + jnp.where(up, amount, -amount)
    # Remainders are used up once.
    return counts, jnp.zeros_like(remainder)

  counts, _ = jax.lax.while_loop(unfinished, adjust, (counts, remainder))
  return counts


def evenly(total: int, num_parts: int) -> list[int]:
  """Returns equal parts of `total`, the first ones one more as needed."""
  share, rest = divmod(total, num_parts)
  return [share + (part < rest) for part in range(num_parts)]


def _exact(ratio: float) -> fractions.Fraction:
  """The number that was written: 0.15 and not the float below it."""
  return fractions.Fraction(str(float(ratio)))


def _each(bound: Any, count: int) -> list[int]:
  return [int(b) for b in np.broadcast_to(np.asarray(bound), [count])]


def check_feasible(total: int, low: list[int], high: list[int]) -> None:
  """Refuses a total that no counts within the bounds of the parts have."""
  if any(lo > hi for lo, hi in zip(low, high, strict=True)):
    raise ValueError(f"lower bounds {low} exceed upper bounds {high}")
  if not sum(low) <= total <= sum(high):
    raise errors.UserError(
      f"a budget of {total} tokens cannot be shared by {len(low)} parts that"
      f" take {sum(low)} to {sum(high)} in all; change the ratio or the bounds"
    )
