"""Row maps of pruned prompts against lists built by hand and by loop."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from cacovid_jax import errors
from cacovid_jax.compressors import base
from cacovid_jax.models import prompt_batch


def _loop(index, start, num_video, length):
  """Rows of the prompt that stay, one row at a time."""
  kept = {start + i for i in index}
  return [
    row
    for row in range(length)
    if row in kept or not start <= row < start + num_video
  ]


def _prune(index, num_valid, *, start, num_video, length, num_rows):
  """Returns (rows, length) of a video whose rows follow each other."""
  rows, new_length, video_rows = prompt_batch.kept_rows(
    index,
    num_valid,
    video_rows=start + jnp.arange(num_video),
    length=length,
    num_rows=num_rows,
  )
  # Kept tokens are found where the rows say that they are.
  valid = jnp.arange(len(video_rows)) < num_valid
  found = jnp.take(rows, video_rows, mode="fill", fill_value=-1)
  expected = jnp.where(valid, start + jnp.asarray(index), -1)
  return rows, new_length, (found == expected).all()


class KeptRowsTest(parameterized.TestCase):
  def test_prefix_kept_tokens_newline_and_suffix(self):
    # Rows: 0-1 text, 2-7 video, 8 newline, 9-10 text.
    rows, length, found = _prune(
      jnp.array([1, 4]), 2, start=2, num_video=6, length=11, num_rows=11
    )
    self.assertTrue(found)
    np.testing.assert_array_equal(rows, [0, 1, 3, 6, 8, 9, 10])
    self.assertEqual(length, 7)

  def test_no_row_need_lie_behind_the_video(self):
    # Rows: 0 text, 1-4 video, nothing else (as before the question is known).
    for index, expected in (([0, 3], [0, 1, 4]), ([1], [0, 2])):
      rows, length, found = _prune(
        jnp.array(index), len(index), start=1, num_video=4, length=5, num_rows=5
      )
      self.assertTrue(found)
      np.testing.assert_array_equal(rows, expected)
      self.assertEqual(length, len(expected))

  @parameterized.parameters(range(5))
  def test_any_number_of_valid_entries_and_padding(self, num_valid):
    index = np.array([0, 2, 3, 7])
    rows, length, found = _prune(
      jnp.asarray(index),
      num_valid,
      start=3,
      num_video=8,
      length=15,
      num_rows=20,
    )
    self.assertTrue(found)
    self.assertLen(rows, 20 - 8 + 4)
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
    prune = functools.partial(_prune, num_video=12, num_rows=20)
    rows, lengths, found = jax.jit(
      jax.vmap(lambda i, n, s, m: prune(i, n, start=s, length=m))
    )(index, num_valid, start, length)
    self.assertTrue(found.all())
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
    def prune(index, valid, video_rows, length):
      traces.append(1)
      rows, length, _ = prompt_batch.kept_rows(
        index, valid, video_rows=video_rows, length=length, num_rows=20
      )
      return rows, length

    for row in range(4):
      place = np.arange(12)
      video_rows = np.where(place < num_video[row], start[row] + place, 20)
      rows, new_length = prune(
        index[row], num_valid[row], video_rows, length[row]
      )
      kept = index[row, : num_valid[row]]
      expected = _loop(kept, start[row], num_video[row], length[row])
      self.assertEqual(new_length, len(expected))
      np.testing.assert_array_equal(rows[:new_length], expected)
    self.assertLen(traces, 1)

  def test_text_between_the_patches_of_a_video_stays(self):
    # Rows: 0 text, 1-2 video, 3 text, 4-5 video, 6-7 text, 8 padding.
    rows, length, video_rows = prompt_batch.kept_rows(
      jnp.array([1, 3, 0]),
      2,
      video_rows=jnp.array([1, 2, 4, 5]),
      length=8,
      num_rows=9,
    )
    np.testing.assert_array_equal(rows, [0, 2, 3, 5, 6, 7, 7, 7])
    self.assertEqual(length, 6)
    np.testing.assert_array_equal(video_rows, [1, 3, 8])

  def test_text_stays_where_all_of_a_patch_is_dropped(self):
    rows, length, video_rows = prompt_batch.kept_rows(
      jnp.array([0]),
      1,
      video_rows=jnp.array([1, 2, 4, 5]),
      length=8,
      num_rows=8,
    )
    np.testing.assert_array_equal(rows, [0, 1, 3, 6, 7])
    self.assertEqual(length, 5)
    np.testing.assert_array_equal(video_rows, [1])

  def test_text_of_a_patch_goes_with_the_last_of_its_tokens(self):
    # Rows: 0 text, 1 time, 2-3 video, 4 time, 5-6 video, 7 mark, 8 text.
    for index, expected, places in (
      ([0], [0, 1, 2, 8], [2]),
      ([3], [0, 4, 6, 7, 8], [2]),
      ([1, 2], [0, 1, 3, 4, 5, 7, 8], [2, 4]),
      ([], [0, 8], []),
    ):
      rows, length, video_rows = prompt_batch.kept_rows(
        jnp.array((index + [0, 0])[:2]),
        len(index),
        video_rows=jnp.array([2, 3, 5, 6]),
        length=9,
        num_rows=10,
        frames=jnp.array([-1, 0, 0, 0, 1, 1, 1, 1, -1, -1]),
      )
      np.testing.assert_array_equal(rows[:length], expected)
      assert (rows[length:] == 8).all() and len(rows) == 8
      np.testing.assert_array_equal(video_rows, (places + [8, 8])[:2])


class PrunedPromptsTest(absltest.TestCase):
  """One prompt of eight rows, its four video tokens in two patches."""

  def setUp(self):
    super().setUp()
    x = np.arange(8 * 2, dtype=np.float32).reshape(1, 8, 2)
    self.deep = 100 + np.arange(3 * 4 * 2, dtype=np.float32)
    self.batch = prompt_batch.PromptBatch(
      x=jnp.asarray(x),
      positions=jnp.arange(8)[None, None] * 10,
      lengths=jnp.array([8]),
      video_rows=jnp.array([[1, 2, 4, 5]]),
      next_position=jnp.array([80]),
      deep=jnp.asarray(self.deep.reshape(1, 3, 4, 2)),
    )

  def test_whole_prompts_know_the_text_behind_the_video(self):
    prompts = prompt_batch.whole(self.batch)
    np.testing.assert_array_equal(prompts.num_after, [2])
    np.testing.assert_array_equal(prompts.index, [[0, 1, 2, 3]])
    # Dropping the last patch makes no other text the one behind the video.
    _, pruned = prompt_batch.take(
      prompts, jnp.array([[0, 1]]), jnp.array([1]), num_video=4
    )
    np.testing.assert_array_equal(pruned.num_after, [2])
    np.testing.assert_array_equal(pruned.index, [[0, 4]])
    np.testing.assert_array_equal(pruned.lengths, [5])

  def test_auxiliary_features_go_with_their_tokens(self):
    deep = self.deep.reshape(3, 4, 2)
    prompts = prompt_batch.whole(self.batch)
    _, pruned = prompt_batch.take(
      prompts, jnp.array([[1, 2]]), jnp.array([2]), num_video=4
    )
    np.testing.assert_array_equal(pruned.deep[0], deep[:, [1, 2]])
    _, pruned = prompt_batch.take(
      pruned, jnp.array([[1]]), jnp.array([1]), num_video=4
    )
    np.testing.assert_array_equal(pruned.deep[0], deep[:, [2]])
    np.testing.assert_array_equal(pruned.index, [[2]])
    np.testing.assert_array_equal(pruned.positions[0, 0], [0, 30, 40, 60, 70])

  def test_those_of_a_selection_take_their_places(self):
    selection = base.Selection(
      features=jnp.full((1, 3, 2), -1.0),
      index=jnp.array([[0, 3, 4]]),
      mask=jnp.array([[True, True, False]]),
      mass=jnp.array([[3.0, 1.0, 0.0]]),
      assign=jnp.array([[0, 0, 0, 1]]),
      deep=jnp.arange(3 * 3 * 2.0).reshape(1, 3, 3, 2),
    )
    whole = prompt_batch.whole(self.batch)
    kept = prompt_batch.keep(whole, selection, num_video=4)
    np.testing.assert_array_equal(kept.deep, selection.deep)
    np.testing.assert_array_equal(kept.x[0, :6, 0], [0, -1, 6, -1, 12, 14])
    np.testing.assert_array_equal(kept.lengths, [6])
    # Without any, those of the tokens that are kept.
    plain = selection._replace(deep=None)
    kept = prompt_batch.keep(whole, plain, num_video=4)
    deep = self.deep.reshape(3, 4, 2)
    np.testing.assert_array_equal(kept.deep[0, :, :2], deep[:, [0, 3]])


def test_buckets_of_text_pad_least():
  rng = np.random.default_rng(3)
  lengths = rng.choice([30, 60, 61, 200, 250, 900], 80).tolist()
  sizes = sorted({-(-length // 16) * 16 for length in lengths})

  def rows(buckets, beside):
    return sum(
      beside + min(b for b in buckets if b >= length) for length in lengths
    )

  for beside in (0, 100, 3000):
    made = prompt_batch.PromptBuckets.of(lengths, beside=beside).text_rows
    every = [
      (*chosen, sizes[-1])
      for chosen in itertools.combinations(sizes[:-1], len(made) - 1)
    ]
    assert rows(made, beside) == min(rows(one, beside) for one in every)
    # A bucket more spares less than a tenth; one fewer would cost that.
    for number, few in ((len(made), False), (len(made) - 2, True)):
      if not 0 <= number < 3:
        continue
      best = min(
        rows((*chosen, sizes[-1]), beside)
        for chosen in itertools.combinations(sizes[:-1], number)
      )
      less, more = sorted((best, rows(made, beside)))
      assert (less <= 0.9 * more) == few
  assert len(prompt_batch.PromptBuckets.of(lengths, beside=9000).text_rows) == 1
  assert prompt_batch.PromptBuckets.of([75]).text_rows == (80,)


def test_a_prompt_takes_the_smallest_bucket_that_holds_its_text():
  buckets = prompt_batch.PromptBuckets((64, 256, 1024))
  found = [buckets.pick(rows) for rows in (1, 64, 65, 256, 1000)]
  assert found == [64, 64, 256, 256, 1024]
  with pytest.raises(errors.UserError, match="has 1025 rows.*prompt_rows"):
    buckets.pick(1025)
  with pytest.raises(errors.UserError) as raised:
    prompt_batch.PromptBuckets((16,)).pick(17)
  (line,) = str(raised.value).splitlines()
  assert line.startswith("a prompt has 17 rows beside its video, above the 16")
  assert "config.data.prompt_rows" in line
  for bad in ((), (64, 64), (64, 16), (0, 3), (1, 2, 3, 4)):
    with pytest.raises(errors.UserError, match="one to three rising"):
      prompt_batch.PromptBuckets(bad)


if __name__ == "__main__":
  absltest.main()
