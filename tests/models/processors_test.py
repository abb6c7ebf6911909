"""What towers take: values by hand, plain loops, and stored references.

golden/processors.npz holds what transformers' own video processors, which need
torchvision, make of the same noise; make_processors.py made it.
"""

import functools
import json
import pathlib
import pickle

import jax
import numpy as np
import pytest
from PIL import Image

from cacovid_jax import errors
from cacovid_jax.data import frames as frames_lib
from cacovid_jax.data import video
from cacovid_jax.models import processors, qwen2_5_vl_layout, video_llm
from tests.data import clips
from tests.golden import make_processors as golden

GOLDEN = np.load(
  pathlib.Path(__file__).parents[1] / "golden" / "processors.npz"
)
TINY = processors.Qwen2_5VLProcessor.tiny()


@pytest.mark.parametrize(
  "height, width, limits, expected",
  [
    # 100/28 = 3.57 -> 4, 150/28 = 5.36 -> 5.
    (100, 150, (1, 10**6), (112, 140)),
    # 70/28 = 2.5 -> 2 and 98/28 = 3.5 -> 4: half to even.
    (70, 98, (1, 10**6), (56, 112)),
    # sqrt(640000 / 200704) = 1.786; 800 / 1.786 / 28 = 16 exactly.
    (800, 800, (1, 256 * 784), (448, 448)),
    # sqrt(720 * 1280 / 200704) = 2.143; 336.0 / 28 = 12 and 597.3 / 28 = 21.3.
    (720, 1280, (1, 256 * 784), (336, 588)),
    # sqrt(100352 / 900) = 10.56; 316.8 / 28 = 11.3 -> 12.
    (30, 30, (128 * 784, 10**6), (336, 336)),
    # The short side would vanish and stays one token.
    (28, 5600, (1, 16 * 784), (28, 1568)),
    # Nothing rounds to no token where it is to be enlarged.
    (3, 3, (4 * 784, 10**6), (56, 56)),
  ],
)
def test_sides_are_multiples_within_the_limits(height, width, limits, expected):
  got = processors.smart_resize(
    height, width, min_pixels=limits[0], max_pixels=limits[1]
  )
  assert got == expected


@pytest.mark.parametrize(
  "height, width, message",
  [(1, 201, "201 x 1 .* crop"), (201, 1, "crop"), (0, 5, "leave the clip out")],
)
def test_frames_that_cannot_be_resized_are_named(height, width, message):
  with pytest.raises(errors.UserError, match=message):
    processors.smart_resize(height, width, min_pixels=784, max_pixels=10**6)
  processors.smart_resize(1, 200, min_pixels=784, max_pixels=10**6)


def test_patches_are_those_of_plain_loops():
  rng = np.random.default_rng(0)
  p, t, m = 3, 2, 2
  frames = rng.integers(0, 256, (4, 2 * m * p, 3 * m * p, 3), np.uint8)
  rows = []
  for k in range(2):
    for H in range(2):
      for W in range(3):
        for i in range(m):
          for j in range(m):
            y, x = (H * m + i) * p, (W * m + j) * p
            rows.append(
              [
                frames[k * t + s, y + u, x + v, c]
                for c in range(3)
                for s in range(t)
                for u in range(p)
                for v in range(p)
              ]
            )
  got = qwen2_5_vl_layout.patchify(frames, patch=p, temporal_patch=t, merge=m)
  np.testing.assert_array_equal(got, rows)


@pytest.mark.parametrize("num_frames, slices", [(1, 1), (3, 2), (4, 2)])
def test_the_last_frame_fills_the_last_slice(num_frames, slices):
  frames = np.stack([clips.picture(i + 1, 16) for i in range(num_frames)])
  got = TINY(frames)
  assert got.grid[0] == slices
  whole = np.concatenate([frames, frames[-1:]])[: 2 * slices]
  np.testing.assert_array_equal(got.values, TINY(whole).values)


def test_a_clip_knows_its_grid_tokens_and_seconds():
  frames = np.zeros((5, 40, 64, 3), np.uint8)
  got = TINY(frames, fps=frames_lib.sampled_fps(5, 4.0))
  # 40 x 64 is 5 x 8 tokens of 8 pixels, above 24: sqrt(2560 / 1536) = 1.29,
  # 40 / 1.29 / 8 = 3.9 and 64 / 1.29 / 8 = 6.2.
  assert got.grid == TINY.grid(5, 40, 64) == (3, 3, 6)
  assert got.values.shape == (3 * 6 * 12, 3 * 2 * 4 * 4)
  assert got.values.dtype == np.float32
  # Five frames of 4 s: 1.25 a second; a slice holds two.
  assert got.second_per_grid_t == 2 / 1.25
  assert TINY(frames).second_per_grid_t == 1.0
  assert frames_lib.sampled_fps(5, 0.0) is None


def test_pixels_are_normalised_channel_by_channel():
  frames = np.zeros((2, 16, 16, 3), np.uint8)
  frames[...] = [0, 51, 255]
  got = TINY(frames).values.reshape(-1, 3, 2 * 4 * 4)
  expected = [
    (value - mean) / std
    for value, mean, std in zip(
      (0.0, 0.2, 1.0),
      (0.48145466, 0.4578275, 0.40821073),
      (0.26862954, 0.26130258, 0.27577711),
      strict=True,
    )
  ]
  np.testing.assert_allclose(
    got, np.broadcast_to(np.array(expected)[:, None], got.shape), rtol=1e-6
  )


@pytest.mark.parametrize(
  "processor",
  [TINY, processors.LlavaOnevisionProcessor(image_size=16)],
  ids=["patches", "tile"],
)
def test_bytes_become_the_same_pixels_in_a_program(processor):
  frames = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), np.uint8)
  given = processor(frames, fps=2.0, as_bytes=True)
  assert given.values.dtype == np.uint8
  plain = processor(frames, fps=2.0)
  assert plain.values.dtype == np.float32 and plain.table is None
  found = jax.jit(video_llm.normalised)(given)
  np.testing.assert_array_equal(found.values, plain.values)
  assert given._replace(values=0, table=0) == plain._replace(values=0, table=0)


@pytest.mark.parametrize("index", range(len(golden.QWEN)))
def test_pixels_of_the_reference_within_a_level(index):
  F, h, w, least, most, total = golden.QWEN[index]
  config = processors.Qwen2_5VLProcessor(
    min_pixels=least * 784,
    max_pixels=most * 784,
    max_video_tokens=total or None,
  )
  got = config(golden.noise(index, F, h, w))
  T, H, W = GOLDEN[f"qwen_{index}_grid_thw"].tolist()
  assert got.grid == (T, H // 2, W // 2)
  levels = _levels(
    got.values.reshape(len(got.values), 3, -1), config.mean, config.std, 1
  )
  _check_levels(levels, GOLDEN[f"qwen_{index}"])


@pytest.mark.parametrize("index", range(len(golden.LLAVA)))
def test_llava_pixels_of_the_reference_within_a_level(index):
  F, h, w, size = golden.LLAVA[index]
  config = processors.LlavaOnevisionProcessor(image_size=size, frame_side=3)
  made = config(golden.noise(index, F, h, w))
  assert made.grid == config.fixed_grid(F) == (F, 3, 3)
  got = made.values
  _check_levels(
    _levels(got, config.mean, config.std, 3), GOLDEN[f"llava_{index}"]
  )


def _levels(pixels, mean, std, axis):
  shape = [1] * pixels.ndim
  shape[axis] = 3
  return (pixels * np.reshape(std, shape) + np.reshape(mean, shape)) * 255


def _check_levels(got, expected):
  difference = np.abs(got - expected)
  # Noise that is enlarged can differ by two levels in a few values of 100 000,
  # as torchvision's filter weights have 16 bits.
  assert difference.max() < 2.001
  assert (difference > 1.001).mean() < 1e-4
  assert (difference > 0.5).mean() < 0.02


def test_large_frames_are_resized_while_they_are_decoded(tmp_path):
  path = clips.write(tmp_path / "wide.mp4", 6, width=192, height=96)
  wanted = [0, 2, 5]
  fit = functools.partial(TINY.resize_frame, num_frames=len(wanted))
  small = video.decode(path, lambda n, s: wanted, resize=pickled(fit))
  assert small.frames.shape == (3, 24, 48, 3)
  whole = video.read_frames(path, wanted)
  got, expected = TINY(small.frames, resized=True), TINY(whole)
  assert got.grid == expected.grid == (2, 3, 6)
  np.testing.assert_array_equal(got.values, expected.values)


def pickled(value):
  """Sends a value through a pickle, as to a decoder's process."""
  return pickle.loads(pickle.dumps(value))


def test_a_clip_shares_its_budget_among_its_frames():
  config = processors.Qwen2_5VLProcessor(
    min_pixels=784, max_pixels=100 * 784, max_video_tokens=100
  )
  # 90 tokens: two slices of 45 each, less than the 100 of a frame; many slices
  # still have 1.05 of the least.
  assert config.grid(4, 600, 600) == (2, 6, 6)
  assert config.grid(1, 600, 600) == (1, 10, 10)
  assert config.grid(4000, 600, 600) == (2000, 1, 1)


HUB = {
  # As in the released checkpoints: one file for images and videos.
  "min_pixels": 3136,
  "max_pixels": 12845056,
  "patch_size": 14,
  "temporal_patch_size": 2,
  "merge_size": 2,
  "image_mean": [0.48145466, 0.4578275, 0.40821073],
  "image_std": [0.26862954, 0.26130258, 0.27577711],
  "image_processor_type": "Qwen2VLImageProcessor",
  "processor_class": "Qwen2_5_VLProcessor",
}


def test_limits_are_read_from_every_form_of_the_file(tmp_path):
  read = processors.Qwen2_5VLProcessor.from_files
  path = tmp_path / "preprocessor_config.json"
  path.write_text(json.dumps(HUB))
  assert read(tmp_path) == processors.Qwen2_5VLProcessor(
    min_pixels=3136, max_pixels=12845056
  )
  assert read(tmp_path).with_bounds(max_pixels=9999).max_pixels == 9999
  # Without numbers: the defaults of the video processor.
  path.write_text("{}")
  assert read(tmp_path) == processors.Qwen2_5VLProcessor()
  path.write_text(
    json.dumps({"size": {"min_pixels": 1000, "max_pixels": 2000}})
  )
  assert read(tmp_path).max_pixels == 2000
  newer = {
    "size": {"shortest_edge": 5000, "longest_edge": 6000},
    "image_mean": [0.1, 0.2, 0.3],
    "image_std": [1, 2, 3],
    "resample": 2,
    "patch_size": 7,
    "cap_pixels_per_frame": True,
    "max_video_tokens": 77,
  }
  (tmp_path / "video_preprocessor_config.json").write_text(json.dumps(newer))
  expected = processors.Qwen2_5VLProcessor(
    patch_size=7,
    min_pixels=5000,
    max_pixels=6000,
    mean=(0.1, 0.2, 0.3),
    std=(1.0, 2.0, 3.0),
    resample=2,
    max_video_tokens=77,
  )
  assert read(tmp_path) == expected
  nested = {"video_processor": {**newer, "max_video_tokens": 78}}
  (tmp_path / "processor_config.json").write_text(json.dumps(nested))
  assert read(tmp_path).max_video_tokens == 78


@pytest.mark.parametrize(
  "entry, message",
  [
    (None, "no preprocessor_config.json"),
    ([1], "must be an object; copy it again"),
    ({"size": [1]}, r"size is \[1\]; it must be a whole number or an object"),
    ({"size": 384}, "size is 384; it must be an object"),
    ({"size": {"height": "a"}}, "size.* must be a whole number or null"),
    ({"patch_size": "wide"}, "patch_size is 'wide'; it must be a whole number"),
    ({"patch_size": 10**30}, "patch_size is 1000.*; it must be a whole number"),
    ({"image_mean": [1]}, r"image_mean is \[1\]; it must be a list"),
    ({"image_std": [1, 1, None]}, r"image_std\[2\] is None; .* a number"),
    ({"merge_size": 0}, "merge_size is 0; it must be a whole number at least"),
    ({"do_resize": "no"}, "do_resize is 'no'; it must be true or false"),
    ({"min_pixels": 9, "max_pixels": 8}, "the smaller one first"),
    ({"image_std": [1, 0, 1]}, "deviations above 0"),
    ({"resample": 17}, "filter of PIL"),
    ({"do_resize": False}, "do_resize=False is not supported"),
    ({"do_normalize": False}, "do_normalize=False is not supported"),
    ({"rescale_factor": 1.0}, "rescale_factor=1.0 is not supported"),
  ],
)
def test_files_that_cannot_be_followed_are_named(tmp_path, entry, message):
  if entry is not None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(entry))
  with pytest.raises(errors.UserError, match=message) as caught:
    processors.Qwen2_5VLProcessor.from_files(tmp_path)
  assert str(tmp_path) in str(caught.value)
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize("fps", [0.0, -1.0, float("nan"), float("inf")])
def test_an_impossible_rate_is_refused(fps):
  with pytest.raises(errors.UserError, match="frames a second"):
    TINY(np.zeros((2, 16, 16, 3), np.uint8), fps=fps)


def test_pixels_are_scaled_then_normalised():
  given = np.array([0, 51, 255], np.uint8).reshape(1, 1, 1, 3)
  statistics = dict(mean=(0.5, 0.1, 0.0), std=(0.5, 0.1, 2.0))
  processor = processors.LlavaOnevisionProcessor(image_size=1, **statistics)
  got = processor(given).values
  assert got.dtype == np.float32
  np.testing.assert_allclose(got.reshape(-1), [-1.0, 1.0, 0.5], rtol=1e-6)


def test_bounds_are_for_frames_that_keep_their_shape():
  square = processors.LlavaOnevisionProcessor()
  assert square.with_paper_bounds() == square
  with pytest.raises(errors.UserError, match="one size: leave them out"):
    square.with_bounds(max_pixels=9)
  paper = processors.Qwen2_5VLProcessor().with_paper_bounds()
  assert paper.min_pixels == processors.PAPER_MIN_PIXELS
  assert paper.max_pixels == processors.PAPER_MAX_PIXELS
  # In tokens: a model of other patches gets as many.
  assert TINY.with_paper_bounds().max_pixels == 256 * 8 * 8
  assert TINY.with_paper_bounds(7, 9).min_pixels == 7
  with pytest.raises(errors.UserError, match="the smaller one first"):
    TINY.with_bounds(9, 7)


def test_rules_are_named_as_in_earlier_runs():
  # Feature caches and answer logs on disk have these words.
  square = processors.LlavaOnevisionProcessor(frame_side=4)
  assert square.identity == (
    "Preprocessing(image_size=384, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5),"
    " resample=3)"
  )
  assert TINY.identity == (
    "ProcessorConfig(patch_size=4, temporal_patch_size=2, merge_size=2,"
    " min_pixels=256, max_pixels=1536, mean=(0.48145466, 0.4578275,"
    " 0.40821073), std=(0.26862954, 0.26130258, 0.27577711), resample=3,"
    " max_video_tokens=None)"
  )


def test_preprocessing_is_read_from_the_checkpoint(tmp_path):
  entry = {
    "image_mean": [0.5, 0.4, 0.3],
    "image_std": [0.1, 0.2, 0.3],
    "size": {"height": 112, "width": 112},
    "resample": 2,
    "rescale_factor": 1 / 255,
  }
  (tmp_path / "preprocessor_config.json").write_text(json.dumps(entry))
  got = processors.LlavaOnevisionProcessor.from_files(tmp_path)
  assert got == processors.LlavaOnevisionProcessor(
    image_size=112, mean=(0.5, 0.4, 0.3), std=(0.1, 0.2, 0.3), resample=2
  )
  rng = np.random.default_rng(0)
  given = rng.integers(0, 256, (1, 130, 140, 3), np.uint8)
  bilinear = Image.fromarray(given[0]).resize((112, 112), Image.BILINEAR)
  np.testing.assert_allclose(
    got(given).values[0] * [0.1, 0.2, 0.3] + [0.5, 0.4, 0.3],
    np.asarray(bilinear) / 255,
    atol=1e-6,
  )
  # transformers 5 stores the video part inside processor_config.json.
  entry = {"video_processor": {**entry, "size": {"height": 56, "width": 56}}}
  (tmp_path / "processor_config.json").write_text(json.dumps(entry))
  assert (
    processors.LlavaOnevisionProcessor.from_files(tmp_path).image_size == 56
  )


@pytest.mark.parametrize("text", [None, "{", '{"image_mean": 3}', "[1]"])
def test_a_missing_or_malformed_file_of_llava_is_named(tmp_path, text):
  if text is not None:
    (tmp_path / "preprocessor_config.json").write_text(text)
  with pytest.raises(errors.UserError, match="checkpoint's origin"):
    processors.LlavaOnevisionProcessor.from_files(tmp_path)


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"size": {"shortest_edge": 384}}, "no square tile"),
    ({"size": {"height": 384, "width": 378}}, "no square tile"),
    ({"size": 0}, "size is 0; it must be a whole number at least 1"),
    ({"size": 8193}, "image_size=8193: give pixels, at most 8192"),
    ({"size": 10**30}, "size is 1000.*; it must be a whole number at most"),
    ({"size": float("inf")}, "checkpoint's origin"),
    ({"resample": 9}, "filter of PIL"),
    ({"image_std": [0.5, 0.5, 0.0]}, "deviations above 0"),
    ({"do_center_crop": True}, "do_center_crop=True is not supported"),
    ({"do_rescale": False}, "do_rescale=False is not supported"),
    ({"rescale_factor": 1 / 127.5}, "rescale_factor"),
    ({"rescale_factor": "1/255"}, "checkpoint's origin"),
  ],
)
def test_steps_that_are_not_ours_are_refused(tmp_path, changes, message):
  entry = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": 384}
  path = tmp_path / "preprocessor_config.json"
  path.write_text(json.dumps(entry))
  assert (
    processors.LlavaOnevisionProcessor.from_files(tmp_path)
    == processors.LlavaOnevisionProcessor()
  )
  path.write_text(json.dumps({**entry, **changes}))
  with pytest.raises(errors.UserError, match=message) as caught:
    processors.LlavaOnevisionProcessor.from_files(tmp_path)
  assert str(path) in str(caught.value)


def test_a_field_that_no_processor_has_is_no_fault_of_the_file(tmp_path):
  entry = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": 384}
  (tmp_path / "preprocessor_config.json").write_text(json.dumps(entry))
  with pytest.raises(TypeError, match="tiles"):
    processors.LlavaOnevisionProcessor.from_files(tmp_path, tiles=1)
