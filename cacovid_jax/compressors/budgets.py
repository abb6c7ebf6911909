"""From a retention ratio to the numbers that each method turns on.

The ratio of a method inside the language model is the equivalent one: video
tokens seen by a layer's attention, averaged over the layers, as a share of the
video. Results never exceed it, but for `largest_remainder_on_device`, whose
weights are data.

Letters: L decoder layers, M video tokens, G parts that share a budget.
"""

import bisect
import fractions
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cacovid_jax import errors
from cacovid_jax.policy import selection

# The depth that published layer numbers are meant for.
_PUBLISHED_LAYERS = 28


def budget(grid: tuple[int, int, int], ratio: float) -> int:
  """Returns K of `grid`; UserError for a ratio outside (0, 1] or no tokens."""
  return selection.num_keep(grid, check_ratio(ratio))


def check_ratio(ratio: Any) -> float:
  """Returns `ratio` as a float if it is a retention ratio in (0, 1]."""
  try:
    value = float(ratio)
  except (TypeError, ValueError):
    value = float("nan")
  if not 0.0 < value <= 1.0:
    raise errors.UserError(
      f"retention ratio {ratio!r} is outside (0, 1]; 0.1 keeps 10 % of the"
      " video tokens"
    )
  return value


def scale_layer(layer: int, num_layers: int) -> int:
  """Returns the layer of an L-layer model that stands for `layer` of 28."""
  return max(1, round(layer * num_layers / _PUBLISHED_LAYERS))


def keep_behind(
  ratio: float, num_layers: int, num_video: int, *, layer: int, entering=None
) -> int:
  """Returns how many tokens may go on at `layer` for a mean of `ratio`.

  The most that keep the equivalent ratio at or below `ratio`, short of it by
  less than 1 / M. Layers in front of it see the `entering` tokens, None for M.
  UserError where those take more than the whole budget.
  """
  entering = num_video if entering is None else entering
  if not 0 <= layer < num_layers:
    raise errors.UserError(
      f"layer {layer} has no layer of {num_layers} behind it; choose one below"
      f" {num_layers}"
    )
  total = exact(ratio) * num_layers * num_video
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


def two_stages(
  ratio: float, num_layers: int, num_video: int, *, layer: int, share: float
) -> tuple[int, int]:
  """Returns (entering, keep) of a method that acts before the LLM and in it.

  The layers up to `layer` see `entering` tokens, those behind it `keep` of
  them, about `share`; as many as `keep_behind` says. UserError where no token
  could go on.
  """
  seen = layer + exact(share) * (num_layers - layer)
  total = exact(ratio) * num_layers * num_video
  entering = min(math.floor(total / seen), num_video)
  if total < num_layers:
    raise errors.UserError(
      f"ratio {ratio} keeps no token of {num_video}; use at least"
      f" {lowest_ratio(num_layers, num_video, entering=1):.4f}"
    )
  if layer:
    # At the smallest budgets the share alone would leave none behind.
    most = math.floor((total - (num_layers - layer)) / layer)
    entering = min(entering, most)
  entering = max(1, entering)
  return entering, keep_behind(
    ratio, num_layers, num_video, layer=layer, entering=entering
  )


def largest_remainder_on_device(weights, total, low=0, high=None):
  """Shares out `total` in proportion to weights, each count within bounds.

  Parts at a bound stay there and the others are proportional to their weights;
  what rounding down leaves goes to the largest remainders, of equal ones to the
  first. What no part with a weight can take is shared evenly. The sum is exact;
  the rounding of float32 may decide between nearly equal remainders of float
  weights, not of integers whose products with the budget fit into int32.

  Args:
    weights: float[G] or int[G], finite, not negative.
    total: int, or int32[].
    low: the least of each part, int or G ints, or int32[G].
    high: the most of each part, likewise; None for `total`.

  Returns int32[G]. UserError if no counts within static bounds have the static
  sum; of bounds that are data, the nearest possible sum is taken.
  """
  (count,) = weights.shape
  high = total if high is None else high
  if not any(isinstance(x, jax.core.Tracer) for x in (total, low, high)):
    check_feasible(int(total), low, high, count)
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
  bounds = jnp.concatenate([lowest / divisor, highest / divisor])
  levels = jnp.sort(jnp.where(jnp.tile(w, 2) > 0, bounds, 0.0))
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
    shares = jnp.clip(left * weights // whole, low, high)
    counts = jnp.where(free, shares, counts)
    rest = (left * weights % whole).astype(jnp.float32)
    remainder = jnp.where(free, rest, 0.0)
  return _completed(counts, remainder, total, low, high)


def _completed(counts, remainder, total, low, high):
  """Returns counts int32[G] of the right sum, largest remainders first."""

  def unfinished(state):
    missing = total - state[0].sum()
    more = (missing > 0) & jnp.any(state[0] < high)
    return more | ((missing < 0) & jnp.any(state[0] > low))

  def adjust(state):
    """Gives each of the first ones a token, or its even share of many."""
    counts, remainder = state
    missing = total - counts.sum()
    up = missing > 0
    room = jnp.where(up, high - counts, counts - low)
    key = jnp.where(up, -remainder, remainder)
    place = jnp.argsort(jnp.argsort(jnp.where(room > 0, key, jnp.inf)))
    missing = jnp.abs(missing)
    even = jnp.maximum(missing // jnp.maximum(jnp.sum(room > 0), 1), 1)
    amount = jnp.where(place < missing, jnp.minimum(room, even), 0)
    # Remainders are used up once.
    return jnp.where(up, counts + amount, counts - amount), jnp.zeros_like(
      remainder
    )

  return jax.lax.while_loop(unfinished, adjust, (counts, remainder))[0]


def mean_threshold(left, shares, ratio: float) -> float:
  """Returns the least threshold of sizes whose mean share is at most a ratio.

  A question gets its first size that leaves out no more than the threshold, or
  else its last: the mean over questions falls as the threshold rises.

  Args:
    left: float[Q, S], what each size leaves out.
    shares: float[Q, S] of the tokens that it keeps, rising.
    ratio: of all sizes, one is at most it.
  """
  left, shares = np.asarray(left, np.float64), np.asarray(shares)

  def met(threshold):
    fits = left <= threshold
    fits[:, -1] = True
    place = fits.argmax(axis=1)[:, None]
    mean = np.take_along_axis(shares, place, axis=1).mean()
    return bool(mean <= ratio * (1 + 1e-9))

  # Half way between two values: rounding does not move a question.
  steps = np.unique(np.append(left, (0.0, 1.0)))
  middles = [*(steps[1:] + steps[:-1]) / 2, 1.0]
  return float(middles[bisect.bisect_left(middles, True, key=met)])


def evenly(total: int, num_parts: int) -> list[int]:
  """Returns equal parts of `total`, the first ones one more as needed."""
  share, rest = divmod(total, num_parts)
  return [share + (part < rest) for part in range(num_parts)]


def exact(ratio: float) -> fractions.Fraction:
  """Returns the number that was written: 0.15 and not the float below it."""
  return fractions.Fraction(str(float(ratio)))


def check_feasible(total: int, low, high, num_parts: int) -> None:
  """Refuses a total that no counts within the bounds of the parts have."""
  low, high = (np.broadcast_to(bound, [num_parts]) for bound in (low, high))
  if (low > high).any():
    raise ValueError(f"lower bounds {low} exceed upper bounds {high}")
  least, most = low.sum(), high.sum()
  if not least <= total <= most:
    raise errors.UserError(
      f"a budget of {total} tokens cannot be shared by {num_parts} parts that"
      f" take {least} to {most} in all; change the ratio or the bounds"
    )
