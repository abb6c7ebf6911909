"""Machines that are taken away: a SIGTERM, then the end."""

import contextlib
import signal
import threading

import jax
from jax.experimental import multihost_utils


@contextlib.contextmanager
def watched():
  """Gives f(step), whether to stop after a SIGTERM; all processes agree."""
  if jax.process_count() > 1:
    # JAX hears it, unless replaced, and names the step where all stop.
    yield multihost_utils.reached_preemption_sync_point
    return
  signals, old = [], None
  # Only the main thread may install a handler.
  if threading.current_thread() is threading.main_thread():
    old = signal.signal(signal.SIGTERM, lambda *args: signals.append(args))
  try:
    yield lambda step: bool(signals)
  finally:
    if old is not None:
      signal.signal(signal.SIGTERM, old)
