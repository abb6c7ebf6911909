"""Qwen3-VL in evaluations: merged tokens, cached features, the plug-in."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cacovid_jax.data import feature_cache
from cacovid_jax.evals import evaluation
from cacovid_jax.inference import clip_queue, clips
from cacovid_jax.inference import engine as engine_lib
from cacovid_jax.inference import methods as methods_lib
from cacovid_jax.integrations.lmms_eval import answerer, arguments, requests
from tests.evals import tiny

WIDTH, MAPS = 32, 2
SIZES = ((32, 32), (32, 48))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  folder = tmp_path_factory.mktemp("clips")
  tiny.write_data(folder, num_clips=2, sizes=SIZES)
  return folder


@pytest.fixture(scope="module")
def asked(qwen3_vl_dir, data, tmp_path_factory):
  return tiny.experiment(
    tmp_path_factory.mktemp("out"), data=str(data), checkpoint=qwen3_vl_dir,
    methods=("prunevid",), ratios=(0.25,), num_frames=8, max_new_tokens=1,
    batch_size=1,
  )  # fmt: skip


def test_merged_tokens_and_their_maps_are_read(asked):
  """The prompt is put together by hand, its rows by their definition."""
  checkpoint = asked.checkpoint
  model, params = checkpoint.model, checkpoint.params
  question = evaluation.load_benchmark(asked).questions[0]
  with clip_queue.open_queue(asked) as source:
    settings = evaluation.settings(asked)
    engine = engine_lib.Engine.of(asked, source, [question], settings)
    runner = engine.batch([question])
    method = methods_lib.Method.parse("prunevid")
    condition = methods_lib.Condition(method, 0.25)
    selection = runner.select(condition)
    ids = runner.output(condition).ids
  batch, count = runner.batch, runner.num_video // 4
  features, maps = (np.asarray(a[0]) for a in (batch.features, batch.deep))
  features, maps = features[: 4 * count], maps[:, : 4 * count]
  assign = np.asarray(selection.assign[0, : 4 * count])
  members = [np.flatnonzero(assign == row) for row in range(count)]
  assert max(map(len, members)) > 1
  merged = np.stack([features[own].mean(axis=0) for own in members])
  np.testing.assert_allclose(selection.features[0, :count], merged, atol=1e-5)
  deep = np.stack([maps[:, own].mean(axis=1) for own in members], axis=1)
  np.testing.assert_allclose(selection.deep[0, :, :count], deep, atol=1e-5)
  # The same rows at the places of the selection, in a prompt of their own.
  length, index = int(batch.lengths[0]), np.asarray(selection.index[0, :count])
  video = np.asarray(batch.video_rows[0, : 4 * count])
  left = np.setdiff1d(np.arange(length), np.delete(video, index))
  where = np.searchsorted(left, video[index])
  x = np.array(batch.x[0])
  x[video[index]] = merged

  @jax.jit
  def read(params, deep):
    logits, _, _ = model.prefill(
      params, x[None, left], batch.positions[:1][:, :, left],
      jnp.array([len(left)]), cache_length=len(left), deep=deep[None],
      video_rows=jnp.asarray(where)[None],
    )  # fmt: skip
    return logits[0]

  logits = read(params, jnp.asarray(deep))
  cache = engine.programs.read(params, batch, selection, 0)[0]
  np.testing.assert_allclose(cache[0], logits, rtol=1e-3, atol=1e-4)
  assert int(ids[0, 0]) == int(np.argmax(logits))
  plain = read(params, jnp.asarray(maps[:, index]))
  assert np.abs(plain - logits).max() > 1e-2


def test_cached_clips_bring_their_maps_and_times(asked, tmp_path, monkeypatch):
  cached = asked.replace({"data.feature_cache": str(tmp_path / "cache")})
  names = [q.video for q in evaluation.load_benchmark(asked).questions]
  names = list(dict.fromkeys(names))

  def read(experiment):
    with clip_queue.open_queue(experiment, keep=len(names)) as source:
      return [source[name] for name in names]

  plain, first = read(asked), read(cached)
  assert os.listdir(tmp_path / "cache")
  monkeypatch.setattr(
    feature_cache.FeatureCache, "put",
    lambda *_: pytest.fail("encoded again"),
  )  # fmt: skip
  second = read(cached)
  shapes = set()
  for clip, *others in zip(plain, first, second, strict=True):
    count = int(np.prod(clip.grid))
    shapes.add(clip.grid)
    assert clip.deep.shape == (MAPS, count, WIDTH)
    assert len(clip.second_per_grid_t) == clip.grid[0]
    for other in others:
      assert other.grid == clip.grid
      assert tuple(other.second_per_grid_t) == clip.second_per_grid_t
      for name in (clips.FEATURES, clips.DEEP):
        one, two = (np.asarray(c.arrays[name]) for c in (clip, other))
        np.testing.assert_allclose(two, one, atol=1e-6)
  assert len(shapes) == 2


def test_the_plug_in_counts_times_and_marks(qwen3_vl_dir, data):
  args = arguments.parse(
    pretrained=qwen3_vl_dir, method="uniform", ratio=0.25, max_frames_num=8,
    batch_size=2,
  )  # fmt: skip
  model = answerer.RequestAnswerer(args)
  folder = data / "videos"
  paths = sorted(str(path) for path in folder.rglob("*.mp4"))
  with model._source:
    questions = [
      requests.Asked(f"t/test/{row}", "", path, "What is it?")
      for row, path in enumerate(paths)
    ]
    replies = model.generate(questions, [2] * len(paths))
    found = [model._source[path.lstrip("/")] for path in paths]
  tokenizer, llm = model.checkpoint.tokenizer, model.checkpoint.model
  assert len({clip.grid for clip in found}) == 2
  for reply, clip in zip(replies, found, strict=True):
    given = tokenizer, "What is it?", clip.grid, clip.second_per_grid_t
    count = int(np.prod(clip.grid))
    text = llm.encode_prompt(*given).length - count
    assert reply.input_tokens == text + count // 4
    assert reply.text
