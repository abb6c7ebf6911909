"""Clips are decoded at a frame rule, encoded once, and kept."""

import dataclasses
import hashlib
import pickle
import types

import av
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cacovid_jax import errors
from cacovid_jax.data import (
  feature_cache,
  frame_record,
  frames,
  left_out,
  video,
)
from cacovid_jax.evals import frame_manifest
from cacovid_jax.inference import features
from cacovid_jax.models import (
  llava_onevision,
  processors,
  qwen2_5_vl,
  token_grid,
  video_llm,
)
from cacovid_jax.parallel import mesh as mesh_lib
from tests.evals import tiny
from tests.training import tiny as tiny_training

PROCESSOR = processors.LlavaOnevisionProcessor(image_size=16, frame_side=1)
RULE = frames.FrameRule(4)


class Model:
  """Features are the mean colours of four frames; counts its runs."""

  config = types.SimpleNamespace(text=types.SimpleNamespace(hidden_size=3))
  precision, backend, num_deep = "float32", "auto", 0

  def __init__(self, scale=1.0):
    self.traced, self.scale, self.observed = 0, scale, []

  def tower_inputs(self, inputs, bucket=None):
    return inputs

  def encode(self, params, inputs, *, signals=()):
    if signals:
      self.observed.append(signals)
    else:
      self.traced += 1
    inputs = video_llm.normalised(inputs)
    colours = inputs.values.mean(axis=(1, 2)) * self.scale * params["weight"]
    found = {
      "vision_attention": colours[:, 0] + 1,
      "vision_keys": colours[:, :2] + 2,
    }
    return video_llm.VideoFeatures(
      colours, inputs.grid, signals={name: found[name] for name in signals}
    )

  def signal_shapes(self, num_video):
    return {"vision_attention": (num_video,), "vision_keys": (num_video, 2)}


@pytest.fixture
def root(tmp_path):
  for name in "ab":
    tiny.write_clip(tmp_path / f"{name}.mp4", seed=ord(name), num_frames=9)
  tiny.write_clip(tmp_path / "short.mp4", seed=1, num_frames=2)
  return tmp_path


def frame_hash(shown):
  """Returns the sha256 of frames and their shape, the plain way."""
  digest = hashlib.sha256(str(shown.shape).encode())
  digest.update(shown.tobytes())
  return digest.hexdigest()


def source_of(root, model=None, **options):
  params = {"weight": jnp.float32(1)}
  return tiny.open_store(
    root, model or Model(), params, PROCESSOR, num_frames=4, **options
  )


def test_frames_follow_the_evaluation_rule(root):
  with source_of(root) as source:
    every = video.read_frames(str(root / "a.mp4"), range(9))
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
    shown = source.frames("a.mp4")
    assert clip.frame_hash == frame_hash(shown)
    assert source["a.mp4"] is clip


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
  with source_of(root, other, cache=cache, weights="other") as source:
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
  with source_of(root, other, cache=cache, weights="x", want=WANT) as source:
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
    parts = source._key("a.mp4")
  assert model.traced == 0 and model.observed == [("vision_attention",)]
  for name in WANT:
    np.testing.assert_array_equal(clip.extras[name], fresh.extras[name])
  # A damaged entry, or one of another shape, is made anew.
  key, other = (
    feature_cache.key(**parts, signal=name) for name in sorted(WANT)
  )
  cache.put(key, {"vision_attention": np.zeros(3)})
  with open(cache.path(other), "wb") as f:
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


def _patches():
  processor = processors.Qwen2_5VLProcessor(
    patch_size=4, min_pixels=6 * 64, max_pixels=16 * 64
  )
  model = qwen2_5_vl.Qwen2_5VLModel(qwen2_5_vl.Qwen2_5VLConfig.tiny())
  grid = list(processor.grid(4, 32, 32))
  return model, processor, dict(num_frames=4, grid=grid)


def _images():
  config = llava_onevision.LlavaOnevisionConfig.tiny()
  model = llava_onevision.LlavaOnevisionModel(config)
  return model, model.processor, dict(num_frames=3)


@pytest.mark.parametrize("kind", [_patches, _images])
def test_extras_of_a_real_tower_have_the_shapes_that_it_says(tmp_path, kind):
  tiny.write_clip(tmp_path / "a.mp4", seed=0, num_frames=5)
  model, processor, options = kind()
  given = tmp_path, model, tiny.random_params(model), processor
  with tiny.open_store(*given, want=WANT, **options) as source:
    clip, missing = source["a.mp4"], source["gone.mp4"]
  for name in WANT:
    assert clip.extras[name].shape == missing.extras[name].shape
  assert clip.extras["vision_attention"].shape == clip.features.shape[:1]
  assert (clip.extras["vision_attention"] > 0).all()


@pytest.fixture
def opened(monkeypatch):
  """Returns the files that were opened to decode, as they come."""
  names, real = [], av.open

  def noting(file, *args, **kwargs):
    names.append(str(file).rpartition("/")[2])
    return real(file, *args, **kwargs)

  monkeypatch.setattr(av, "open", noting)
  return names


def test_a_clip_on_disk_is_not_opened_and_keeps_its_record(
  root, tmp_path, opened
):
  cache = feature_cache.FeatureCache(tmp_path / "cache")
  with source_of(root, cache=cache) as source:
    # By the way of training, which raises what it cannot use.
    (first,) = source.finish([source.load("a.mp4")])
  assert opened == ["a.mp4"]
  manifest = frame_manifest.FrameManifest(
    tmp_path / "frames.jsonl", num_frames=4
  )
  with source_of(root, cache=cache, manifest=manifest) as source:
    second = source["a.mp4"]
  assert opened == ["a.mp4"]
  assert second.record == first.record and second.grid == (4, 1, 1)
  assert second.record.size == (32, 32)
  assert second.record.indices == (0, 2, 5, 8)
  assert second.frame_hash and second.index_hash
  assert manifest["a.mp4"] == second.record
  # The same bytes under another name are the same clip.
  (root / "copy.mp4").write_bytes((root / "a.mp4").read_bytes())
  with source_of(root, cache=cache) as source:
    copy = source["copy.mp4"]
  assert opened == ["a.mp4"] and copy.record.video == "copy.mp4"
  # Another decoder may give other pixels.
  other = dataclasses.replace(first.record, frame_hash="0" * 64)
  manifest._own.entries["a.mp4"] = other
  with source_of(root, cache=cache, manifest=manifest) as source:
    with pytest.raises(errors.UserError, match="other frames are decoded"):
      source["a.mp4"]


def test_other_frames_than_those_of_the_rule_have_an_entry_of_their_own(
  root, tmp_path, opened
):
  cache = feature_cache.FeatureCache(tmp_path / "cache")
  with source_of(root, cache=cache) as source:
    plain = source["a.mp4"]
  shown = video.decode(
    str(root / "a.mp4"), lambda *_: [1, 2, 3, 4], hashed=True
  )
  content = frame_record.hash_file(root / "a.mp4")
  record = frame_record.FrameRecord.of("a.mp4", shown, content)
  manifest = frame_manifest.FrameManifest(
    tmp_path / "frames.jsonl", num_frames=4
  )
  manifest.add(record)
  del opened[:]
  for times in (1, 1):
    with source_of(root, cache=cache, manifest=manifest) as source:
      clip = source["a.mp4"]
    assert clip.record == record and len(opened) == times
  assert not np.array_equal(clip.features, plain.features)
  for rule in (RULE, frames.FrameRule(4, frames.TRAIN_RULE, fps=9.0)):
    with source_of(root, cache=cache, rule=rule) as source:
      again = source["a.mp4"]
    assert np.array_equal(again.features, plain.features) == (rule == RULE)


@pytest.mark.parametrize("what", ["frame", "preprocessing", "model", "decoder"])
def test_the_key_names_all_that_features_depend_on(root, monkeypatch, what):
  with source_of(root) as source:
    key = source._key("a.mp4")
  options = {}
  if what == "frame":
    options["rule"] = frames.FrameRule(4, frames.TRAIN_RULE)
  elif what == "model":
    options["model"] = Model()
    options["model"].backend = "xla"
  elif what == "preprocessing":
    monkeypatch.setattr(
      f"{__name__}.PROCESSOR", dataclasses.replace(PROCESSOR, image_size=32)
    )
  else:
    monkeypatch.setattr(frame_record, "decoder", lambda: "PyAV 0")
  with source_of(root, **options) as source:
    assert source._key("a.mp4") != key


def test_clips_are_loaded_in_another_process(root, tmp_path):
  cache = feature_cache.FeatureCache(tmp_path / "cache")
  with source_of(root, cache=cache) as source:
    alone = features.FeatureStore(
      source.reader, source.model, {"weight": jnp.float32(1)}, cache=cache
    )
    there = pickle.loads(pickle.dumps(alone))
    loaded = pickle.loads(pickle.dumps(there.load("a.mp4")))
    assert loaded.inputs is not None and not loaded.clip.arrays
    expected = source.finish([loaded, loaded])
    assert expected[0] is expected[1]
    again = there.load("a.mp4")
    assert again.inputs is None
    np.testing.assert_array_equal(again.clip.features, expected[0].features)


def test_small_and_refused_clips_are_not_used(root, tmp_path):
  cache = feature_cache.FeatureCache(tmp_path / "cache")
  with source_of(root, cache=cache, min_side=31) as source:
    source.finish([source.load("a.mp4")])
  for known in (cache, None):
    with source_of(root, cache=known, min_side=32) as source:
      with pytest.raises(video.VideoError, match="bad shape .a frame of 32 x"):
        source.load("a.mp4")
  content = left_out.content_hash(root / "a.mp4")
  with source_of(root, refused={content: "timeout"}) as source:
    with pytest.raises(video.VideoError, match="refused in an earlier run"):
      source.load("a.mp4")
    assert source.load("b.mp4").inputs is not None


def test_devices_share_the_clips_that_are_encoded_at_once(root):
  mesh = mesh_lib.make_mesh(2, devices=jax.devices()[:2])
  with source_of(root) as alone, source_of(root, mesh=mesh) as shared:
    names = ["a.mp4", "b.mp4", "short.mp4"]
    expected = alone.finish([alone.load(name) for name in names])
    found = shared.finish([shared.load(name) for name in names])
  for one, other in zip(found, expected, strict=True):
    np.testing.assert_array_equal(one.features, other.features)
    assert one.record.video == other.record.video


def tiny_tower():
  """Returns (model, params) of a tower whose clips have grids of their own."""
  model = qwen2_5_vl.Qwen2_5VLModel(qwen2_5_vl.Qwen2_5VLConfig.tiny())
  return model, tiny.random_params(model)


class TestBuckets:
  """A tower whose clips have grids of their own."""

  @pytest.fixture
  def model(self):
    return tiny_tower()

  @pytest.fixture
  def folder(self, tmp_path):
    tiny.write_clip(tmp_path / "a.mp4", seed=0, num_frames=5)
    tiny.write_clip(tmp_path / "wide.mp4", seed=1, size=(16, 96))
    tiny.write_clip(tmp_path / "narrow.mp4", seed=2, size=(16, 1000))
    return tmp_path

  def store(self, folder, model, **options):
    processor = processors.Qwen2_5VLProcessor.tiny()
    return tiny.open_store(folder, *model, processor, num_frames=4, **options)

  def test_padding_is_cut_off(self, folder, model):
    buckets = [token_grid.GridBucket(2, 24), token_grid.GridBucket(3, 40)]
    with (
      self.store(folder, model, want=WANT) as exact,
      self.store(folder, model, want=WANT, buckets=buckets) as padded,
    ):
      for name in ("a.mp4", "wide.mp4"):
        one, other = exact[name], padded[name]
        assert one.grid == other.grid
        assert padded.bucket_of(one.grid) == buckets[0]
        for what, value in one.arrays.items():
          np.testing.assert_allclose(other.arrays[what], value, atol=2e-5)
      # Of no bucket: in its own size.
      small = self.store(folder, model, buckets=[token_grid.GridBucket(2, 4)])
      with small:
        np.testing.assert_array_equal(
          small["a.mp4"].features, exact["a.mp4"].features
        )

  def test_what_is_too_long_and_narrow_for_all_of_them_is_refused(
    self, folder, model
  ):
    buckets = [token_grid.GridBucket(2, 24)]
    with self.store(folder, model, buckets=buckets, only_buckets=True) as store:
      store.load("a.mp4")
      with pytest.raises(video.VideoError, match="long and narrow"):
        store.load("narrow.mp4")

  def test_the_disk_tells_the_shape_of_a_clip(
    self, folder, model, tmp_path, opened
  ):
    cache = feature_cache.FeatureCache(tmp_path / "cache")
    with self.store(folder, model, cache=cache) as store:
      store.finish([store.load("a.mp4")])
    del opened[:]
    with self.store(folder, model, cache=cache) as store:
      store.survey(["a.mp4"])
      assert store["a.mp4"].grid == store.grid == (2, 4, 4)
    assert opened == []

  def test_buckets_for_fewer_frames_are_training_s(self, folder, tmp_path):
    config = tiny_training.config(
      **{
        "data.root": str(folder),
        "data.num_frames": 8,
        "data.buckets": ((2, 24), (4, 24)),
      }
    )
    processor = processors.Qwen2_5VLProcessor.tiny()
    model, params = tiny_tower()
    experiment = types.SimpleNamespace(
      config=config,
      loaded=types.SimpleNamespace(
        model=model, params=params, identity={"sha256": "0"}
      ),
    )
    store = features.open_store(experiment, processor, frames.FrameRule(8))
    assert store.buckets == (token_grid.GridBucket(4, 24),)
    # Training has to be told.
    with pytest.raises(errors.UserError, match="fewer temporal patches"):
      features.open_store(
        experiment, processor, frames.FrameRule(8), only_buckets=True
      )

  def test_grids_are_found_without_weights(self, folder):
    model, _ = tiny_tower()
    with self.store(folder, (model, None)) as store:
      store.survey(["a.mp4"])
      assert store.grid == (2, 4, 4)
