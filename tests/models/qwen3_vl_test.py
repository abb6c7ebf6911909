"""Qwen3-VL against golden/qwen3_vl_tiny, stage by stage.

The golden folder was made with transformers 5.24 in float32. In its prompts
text stands between the temporal patches; one of them is also run without two of
three video tokens, all text, positions and auxiliary features kept.
"""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cacovid_jax import compressors
from cacovid_jax.compressors import base, layerwise
from cacovid_jax.models import (
  checkpoints,
  generation,
  processors,
  prompt_batch,
  token_grid,
)

FOLDER = pathlib.Path(__file__).parents[1] / "golden" / "qwen3_vl_tiny"


@pytest.fixture(scope="module", autouse=True)
def _exact():
  with jax.default_matmul_precision("highest"):
    yield


@pytest.fixture(scope="module")
def loaded():
  checkpoint = checkpoints.load(FOLDER)
  return checkpoint.model, checkpoint.params


@pytest.fixture(scope="module")
def golden():
  with np.load(FOLDER / "golden.npz") as file:
    return dict(file)


@pytest.fixture(scope="module")
def videos(loaded, golden):
  """The encoded clips, and the tower's stages of both in a row."""
  model, params = loaded
  encode = jax.jit(
    lambda params, inputs: (
      model.encode(params, inputs),
      model.encode_stages(params, inputs)[1],
    )
  )
  found, stages, start = [], [], 0
  for T, height, width in golden["video_grid_thw"].tolist():
    end = start + T * height * width
    inputs = model.tower_inputs(
      processors.TowerInputs(
        golden["pixel_values_videos"][start:end], (T, height // 2, width // 2)
      )
    )
    video, stage = jax.device_get(encode(params, inputs))
    found.append(video)
    stages.append(stage)
    start = end
  return found, jax.tree.map(lambda *x: np.concatenate(x, axis=-2), *stages)


@pytest.fixture(scope="module")
def prompts(loaded, golden, videos):
  """Each whole prompt, right padded: a list of `PromptBatch` of one."""
  model, params = loaded
  embed, found = jax.jit(model.embed_prompt), []
  for row, video in enumerate(videos[0]):
    ids = _unpadded(golden, golden["input_ids"], row)
    positions, following = model.positions(ids, video)
    rows = np.flatnonzero(ids == model.config.video_token_id)
    batch = prompt_batch.PromptBatch(
      x=embed(params, ids, video.features, rows),
      positions=positions,
      lengths=np.int32(len(ids)),
      video_rows=np.int32(rows),
      next_position=np.int32(following),
      deep=video.deep,
    )
    found.append(jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], batch))
  return found


def _unpadded(golden, array, row):
  return array[row][golden["attention_mask"][row] == 1]


def _close(actual, expected, tolerance=2e-5):
  tolerance *= max(1.0, np.abs(expected).max() / 8)
  np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance)


@functools.partial(
  jax.jit, static_argnums=0, static_argnames=("want_hidden", "want_attention")
)
def _read(model, params, batch, *, want_hidden=False, want_attention=False):
  hidden, out = model.forward(
    params,
    batch.x,
    batch.positions,
    deep=batch.deep,
    video_rows=batch.video_rows,
    want_hidden=want_hidden,
    want_attention=want_attention,
  )
  return hidden, out, model.logits(params, hidden)


@functools.partial(jax.jit, static_argnums=(0, 3))
def _greedy(model, params, batch, num_new):
  """Returns the ids of a prefill and of the steps after it."""
  logits, cache, _ = model.prefill(
    params,
    batch.x,
    batch.positions,
    batch.lengths,
    cache_length=batch.x.shape[1] + num_new - 1,
    deep=batch.deep,
    video_rows=batch.video_rows,
  )
  return generation.extend(
    model,
    params,
    logits,
    cache,
    batch.next_position,
    max_new_tokens=num_new,
    eos_ids=(),
    pad_id=0,
  )


def _run_layers(model):
  return jax.jit(model.run_layers, static_argnames=("first", "last"))


def test_tower_mergers_and_auxiliary_features(loaded, golden, videos):
  found, stages = videos
  for name in ("patch_embed", "vision_tower_output"):
    _close(stages[name], golden[name], 3e-5)
  features = np.concatenate([video.features for video in found])
  _close(features, golden["video_features"])
  deep = np.concatenate([video.deep for video in found], axis=1)
  _close(deep, golden["deepstack_features"])
  assert loaded[0].num_deep == len(deep) == 3


def test_positions_leave_time_to_the_text(golden, prompts):
  for row, batch in enumerate(prompts):
    expected = np.stack(
      [_unpadded(golden, one, row) for one in golden["position_ids"]]
    )
    np.testing.assert_array_equal(batch.positions[0], expected)
    delta = batch.next_position - batch.lengths
    assert delta == golden["rope_deltas"][row]


def test_every_layer_and_the_logits(loaded, golden, prompts):
  for row, batch in enumerate(prompts):
    hidden, out, logits = _read(*loaded, batch, want_hidden=True)
    states = golden["hidden_states"][:, row]
    states = states[:, golden["attention_mask"][row] == 1]
    # Of the last layer the file holds what the norm made of it.
    for mine, theirs in zip(
      [batch.x[0], *out["hidden"][:-1, 0], hidden[0]], states, strict=True
    ):
      _close(mine, theirs, 3e-5)
    _close(logits[0], _unpadded(golden, golden["logits"], row), 1e-4)


def test_pruned_logits_with_text_between_the_patches(loaded, golden, prompts):
  model, params = loaded
  rows = golden["pruned_keep_index"] - (golden["attention_mask"][0] == 0).sum()
  index = np.flatnonzero(np.isin(prompts[0].video_rows[0], rows))
  alone = jax.tree.map(lambda leaf: leaf[0], prompts[0])
  taken, pruned = prompt_batch.prune(alone, index, len(index))
  np.testing.assert_array_equal(taken, rows)
  pruned = jax.tree.map(lambda leaf: leaf[None], pruned)
  _, _, logits = _read(model, params, pruned)
  _close(logits, golden["pruned_logits"], 1e-4)
  # They matter: without them the logits are elsewhere.
  _, _, without = _read(model, params, pruned._replace(deep=None))
  assert np.abs(without - golden["pruned_logits"]).max() > 1


def test_prefill_and_greedy_answers(loaded, golden, prompts):
  model, params = loaded
  for row, batch in enumerate(prompts):
    ids = _greedy(model, params, batch, golden["generated_ids"].shape[1])
    np.testing.assert_array_equal(ids[0], golden["generated_ids"][row])


def test_slices_of_layers_add_what_all_layers_add(loaded, prompts):
  model, params = loaded
  batch = prompts[1]
  run = functools.partial(
    _run_layers(model),
    params,
    positions=batch.positions,
    lengths=batch.lengths,
    deep=batch.deep,
    video_rows=batch.video_rows,
  )
  x, *_ = run(x=batch.x, first=0, last=2)
  x, *_ = run(x=x, first=2, last=model.config.text.num_layers)
  last = jax.jit(model.final_logits)(params, x)
  _, _, logits = _read(model, params, batch)
  _close(last, logits, 1e-5)


def _frames(batch, num_frames):
  """Returns int32[L] of a prompt: a patch's tokens, and text beside them.

  Of the first patch the mark alone.
  """
  rows = np.asarray(batch.video_rows[0])
  frames = np.full(batch.x.shape[1], -1, np.int32)
  start = rows[0] - 1
  for frame, own in enumerate(rows.reshape(num_frames, -1)):
    frames[start : own[-1] + 2] = frame
    start = own[-1] + 2
  return frames


@pytest.mark.parametrize(("ratio", "drop"), [(0.6, False), (0.45, True)])
def test_tokens_dropped_between_layers_take_their_features_along(
  loaded, prompts, ratio, drop
):
  """FastV before layer 2 of 5, while layer 2 has features to add."""
  model, params = loaded
  batch, grid = prompts[0], (4, 3, 5)
  frames = _frames(batch, 4)
  if drop:
    batch = batch._replace(frames=jnp.asarray(frames)[None])
  method = compressors.get("fastv", layer=2, scale_layers=False)
  whole = prompt_batch.whole(batch)
  inputs = base.CompressorInputs(
    features=prompt_batch.read_video(batch.x, batch.video_rows), grid=grid
  )
  prefill = functools.partial(method.prefill, model, ratio=ratio, new_rows=1)
  logits, _, trace = jax.jit(prefill)(params, whole, inputs)
  # What the last token attends to most in layer 1.
  _, out, _ = _read(model, params, batch, want_attention=True)
  video_rows = np.asarray(batch.video_rows[0])
  paid = np.asarray(out["last_query_attention"])[1, 0, video_rows]
  (keep,) = [keep for _, keep in method.plan(5, 60, ratio)]
  index = np.sort(np.argsort(-paid, kind="stable")[:keep])
  assert 0 < keep < 40
  np.testing.assert_array_equal(trace.index[0], index)
  # The rest of the layers over the rows that are left, text among them.
  rows = np.setdiff1d(np.arange(batch.x.shape[1]), np.delete(video_rows, index))
  if drop:
    emptied = set(range(4)) - set((index // 15).tolist())
    assert emptied
    rows = rows[~np.isin(frames[rows], list(emptied))]
  run = functools.partial(_run_layers(model), params, lengths=batch.lengths)
  x, *_ = run(
    x=batch.x,
    positions=batch.positions,
    first=0,
    last=2,
    deep=batch.deep,
    video_rows=batch.video_rows,
  )
  x, *_ = run(
    x=x[:, rows],
    positions=batch.positions[..., rows],
    lengths=jnp.array([len(rows)]),
    first=2,
    last=5,
    deep=batch.deep[:, :, index],
    video_rows=jnp.asarray(np.searchsorted(rows, video_rows[index]))[None],
  )
  _close(logits, jax.jit(model.final_logits)(params, x[:, -1]), 1e-5)


def test_the_text_behind_the_video_is_not_that_between_its_patches(prompts):
  batch = prompts[0]
  whole = prompt_batch.whole(batch)
  length, last = int(batch.lengths[0]), int(batch.video_rows[0, -1])
  q = jax.random.normal(jax.random.key(0), (1, length, 4, 8))
  k = jax.random.normal(jax.random.key(1), (1, length, 2, 8))
  look = layerwise.attention_of("after_video", whole)
  q_by_kv_head = q[0].reshape(-1, 2, 2, 8)
  scores = jnp.einsum("tkgh,skh->kgts", q_by_kv_head, k[0]) / np.sqrt(8)
  scores = jnp.where(jnp.tri(length, dtype=bool), scores, -jnp.inf)
  most = jax.nn.softmax(scores)[:, :, last + 1 :].max(axis=(0, 1, 2))
  np.testing.assert_allclose(look(q, k, batch.lengths)[0], most, atol=1e-6)


def _only(prompts, index):
  """Returns the first prompt with some of its video tokens, and the rows."""
  alone = jax.tree.map(lambda leaf: leaf[0], prompts[0])
  rows, pruned = prompt_batch.prune(alone, jnp.asarray(index), len(index))
  return rows, jax.tree.map(lambda leaf: leaf[None], pruned)


def test_all_tokens_kept_is_the_whole_prompt(loaded, prompts):
  whole = prompts[0]
  _, kept = _only(prompts, np.arange(whole.video_rows.shape[1]))
  jax.tree.map(np.testing.assert_array_equal, kept, whole)
  for mine, theirs in zip(
    _read(*loaded, kept)[::2], _read(*loaded, whole)[::2], strict=True
  ):
    np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize("drop", [False, True])
def test_dropped_tokens_are_as_if_nobody_saw_them(loaded, prompts, drop):
  model, params = loaded
  whole, frames = prompts[0], _frames(prompts[0], 4)
  if drop:
    whole = whole._replace(frames=jnp.asarray(frames)[None])
  # Nothing of the second temporal patch, whose time and marks stay, or go.
  index = np.setdiff1d(np.arange(0, 60, 4), np.arange(15, 30))
  rows, kept = _only([whole], index)
  rows = rows[: int(kept.lengths[0])]
  visible = np.zeros(whole.x.shape[1], bool)
  visible[rows] = True
  gone = ((frames == 1).sum() - 15) if drop else 0
  assert visible.sum() == whole.x.shape[1] - 60 + len(index) - gone
  mask = np.tri(len(visible), dtype=bool) & visible
  hidden, _ = jax.jit(model.forward)(
    params,
    whole.x,
    whole.positions,
    mask=mask[None],
    deep=whole.deep,
    video_rows=whole.video_rows,
  )
  mine, _, _ = _read(model, params, kept)
  _close(mine[0, : len(rows)], hidden[0, rows])


def test_a_batch_padded_to_a_bucket_is_each_clip_alone(
  loaded, golden, videos, prompts
):
  model, params = loaded
  # Tokens of the towers' programs, then rows of the decoder's.
  bucket, start = token_grid.GridBucket(5, 16, 70), 0
  encode, found = jax.jit(model.encode), []
  for T, height, width in golden["video_grid_thw"].tolist():
    end = start + T * height * width
    inputs = processors.TowerInputs(
      golden["pixel_values_videos"][start:end], (T, height // 2, width // 2)
    )
    found.append(encode(params, model.tower_inputs(inputs, bucket)))
    start = end
  for padded, alone in zip(found, videos[0], strict=True):
    count = len(alone.features)
    _close(padded.features[:count], alone.features, 1e-5)
    _close(padded.deep[:, :count], alone.deep, 1e-5)
    assert not padded.features[count:].any()
    assert not padded.deep[:, count:].any()

  length, most = max(p.x.shape[1] for p in prompts), 60

  def pad(prompt):
    one = jax.tree.map(lambda leaf: leaf[0], prompt)
    more = length - len(one.x)
    rows = jnp.where(one.video_rows < len(one.x), one.video_rows, length)
    short = most - len(rows)
    return one._replace(
      x=jnp.pad(one.x, [(0, more), (0, 0)]),
      positions=jnp.pad(one.positions, [(0, 0), (0, more)]),
      video_rows=jnp.pad(rows, (0, short), constant_values=length),
      deep=jnp.pad(one.deep, [(0, 0), (0, short), (0, 0)]),
    )

  batch = jax.tree.map(lambda *x: jnp.stack(x), *map(pad, prompts))
  together = _greedy(model, params, batch, 4)
  np.testing.assert_array_equal(together, golden["generated_ids"][:, :4])
