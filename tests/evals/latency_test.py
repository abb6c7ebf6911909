"""What counts towards a method's time."""

import numpy as np
import pytest

from cacovid_jax.evals import benchmarks, latency, timing
from cacovid_jax.inference import engine as engine_lib
from cacovid_jax.inference import methods as methods_lib
from tests.evals import tiny


@pytest.fixture(scope="module")
def engine(checkpoint, data_dir):
  questions = benchmarks.load(data_dir, "test").questions
  return questions, tiny.engine_of(checkpoint, data_dir, questions, (1, 1))


def test_what_a_method_reads_is_counted_once(engine, monkeypatch):
  questions, engine = engine
  counted = []

  def median(function, repeats):
    assert repeats == 3
    function()
    counted.append(1)
    return timing.Timing.of([float(len(counted))])

  monkeypatch.setattr(timing, "measure", median)
  subject = latency.subject(engine, questions[0])
  watch = latency.Stopwatch(subject, repeats=3)
  parse = methods_lib.Method.parse
  # The rule, then the answer; from as many tokens, that is known.
  assert watch.cost(parse("uniform"), 0.25) == latency.Cost(1.0, 0.0, 2.0)
  # The prefill first, then the rule; at another ratio rule and answer.
  assert watch.cost(parse("last_query"), 0.25) == latency.Cost(4.0, 3.0, 2.0)
  assert watch.cost(parse("last_query"), 0.1) == latency.Cost(5.0, 3.0, 6.0)
  cost = latency.Cost(5.0, 3.0, 6.0, 0.5)
  assert (cost.choosing, cost.total) == (8.0, 14.5)
  # Inside the model: beyond answering from as many tokens, 7 less 8, not < 0;
  # then all of the program's time is that of the answer.
  assert watch.cost(parse("fastv"), 0.5) == latency.Cost(0.0, 0.0, 7.0)
  # All tokens: without the attention that was read, another program.
  assert watch.cost(None, 1.0) == latency.Cost(0.0, 0.0, 9.0)
  assert (watch.tower(), watch.embed(), watch.tower()) == (10.0, 11.0, 10.0)


def test_the_tower_that_is_timed_gives_the_features_of_the_clip(engine):
  questions, engine = engine
  (found,) = latency.subject(engine, questions[0]).encode()
  known = engine.source[questions[0].video].arrays["features"]
  np.testing.assert_array_equal(found["features"], known)


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
