"""Answers from few rows: against the whole prompt, loops, and two studies."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cacovid_jax import compressors, errors
from cacovid_jax.compressors import base
from cacovid_jax.related import answers as answers_lib
from cacovid_jax.related import clips as clips_lib
from cacovid_jax.related import quecc, quecc_llm, vqtoken
from cacovid_jax.related import study as study_lib
from cacovid_jax.synthetic import packed, world
from configs import related_systems


@pytest.fixture(scope="module")
def answers():
  """Returns those of two dense clips to train on, and one to test on."""
  return answers_lib.Answers("dense", (2, 1))


def test_train_and_test_ask_about_other_clips(answers):
  train, test = answers.asked("train"), answers.asked("test")
  assert train.features.shape == (2, 784, 128) and test.features.shape[0] == 1
  assert set(np.asarray(train.clip)) == {0, 1}
  decode = answers.experiment.loaded.tokenizer.decode
  told = [decode(row.tolist()) for row in np.asarray(train.ids)]
  assert not set(told) & {decode(row.tolist()) for row in np.asarray(test.ids)}
  for row, letter in zip(np.asarray(train.ids), train.letter, strict=True):
    assert decode([int(row[letter])]) in "ABCD"


def test_all_rows_at_their_places_are_the_whole_video(answers):
  asked = answers.asked("test")
  features, ids, letter = asked.take(np.arange(8))
  order = np.random.default_rng(0).permutation(784)  # Rows in any order.
  index = jnp.broadcast_to(jnp.asarray(order), (2, 784))
  given = features[:2, order], index, ids[:2], letter[:2]
  found = jax.jit(answers.logits)(answers.params, *given)
  video = packed.TowerOutput(features[:1])
  told = jax.jit(answers.prompts.full_logits)(answers.params, video, ids[None])
  expected = told[0, np.arange(2), letter[:2] - 1]
  np.testing.assert_allclose(found, expected, atol=2e-3)
  # The loss, by hand.
  shifted = np.asarray(found, np.float64)
  logs = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
  right = [logs[i, int(ids[i, letter[i]])] for i in range(2)]
  loss = jax.jit(answers.loss)(answers.params, *given)
  assert loss == pytest.approx(-np.mean(right), abs=1e-6)


def test_a_distillation_asks_for_what_the_whole_clip_gives(answers):
  asked, heard = answers.asked("train"), answers.heard()
  length = asked.ids.shape[1]
  assert heard.shape == (len(asked.ids), 11, length, 2 * 2 * 32)
  which = np.array([len(asked.ids) - 1])
  features, ids, letter = asked.take(which)
  # Keys and values of a whole prompt, which is read as any other.
  model, head = answers.prompts.model, answers.prompts.chosen(None, 1)
  end = head.following[0] + jnp.arange(length)

  @jax.jit
  def rows(params, features, ids):
    whole = jnp.concatenate([head.ids[0], ids])
    video = features, head.video_rows[0]
    x = model.embed_prompt(params, whole, *video)[None]
    positions = jnp.concatenate([head.positions, end[None, None]], axis=-1)
    _, out = model.forward(params, x, positions, want_cache=True)
    found = [jnp.stack(out[name])[:, 0] for name in ("keys", "values")]
    return jnp.concatenate(found, axis=-1)[:, -length:].reshape(12, length, -1)

  found, blank = (
    rows(answers.params, x, ids[0]) for x in (features[0], 0 * features[0])
  )
  told = np.asarray(heard[which], np.float32)
  np.testing.assert_allclose(found[1:], told[0], rtol=2e-3, atol=5e-3)
  # The first layer has not seen the video, the second has.
  np.testing.assert_array_equal(found[0], blank[0])
  assert np.abs(found[1] - blank[1]).max() > 0.05
  loss = jax.jit(answers.loss)
  given = answers.params, features, jnp.arange(784)[None], ids, letter
  plain, near = loss(*given), loss(*given, told)
  assert plain < near < plain + 1e-4
  # What else is asked for, by NumPy; from the letter on nothing is.
  far = told + np.float32(np.random.default_rng(0).normal(size=told.shape))
  before = np.s_[0, :, : letter[0]]
  square = np.square(far - told)[before].mean(axis=1)
  expected = (square / far[before].var(axis=1)).mean()
  far[0, :, letter[0] :] = 9
  assert loss(*given, far) - plain == pytest.approx(expected, rel=1e-2)


class Fewer(answers_lib.Answers):
  """All questions to train on but one of the first clip's."""

  def asked(self, split):
    asked = super().asked(split)
    left = np.delete(np.arange(len(asked.ids)), 3)
    return answers_lib.Asked(asked.features, *(x[left] for x in asked[1:]))


def test_a_clip_is_heard_once_as_each_question_alone_hears_it(answers):
  """By a loop over questions, each with a clip that is read for it."""
  fewer = Fewer("dense", (2, 1))
  asked, heard = fewer.asked("train"), fewer.heard()
  assert len(heard) == len(answers.asked("train").ids) - 1

  @jax.jit
  def alone(params, features, ids, letter):
    index = jnp.arange(784)[None]
    given = params, features, index, ids, letter
    return answers.read(*given, want_cache=True)[1][0]

  for i in (*range(9), len(heard) - 1):
    expected = alone(answers.params, *asked.take(np.array([i])))
    np.testing.assert_allclose(heard[i], expected, rtol=2e-3, atol=2e-3)


def test_variance_that_is_not_found_by_a_loop():
  rng = np.random.default_rng(0)
  found, told = rng.normal(size=(2, 3, 2, 5, 4))
  there = rng.random((3, 5)) < 0.6
  shares = []
  for layer in range(2):
    for channel in range(4):
      a, b = (x[:, layer, :, channel][there] for x in (found, told))
      shares.append(np.square(a - b).mean() / b.var())
  out = answers_lib.unlike(found, told, jnp.asarray(there))
  assert out == pytest.approx(np.mean(shares), rel=1e-5)


def test_the_questions_mean_ends_with_the_users_turn(answers):
  ids = answers.asked("test").ids[:1]
  tokenizer = answers.experiment.loaded.tokenizer
  end = list(np.asarray(ids[0])).index(tokenizer.token_id("<|im_end|>"))
  table = np.asarray(answers.params["language_model"]["embed_tokens"])
  expected = table[np.asarray(ids[0, :end])].mean(axis=0)
  np.testing.assert_allclose(answers.text(ids)[0], expected, atol=1e-5)


def test_what_is_trained_is_what_the_method_gives(answers, tmp_path):
  """`Cells` with saved weights makes the rows that training handed over."""
  module = quecc.QueCC(2, 16, 2)
  features, ids, letter = answers.asked("test").take(np.arange(1))
  x = features.reshape(*world.SMALL.grid, -1)
  text = answers.text(ids)[0]
  params = module.init(jax.random.key(0), x, text)["params"]
  given = answers, module, params, features, ids, letter
  rows, index = quecc_llm.compress(*given)
  quecc.save(tmp_path / "w.safetensors", params)
  own = compressors.get(
    "cacovid_jax.related.quecc:Cells"
    f"?weights={tmp_path}/w.safetensors&width=16&heads=2"
  )
  inputs = base.CompressorInputs(
    features=features[0], grid=world.SMALL.grid, text=text[None]
  )
  found = own.select(inputs, num_keep=64, params=own.load())
  order = np.argsort(index[0])
  np.testing.assert_array_equal(found.index, index[0][order])
  np.testing.assert_allclose(found.features, rows[0][order], atol=1e-4)


def test_the_policy_reads_the_question(answers):
  spec = "cacovid?importance_ratio=1.0&budget=clip"
  given = answers.asked("test").take(np.arange(4))
  choose = jax.jit(functools.partial(answers.method(spec, 16), None))
  rows, index = choose(*given)
  assert rows.shape == (4, 16, 128) and (np.diff(index, axis=1) > 0).all()
  assert len({tuple(one) for one in np.asarray(index)}) == 4
  # What is asked behind the turn's end, the answer, changes nothing.
  features, ids, letter = given
  other = ids.at[jnp.arange(4), letter].set(7)
  np.testing.assert_array_equal(choose(features, other, letter)[1], index)


def test_a_trained_map_starts_as_nothing_and_is_one_of_single_tokens(answers):
  """A map of means is the mean of mapped tokens, by a loop."""
  features = answers.asked("test").features
  rows = clips_lib.rows_of(
    jax.random.key(0), features, spec="vqtoken", num_keep=12
  )
  method = compressors.get("vqtoken")
  found = method.select(
    base.CompressorInputs(
      features=features[0], grid=world.SMALL.grid,
      rng=jax.random.fold_in(jax.random.key(0), 0),
    ),
    num_keep=12,
  )  # fmt: skip
  rng = np.random.default_rng(1)
  kernel, bias = 0.1 * rng.normal(size=(128, 128)), rng.normal(size=128)
  mapped = vqtoken.mapped(
    {"kernel": np.float32(kernel), "bias": np.float32(bias)}, rows.rows[0]
  )
  for k in range(12):
    members = np.asarray(features[0])[np.asarray(found.assign) == k]
    each = [v + v @ kernel + bias for v in members]
    np.testing.assert_allclose(mapped[k], np.mean(each, axis=0), atol=1e-3)
  assert vqtoken.mapped({}, rows.rows) is rows.rows


@pytest.mark.parametrize(
  "module, arms", [(quecc_llm, 7), (vqtoken, 7)], ids=["quecc_llm", "vqtoken"]
)
def test_the_smallest_study_runs(module, arms, tmp_path):
  name = module.__name__.rpartition(".")[2]
  config = related_systems.get_config("debug")[name]
  study = module.study(config, None, tmp_path)
  found = [(case, 0, run(0)) for case, run in study.cases.items()]
  outcome = study_lib.Outcome(found)
  assert len(outcome.rows) == arms
  for case, arm in outcome.rows:
    assert 0 <= outcome.mean(case, arm, "accuracy") <= 1
  assert study.bars(outcome) and study.picture(outcome).startswith("<?xml")


def test_sizes_of_no_sense_are_one_line():
  config = related_systems.get_config("debug")
  config.vqtoken.sizes = (("dense", 784),)
  with pytest.raises(
    errors.UserError, match="784 clusters of 784 tokens; give"
  ):
    vqtoken.study(config.vqtoken, None)
  config.quecc_llm.sizes = (("dense", 5),)
  with pytest.raises(errors.UserError, match="5 x 5 cells do not fit"):
    quecc_llm.study(config.quecc_llm, None)
  for own, module in ((config.vqtoken, vqtoken), (config.quecc_llm, quecc_llm)):
    own.sizes = ()
    with pytest.raises(errors.UserError, match="sizes: give at least one"):
      module.study(own, None)
  config.quecc_llm.update(sizes=(("dense", 1),), heads=3)
  with pytest.raises(errors.UserError, match="width 16: give a multiple of he"):
    quecc_llm.study(config.quecc_llm, None)
  config.quecc_llm.update(heads=2, policy="nowhere")
  study = quecc_llm.study(config.quecc_llm, None)
  with pytest.raises(errors.UserError, match="nowhere"):
    next(iter(study.cases.values()))(0)
