"""Likelihoods of given answers, against forward passes without a cache."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cacovid_jax import errors
from cacovid_jax.evals import benchmarks
from cacovid_jax.inference import methods as methods_lib
from tests.evals import tiny


@pytest.fixture(scope="module")
def engine(checkpoint, data_dir):
  questions = benchmarks.load(data_dir, "test").questions
  made = tiny.engine_of(checkpoint, data_dir, questions, (2, 5))
  with made.source:
    yield made


@functools.partial(jax.jit, static_argnums=0)
def _forward(model, params, x, positions, length):
  hidden, _ = model.forward(
    params, x[None], positions[None], lengths=jnp.asarray(length)[None]
  )
  return model.logits(params, hidden)[0]


def _naive(engine, question, condition, ids):
  """Returns (log-probability, greedy) by one forward pass over all tokens."""
  runner = engine.batch([question])
  batch, model = runner.batch, engine.checkpoint.model
  params = engine.checkpoint.params
  length, start = int(batch.lengths[0]), int(batch.video_rows[0, 0])
  rows = np.arange(length)
  if condition.method is not None:
    kept = np.asarray(runner.select(condition).index[0])
    video = np.arange(start, start + tiny.NUM_VIDEO)
    rows = np.concatenate(
      [rows[:start], video[kept], rows[start + tiny.NUM_VIDEO :]]
    )
  x = np.asarray(batch.x[0])[rows]
  positions = np.asarray(batch.positions[0])[:, rows]
  x = np.concatenate([x, model.embed_text(params, jnp.asarray(ids))])
  new = int(batch.next_position[0]) + np.arange(len(ids))
  positions = np.concatenate([positions, new[None]], axis=1)
  # Padded, so that all cases are one program.
  x = np.pad(x, [(0, 256 - len(x)), (0, 0)])
  positions = np.pad(positions, [(0, 0), (0, 256 - positions.shape[1])])
  logits = _forward(model, params, x, positions, len(rows) + len(ids))
  logits = np.asarray(logits, np.float64)[: len(rows) + len(ids)]
  logits = logits[len(rows) - 1 : -1]
  log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  return (
    log_probs[np.arange(len(ids)), ids].sum(),
    (logits.argmax(-1) == ids).all(),
  )


@pytest.mark.parametrize("spec", ["vanilla", "uniform"])
def test_it_is_the_sum_over_the_tokens_of_a_forward_pass(engine, spec):
  method = None if spec == "vanilla" else methods_lib.Method.parse(spec)
  condition = methods_lib.Condition(method, 1.0 if method is None else 0.25, 0)
  questions = _questions(engine)[:3]
  texts = ["A", "red or blue?", "grey", "A"]
  asked = [questions[0], questions[0], questions[1], questions[2]]
  found = engine.likelihoods(asked, texts, condition)
  encode = engine.checkpoint.tokenizer.encode
  assert len(encode(texts[1])) > len(encode(texts[0]))
  for question, text, got in zip(asked, texts, found, strict=True):
    log_prob, greedy = _naive(engine, question, condition, encode(text))
    np.testing.assert_allclose(got.log_prob, log_prob, rtol=1e-4)
    assert got.greedy == greedy


def _questions(engine):
  return engine.pool


@pytest.mark.parametrize("spec", ["fastv"])
def test_what_would_be_generated_is_greedy_and_likelier(engine, spec):
  method = None if spec == "vanilla" else methods_lib.Method.parse(spec)
  condition = methods_lib.Condition(method, 1.0 if method is None else 0.5, 0)
  question = _questions(engine)[0]
  runner = engine.batch([question])
  ids = runner.output(condition).ids
  said = np.asarray(ids)[0].tolist()
  eos_ids = engine.checkpoint.eos_ids
  ends = [i for i, one in enumerate(said) if one in eos_ids]
  said = said[: ends[0]] if ends else said
  assert said
  # Any other last token is less likely, and not greedy.
  other = [*said[:-1], (said[-1] + 1) % 200]
  ((found, less),) = runner.likelihood(condition, [[said, other]], 8)
  assert found.greedy and found.log_prob < 0
  assert less.log_prob < found.log_prob and not less.greedy


def test_probabilities_of_all_first_tokens_sum_to_one(engine):
  question = _questions(engine)[1]
  vocab = engine.checkpoint.model.config.text.vocab_size
  first = [[number] for number in range(vocab)]
  (found,) = engine.batch([question]).likelihood(
    methods_lib.Condition(), [first], 8
  )
  total = sum(np.exp(one.log_prob) for one in found)
  np.testing.assert_allclose(total, 1.0, rtol=1e-4)


def test_a_budget_that_cannot_be_met_is_refused(engine):
  condition = methods_lib.Condition(methods_lib.Method.parse("fastv"), 0.01, 0)
  with pytest.raises(errors.UserError):
    engine.likelihoods(_questions(engine)[:1], ["A"], condition)
