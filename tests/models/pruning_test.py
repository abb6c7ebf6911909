"""Row maps of pruned prompts against lists built by hand and by loop."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from cacovid_jax.models import pruning


def _loop(index, start, num_video, length):
  """Rows of the prompt that stay, one row at a time."""
  kept = {start + i for i in index}
  return [
    row
    for row in range(length)
    if row in kept or not start <= row < start + num_video
  ]


class PrunedRowsTest(parameterized.TestCase):
  def test_prefix_kept_tokens_newline_and_suffix(self):
    # Rows: 0-1 text, 2-7 video, 8 newline, 9-10 text.
    rows, length = pruning.pruned_rows(
      jnp.array([1, 4]),
      2,
      video_start=2,
      num_video=6,
      length=11,
      out_length=7,
    )
    np.testing.assert_array_equal(rows, [0, 1, 3, 6, 8, 9, 10])
    self.assertEqual(length, 7)

  def test_no_row_need_lie_behind_the_video(self):
    # Rows: 0 text, 1-4 video, nothing else (as before the question is known).
    for index, expected in (([0, 3], [0, 1, 4]), ([1], [0, 2])):
      rows, length = pruning.pruned_rows(
        jnp.array(index),
        len(index),
        video_start=1,
        num_video=4,
        length=5,
        out_length=len(expected),
      )
      np.testing.assert_array_equal(rows, expected)
      self.assertEqual(length, len(expected))

  @parameterized.parameters(range(5))
  def test_any_number_of_valid_entries_and_padding(self, num_valid):
    index = np.array([0, 2, 3, 7])
    rows, length = pruning.pruned_rows(
      jnp.asarray(index),
      num_valid,
      video_start=3,
      num_video=8,
      length=15,
      out_length=20 - 8 + 4,  # Of prompts of up to 20 rows.
    )
    expected = _loop(index[:num_valid], 3, 8, 15)
    self.assertEqual(length, len(expected))
    np.testing.assert_array_equal(rows[:length], expected)
    # Behind the end: a row that exists, so that a gather stays in bounds.
    np.testing.assert_array_equal(rows[length:], expected[-1])

  def test_every_array_may_be_traced_and_batched(self):
    gen = np.random.default_rng(0)
    index = np.sort([gen.permutation(12)[:5] for _ in range(6)], axis=1)
    num_valid, start = gen.integers(0, 6, 6), gen.integers(0, 4, 6)
    length = start + 12 + 1 + gen.integers(1, 4, 6)
    prune = functools.partial(
      pruning.pruned_rows, num_video=12, out_length=20 - 12 + 5
    )
    rows, lengths = jax.jit(
      jax.vmap(
        lambda i, n, s, m: prune(i, n, video_start=s, length=m),
      )
    )(index, num_valid, start, length)
    for row in range(6):
      expected = _loop(
        index[row, : num_valid[row]], start[row], 12, length[row]
      )
      np.testing.assert_array_equal(rows[row, : lengths[row]], expected)

  def test_videos_of_other_sizes_share_a_program(self):
    # Qwen2.5-VL: text directly behind the video, N differs by video.
    gen = np.random.default_rng(1)
    num_video, start = np.array([3, 9, 12, 1]), np.array([0, 2, 1, 4])
    num_valid, length = np.array([2, 4, 5, 1]), start + num_video + 3
    index = np.zeros((4, 5), np.int64)
    for row, (video, valid) in enumerate(
      zip(num_video, num_valid, strict=True)
    ):
      index[row, :valid] = np.sort(gen.permutation(video)[:valid])
    traces = []

    @jax.jit
    def prune(index, valid, start, video, length):
      traces.append(1)
      return pruning.pruned_rows(
        index,
        valid,
        video_start=start,
        num_video=video,
        length=length,
        out_length=13,
      )

    for row in range(4):
      rows, new_length = prune(
        index[row], num_valid[row], start[row], num_video[row], length[row]
      )
      kept = index[row, : num_valid[row]]
      expected = _loop(kept, start[row], num_video[row], length[row])
      self.assertEqual(new_length, len(expected))
      np.testing.assert_array_equal(rows[:new_length], expected)
    self.assertLen(traces, 1)


if __name__ == "__main__":
  absltest.main()
