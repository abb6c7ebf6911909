"""Medians of times, and what counts towards a method."""

import pytest

from cacovid_jax.evals import benchmarks, latency
from cacovid_jax.inference import engine as engine_lib
from cacovid_jax.inference import methods as methods_lib
from tests.evals import tiny


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
  calls = []
  monkeypatch.setattr(latency.time, "perf_counter", Clock(0.002, 0.001, 0.009))
  found = latency.median_milliseconds(lambda: calls.append(1), 3)
  assert found == pytest.approx(2.0)
  assert len(calls) == 4


@pytest.fixture(scope="module")
def engine(checkpoint, checkpoint_dir, data_dir):
  benchmark = benchmarks.load(data_dir, "test")
  source = tiny.open_store(
    data_dir,
    checkpoint.model,
    checkpoint.params,
    checkpoint.model.read_processor(checkpoint_dir),
    num_frames=tiny.FRAMES,
  )
  settings = engine_lib.Settings(num_frames=4, batch_size=1, max_new_tokens=1)
  return benchmark.questions, engine_lib.Engine(
    checkpoint, source, benchmark.questions, settings
  )


def test_what_a_method_reads_is_counted_once(engine, monkeypatch):
  questions, engine = engine
  counted = []

  def median(function, repeats):
    assert repeats == 3
    function()
    counted.append(1)
    return float(len(counted))

  monkeypatch.setattr(latency, "median_milliseconds", median)
  subject = latency.subject(engine, questions[0])
  watch = latency.Stopwatch(subject, repeats=3)
  parse = methods_lib.Method.parse
  assert watch.cost(parse("uniform"), 0.25) == latency.Cost(rule=1.0)
  # The prefill first, then the rule; at another ratio only the rule.
  assert watch.cost(parse("last_query"), 0.25) == latency.Cost(3.0, 2.0)
  assert watch.cost(parse("last_query"), 0.1) == latency.Cost(4.0, 2.0)
  assert latency.Cost(4.0, 2.0).total == 6.0
  # Inside the model: beyond answering from as many tokens, 5 less 6, not < 0.
  assert watch.cost(parse("fastv"), 0.5).rule == 0.0


def test_batches_are_refused(engine):
  questions, engine = engine
  several = engine_lib.Engine(
    engine.checkpoint,
    engine.source,
    questions,
    engine_lib.Settings(num_frames=4, batch_size=2, max_new_tokens=1),
    programs=engine.programs,
  )
  with pytest.raises(ValueError, match="batch size of 1"):
    latency.subject(several, questions[0])


def test_the_first_clip_that_can_be_read(engine, monkeypatch):
  questions, engine = engine
  assert latency.readable(engine, questions) is questions[0]
  bad = engine.source.unusable(questions[0].video, "missing")
  monkeypatch.setitem(engine.source._clips, questions[0].video, bad)
  assert latency.readable(engine, questions).video != questions[0].video
  assert latency.readable(engine, questions[:1]) is None
