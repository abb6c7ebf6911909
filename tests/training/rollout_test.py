"""Rollouts and lettered rewards."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cacovid_jax import errors
from cacovid_jax.data import question as question_lib
from cacovid_jax.data import rewards as rewards_lib
from cacovid_jax.inference import programs
from cacovid_jax.models import layers, prompt_batch
from cacovid_jax.training import rollout
from tests.training import tiny


@pytest.fixture(scope="module")
def prompts():
  config = tiny.step_config()
  constants = tiny.constants(config)
  whole = tiny.batch().prompts
  x = jax.jit(jax.vmap(config.model.embed_prompt, (None, 0, 0, 0)))(
    constants.params, whole.ids, whole.features, whole.video_rows
  )
  positions = jnp.broadcast_to(jnp.arange(tiny.LENGTH), (2, 1, tiny.LENGTH))
  return (
    config,
    constants.params,
    prompt_batch.PromptBatch(
      x=x,
      positions=positions,
      lengths=jnp.asarray(whole.lengths),
      video_rows=jnp.asarray(whole.video_rows),
      next_position=jnp.asarray(whole.lengths),
    ),
  )


def answer(prompts, index, num_valid, max_new_tokens, earlier=None):
  config, params, held = prompts
  rows = functools.partial(
    programs.answer_rows,
    config.model,
    max_new_tokens=max_new_tokens,
    eos_ids=(1,),
    pad_id=0,
  )
  index, num_valid = np.int32(index), np.int32(num_valid)
  ask = jax.jit(lambda *given, earlier: rows(*given, earlier=earlier))
  given = params, held, index, num_valid
  return rollout.Answers(*ask(*given, earlier=earlier))


def test_pruned_prompt_keeps_text_newline_and_original_positions(prompts):
  _, _, held = prompts
  one = jax.tree.map(lambda a: a[0], held)
  _, pruned = jax.jit(prompt_batch.prune)(one, jnp.array([3, 10, 63]), 3)
  x, positions, length = pruned.x, pruned.positions, pruned.lengths
  start, end = tiny.VIDEO_START, tiny.VIDEO_START + tiny.NUM_VIDEO
  expected = [*range(start), start + 3, start + 10, start + 63]
  expected += range(end, int(one.lengths))
  assert int(length) == len(expected)
  np.testing.assert_array_equal(positions[0, : len(expected)], expected)
  np.testing.assert_array_equal(x[: len(expected)], one.x[np.array(expected)])


def test_first_token_alone_equals_generation(prompts):
  index = np.sort(
    np.stack(
      [[np.random.default_rng(i).permutation(64)[:6] for i in range(3)]] * 2
    ),
    axis=-1,
  )
  first = answer(prompts, index, [6, 6], 1)
  longer = answer(prompts, index, [6, 6], 3)
  assert first.ids.shape == (2, 3, 1) and longer.ids.shape == (2, 3, 3)
  np.testing.assert_array_equal(first.ids[..., 0], longer.ids[..., 0])
  assert longer.logits is None
  assert first.logits.shape == (2, 3, tiny.VOCABULARY)


def test_keeping_everything_equals_the_whole_prompt(prompts):
  config, params, held = prompts
  got = answer(prompts, [[np.arange(64)]] * 2, [64, 64], 1)
  prefill = functools.partial(config.model.prefill, cache_length=tiny.LENGTH)
  given = params, held.x, held.positions, held.lengths
  logits, _, _ = jax.jit(prefill)(*given)
  np.testing.assert_allclose(got.logits[:, 0], logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", [layers.STACKED, layers.FUSED])
@pytest.mark.parametrize("deep", [False, True])
def test_text_in_front_read_once_changes_no_answer(prompts, deep, form):
  config, params, held = prompts
  params = layers.convert(params, form)
  # Positions with gaps; the video begins at the row where the text ends.
  held = held._replace(positions=held.positions * 2 + 3)
  if deep:
    maps = np.random.default_rng(3).normal(size=(2, 2, tiny.NUM_VIDEO, 32))
    held = held._replace(deep=jnp.asarray(maps, jnp.float32))

  @jax.jit
  def read(held):
    return programs.read_text(config.model, params, held, tiny.VIDEO_START)

  earlier = read(held)
  assert earlier[0].shape[:3] == (3, 2, tiny.VIDEO_START)
  index = [[[0, 5, 9], [1, 2, 63]], [[3, 4, 64], [7, 8, 64]]]
  given = (config, params, held), index, [3, 2]
  for new in (1, 4):
    plain, shared = (answer(*given, new, earlier=x) for x in (None, earlier))
    np.testing.assert_array_equal(plain.ids, shared.ids)
    if new == 1:
      np.testing.assert_allclose(plain.logits, shared.logits, atol=1e-5)
      other = answer(
        *given, new, earlier=jax.tree.map(lambda a: a * 2, earlier)
      )
      assert np.abs(other.logits - plain.logits).max() > 1e-3


def test_padded_combination_answers_like_the_short_one(prompts):
  short = answer(prompts, [[[1, 5, 9]]] * 2, [3, 3], 2)
  padded = answer(prompts, [[[1, 5, 9, 64, 64]]] * 2, [3, 3], 2)
  np.testing.assert_array_equal(short.ids, padded.ids)


def test_lettered_reward_is_the_hosts():
  tokenizer = tiny.checkpoint().tokenizer
  letters = rollout.first_letters(tokenizer, tokenizer.vocab_size)
  texts = ["B", "A", " B", "B.", "Because", "", ". B", "  B) it", "b", "."]
  encoded = [tokenizer.encode(text)[:8] for text in texts]
  ids = np.full((len(texts), 8), tokenizer.pad_id, np.int32)
  for row, tokens in enumerate(encoded):
    ids[row, : len(tokens)] = tokens
  target = rollout.Target(tokenizer.letter_id("B"), None, letters)
  got = jax.jit(rollout.accuracy)(rollout.Answers(ids, None), target)
  expected = [
    rewards_lib.reward(question_lib.MULTIPLE_CHOICE, tokenizer.decode(row), "B")
    for row in ids
  ]
  # The host's rule stops at a space behind a full stop; see `first_letters`.
  expected[texts.index(". B")] = 1.0
  np.testing.assert_array_equal(got, expected)


def test_only_a_token_without_a_letter_leaves_an_answer_open():
  tokenizer = tiny.checkpoint().tokenizer
  letters = rollout.first_letters(tokenizer, tokenizer.vocab_size)
  decided = rollout.RolloutConfig().decided(jnp.asarray(letters))
  for token in range(tokenizer.vocab_size):
    text = tokenizer.decode([token])
    # The host's rule, and spaces behind full stops do not count here.
    read = text.strip().strip(".").strip()
    assert bool(decided(token)) == bool(read), text
  for token in (*tokenizer.eos_ids, tokenizer.pad_id):
    assert not decided(token)


def whole(answers, target):
  return target.letters[answers.ids].sum(axis=-1)


@pytest.mark.parametrize("reward", ["log_likelihood", "margin", whole])
def test_rewards_that_read_whole_answers_stop_nothing(reward):
  config = rollout.RolloutConfig(reward=reward)
  assert config.decided(jnp.zeros(3, int)) is None


def test_question_without_a_letter_earns_nothing():
  letters = jnp.array([65, 66])
  ids = jnp.array([[0], [1]])
  target = rollout.Target(jnp.int32(-1), None, letters)
  got = rollout.accuracy(rollout.Answers(ids, None), target)
  np.testing.assert_array_equal(got, [0, 0])


def test_graded_rewards_by_hand():
  logits = jnp.log(jnp.array([[0.5, 0.2, 0.2, 0.1], [0.1, 0.6, 0.2, 0.1]]))
  options = jnp.array([0, 2, 3, -1])  # Token 1 is no option.
  given = rollout.Answers(None, logits), rollout.Target(2, options, None)
  likelihood = rollout.log_likelihood(*given)
  np.testing.assert_allclose(likelihood, np.log([0.2, 0.2]), rtol=1e-5)
  margin = rollout.margin(*given)
  np.testing.assert_allclose(margin, np.log([0.2 / 0.5, 0.2 / 0.1]), rtol=1e-5)


@pytest.mark.parametrize(
  "changes",
  [
    {"reward": "luck"},
    {"marking": "nowhere"},
    {"max_new_tokens": 0},
    {"reward": "margin", "marking": "host"},
  ],
)
def test_mistakes_are_named(changes):
  with pytest.raises(errors.UserError, match="rollout"):
    rollout.RolloutConfig(**changes)


def test_words_of_another_name_are_refused():
  with pytest.raises(errors.UserError, match="rouge is 'ascii'; it must be"):
    rollout.RolloutConfig(rouge="ascii")
