"""Stateless order, bad clips, what a batch holds: on clips made here."""

import dataclasses
import functools
import json
import operator
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cacovid_jax import errors
from cacovid_jax.data import decode_workers, frames, left_out, video
from cacovid_jax.data import question as question_lib
from cacovid_jax.models import checkpoints, prompt_batch
from cacovid_jax.policy import sampling
from cacovid_jax.training import batches as batches_lib
from cacovid_jax.training import data_order, ratio
from tests.data import clips
from tests.training import tiny

RULE = frames.FrameRule(4)
RESIZE = functools.partial(frames.resize_frame, size=32)


def _rows(videos):
  return [
    question_lib.Question(
      id=f"q{i}",
      video=name,
      question=f"What {i}?",
      options=("x", "y"),
      answer="AB"[i % 2],
      prompt=f"What {i}?",
    )
    for i, name in enumerate(videos)
  ]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
  root = tmp_path_factory.mktemp("media")
  for i in range(3):
    clips.write(root / f"{i}.mp4", 8 + 4 * i)
  (root / "bad.mp4").write_text("no clip")
  return root


GOOD = _rows([f"{i % 3}.mp4" for i in range(10)])


class Frames:
  """A store whose clips are their frames, at a size of 32."""

  def __init__(self, root, refused=(), call=operator.call):
    self.root, self.refused, self.call = root, dict(refused), call

  def load(self, path):
    file = video.safe_path(str(self.root), path)
    return self.call(video.decode, file, RULE, resize=RESIZE).frames


def _train(store, rows=GOOD, **options):
  options = dict(batch_size=4, seed=7, steps=(0, 6), num_threads=0) | options
  return list(data_order.load_ahead(rows, store, **options))


def _ids(batches):
  return [[row.id for row in questions] for questions, _ in batches]


def _assert_equal(first, second):
  assert _ids(first) == _ids(second)
  for (_, one), (_, other) in zip(first, second, strict=True):
    np.testing.assert_array_equal(one, other)


def test_a_step_holds_the_clips_of_its_questions(root):
  for questions, loaded in _train(Frames(root)):
    assert len(questions) == len(loaded) == 4
    for row, found in zip(questions, loaded, strict=True):
      expected = video.decode(root / row.video, RULE, resize=RESIZE).frames
      np.testing.assert_array_equal(found, expected)


def _batches(tmp_path, store, questions, checkpoint=tiny.checkpoint, **changes):
  experiment = tiny.experiment_of(
    tiny.config(**changes), tmp_path, checkpoint=checkpoint()
  )
  ladder = ratio.make_ladder(
    tiny.GRID,
    sampling.SamplingConfig(num_combinations=8),
    ratio.RatioConfig(),
    fixed=0.125,
  )
  return batches_lib.Batches(experiment, questions, store, [ladder])


def test_a_batch_holds_what_the_trainer_needs(tmp_path):
  checkpoint, questions = tiny.checkpoint(), tiny.questions()
  tokenizer = checkpoint.tokenizer
  made = _batches(tmp_path, tiny.Store(), questions)
  (rows,) = made.prompts.text_rows
  batch, shown = next(made(0))
  N, L = tiny.NUM_VIDEO, tiny.NUM_VIDEO + rows
  held = batch.prompts
  assert rows % 16 == 0 and held.ids.shape == (2, L)
  assert held.ids.dtype == np.int32 and held.deep is None
  for i, row in enumerate(shown):
    prompt = tokenizer.encode_prompt(row.prompt, N)
    length = prompt.length
    assert held.lengths[i] == held.next_position[i] == length
    np.testing.assert_array_equal(held.video_rows[i], prompt.video_rows)
    np.testing.assert_array_equal(held.ids[i, :length], prompt.ids)
    np.testing.assert_array_equal(held.positions[i, 0], np.arange(L))
    np.testing.assert_array_equal(held.features[i], tiny.features(row.video))
    assert batch.answer_id[i] == tokenizer.letter_id(row.answer)
    assert batch.question_hash[i] == question_lib.question_hash(row.id)
  assert batch.question_hash.dtype == np.uint32
  longest = max(
    tokenizer.encode_prompt(row.prompt, N).length - N for row in questions
  )
  assert longest <= rows < longest + 16


def _in_half(front="") -> checkpoints.Checkpoint:
  """Returns the tiny model in bfloat16; `front` goes before some clips."""
  found = tiny.checkpoint()

  class Model(type(found.model)):
    def encode_prompt(self, tokenizer, text, *grid):
      prompt = super().encode_prompt(tokenizer, text, *grid)
      cut = 2 if front and front in text else 0
      return prompt._replace(
        ids=prompt.ids[cut:], video_rows=prompt.video_rows - cut
      )

  model = Model(found.model.config, dtype=jnp.bfloat16)
  return dataclasses.replace(found, model=model)


def test_text_in_front_of_all_videos_is_shared_but_in_float32(tmp_path):
  rows = tiny.questions()
  prompt = tiny.checkpoint().tokenizer.encode_prompt(rows[0].prompt, 1)
  given = tmp_path, tiny.Store(), rows
  made = _batches(*given, _in_half)
  batch, _ = next(made(0))
  assert batch.shared_rows == prompt.video_rows[0] > 2
  assert {x.shared_rows for x in made.shapes(batch)} == {batch.shared_rows}
  batch, _ = next(_batches(*given)(0))
  assert batch.shared_rows == 0


def test_a_video_with_less_text_in_front_shares_none(tmp_path):
  half = functools.partial(_in_half, "What is 1")
  given = tmp_path, tiny.Store(), tiny.questions()
  made = _batches(*given, half, total_steps=3)
  for batch, rows in made(0):
    shorter = any("What is 1" in row.prompt for row in rows)
    first = batch.prompts.video_rows[:, 0].min()
    assert batch.shared_rows == (0 if shorter else first)


def test_auxiliary_feature_maps_are_padded_like_features(tmp_path):
  class Deep(tiny.Store):
    def finish(self, paths):
      deep = np.ones((3, tiny.NUM_VIDEO, 32), np.float32)
      return [clip._replace(deep=deep) for clip in super().finish(paths)]

  batch, _ = next(_batches(tmp_path, Deep(), tiny.questions())(0))
  assert batch.prompts.deep.shape == (2, 3, tiny.NUM_VIDEO, 32)


def test_features_must_match_the_tokens_of_the_prompt(tmp_path):
  store = tiny.Store(
    lambda path: np.zeros((32, 32), np.float32), lambda path: (2, 4, 4)
  )
  with pytest.raises(errors.UserError, match="a clip has 2 x 4 x 4 video tok"):
    next(_batches(tmp_path, store, tiny.questions())(0))


def test_question_hash_is_a_fixed_function():
  # hashlib.blake2b(b"q0", digest_size=4), little endian.
  assert question_lib.question_hash("q0") == 0x38E871FA
  assert question_lib.question_hash("q0") != question_lib.question_hash("q1")


def test_every_epoch_is_another_permutation():
  order = data_order.Order(10, seed=7)
  epochs = [[order[e * 10 + i] for i in range(10)] for e in range(3)]
  for epoch in epochs:
    assert sorted(epoch) == list(range(10))
  assert epochs[0] != epochs[1] != epochs[2]
  again = data_order.Order(10, seed=7)
  assert [again[i] for i in (25, 3)] == [order[25], order[3]]
  other = data_order.Order(10, seed=8)
  assert [other[i] for i in range(10)] != epochs[0]


def test_resuming_gives_the_batches_of_an_uninterrupted_run(root):
  store = Frames(root)
  whole = _train(store)
  assert len(whole) == 6
  _assert_equal(whole[2:], _train(store, steps=(2, 6)))
  assert _train(store, steps=(6, 6)) == []


@pytest.mark.parametrize(
  "way, options",
  [
    ("in_process", {"num_threads": 3}),
    ("workers", {"num_threads": 3}),
    ("workers", {"num_workers": 2}),
  ],
)
def test_loading_ahead_changes_nothing(root, way, options):
  store = Frames(root, call=decode_workers.WAYS[way])
  _assert_equal(
    _train(Frames(root), steps=(0, 4)), _train(store, steps=(0, 4), **options)
  )


def _mixed():
  return _rows([f"{i % 3}.mp4" for i in range(9)] + ["bad.mp4", "absent.mp4"])


def test_bad_clips_are_replaced_by_place_alone(root, tmp_path):
  rows, path = _mixed(), tmp_path / "log" / "quarantine.jsonl"
  order = data_order.Order(len(rows), seed=7)
  ledger = left_out.RejectedClips(path)
  batches = _train(Frames(root), rows, rejected=ledger)
  flat = [name for batch in _ids(batches) for name in batch]
  bad = {"q9", "q10"}
  for position, name in enumerate(flat):
    index, attempt = order[position], 0
    while f"q{index}" in bad:
      index = order.substitute(position, attempt)
      attempt += 1
    assert name == f"q{index}"
  # The order of all others is as if nothing had happened, also on resuming.
  resumed = _train(Frames(root), rows, steps=(3, 6))
  _assert_equal(batches[3:], resumed)
  lines = [json.loads(line) for line in path.read_text().splitlines()]
  assert {(e["video"], e["reason"]) for e in lines} == {
    ("bad.mp4", "unreadable"),
    ("absent.mp4", "missing"),
  }
  assert len(lines) == 2  # Once each, however often they were met.
  contents = {entry["video"]: entry["content"] for entry in lines}
  assert contents["bad.mp4"] == left_out.content_hash(root / "bad.mp4")
  assert contents["absent.mp4"] is None


def test_the_ledger_is_read_again_and_forgives_a_cut_line(tmp_path, root):
  path = tmp_path / "quarantine.jsonl"
  ledger = left_out.RejectedClips(path)
  content = left_out.content_hash(root / "0.mp4")
  error = video.VideoError(root / "0.mp4", "timeout")
  assert ledger.add(GOOD[0], error)
  assert not ledger.add(GOOD[3], error)
  with open(path, "a", encoding="utf-8") as f:
    f.write('{"content": "12')
  again = left_out.RejectedClips(path)
  assert again.refused == {content: "timeout"}


def test_a_damaged_line_of_the_ledger_is_set_aside(tmp_path, root, caplog):
  path = tmp_path / "quarantine.jsonl"
  ledger = left_out.RejectedClips(path)
  for row, name in zip(GOOD, ("0.mp4", "1.mp4"), strict=False):
    ledger.add(row, video.VideoError(root / name, "timeout"))
  first, second = path.read_bytes().splitlines(keepends=True)
  path.write_bytes(first.replace(b"timeout", b"timeouT") + second)
  again = left_out.RejectedClips(path)
  content = left_out.content_hash(root / "1.mp4")
  assert again.refused == {content: "timeout"}
  assert "1 lines damaged" in caplog.text
  assert path.read_bytes() == second
  assert again.add(GOOD[0], video.VideoError(root / "0.mp4", "timeout"))
  assert path.read_bytes() == second + first


def test_too_many_bad_clips_end_the_run(root, monkeypatch):
  monkeypatch.setattr(data_order, "MIN_FAILURES", 5)
  with pytest.raises(errors.UserError, match="clips cannot be used, more than"):
    _train(Frames(root), _mixed(), steps=(0, 50))
  rows = _rows(["absent.mp4"] * 4)
  with pytest.raises(errors.UserError, match="17 clips in a row"):
    _train(Frames(root), rows)


def test_frame_rules_always_give_the_static_number_of_frames():
  trainer = frames.FrameRule(4, frames.TRAIN_RULE)
  assert trainer(100, 10.0).tolist() == [0, 33, 66, 99]
  # Two seconds would give two frames: four are spaced instead.
  assert trainer(20, 2.0).tolist() == [0, 6, 13, 19]
  assert trainer(9, 0.9).size == 0
  assert frames.FrameRule(4)(20, 0.9).tolist() == [0, 6, 12, 19]
  with pytest.raises(errors.UserError, match="frame rule 'random'"):
    frames.FrameRule(4, "random")


def test_without_questions_there_is_no_order():
  with pytest.raises(errors.UserError, match="give at least one"):
    data_order.Order(0, seed=1)


def test_an_odd_shape_can_cross_processes():
  error = pickle.loads(pickle.dumps(frames.ShapeError("too long", "cut it")))
  assert (error.detail, error.mend) == ("too long", "cut it")
  assert str(error) == "too long; cut it"


@pytest.mark.parametrize(
  ("prompt_rows", "expected"), [((1 + 25 + 64,), 218), ((), 208)]
)
def test_rollouts_compute_the_rows_of_their_text(prompt_rows, expected):
  """Of 32 frames of 14 x 14 tokens at r = 0.02, which keeps 128 at most.

  A newline, 25 tokens of the template and 50 of a question; padded to 1 024
  tokens of text the rows would be 1 168.
  """
  grid = (32, 14, 14)
  ladder = ratio.make_ladder(
    grid, sampling.SamplingConfig(), ratio.RatioConfig(), fixed=0.02
  )
  (K,) = ladder.num_keep
  buckets = prompt_batch.PromptBuckets.of([1 + 25 + 50], beside=K)
  if prompt_rows:
    buckets = prompt_batch.PromptBuckets(prompt_rows)
  N = ladder.bucket.tokens
  L = N + buckets.pick(1 + 25 + 50)
  rows, _, _ = jax.eval_shape(
    functools.partial(prompt_batch.kept_rows, num_rows=L),
    jax.ShapeDtypeStruct((K,), np.int32),
    jax.ShapeDtypeStruct((), np.int32),
    video_rows=jax.ShapeDtypeStruct((N,), np.int32),
    length=jax.ShapeDtypeStruct((), np.int32),
  )
  assert (K, N, rows.shape[0]) == (128, 6272, expected)
