"""Both recipes of released models: settings, frames and learning rates."""

import json
import pathlib

import jax
import numpy as np
import pytest

from cacovid_jax import config as config_lib
from cacovid_jax import errors, metrics
from cacovid_jax.data import frames
from cacovid_jax.models import llava_onevision, processors, token_grid
from cacovid_jax.synthetic import build, tiny_checkpoints
from cacovid_jax.training import loop
from tests.training import tiny

_CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
# Sections 4 and 6 of the method's description, key by key.
_PUBLIC = {
  "optimizer.schedule": "cosine_repeated",
  "sampling.frame_cap": "public",
  "data.frame_rule": "public_linspace_1fps",
}
_OURS = {
  "optimizer.schedule": "cosine",
  "sampling.frame_cap": "per_frame",
  "data.frame_rule": "train_linspace_1fps",
}
_BOTH = {
  "seed": 42,
  "total_steps": 0,
  "videos_per_step": 1,
  "iterations": 5,
  "data.num_frames": 32,
  "data.min_side": 28,
  "sampling.num_combinations": 32,
  "sampling.group_size": 2,
  "sampling.max_group_prob": 2.0,
  "sampling.max_frame_prob": 3.0,
  "sampling.frame_ratio": 0.125,
  "ratio.adaptive": True,
  "ratio.start": 0.02,
  "ratio.low": 0.125,
  "ratio.high": 0.875,
  "objective.clip_low": 0.2,
  "objective.clip_high": 0.28,
  "objective.kl_weight": 0.0,
  "objective.log_ratio_clamp": None,
  "optimizer.lr_heads": 1e-6,
  "optimizer.lr_layer": 1e-7,
  "optimizer.weight_decay": 0.01,
  "optimizer.clip": 5.0,
  "optimizer.warmup": 0,
  "optimizer.average": 0.0,
  "policy.num_halvings": 4,
  "policy.dtype": "bfloat16",
  "rollout.reward": "accuracy",
  "rollout.max_new_tokens": 768,
}
_FILES = (("llava_onevision", "7b"), ("qwen2_5_vl", "3b"))


@pytest.mark.parametrize(("family", "size"), _FILES)
def test_a_recipe_is_what_the_paper_and_its_code_say(family, size):
  def load(text):
    return config_lib.load(f"{_CONFIGS / family}.py:size={size}{text}")

  for text, own in (
    ("", _PUBLIC), (",recipe=public", _PUBLIC), (",recipe=ours", _OURS)
  ):  # fmt: skip
    config = load(text)
    for key, value in {**_BOTH, **own}.items():
      assert config_lib.value_of(config, key) == value, key
    assert min(config.ratio.rungs) == 0.01 and max(config.ratio.rungs) == 0.12
    # Of LLaVA-OneVision, short clips have a bucket of their own.
    short = family == "llava_onevision" and own is _PUBLIC
    assert config.data.buckets == (((16, 196), (32, 196)) if short else ())
    # Evaluated alike: the paper's evaluator shows 32 frames of every clip.
    assert config.evals.frame_rule == "eval_linspace"
  with pytest.raises(
    errors.UserError, match="unknown recipe 'paper': use public or ours"
  ):
    load(",recipe=paper")


def test_the_public_frame_rule_takes_fewer_frames_of_short_clips():
  rule = frames.FrameRule(32, frames.PUBLIC_RULE)
  # (pictures, seconds) -> min(32, pictures, whole seconds).
  cases = {
    (80, 10.0): 10, (799, 99.9): 32, (64, 31.99): 31, (5, 40.0): 5, (3, 0.9): 0
  }  # fmt: skip
  for (count, seconds), expected in cases.items():
    found = rule(count, seconds)
    assert len(found) == expected
    if expected > 1:
      assert (found[0], found[-1]) == (0, count - 1)
  assert [len(frames.FrameRule(32, frames.TRAIN_RULE)(*x)) for x in cases] == [
    32, 32, 32, 32, 0
  ]  # fmt: skip


def test_frame_rules_that_there_are_not_are_one_line():
  for key, value, known in (
    ("data.frame_rule", "1fps", "public_linspace_1fps"),
    ("evals.frame_rule", frames.PUBLIC_RULE, "train_linspace_1fps"),
  ):
    with pytest.raises(errors.UserError, match=f"{key}.*{known}"):
      config_lib.load(f"{_CONFIGS}/llava_onevision.py", [f"{key}={value}"])


def test_buckets_of_fewer_frames_need_clips_of_fewer():
  processor = processors.LlavaOnevisionProcessor()
  full, public = (
    frames.FrameRule(32, name)
    for name in (frames.TRAIN_RULE, frames.PUBLIC_RULE)
  )
  assert processor.grid_of(full) == (32, 14, 14)
  assert processor.grid_of(public) is None
  assert token_grid.make_buckets((), processor, public) == [
    token_grid.GridBucket(32, 196)
  ]
  sizes = ((16, 196), (32, 196))
  made = token_grid.make_buckets(sizes, processor, public)
  assert [bucket.tokens for bucket in made] == [16 * 196, 32 * 196]
  with pytest.raises(errors.UserError, match="fewer temporal patches"):
    token_grid.make_buckets(sizes, processor, full)
  with pytest.raises(errors.UserError, match="fewer temporal patches"):
    token_grid.make_buckets(sizes[:1], processor, public)


def test_padded_frames_change_no_feature():
  model = llava_onevision.LlavaOnevisionModel(
    llava_onevision.LlavaOnevisionConfig.tiny()
  )
  params = tiny.drawn(model)
  pixels = np.random.default_rng(0).integers(0, 255, (3, 30, 40, 3), np.uint8)
  inputs = model.processor(pixels)
  own = model.encode(params, model.tower_inputs(inputs)).features
  bucket = token_grid.GridBucket(5, 16)
  given = model.processor(pixels, as_bytes=True)  # What is padded is black.
  padded = model.tower_inputs(given, bucket)
  assert padded.values.shape[0] == 5 and padded.grid == (3, 4, 4)
  found = model.encode(params, padded).features
  assert found.shape[0] == bucket.tokens
  np.testing.assert_allclose(found[: len(own)], own, rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
  """Returns a folder of a model, two clips and a question about each."""
  folder = tmp_path_factory.mktemp("recipe")
  tiny_checkpoints.write_tiny(folder / "model", "llava_onevision")
  rows = []
  for seconds in (10, 100):
    count = seconds * build.FRAMES_PER_SECOND
    still = np.full((112, 112, 3), seconds, np.uint8)
    build.encode(folder / f"{seconds}.mp4", [still] * count)
    rows.append(
      {
        "problem_id": seconds,
        "problem": "Which colour?",
        "data_type": "video",
        "problem_type": "multiple choice",
        "options": ["A. red", "B. blue"],
        "solution": "<answer>A</answer>",
        "path": f"./{seconds}.mp4",
        "data_source": "made",
      }
    )
  (folder / "train.json").write_text(json.dumps(rows))
  return folder


_RATE, _DECAY, _UPDATES = 0.1, 0.5, (2, 3)  # Videos, and iterations of each.


def _rates(recipe):
  """Returns the share of the rate at each update, by the corrected section 6.

  The public scheduler counts iterations, its horizon counts videos.
  """
  videos, iterations = _UPDATES
  steps = np.arange(videos * iterations)
  horizon = videos if recipe == "public" else videos * iterations
  return 0.5 * (1 + np.cos(np.pi * steps / horizon))


@pytest.mark.parametrize("recipe", ["public", "ours"])
def test_a_run_follows_its_recipe(recipe, clips, tmp_path):
  """Frames of short and long clips; rates, by what weight decay leaves."""
  config = config_lib.load(
    f"{_CONFIGS}/llava_onevision.py:debug,recipe={recipe}",
    [
      f"model.path={clips / 'model'}", f"data.root={clips}", "mesh.data=1",
      "data.num_frames=32", "data.num_threads=0", "data.decode=in_process",
      f"total_steps={_UPDATES[0]}", f"iterations={_UPDATES[1]}",
      "rollout.max_new_tokens=1", "ratio.adaptive=false",
      "sampling.ratio=0.125", "sampling.num_combinations=4",
      f"optimizer.lr_heads={_RATE}",
      f"optimizer.weight_decay={_DECAY}",
    ],
  )  # fmt: skip
  result = loop.train(tiny.experiment_of(config, tmp_path))
  run = result.run
  shown = {
    row.video.removesuffix(".mp4"): int(np.ravel(batch.grid.num_frames)[0])
    for batch, (row,) in run.batches(0)
  }
  short = 10 if recipe == "public" else 32
  assert shown == {"10": short, "100": 32}
  # One bucket holds both; of one grid, no program pads.
  (bucket,) = {shape.bucket for shape, _ in run.programs.compile_seconds}
  assert bucket == token_grid.GridBucket(32, 16)
  assert bool(run.config.ladder.plans) == (recipe == "ours")
  # Rewards all agree, so that no gradient moves anything.
  lines = metrics.read(tmp_path)
  assert [line["gradient_norm"] for line in lines] == [0.0] * _UPDATES[0]
  ends = np.arange(1, _UPDATES[0] + 1) * _UPDATES[1] - 1
  np.testing.assert_allclose(
    [line["lr_heads"] for line in lines], _RATE * _rates(recipe)[ends],
    rtol=1e-5, atol=1e-9,
  )  # fmt: skip
  left = np.prod(1 - _RATE * _DECAY * _rates(recipe))
  before = run.init_params()["token_compress"]
  after = result.state.params["token_compress"]
  kernels = 0
  for old, new in zip(*map(jax.tree.leaves, (before, after)), strict=True):
    if old.ndim > 1:
      kernels += 1
      np.testing.assert_allclose(new, old * left, rtol=1e-5, atol=1e-8)
    else:
      np.testing.assert_array_equal(new, old)
  assert kernels == config.policy.num_halvings + 1
