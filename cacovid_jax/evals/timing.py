"""How times are taken: compilation apart, results waited for, medians.

The first run may compile and is told by itself; the others are each waited for.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax


def peak_gib(devices) -> float:
  """Returns the most GiB that one of the devices has held, 0 if unknown."""
  stats = [device.memory_stats() or {} for device in devices]
  return max(one.get("peak_bytes_in_use", 0) for one in stats) / 2**30


class Timing(NamedTuple):
  """What several runs of one function took."""

  ms: float  # Median milliseconds.
  low: float  # Lower and upper quartile.
  high: float
  first_s: float = 0.0  # Seconds of the run before, which may compile.

  @classmethod
  def of(cls, taken: Sequence[float], first_s: float = 0.0) -> "Timing":
    """Returns the timing of runs that took so many milliseconds each."""
    quartiles = taken[:1] * 3
    if len(taken) > 1:
      quartiles = statistics.quantiles(taken, n=4, method="inclusive")
    return cls(quartiles[1], quartiles[0], quartiles[2], first_s)


def measure(
  function: Callable[[], Any],
  repeats: int,
  wait: Callable[[Any], Any] = jax.block_until_ready,
) -> Timing:
  """Returns the timing of `repeats` runs, after one that may compile.

  `wait` returns when what a run gave has been computed.
  """
  taken = []
  for _ in range(repeats + 1):
    start = time.perf_counter()
    wait(function())
    taken.append(1e3 * (time.perf_counter() - start))
  return Timing.of(taken[1:], taken[0] / 1e3)
