"""When dispatched programs are done, seen without waiting for them."""

import collections
import math
import queue
import threading
import time
from collections.abc import Callable
from typing import Any

import jax


class DeviceWatch:
  """Follows dispatched programs in a thread, in the order of their dispatch.

  The device is busy from the return of a dispatch until what it gives is ready;
  where such times overlap they count once. So compiling and dispatching do not
  count, nor what a device has computed before the dispatch returned (on a CPU,
  small programs altogether). What counts: copies of a program's inputs to the
  device, gaps between its kernels, and the time until this thread is told, as a
  rule below a millisecond. Of several devices, one that computes is enough.

  Attributes:
    busy: seconds.
    seconds: from the call or from the end of the program before, whichever is
      later, until it is ready, by what programs are for. With compiling.
  """

  def __init__(
    self,
    wait: Callable[[Any], Any] = jax.block_until_ready,
    clock: Callable[[], float] = time.perf_counter,
  ):
    """Starts the thread; `wait` returns when arrays are computed."""
    self.busy, self.seconds = 0.0, collections.Counter()
    self.clock, self._wait, self._end = clock, wait, -math.inf
    self._queue: queue.Queue = queue.Queue()
    threading.Thread(target=self._follow, daemon=True).start()

  def add(self, name: str, called: float, out):
    """Returns `out` of a program called then, which has just been dispatched.

    `called` is of `clock`; `name` says what the program is for.
    """
    self._queue.put((name, called, self.clock(), out))
    return out

  def note(self, name: str, called: float, dispatched: float, ready: float):
    """Adds the times of one program; the dispatches rise."""
    self.busy += max(0.0, ready - max(dispatched, self._end))
    self.seconds[name] += max(0.0, ready - max(called, self._end))
    self._end = max(self._end, ready)

  def settle(self) -> None:
    """Waits until all that was dispatched is done."""
    self._queue.join()

  def close(self) -> None:
    """Ends the thread when it has seen everything."""
    self._queue.put(None)

  def _follow(self):
    while (entry := self._queue.get()) is not None:
      *times, out = entry
      try:
        self._wait(out)
      except Exception:  # noqa: BLE001  Told to whoever reads the arrays.
        pass
      self.note(*times, self.clock())
      # Arrays are not held until the next program comes.
      del entry, out
      self._queue.task_done()
    self._queue.task_done()
