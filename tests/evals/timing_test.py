"""Times: the first run apart, medians and quartiles of the others."""

import pytest

from cacovid_jax.evals import timing


class Clock:
  """A clock that goes on by given steps between two looks."""

  def __init__(self, *steps):
    self.now, self.steps, self.started = 0.0, list(steps), False

  def __call__(self):
    if self.started:
      self.now += self.steps.pop(0)
    self.started = not self.started
    return self.now


def test_the_first_run_does_not_count(monkeypatch):
  waited = []
  clock = Clock(7.0, 0.002, 0.001, 0.009)
  monkeypatch.setattr(timing.time, "perf_counter", clock)
  found = timing.measure(lambda: len(waited), 3, waited.append)
  assert found == pytest.approx((2.0, 1.5, 5.5, 7.0))
  assert waited == [0, 1, 2, 3]


def test_one_run_is_its_own_median():
  assert timing.Timing.of([3.0], 1.0) == (3.0, 3.0, 3.0, 1.0)
