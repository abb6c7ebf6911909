"""Patches of Qwen2.5-VL: values by hand, plain loops, and stored references.

golden/processors.npz holds what transformers' own video processors, which need
torchvision, make of the same noise; make_processors.py made it.
"""

import functools
import json
import pathlib
import pickle

import numpy as np
import pytest

from cacovid_jax import errors
from cacovid_jax.data import frames as frames_lib
from cacovid_jax.data import qwen_frames, video
from tests.golden import make_processors as golden

from . import clips

GOLDEN = np.load(
  pathlib.Path(__file__).parents[1] / "golden" / "processors.npz"
)
TINY = qwen_frames.ProcessorConfig.tiny()


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
  got = qwen_frames.smart_resize(
    height, width, min_pixels=limits[0], max_pixels=limits[1]
  )
  assert got == expected


@pytest.mark.parametrize(
  "height, width, message",
  [(1, 201, "201 x 1 .* crop"), (201, 1, "crop"), (0, 5, "leave the clip out")],
)
def test_frames_that_cannot_be_resized_are_named(height, width, message):
  with pytest.raises(errors.UserError, match=message):
    qwen_frames.smart_resize(height, width, min_pixels=784, max_pixels=10**6)
  qwen_frames.smart_resize(1, 200, min_pixels=784, max_pixels=10**6)


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
  got = qwen_frames.patchify(frames, patch=p, temporal_patch=t, merge=m)
  np.testing.assert_array_equal(got, rows)


@pytest.mark.parametrize("num_frames, slices", [(1, 1), (3, 2), (4, 2)])
def test_the_last_frame_fills_the_last_slice(num_frames, slices):
  frames = np.stack([clips.picture(i + 1, 16) for i in range(num_frames)])
  got = TINY(frames)
  assert got.grid[0] == slices
  whole = np.concatenate([frames, frames[-1:]])[: 2 * slices]
  np.testing.assert_array_equal(got.patches, TINY(whole).patches)


def test_a_clip_knows_its_grid_tokens_and_seconds():
  frames = np.zeros((5, 40, 64, 3), np.uint8)
  got = TINY(frames, fps=qwen_frames.sampled_fps(5, 4.0))
  # 40 x 64 is 5 x 8 tokens of 8 pixels, above 24: sqrt(2560 / 1536) = 1.29,
  # 40 / 1.29 / 8 = 3.9 and 64 / 1.29 / 8 = 6.2.
  assert got.grid == TINY.grid(40, 64, 5) == (3, 3, 6)
  assert got.grid_thw == (3, 6, 12)
  assert got.num_tokens == 54
  assert got.patches.shape == (3 * 6 * 12, 3 * 2 * 4 * 4)
  assert got.patches.dtype == np.float32
  # Five frames of 4 s: 1.25 a second; a slice holds two.
  assert got.seconds_per_slice == 2 / 1.25
  assert TINY(frames).seconds_per_slice == 1.0
  assert qwen_frames.sampled_fps(5, 0.0) is None


def test_pixels_are_normalised_channel_by_channel():
  frames = np.zeros((2, 16, 16, 3), np.uint8)
  frames[...] = [0, 51, 255]
  got = TINY(frames).patches.reshape(-1, 3, 2 * 4 * 4)
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


@pytest.mark.parametrize("index", range(len(golden.QWEN)))
def test_pixels_of_the_reference_within_a_level(index):
  F, h, w, least, most, total = golden.QWEN[index]
  config = qwen_frames.ProcessorConfig(
    min_pixels=least * 784,
    max_pixels=most * 784,
    max_video_tokens=total or None,
  )
  got = config(golden.noise(index, F, h, w))
  assert got.grid_thw == tuple(GOLDEN[f"qwen_{index}_grid_thw"].tolist())
  levels = _levels(
    got.patches.reshape(len(got.patches), 3, -1), config.mean, config.std, 1
  )
  _check_levels(levels, GOLDEN[f"qwen_{index}"])


@pytest.mark.parametrize("index", range(len(golden.LLAVA)))
def test_llava_pixels_of_the_reference_within_a_level(index):
  F, h, w, size = golden.LLAVA[index]
  config = frames_lib.Preprocessing(size)
  got = config(golden.noise(index, F, h, w))
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
  np.testing.assert_array_equal(got.patches, expected.patches)


def pickled(value):
  """Sends a value through a pickle, as to a decoder's process."""
  return pickle.loads(pickle.dumps(value))


def test_a_clip_shares_its_budget_among_its_frames():
  config = qwen_frames.ProcessorConfig(
    min_pixels=784, max_pixels=100 * 784, max_video_tokens=100
  )
  # 90 tokens: two slices of 45 each, less than the 100 of a frame; many slices
  # still have 1.05 of the least.
  assert config.grid(600, 600, 4) == (2, 6, 6)
  assert config.grid(600, 600, 1) == (1, 10, 10)
  assert config.grid(600, 600, 4000) == (2000, 1, 1)


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
  read = qwen_frames.ProcessorConfig.from_files
  path = tmp_path / "preprocessor_config.json"
  path.write_text(json.dumps(HUB))
  assert read(tmp_path) == qwen_frames.ProcessorConfig(
    min_pixels=3136, max_pixels=12845056
  )
  assert read(tmp_path, max_pixels=9999).max_pixels == 9999
  # Without numbers: the defaults of the video processor.
  path.write_text("{}")
  assert read(tmp_path) == qwen_frames.ProcessorConfig()
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
  expected = qwen_frames.ProcessorConfig(
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
    ([1], "not a usable processor file"),
    ({"size": [1]}, "not a usable processor file"),
    ({"patch_size": "wide"}, "not a usable processor file"),
    ({"image_mean": [1]}, "not a usable processor file"),
    ({"merge_size": 0}, "merge_size=0"),
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
    qwen_frames.ProcessorConfig.from_files(tmp_path)
  assert str(tmp_path) in str(caught.value)
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize("fps", [0.0, -1.0, float("nan"), float("inf")])
def test_an_impossible_rate_is_refused(fps):
  with pytest.raises(errors.UserError, match="frames a second"):
    TINY(np.zeros((2, 16, 16, 3), np.uint8), fps=fps)
