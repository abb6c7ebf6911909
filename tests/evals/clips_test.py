"""Clips are decoded with the evaluation's frame rule and encoded once."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cacovid_jax import errors
from cacovid_jax.data import feature_cache
from cacovid_jax.evals import clips
from cacovid_jax.models import (
  llava_onevision,
  processors,
  qwen2_5_vl,
  video_llm,
)
from tests.evals import tiny

PROCESSOR = processors.LlavaOnevisionProcessor(image_size=16, frame_side=1)


class Model:
  """Features are the mean colours of four frames; counts its runs."""

  config = types.SimpleNamespace(text=types.SimpleNamespace(hidden_size=3))

  def __init__(self, scale=1.0):
    self.traced, self.scale, self.observed = 0, scale, []

  def tower_inputs(self, inputs):
    return inputs

  def encode(self, params, inputs, *, signals=()):
    if signals:
      self.observed.append(signals)
    else:
      self.traced += 1
    features = inputs.values.mean(axis=(1, 2)) * self.scale * params
    found = {
      "vision_attention": features[:, 0] + 1,
      "vision_keys": features[:, :2] + 2,
    }
    return video_llm.VideoFeatures(
      features, inputs.grid, signals={name: found[name] for name in signals}
    )

  def signal_shapes(self, num_video):
    return {"vision_attention": (num_video,), "vision_keys": (num_video, 2)}


@pytest.fixture
def root(tmp_path):
  for name in "ab":
    tiny.write_clip(tmp_path / f"{name}.mp4", seed=ord(name), num_frames=9)
  tiny.write_clip(tmp_path / "short.mp4", seed=1, num_frames=2)
  return tmp_path


def source_of(root, model=None, **options):
  return clips.ClipSource(
    str(root),
    model or Model(),
    jnp.float32(1),
    PROCESSOR,
    num_frames=4,
    **options,
  )


def test_frames_follow_the_evaluation_rule(root):
  with source_of(root) as source:
    every = clips.video.read_frames(str(root / "a.mp4"), range(9))
    # linspace(0, 8, 4) truncated, as the paper's evaluation has it.
    np.testing.assert_array_equal(source.frames("a.mp4"), every[[0, 2, 5, 8]])
    # A clip with fewer frames repeats them: the grid is always full.
    assert source.frames("short.mp4").shape[0] == 4


def test_features_and_hash_are_of_the_frames(root):
  with source_of(root) as source:
    clip = source["a.mp4"]
    pixels = PROCESSOR(source.frames("a.mp4")).values
    expected = pixels.mean(axis=(1, 2))
    np.testing.assert_allclose(clip.features, expected, rtol=1e-5)
    assert clip.features.dtype == np.float32
    assert len(clip.frame_hash) == 64
    assert clip.frame_hash != source["b.mp4"].frame_hash
    assert clip.fault == ""
    assert source["a.mp4"] is clip
    assert source._encode._cache_size() == 1


def test_only_some_clips_are_held(root):
  with source_of(root, keep=1) as source:
    first = source["a.mp4"]
    source["b.mp4"]
    again = source["a.mp4"]
    assert again is not first
    np.testing.assert_array_equal(again.features, first.features)


def test_cached_features_are_the_same_and_spare_the_tower(root, tmp_path):
  cache = feature_cache.FeatureCache(tmp_path / "cache")
  with source_of(root, cache=cache) as source:
    first = source["a.mp4"]
  second_model = Model()
  with source_of(root, second_model, cache=cache) as source:
    second = source["a.mp4"]
  assert second_model.traced == 0
  np.testing.assert_array_equal(first.features, second.features)
  assert first.frame_hash == second.frame_hash
  # Other weights have other features.
  other = Model()
  with source_of(root, other, cache=cache, cache_key="other") as source:
    source["a.mp4"]
  assert other.traced == 1


@pytest.mark.parametrize(
  "name,reason",
  [("gone.mp4", "missing"), ("text.mp4", "unreadable"), ("../x.mp4", "unsafe")],
)
def test_a_clip_that_cannot_be_used_says_why(root, name, reason):
  (root / "text.mp4").write_text("no video")
  with source_of(root) as source:
    clip = source[name]
  assert clip.fault == reason
  assert not clip.features.any()


def test_features_that_are_not_finite_stop_the_evaluation(root):
  with source_of(root, Model(np.nan)) as source:
    with pytest.raises(errors.UserError, match="vision tower hold NaN"):
      source["a.mp4"]


def test_decoding_ahead_gives_the_same_clips(root):
  with source_of(root) as ahead, source_of(root) as plain:
    ahead.prefetch(["a.mp4", "b.mp4", "a.mp4", "gone.mp4"])
    for name in ("b.mp4", "a.mp4"):
      np.testing.assert_array_equal(ahead[name].features, plain[name].features)
    assert ahead["gone.mp4"].fault == "missing"


WANT = frozenset(["vision_attention", "vision_keys"])


def test_extras_are_computed_only_where_wanted(root):
  plain = Model()
  with source_of(root, plain) as source:
    clip = source["a.mp4"]
  assert clip.extras == {} and plain.observed == []
  model = Model()
  with source_of(root, model, want=["vision_keys"]) as source:
    assert source.want == {"vision_keys"}
    keyed = source["a.mp4"]
    source["b.mp4"]
  assert model.observed == [("vision_keys",)]
  assert list(keyed.extras) == ["vision_keys"]
  assert keyed.extras["vision_keys"].dtype == np.float32
  np.testing.assert_allclose(
    keyed.extras["vision_keys"], keyed.features[:, :2] + 2, rtol=1e-6
  )
  # Wanting more changes no bit of the features.
  np.testing.assert_array_equal(keyed.features, clip.features)


def test_what_clips_bring_along_can_change(root):
  model = Model()
  with source_of(root, model) as source:
    before = source["a.mp4"]
    assert not source["gone.mp4"].extras
    source.observe(["vision_keys"])
    after = source["a.mp4"]
    assert list(after.extras) == ["vision_keys"]
    assert not source["gone.mp4"].extras["vision_keys"].any()
    source.observe(["vision_keys"])  # No change: nothing is made anew.
    assert source["a.mp4"] is after
    with pytest.raises(ValueError, match="no vision signal"):
      source.observe(["vision_colours"])
  np.testing.assert_array_equal(before.features, after.features)
  assert model.traced == 1 and model.observed == [("vision_keys",)]


def test_a_clip_that_cannot_be_used_has_extras_of_zeros(root):
  with source_of(root, want=WANT) as source:
    clip, good = source["gone.mp4"], source["a.mp4"]
  assert clip.fault
  for name in WANT:
    assert clip.extras[name].shape == good.extras[name].shape
    assert not clip.extras[name].any()


def test_cached_extras_spare_the_tower(root, tmp_path):
  cache = feature_cache.FeatureCache(tmp_path / "cache")
  with source_of(root, cache=cache, want=WANT) as source:
    first = source["a.mp4"]
  model = Model()
  with source_of(root, model, cache=cache, want=WANT) as source:
    second = source["a.mp4"]
  assert model.traced == 0 and model.observed == []
  np.testing.assert_array_equal(first.features, second.features)
  for name in WANT:
    np.testing.assert_array_equal(first.extras[name], second.extras[name])
  # Other weights have other keys.
  other = Model(2.0)
  with source_of(root, other, cache=cache, cache_key="x", want=WANT) as source:
    third = source["a.mp4"]
  assert other.observed == [("vision_attention", "vision_keys")]
  assert not np.array_equal(
    third.extras["vision_keys"], first.extras["vision_keys"]
  )


def test_a_cache_without_extras_is_completed(root, tmp_path):
  cache = feature_cache.FeatureCache(tmp_path / "cache")
  with source_of(root, cache=cache) as source:
    plain = source["a.mp4"]
  with source_of(root, want=WANT) as source:
    fresh = source["a.mp4"]
  model = Model()
  with source_of(root, model, cache=cache, want=["vision_keys"]) as source:
    clip = source["a.mp4"]
  assert model.traced == 0 and model.observed == [("vision_keys",)]
  np.testing.assert_array_equal(clip.features, plain.features)
  model = Model()
  with source_of(root, model, cache=cache, want=WANT) as source:
    clip = source["a.mp4"]
    key = source._key(clip.frame_hash, "vision_attention")
  assert model.traced == 0 and model.observed == [("vision_attention",)]
  for name in WANT:
    np.testing.assert_array_equal(clip.extras[name], fresh.extras[name])
  # A damaged entry, or one of another shape, is made anew.
  cache.put(key, np.zeros(3))
  with open(cache.path(source._key(clip.frame_hash, "vision_keys")), "wb") as f:
    f.write(b"nonsense")
  with source_of(root, cache=cache, want=WANT) as source:
    clip = source["a.mp4"]
  for name in WANT:
    np.testing.assert_array_equal(clip.extras[name], fresh.extras[name])


def test_extras_that_are_not_finite_stop_the_evaluation(root, tmp_path):
  cache = feature_cache.FeatureCache(tmp_path / "cache")
  with source_of(root, cache=cache) as source:
    source["a.mp4"]
  model = Model(np.inf)
  with source_of(root, model, cache=cache, want=["vision_keys"]) as source:
    with pytest.raises(errors.UserError, match="vision keys of the vision"):
      source["a.mp4"]


def test_unknown_extras_are_a_mistake_of_the_caller(root):
  with pytest.raises(ValueError, match="'depth'"):
    source_of(root, want=["depth"])


def test_extras_of_a_tower_that_reads_patches(tmp_path):
  tiny.write_clip(tmp_path / "a.mp4", seed=0, num_frames=5)
  model = qwen2_5_vl.Qwen2_5VLModel(qwen2_5_vl.Qwen2_5VLConfig.tiny())
  params = model.init(jax.random.key(0))
  processor = processors.Qwen2_5VLProcessor(
    patch_size=4, min_pixels=6 * 64, max_pixels=16 * 64
  )
  with clips.ClipSource(
    str(tmp_path),
    model,
    params,
    processor,
    num_frames=4,
    grid=processor.grid(4, 32, 32),
    want=WANT,
  ) as source:
    clip, missing = source["a.mp4"], source["gone.mp4"]
  for name in WANT:
    assert clip.extras[name].shape == missing.extras[name].shape
  assert clip.extras["vision_attention"].shape == clip.features.shape[:1]
  assert (clip.extras["vision_attention"] > 0).all()


def test_extras_of_a_real_tower_have_the_shapes_that_it_says(tmp_path):
  tiny.write_clip(tmp_path / "a.mp4", seed=0, num_frames=5)
  model = llava_onevision.LlavaOnevisionModel(
    llava_onevision.LlavaOnevisionConfig.tiny()
  )
  params = model.init(jax.random.key(0))
  with clips.ClipSource(
    str(tmp_path),
    model,
    params,
    model.processor,
    num_frames=3,
    want=WANT,
  ) as source:
    clip, missing = source["a.mp4"], source["gone.mp4"]
  for name in WANT:
    assert clip.extras[name].shape == missing.extras[name].shape
  assert clip.extras["vision_attention"].shape == clip.features.shape[:1]
  assert (clip.extras["vision_attention"] > 0).all()
