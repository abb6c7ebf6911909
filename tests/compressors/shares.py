"""Sharing out a budget on the host, in exact fractions."""

import fractions
import math

import numpy as np

from cacovid_jax.compressors import budgets


def largest_remainder(weights, total, low=0, high=None):
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
  high = total if high is None else high
  budgets.check_feasible(total, low, high, count)
  low, high = (np.broadcast_to(x, [count]).tolist() for x in (low, high))
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
