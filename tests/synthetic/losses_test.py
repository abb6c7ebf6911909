"""Losses and layouts of the base model's pretraining."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cacovid_jax.models import llava_onevision, prompt_batch
from cacovid_jax.policy import network
from cacovid_jax.synthetic import losses, packed, pretraining, questions, world

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


def head(prefix, num_video):
  """Returns the one head: prefix, video, newline."""
  length = len(prefix) + num_video + 1
  ids = np.zeros(length, np.int32)
  ids[: len(prefix)] = prefix
  rows = len(prefix) + np.arange(num_video)
  text = [*range(len(prefix)), length - 1]
  parts = ids, np.arange(length)[None], rows, length, length, text
  return packed.Heads(*(np.int32(part)[None] for part in parts))


def layout():
  heads = head(PREFIX, NUM_VIDEO)
  return packed.PackedPrompts(tiny()[0], heads, None)


VIDEO_ROWS = len(PREFIX) + np.arange(NUM_VIDEO)


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
    x = model.embed_prompt(params, ids, features, VIDEO_ROWS)[None]
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
  found = jax.jit(lambda f, i: layout().full_logits(params, f, i))(
    packed.TowerOutput(features), ids
  )
  np.testing.assert_allclose(found, separate(), atol=2e-5)


def test_what_a_question_sees_by_hand():
  # Two heads: prefix, video token, newline; the same without a newline.
  heads = head((1,), 1)
  both = [jnp.concatenate([x, x]) for x in heads]
  heads = packed.Heads(*both)._replace(length=np.int32([3, 2]))
  prompts = packed.PackedPrompts(None, heads, None)
  mask = prompts.question_mask(prompts.chosen(np.array([0, 1]), 2), 2)
  found = [["".join(".1"[int(x)] for x in row) for row in one] for one in mask]
  assert found == [["1111.", "11111"], ["11.1.", "11.11"]]
  prompts = packed.PackedPrompts(None, head((1,), 1), None)
  mask = prompts.question_mask(prompts.chosen(None, 3), 2)
  assert mask.tolist() == [[[True] * 4 + [False], [True] * 5]]


def pruned(ids, index, valid, merged=None, features=None):
  model, params = tiny()
  features = inputs()[0] if features is None else features
  return jax.jit(functools.partial(layout().pruned_logits, params))(
    packed.TowerOutput(features), ids, index, valid, merged
  )


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
  length = len(PREFIX) + NUM_VIDEO + 1 + LENGTH
  found = pruned(ids, index, valid)

  @jax.jit
  def expected(ids, features, index, count):
    x = model.embed_prompt(params, ids, features, VIDEO_ROWS)
    rows, new_length, _ = prompt_batch.kept_rows(
      index, count, video_rows=VIDEO_ROWS, length=length, num_rows=length
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


def test_merged_tokens_are_means_of_those_next_to_them():
  features, ids = inputs()
  index, valid = subsets()
  share = np.float32([[0.0, 0.5, 1.0], [0.25, 1.0, 0.0]])
  found = pruned(ids, index, valid, share)
  for b, q in np.ndindex(share.shape):
    kept = index[b, q][valid[b, q]]
    unit = features[b] / np.linalg.norm(features[b], axis=-1, keepdims=True)
    nearest = [kept[np.argmax(unit[kept] @ token)] for token in unit]
    merged = features.copy()
    for token in kept:
      mean = features[b][np.equal(nearest, token)].mean(0)
      merged[b, token] += share[b, q] * (mean - merged[b, token])
    alone = pruned(ids, index, valid, features=merged)
    np.testing.assert_allclose(found[b, q], alone[b, q], atol=2e-5)


def test_rows_are_merged_as_often_as_said():
  batch = {"decisive": np.zeros((500, 4, 2), np.int16)}
  config = types.SimpleNamespace(merged_share=0.3)
  found = losses.merged_shares(jax.random.key(0), batch, config)
  assert found.shape == (500, 4)
  # Five standard deviations of 2000 draws.
  assert abs((found > 0).mean() - 0.3) < 0.052
  assert abs(found[found > 0].mean() - 0.5) < 0.06
  config.merged_share = 0.0
  assert losses.merged_shares(jax.random.key(0), batch, config) is None


def test_answers_are_lost_from_merged_tokens(monkeypatch):
  features, ids = inputs()
  given = []

  def pruned_logits(*args):
    given.extend(args)
    raise InterruptedError

  prompts = types.SimpleNamespace(
    model=tiny()[0],
    encode=lambda *_: packed.TowerOutput(features),
    full_logits=lambda *_: None,
    pruned_logits=pruned_logits,
  )
  monkeypatch.setattr(losses, "draw_frames", lambda *_: jnp.zeros(1))
  monkeypatch.setattr(losses, "lossy_subsets", lambda *_: ("index", "valid"))
  config = types.SimpleNamespace(merged_share=1.0)
  batch = {"ids": ids, "target": ids, "decisive": np.zeros((2, QUESTIONS, 2))}
  with pytest.raises(InterruptedError):
    losses.answer_losses(
      prompts,
      {"model": {}},
      jax.random.key(0),
      batch,
      config=config,
      word_ids=None,
    )
  *_, index, valid, merged, _ = given
  assert (index, valid, merged.shape) == ("index", "valid", (2, QUESTIONS))
  assert (merged > 0).all()


def test_the_first_layer_reads_as_a_new_policy_does():
  model, params = tiny()
  features, ids = inputs()
  ids, lengths = ids[:, 0], np.array([3, 5], np.int32)

  @jax.jit
  def read(ids):
    video = packed.TowerOutput(features)
    return layout().first_layer(params, video, ids, lengths)

  policy = network.Policy.from_llm_config(model.config.text, num_halvings=1)
  layer = policy.init_from_llm(jax.random.key(0), params)

  @jax.jit
  def encoded(ids, features, length):
    x = model.embed_prompt(params, ids, features, VIDEO_ROWS)
    positions = jnp.arange(len(x))[None]
    total = layout().text_start + length
    h = policy.apply({"params": layer}, x, positions, total, method="_encode")
    return h[len(PREFIX) : len(PREFIX) + NUM_VIDEO]

  found = np.asarray(read(ids))
  for row in range(2):
    alone = encoded(whole_prompt(ids[row]), features[row], lengths[row])
    np.testing.assert_allclose(found[row], alone, atol=2e-5)
  # It reads the question, and not the answer behind it.
  asked, answered = ids.copy(), ids.copy()
  asked[:, 2] += 1
  answered[:, 5] += 1
  assert (np.abs(found - np.asarray(read(asked))).max((1, 2)) > 1e-6).all()
  np.testing.assert_array_equal(found, read(answered))


def test_random_subsets_hold_the_decisive_tokens():
  rng = np.random.default_rng(0)
  decisive = np.full((4, 5, 6), -1, np.int16)
  for place in np.ndindex(4, 5):
    count = int(rng.integers(0, 6))
    decisive[place][:count] = rng.permutation(50)[:count]
  sizes = rng.integers(6, 13, (4, 5)).astype(np.int32)
  index, valid = losses.random_subsets(
    jax.random.key(0), decisive, sizes, np.zeros((4, 5, 50)), num_keep=12
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


def test_lossy_subsets_miss_tokens_and_crowd_objects_as_often_as_said():
  rng = np.random.default_rng(0)
  shape, num_video = (40, 25), 100
  owned = np.arange(num_video) < 60
  labels = np.where(owned, 2, -1)[None, :, None].repeat(40, 0).repeat(3, 2)
  # Among the tokens without an object, so that both can be told apart.
  decisive = np.stack([60 + rng.permutation(40)[:4] for _ in range(1000)])
  batch = {
    "decisive": decisive.reshape(*shape, 4).astype(np.int16),
    "labels": labels.astype(np.int8),
  }
  config = types.SimpleNamespace(
    min_keep=20, num_keep=30, lossy_share=0.3, crowded_share=0.6
  )
  index, valid = jax.jit(lambda rng: losses.lossy_subsets(rng, batch, config))(
    jax.random.key(1)
  )
  kept = [
    set(i[v].tolist())
    for i, v in zip(
      np.asarray(index).reshape(1000, -1),
      np.asarray(valid).reshape(1000, -1),
      strict=True,
    )
  ]
  sizes = np.array([len(k) for k in kept])
  assert sizes.min() == 20 and sizes.max() == 30
  found = np.array(
    [len(k & set(d)) for k, d in zip(kept, decisive.tolist(), strict=True)]
  )
  # A lossy row loses a uniform share of its four: all are left in one of
  # five. Chance brings a few back.
  whole = (found == 4).mean()
  assert 0.73 < whole < 0.83
  assert (found == 0).mean() > 0.02
  objects = np.array([len({t for t in k if t < 60}) for k in kept]) / (
    sizes - found
  )
  # Nearly nothing but objects in crowded rows, their share in the others.
  crowded = objects > 0.93
  assert 0.55 < crowded.mean() < 0.65
  assert 0.55 < objects[~crowded].mean() < 0.7


def cross_entropy(logits, label):
  logits = logits.astype(np.float64)
  return np.log(np.exp(logits).sum()) - logits[label]


def test_the_label_loss_against_a_loop():
  rng = np.random.default_rng(0)
  tokens = world.SMALL.num_tokens
  classes = (8, 4, 8)
  logits = rng.normal(size=(1, tokens, 25)).astype(np.float32)
  labels = np.full((1, tokens, 3), -1, np.int8)
  for token in rng.permutation(tokens)[:40]:
    labels[0, token] = [rng.integers(size) for size in classes]
  foreground, background, attributes, places = [], [], [], []
  for token in range(tokens):
    z, label = logits[0, token].astype(np.float64), labels[0, token]
    row, col = divmod(token % 49, 7)
    if label[0] >= 0:
      if row != 3 and col != 3:
        side = ("north", "south")[row > 3] + ("west", "east")[col > 3]
        place = questions.PLACES.index(side)
        places.append(cross_entropy(z[21:25], place))
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
  # Means over objects and over the rest; one token is added to each count, so
  # that a clip without objects divides by something.
  expected = (
    sum(foreground) / (len(foreground) + 1)
    + sum(background) / (len(background) + 1)
    + sum(attributes) / (len(attributes) + 1)
    + sum(places) / (len(places) + 1)
  )
  found = losses.label_loss(jnp.asarray(logits), labels)
  np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_tokens_of_the_size_of_words_cost_nothing():
  table = np.random.default_rng(0).normal(size=(50, 8)).astype(np.float32)
  table /= np.sqrt(np.square(table).mean())
  features = np.ones((2, 3, 8), np.float32)
  size_loss = losses.size_loss
  np.testing.assert_allclose(size_loss(features, table), 0, atol=1e-6)
  # By hand: e times the size is a difference of 1 in its logarithm.
  np.testing.assert_allclose(size_loss(np.e * features, table), 1, rtol=1e-4)
  pulled = jax.grad(size_loss, argnums=1)(features * 2, table)
  assert not np.any(pulled)


@pytest.mark.parametrize("kept", ["decisive", "random"])
def test_probe_rules_keep_their_budget(kept):
  rules = pretraining.probe_rules(world.SMALL.num_tokens)
  decisive = np.array([700, 3, 90, -1, -1], np.int16)
  for name, rule in rules.items():
    if not name.startswith(kept):
      continue
    num_keep = int(float(name.split("_")[1]) * world.SMALL.num_tokens)
    index = np.asarray(rule(jax.random.key(0), decisive))
    assert len(set(index.tolist())) == num_keep
    if kept == "decisive":
      assert {700, 3, 90} <= set(index.tolist())


def test_layers_take_steps_of_one_size_in_all_directions():
  config = types.SimpleNamespace(
    lr=0.1, warmup_steps=1, num_steps=1000, weight_decay=0.0, norm_rate=1.0
  )
  tx, schedule = pretraining.make_tx(config)
  params = {
    "layers": {"kernel": jnp.zeros((3, 8, 16)), "scale": jnp.zeros((3, 8))},
    "embed_tokens": jnp.zeros((20, 8)),
  }
  rng = np.random.default_rng(0)
  grads = jax.tree.map(
    lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), params
  )
  state = tx.init(params)
  for _ in range(2):  # The rate of the first one is 0.
    updates, state = tx.update(grads, state, params)
  lr = float(schedule(1))
  # Orthogonal, with entries as large as AdamW's; Newton and Schulz's
  # iterations leave singular values between 0.7 and 1.2.
  for layer, grad in zip(
    updates["layers"]["kernel"], grads["layers"]["kernel"], strict=True
  ):
    left, _, right = np.linalg.svd(np.asarray(grad), full_matrices=False)
    sizes = np.diag(left.T @ np.asarray(-layer) @ right.T) / (lr * 0.2 * 4.0)
    assert (sizes > 0.6).all() and (sizes < 1.3).all()
  for update, grad in (
    (updates["layers"]["scale"], grads["layers"]["scale"]),
    (updates["embed_tokens"], grads["embed_tokens"]),
  ):
    # Of the sign alone, a little longer by Nesterov's momentum.
    np.testing.assert_allclose(update, -lr * np.sign(grad), rtol=0.2)
