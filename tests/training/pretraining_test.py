"""Losses and layouts of the base model's pretraining."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cacovid_jax.data.synthetic import world
from cacovid_jax.models import llava_onevision, pruning
from cacovid_jax.training import pretraining

NUM_VIDEO, WIDTH, QUESTIONS, LENGTH = 64, 32, 3, 6
PREFIX = (5, 6)


@functools.cache
def tiny():
  model = llava_onevision.LlavaOnevisionModel(
    llava_onevision.LlavaOnevisionConfig.tiny()
  )
  # Drawn by NumPy: compiling the initialisers takes seconds.
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda leaf: rng.normal(0, 0.1, leaf.shape).astype(np.float32),
    jax.eval_shape(model.init, jax.random.key(0)),
  )
  return model, params


def inputs(seed=0, batch=2):
  rng = np.random.default_rng(seed)
  features = rng.normal(size=(batch, NUM_VIDEO, WIDTH)).astype(np.float32)
  ids = rng.integers(2, 60, (batch, QUESTIONS, LENGTH)).astype(np.int32)
  return features, ids


def layout():
  return pretraining.Prompts(PREFIX, NUM_VIDEO, QUESTIONS, LENGTH)


def whole_prompt(ids):
  """Returns int32[L] ids of one unpacked prompt."""
  video = [0] * (NUM_VIDEO + 1)
  return np.array([*PREFIX, *video, *ids], np.int32)


@functools.cache
def separate():
  """Returns logits [B, Q, A, V] of every question asked on its own."""
  model, params = tiny()
  features, ids = inputs()

  @jax.jit
  def logits(ids, features):
    x = model.embed_prompt(params, ids, features, len(PREFIX))[None]
    positions = jnp.arange(x.shape[1])[None, None]
    hidden, _ = model.forward(params, x, positions)
    return model.logits(params, hidden[0, -LENGTH:])

  return np.stack(
    [
      [logits(whole_prompt(row), features[b]) for row in ids[b]]
      for b in range(len(ids))
    ]
  )


def test_packed_questions_are_answered_as_separate_prompts():
  model, params = tiny()
  features, ids = inputs()
  packed = jax.jit(
    lambda f, i: pretraining.packed_logits(model, params, layout(), f, i)
  )(features, ids)
  np.testing.assert_allclose(packed, separate(), atol=2e-5)


def test_the_packed_mask_by_hand():
  mask = pretraining.Prompts((1,), 1, 2, 2).packed_mask()
  # Prefix, video token, newline; two questions of two tokens each.
  expected = """
    1......
    11.....
    111....
    1111...
    11111..
    111..1.
    111..11
  """.split()
  found = ["".join("1" if seen else "." for seen in row) for row in mask]
  assert found == expected
  positions = pretraining.Prompts((1,), 1, 2, 2).packed_positions()
  assert positions.tolist() == [0, 1, 2, 3, 4, 3, 4]


def pruned(ids, index, valid, **options):
  model, params = tiny()
  features, _ = inputs()
  return jax.jit(
    lambda i, k, v: pretraining.pruned_logits(
      model, params, layout(), features, i, k, v, **options
    )
  )(ids, index, valid)


def subsets(num_keep=7):
  rng = np.random.default_rng(1)
  shape = (2, QUESTIONS)
  index = np.zeros((*shape, num_keep), np.int32)
  valid = np.zeros((*shape, num_keep), bool)
  for place in np.ndindex(shape):
    count = int(rng.integers(2, num_keep + 1))
    index[place][:count] = np.sort(rng.permutation(NUM_VIDEO)[:count])
    valid[place][:count] = True
  return index, valid


def test_pruned_questions_are_answered_as_by_the_pruning_of_rollouts():
  model, params = tiny()
  features, ids = inputs()
  index, valid = subsets()
  num_keep = index.shape[-1]
  length = len(PREFIX) + NUM_VIDEO + 1 + LENGTH
  found, _ = pruned(ids, index, valid)

  @jax.jit
  def expected(ids, features, index, count):
    x = model.embed_prompt(params, ids, features, len(PREFIX))
    rows, new_length = pruning.pruned_rows(
      index,
      count,
      video_start=len(PREFIX),
      num_video=NUM_VIDEO,
      length=length,
      out_length=length - NUM_VIDEO + num_keep,
    )
    hidden, _ = model.forward(
      params, x[rows][None], rows[None, None], lengths=new_length[None]
    )
    text = new_length - LENGTH + jnp.arange(LENGTH)
    return model.logits(params, hidden[0, text])

  for b, q in np.ndindex(2, QUESTIONS):
    alone = expected(
      whole_prompt(ids[b, q]), features[b], index[b, q], valid[b, q].sum()
    )
    np.testing.assert_allclose(found[b, q], alone, atol=2e-5)


def test_video_tokens_read_the_question_in_two_way_rows_only():
  _, ids = inputs()
  index, valid = subsets()
  two_way = np.tile(np.array([LENGTH - 1, 0, LENGTH - 1], np.int32), (2, 1))
  _, first = pruned(ids, index, valid, two_way=two_way)
  changed = ids.copy()
  changed[:, :, 2] += 1
  logits, second = pruned(changed, index, valid, two_way=two_way)
  moved = np.abs(np.asarray(first) - np.asarray(second)).max(-1)  # [B, Q, K]
  assert (moved[:, 1] == 0).all()
  assert (moved[:, [0, 2]][valid[:, [0, 2]]] > 1e-6).all()
  # The answer, behind the question, is never seen ahead.
  answered = changed.copy()
  answered[:, :, -1] += 1
  later, third = pruned(answered, index, valid, two_way=two_way)
  np.testing.assert_array_equal(second, third)
  np.testing.assert_array_equal(logits[:, :, :-1], later[:, :, :-1])


def test_random_subsets_hold_the_decisive_tokens():
  rng = np.random.default_rng(0)
  decisive = np.full((4, 5, 6), -1, np.int16)
  for place in np.ndindex(4, 5):
    count = int(rng.integers(0, 6))
    decisive[place][:count] = rng.permutation(50)[:count]
  sizes = rng.integers(6, 13, (4, 5)).astype(np.int32)
  index, valid = pretraining.random_subsets(
    jax.random.key(0), decisive, sizes, num_video=50, num_keep=12
  )
  index, valid = np.asarray(index), np.asarray(valid)
  for place in np.ndindex(4, 5):
    kept = index[place][valid[place]].tolist()
    assert valid[place].tolist() == [i < sizes[place] for i in range(12)]
    assert kept == sorted(set(kept)) and len(kept) == sizes[place]
    wanted = set(decisive[place].tolist()) - {-1}
    assert wanted <= set(kept)
  # What is kept besides differs from row to row.
  assert len({tuple(row) for row in index.reshape(20, 12)}) > 15


def cross_entropy(logits, label):
  logits = logits.astype(np.float64)
  return np.log(np.exp(logits).sum()) - logits[label]


def test_the_label_loss_against_a_loop():
  rng = np.random.default_rng(0)
  tokens = world.NUM_TOKENS
  classes = (8, 4, 8)
  logits = rng.normal(size=(1, tokens, 35)).astype(np.float32)
  labels = np.full((1, tokens, 3), -1, np.int8)
  for token in rng.permutation(tokens)[:40]:
    labels[0, token] = [rng.integers(size) for size in classes]
  foreground, background, places = [], [], []
  attributes = []
  for token in range(tokens):
    z, label = logits[0, token].astype(np.float64), labels[0, token]
    if label[0] >= 0:
      foreground.append(np.log1p(np.exp(-z[0])))
      starts = (1, 9, 13)
      attributes.append(
        sum(
          cross_entropy(z[start : start + size], value)
          for start, size, value in zip(starts, classes, label, strict=True)
        )
      )
    else:
      background.append(np.log1p(np.exp(z[0])))
    row, col = divmod(token % 49, 7)
    places.append(cross_entropy(z[21:28], row) + cross_entropy(z[28:35], col))
  # Means over objects and over the rest; one token is added to each count, so
  # that a clip without objects divides by something.
  expected = (
    sum(foreground) / (len(foreground) + 1)
    + sum(background) / (len(background) + 1)
    + sum(attributes) / (len(attributes) + 1)
    + np.mean(places)
  )
  found = pretraining.label_loss(jnp.asarray(logits), labels)
  np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_tokens_of_the_size_of_words_cost_nothing():
  table = np.random.default_rng(0).normal(size=(50, 8)).astype(np.float32)
  table /= np.sqrt(np.square(table).mean())
  features = np.ones((2, 3, 8), np.float32)
  size_loss = pretraining.size_loss
  np.testing.assert_allclose(size_loss(features, table), 0, atol=1e-6)
  # By hand: e times the size is a difference of 1 in its logarithm.
  np.testing.assert_allclose(size_loss(np.e * features, table), 1, rtol=1e-4)
  pulled = jax.grad(size_loss, argnums=1)(features * 2, table)
  assert not np.any(pulled)


@pytest.mark.parametrize("kept", ["decisive", "random"])
def test_probe_rules_keep_their_budget(kept):
  rules = pretraining.probe_rules(world.NUM_TOKENS)
  decisive = np.array([700, 3, 90, -1, -1], np.int16)
  for name, (rule, num_keep) in rules.items():
    if not name.startswith(kept):
      continue
    assert num_keep == int(float(name.split("_")[1]) * world.NUM_TOKENS)
    index = np.asarray(rule(jax.random.key(0), None, decisive))
    assert len(set(index.tolist())) == num_keep
    if kept == "decisive":
      assert {700, 3, 90} <= set(index.tolist())
