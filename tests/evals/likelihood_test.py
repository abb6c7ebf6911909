"""Likelihoods of given answers, against forward passes without a cache."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cacovid_jax import errors
from cacovid_jax.evals import asker as asker_lib
from cacovid_jax.evals import benchmarks, clips, likelihood, runner
from tests.evals import tiny


@pytest.fixture(scope="module")
def evaluator(checkpoint, checkpoint_dir, data_dir):
  with clips.ClipSource(
    data_dir,
    checkpoint.model,
    checkpoint.params,
    checkpoint.model.read_processor(checkpoint_dir),
    num_frames=tiny.FRAMES,
  ) as source:
    yield runner.Evaluator(
      checkpoint,
      source,
      benchmarks.load(data_dir, "test").questions,
      runner.Settings(num_frames=tiny.FRAMES, batch_size=2, max_new_tokens=5),
    )


@functools.partial(jax.jit, static_argnums=0)
def _forward(model, params, x, positions, length):
  hidden, _ = model.forward(
    params, x[None], positions[None], lengths=jnp.asarray(length)[None]
  )
  return model.logits(params, hidden)[0]


def _naive(evaluator, question, cell, ids):
  """Returns (log-probability, greedy) by one forward pass over all tokens."""
  asker = asker_lib.Asker(evaluator, [question])
  batch, model = asker.batch, evaluator.checkpoint.model
  params = evaluator.checkpoint.params
  length, start = int(batch.lengths[0]), int(batch.video_rows[0, 0])
  rows = np.arange(length)
  if cell.method is not None:
    kept = np.asarray(asker.select(cell).index[0])
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
def test_it_is_the_sum_over_the_tokens_of_a_forward_pass(evaluator, spec):
  method = None if spec == "vanilla" else runner.Method.parse(spec)
  cell = runner.Cell(method, 1.0 if method is None else 0.25, 0)
  questions = _questions(evaluator)[:3]
  texts = ["A", "red or blue?", "grey", "A"]
  asked = [questions[0], questions[0], questions[1], questions[2]]
  found = likelihood.score(evaluator, asked, texts, cell)
  encode = evaluator.checkpoint.tokenizer.encode
  assert len(encode(texts[1])) > len(encode(texts[0]))
  for question, text, got in zip(asked, texts, found, strict=True):
    log_prob, greedy = _naive(evaluator, question, cell, encode(text))
    np.testing.assert_allclose(got.log_prob, log_prob, rtol=1e-4)
    assert got.greedy == greedy


def _questions(evaluator):
  return [evaluator._pool[i] for i in range(len(evaluator._pool))]


@pytest.mark.parametrize("spec", ["fastv"])
def test_what_would_be_generated_is_greedy_and_likelier(evaluator, spec):
  method = None if spec == "vanilla" else runner.Method.parse(spec)
  cell = runner.Cell(method, 1.0 if method is None else 0.5, 0)
  question = _questions(evaluator)[0]
  asker = asker_lib.Asker(evaluator, [question])
  ids = asker.vanilla().ids if method is None else asker.reply(cell).ids
  reader = likelihood._Reader(evaluator, evaluator.tools(question), cell, 8)
  state = reader.prefill(asker)
  said = np.asarray(ids)[0].tolist()
  ends = [i for i, one in enumerate(said) if one in asker._e.checkpoint.eos_ids]
  said = said[: ends[0]] if ends else said
  assert said
  log_prob, greedy = reader.score(state, asker.batch, [said])
  assert greedy[0] and log_prob[0] < 0
  # Any other last token is less likely, and not greedy.
  other = [*said[:-1], (said[-1] + 1) % 200]
  less, not_greedy = reader.score(state, asker.batch, [other])
  assert less[0] < log_prob[0] and not not_greedy[0]


def test_probabilities_of_all_first_tokens_sum_to_one(evaluator):
  question = _questions(evaluator)[1]
  reader = likelihood._Reader(
    evaluator, evaluator.tools(question), runner.Cell(None, 1.0, 0), 8
  )
  asker = asker_lib.Asker(evaluator, [question, question])
  state = reader.prefill(asker)
  vocab = evaluator.checkpoint.model.config.text.vocab_size
  total = 0.0
  for first in range(0, vocab, 2):
    pair = [[first], [min(first + 1, vocab - 1)]]
    log_prob, _ = reader.score(state, asker.batch, pair)
    total += np.exp(log_prob[: min(2, vocab - first)]).sum()
  np.testing.assert_allclose(total, 1.0, rtol=1e-4)


def test_a_budget_that_cannot_be_met_is_refused(evaluator):
  cell = runner.Cell(runner.Method.parse("fastv"), 0.01, 0)
  with pytest.raises(errors.UserError):
    likelihood.score(evaluator, _questions(evaluator)[:1], ["A"], cell)
