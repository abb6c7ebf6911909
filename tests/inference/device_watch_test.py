"""How busy a device is, from made-up times."""

import threading

import numpy as np
import pytest

from cacovid_jax.inference import device_watch


def test_overlapping_times_count_once():
  """Against a count of the seconds that some program covers."""
  rng = np.random.default_rng(0)
  starts = np.sort(rng.integers(0, 300, 40))
  ends = starts + rng.integers(0, 12, 40)
  watch, covered = device_watch.DeviceWatch(), np.zeros(400, bool)
  for start, end in zip(starts, ends, strict=True):
    watch.note("any", start - 1, start, end)
    covered[start:end] = True
  watch.close()
  assert 0 < covered.sum() < ends.max() - starts.min()
  assert watch.busy == covered.sum()


def test_a_program_takes_what_lies_behind_the_one_before():
  watch = device_watch.DeviceWatch()
  watch.note("tower", 0.0, 1.0, 3.0)
  watch.note("answer", 0.5, 1.5, 8.0)  # Waits for the tower until 3.
  watch.note("tower", 10.0, 12.0, 13.0)  # Two seconds are the call's.
  watch.close()
  assert dict(watch.seconds) == {"tower": 3.0 + 3.0, "answer": 5.0}
  assert watch.busy == 2.0 + 5.0 + 1.0


@pytest.mark.parametrize("fails", [False, True])
def test_what_is_dispatched_is_followed_and_not_waited_for(fails):
  now, done = [1.0], threading.Event()

  def wait(out):
    assert out is done and done.wait(600)
    if fails:
      raise RuntimeError("told to whoever reads it")

  watch = device_watch.DeviceWatch(wait, lambda: now[0])
  assert watch.add("answer", 0.0, done) is done
  assert not watch.busy
  now[0] = 4.0
  done.set()
  watch.settle()
  assert (watch.busy, watch.seconds["answer"]) == (3.0, 4.0)
  watch.close()
