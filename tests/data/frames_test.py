"""Expected values worked out by hand."""

import json

import numpy as np
import pytest
from absl.testing import absltest
from PIL import Image

from cacovid_jax import errors
from cacovid_jax.data import frames


class EvalRuleTest(absltest.TestCase):
  def test_positions_are_truncated_not_rounded(self):
    # linspace(0, 7, 4) = 0, 2.33, 4.67, 7.
    self.assertEqual(frames.eval_linspace(8, 4).tolist(), [0, 2, 4, 7])

  def test_short_clips_repeat_frames(self):
    self.assertEqual(frames.eval_linspace(2, 4).tolist(), [0, 0, 0, 1])
    self.assertEqual(frames.eval_linspace(1, 3).tolist(), [0, 0, 0])


class TrainRuleTest(absltest.TestCase):
  def test_one_frame_a_second_rounded_half_to_even(self):
    # 3.9 s give 3 frames; the middle of 0..101 is 50.5, of 0..103 51.5.
    self.assertEqual(
      frames.train_linspace_1fps(102, 3.9).tolist(), [0, 50, 101]
    )
    self.assertEqual(
      frames.train_linspace_1fps(104, 3.9).tolist(), [0, 52, 103]
    )

  def test_at_most_as_many_as_asked_for_or_there_are(self):
    self.assertLen(frames.train_linspace_1fps(9000, 300.0), 32)
    self.assertEqual(frames.train_linspace_1fps(2, 60.0).tolist(), [0, 1])

  def test_below_a_second_there_is_none(self):
    self.assertEmpty(frames.train_linspace_1fps(20, 0.9))


class PixelsTest(absltest.TestCase):
  def test_frames_of_the_right_size_are_not_touched(self):
    given = np.zeros((2, 8, 8, 3), np.uint8)
    self.assertIs(frames.resize(given, 8), given)

  def test_resize_is_pils_bicubic_filter(self):
    given = np.random.default_rng(0).integers(0, 256, (2, 9, 14, 3), np.uint8)
    got = frames.resize(given, 6)
    for frame, small in zip(given, got, strict=True):
      expected = Image.fromarray(frame).resize((6, 6), Image.BICUBIC)
      np.testing.assert_array_equal(small, np.asarray(expected))

  def test_pixels_are_scaled_then_normalised(self):
    given = np.array([0, 51, 255], np.uint8).reshape(1, 1, 1, 3)
    got = frames.to_pixels(given, 1, (0.5, 0.1, 0.0), (0.5, 0.1, 2.0))
    self.assertEqual(got.dtype, np.float32)
    np.testing.assert_allclose(got.reshape(-1), [-1.0, 1.0, 0.5], rtol=1e-6)


def test_preprocessing_is_read_from_the_checkpoint(tmp_path):
  entry = {
    "image_mean": [0.5, 0.4, 0.3],
    "image_std": [0.1, 0.2, 0.3],
    "size": {"height": 112, "width": 112},
  }
  (tmp_path / "preprocessor_config.json").write_text(json.dumps(entry))
  got = frames.Preprocessing.from_directory(tmp_path)
  assert got == frames.Preprocessing(112, (0.5, 0.4, 0.3), (0.1, 0.2, 0.3))
  # transformers 5 stores the video part inside processor_config.json.
  entry = {"video_processor": {**entry, "size": {"height": 56, "width": 56}}}
  (tmp_path / "processor_config.json").write_text(json.dumps(entry))
  assert frames.Preprocessing.from_directory(tmp_path).image_size == 56


@pytest.mark.parametrize("text", [None, "{", '{"image_mean": 3}', "[1]"])
def test_a_missing_or_malformed_processor_file_is_named(tmp_path, text):
  if text is not None:
    (tmp_path / "preprocessor_config.json").write_text(text)
  with pytest.raises(errors.UserError, match="checkpoint's origin"):
    frames.Preprocessing.from_directory(tmp_path)


if __name__ == "__main__":
  absltest.main()
