"""Times: the first run apart, medians and quartiles of the others."""

import pytest

from cacovid_jax.evals import timing


def test_the_first_run_does_not_count(monkeypatch):
  """Looks before and after runs of 7 s, 2, 1 and 9 ms."""
  looks, waited = iter([0, 7, 8, 8.002, 9, 9.001, 10, 10.009]), []
  monkeypatch.setattr(timing.time, "perf_counter", lambda: next(looks))
  found = timing.measure(lambda: len(waited), 3, waited.append)
  assert found == pytest.approx((2.0, 1.5, 5.5, 7.0))
  assert waited == [0, 1, 2, 3]
  assert timing.Timing.of([3.0], 1.0) == (3.0, 3.0, 3.0, 1.0)
