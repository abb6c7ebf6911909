"""Expected values worked out by hand."""

import fractions

import numpy as np
from absl.testing import absltest
from PIL import Image

from cacovid_jax.data import frames


class EvalRuleTest(absltest.TestCase):
  def test_positions_are_truncated_not_rounded(self):
    # linspace(0, 7, 4) = 0, 2.33, 4.67, 7.
    self.assertEqual(frames.eval_linspace(8, 4).tolist(), [0, 2, 4, 7])

  def test_short_clips_repeat_frames(self):
    self.assertEqual(frames.eval_linspace(2, 4).tolist(), [0, 0, 0, 1])
    self.assertEqual(frames.eval_linspace(1, 3).tolist(), [0, 0, 0])

  def test_positions_are_those_of_the_evaluators_expression(self):
    for num_frames in (1, 2, 3, 4, 12, 31, 32, 33, 152, 1800, 107_892):
      for num_samples in (1, 2, 8, 16, 32):
        got = frames.eval_linspace(num_frames, num_samples)
        np.testing.assert_array_equal(
          got, np.linspace(0, num_frames - 1, num_samples, dtype=int)
        )
        # A loop in exact fractions: only at whole positions may the float
        # product fall short of it, by one.
        for i, index in enumerate(got.tolist()):
          exact = fractions.Fraction(
            i * (num_frames - 1), max(num_samples - 1, 1)
          )
          whole = exact.denominator == 1
          self.assertIn(index - int(exact), (-1, 0) if whole else (0,))
        self.assertEqual(got[0], 0)
        if num_samples > 1:
          self.assertEqual(got[-1], num_frames - 1)


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
    self.assertEmpty(frames.train_linspace_1fps(4, 0.4))
    self.assertEmpty(frames.train_linspace_1fps(1, 0.04))

  def test_a_single_frame_is_the_first(self):
    self.assertEqual(frames.train_linspace_1fps(1, 5.0).tolist(), [0])
    self.assertEqual(frames.train_linspace_1fps(45, 1.9).tolist(), [0])

  def test_positions_are_those_of_the_trainers_loop(self):
    for num_frames in (1, 2, 3, 12, 31, 33, 152, 1800):
      for duration in (0.0, 0.4, 0.999, 1.0, 2.5, 31.99, 32.0, 60.0):
        for fps in (0.5, 1.0, 2.0):
          num_samples = min(32, num_frames, int(duration * fps))
          expected = []
          for i in range(num_samples):
            step = (num_frames - 1) / max(num_samples - 1, 1)
            last = num_samples > 1 and i == num_samples - 1
            expected.append(num_frames - 1 if last else round(i * step))
          got = frames.train_linspace_1fps(num_frames, duration, 32, fps)
          self.assertEqual(got.tolist(), expected)

  def test_a_rate_of_unknown_seconds_takes_no_frame(self):
    rule = frames.FrameRule(8, frames.RATE_RULE)
    for duration in (0.0, float("inf"), float("nan")):
      self.assertEmpty(rule(100, duration))
    self.assertLen(rule(100, 4.0), 8)


class PixelsTest(absltest.TestCase):
  def test_frames_of_the_right_size_are_not_touched(self):
    given = np.zeros((8, 8, 3), np.uint8)
    self.assertIs(frames.resize_frame(given, 8), given)

  def test_resize_is_the_bicubic_filter_of_two_rounded_passes(self):
    # Reduced, enlarged, and one side each way; noise has the worst edges.
    for h, w, size in ((19, 14, 6), (5, 9, 24), (50, 9, 24), (9, 50, 24)):
      given = np.random.default_rng(h).integers(0, 256, (2, h, w, 3), np.uint8)
      for frame in given:
        small = frames.resize_frame(frame, size)
        wide = _bytes(np.einsum("pw,hwc->hpc", _filter(w, size), frame))
        expected = _bytes(np.einsum("ph,hwc->pwc", _filter(h, size), wide))
        difference = np.abs(small - expected)
        # PIL's weights have 22 bits: a sum at one half may fall either way.
        self.assertLessEqual(difference.max(), 1)
        self.assertLess((difference > 0).mean(), 2e-3)

  def test_where_both_sides_shrink_it_is_pils_own(self):
    given = np.random.default_rng(0).integers(0, 256, (19, 14, 3), np.uint8)
    for resample in Image.Resampling:
      expected = Image.fromarray(given).resize((6, 6), resample)
      np.testing.assert_array_equal(
        frames.resize_frame(given, 6, int(resample)), np.asarray(expected)
      )

  def test_a_frame_keeps_rows_and_columns_apart(self):
    given = np.zeros((8, 8, 3), np.uint8)
    self.assertEqual(frames.resize_frame(given, (4, 12)).shape, (4, 12, 3))


def _filter(size: int, wanted: int) -> np.ndarray:
  """Returns float64[wanted,size] weights of the cubic filter, a = -1/2."""
  step = size / wanted
  width = max(step, 1.0)
  weights = np.zeros((wanted, size))
  for i in range(wanted):
    centre = (i + 0.5) * step
    low, high = int(centre - 2 * width + 0.5), int(centre + 2 * width + 0.5)
    for j in range(max(low, 0), min(high, size)):
      x = abs((j + 0.5 - centre) / width)
      if x < 1:
        weights[i, j] = 1.5 * x**3 - 2.5 * x**2 + 1
      elif x < 2:
        weights[i, j] = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
  return weights / weights.sum(axis=1, keepdims=True)


def _bytes(values: np.ndarray) -> np.ndarray:
  return np.clip(np.floor(values + 0.5), 0, 255)


if __name__ == "__main__":
  absltest.main()
