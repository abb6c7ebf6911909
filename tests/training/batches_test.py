"""Stateless order, bad clips, features: on clips that are made here."""

import json
import pickle

import numpy as np
import pytest

from cacovid_jax import errors
from cacovid_jax.data import feature_cache, frames, rejected_clips, video
from cacovid_jax.data import question as question_lib
from cacovid_jax.data import tokenizer as tokenizer_lib
from cacovid_jax.models import processors
from cacovid_jax.training import pipeline
from tests.data import clips
from tests.data import tokenizers_for_tests as toks

NUM_TOKENS = 8  # Two per frame.
RULE = pipeline.FrameRule(4)


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


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
  return tokenizer_lib.Tokenizer.from_directory(
    toks.write(tmp_path_factory.mktemp("tokenizer"))
  )


PROCESSOR = processors.LlavaOnevisionProcessor(image_size=32)
GOOD = _rows([f"{i % 3}.mp4" for i in range(10)])


def _source(root, **options):
  return pipeline.ClipSource(root, RULE, 32, **options)


def _train(tokenizer, source, rows=GOOD, **options):
  options = (
    dict(
      batch_size=4,
      seed=7,
      num_video_tokens=NUM_TOKENS,
      length=64,
      num_steps=6,
      num_threads=0,
    )
    | options
  )
  return list(pipeline.train_batches(rows, tokenizer, source, **options))


def _ids(batches):
  return [[row.id for row in batch["questions"]] for batch in batches]


def _assert_equal(first, second):
  assert _ids(first) == _ids(second)
  for one, other in zip(first, second, strict=True):
    for key, value in one.items():
      if isinstance(value, np.ndarray):
        np.testing.assert_array_equal(value, other[key])


def test_a_batch_holds_what_the_trainer_needs(root, tokenizer):
  batch = _train(tokenizer, _source(root))[0]
  rows = batch["questions"]
  assert batch["pixels"].shape == (4, 4, 32, 32, 3)
  assert batch["pixels"].dtype == np.uint8
  assert batch["ids"].shape == (4, 64) and batch["ids"].dtype == np.int32
  for i, row in enumerate(rows):
    prompt = tokenizer.encode_prompt(row.prompt, NUM_TOKENS)
    assert batch["length"][i] == prompt.length
    np.testing.assert_array_equal(batch["video_rows"][i], prompt.video_rows)
    np.testing.assert_array_equal(batch["ids"][i, : prompt.length], prompt.ids)
    assert batch["answer_id"][i] == tokenizer.letter_id(row.answer)
    assert batch["question_hash"][i] == question_lib.question_hash(row.id)
    expected = video.decode(root / row.video, RULE, size=32).frames
    np.testing.assert_array_equal(batch["pixels"][i], expected)
  assert batch["question_hash"].dtype == np.uint32
  assert batch["valid"].all() and batch["errors"] == [None] * 4


def test_question_hash_is_a_fixed_function():
  # hashlib.blake2b(b"q0", digest_size=4), little endian.
  assert question_lib.question_hash("q0") == 0x38E871FA
  assert question_lib.question_hash("q0") != question_lib.question_hash("q1")


def test_every_epoch_is_another_permutation():
  order = pipeline.Order(10, seed=7)
  epochs = [[order[e * 10 + i] for i in range(10)] for e in range(3)]
  for epoch in epochs:
    assert sorted(epoch) == list(range(10))
  assert epochs[0] != epochs[1] != epochs[2]
  again = pipeline.Order(10, seed=7)
  assert [again[i] for i in (25, 3)] == [order[25], order[3]]
  other = pipeline.Order(10, seed=8)
  assert [other[i] for i in range(10)] != epochs[0]


def test_resuming_gives_the_batches_of_an_uninterrupted_run(root, tokenizer):
  source = _source(root)
  whole = _train(tokenizer, source)
  assert len(whole) == 6
  _assert_equal(whole[2:], _train(tokenizer, source, start_step=2))
  assert _train(tokenizer, source, start_step=6) == []


@pytest.mark.parametrize("options", [{"num_threads": 3}, {"num_workers": 2}])
def test_loading_ahead_changes_nothing(root, tokenizer, options):
  source = _source(root)
  _assert_equal(
    _train(tokenizer, source, num_steps=4),
    _train(tokenizer, source, num_steps=4, **options),
  )


def test_processes_share_a_batch_without_overlap(root, tokenizer):
  source = _source(root)
  whole = _train(tokenizer, source)
  first = _train(tokenizer, source, shard=(0, 2))
  second = _train(tokenizer, source, shard=(1, 2))
  joined = [a + b for a, b in zip(_ids(first), _ids(second), strict=True)]
  assert joined == _ids(whole)
  resumed = _train(tokenizer, source, shard=(1, 2), start_step=3)
  assert _ids(resumed) == _ids(second)[3:]
  with pytest.raises(errors.UserError, match="among 3 processes"):
    _train(tokenizer, source, shard=(0, 3))


def _mixed():
  return _rows([f"{i % 3}.mp4" for i in range(9)] + ["bad.mp4", "absent.mp4"])


def test_bad_clips_are_replaced_by_place_alone(root, tokenizer, tmp_path):
  rows, path = _mixed(), tmp_path / "log" / "quarantine.jsonl"
  order = pipeline.Order(len(rows), seed=7)
  ledger = rejected_clips.RejectedClips(path)
  batches = _train(tokenizer, _source(root), rows, quarantine=ledger)
  flat = [name for batch in _ids(batches) for name in batch]
  bad = {"q9", "q10"}
  for position, name in enumerate(flat):
    index, attempt = order[position], 0
    while f"q{index}" in bad:
      index = order.substitute(position, attempt)
      attempt += 1
    assert name == f"q{index}"
  # The order of all others is as if nothing had happened, also on resuming.
  resumed = _train(tokenizer, _source(root), rows, start_step=3)
  _assert_equal(batches[3:], resumed)
  lines = [json.loads(line) for line in path.read_text().splitlines()]
  assert {(e["video"], e["reason"]) for e in lines} == {
    ("bad.mp4", "unreadable"),
    ("absent.mp4", "missing"),
  }
  assert len(lines) == 2  # Once each, however often they were met.
  contents = {entry["video"]: entry["content"] for entry in lines}
  assert contents["bad.mp4"] == rejected_clips.content_hash(root / "bad.mp4")
  assert contents["absent.mp4"] is None


def test_the_ledger_is_read_again_and_forgives_a_cut_line(tmp_path, root):
  path = tmp_path / "quarantine.jsonl"
  ledger = rejected_clips.RejectedClips(path)
  content = rejected_clips.content_hash(root / "0.mp4")
  error = video.VideoError(root / "0.mp4", "timeout")
  assert ledger.add(GOOD[0], error, content)
  assert not ledger.add(GOOD[3], error, content)
  with open(path, "a", encoding="utf-8") as f:
    f.write('{"content": "12')
  again = rejected_clips.RejectedClips(path)
  assert again.refused == {content: "timeout"}
  # A clip that once timed out is refused at once: resuming keeps its order.
  source = _source(root, refused=again.refused)
  with pytest.raises(video.VideoError, match="refused in an earlier run"):
    source.load(GOOD[0])
  assert source.load(GOOD[1]).shape == (4, 32, 32, 3)


def test_too_many_bad_clips_end_the_run(root, tokenizer):
  with pytest.raises(errors.UserError, match="clips cannot be used, more than"):
    _train(tokenizer, _source(root), _mixed(), num_steps=50, min_failures=5)
  rows = _rows(["absent.mp4"] * 4)
  with pytest.raises(errors.UserError, match="17 clips in a row"):
    _train(tokenizer, _source(root), rows)


def _evaluate(tokenizer, source, rows, **options):
  options = (
    dict(batch_size=4, num_video_tokens=NUM_TOKENS, length=64, num_threads=0)
    | options
  )
  return list(pipeline.eval_batches(rows, tokenizer, source, **options))


def test_evaluation_shows_every_question_once(root, tokenizer):
  batches = _evaluate(tokenizer, _source(root), GOOD, num_threads=2)
  assert [len(batch["questions"]) for batch in batches] == [4, 4, 2]
  assert [q for batch in batches for q in batch["questions"]] == GOOD
  for batch in batches:
    assert batch["pixels"].shape[0] == batch["ids"].shape[0] == 4
  assert batches[2]["valid"].tolist() == [True, True, False, False]


def test_evaluation_marks_bad_clips_and_keeps_them(root, tokenizer):
  rows = _rows(["bad.mp4", "0.mp4", "absent.mp4", "../x.mp4"])
  (batch,) = _evaluate(tokenizer, _source(root), rows)
  assert batch["questions"] == rows
  assert batch["valid"].tolist() == [False, True, False, False]
  reasons = [error and error.reason for error in batch["errors"]]
  assert reasons == ["unreadable", None, "missing", "unsafe"]
  assert not batch["pixels"][[0, 2, 3]].any() and batch["pixels"][1].any()


class _Encoder:
  """Two tokens per frame: the means of the upper and lower half."""

  def __init__(self, batch):
    self.batch, self.calls = batch, []

  def __call__(self, pixels):
    assert pixels.dtype == np.float32 and len(pixels) == self.batch
    self.calls.append(len(pixels))
    halves = pixels.reshape(*pixels.shape[:2], 2, -1, 3).mean(3)
    return halves.reshape(len(pixels), NUM_TOKENS, 3)


def _features(root, encoder, **options):
  return pipeline.FeatureSource(
    _source(root),
    encoder,
    PROCESSOR,
    identity=options.pop("identity", "weights"),
    num_tokens=NUM_TOKENS,
    width=3,
    encode_batch=encoder.batch,
    **options,
  )


def test_every_clip_is_encoded_once(root, tokenizer):
  encoder = _Encoder(2)
  batches = _evaluate(tokenizer, _features(root, encoder), GOOD)
  assert len(encoder.calls) == 2  # Three clips, two at a time.
  pixels = _evaluate(tokenizer, _source(root), GOOD)
  for batch, plain in zip(batches, pixels, strict=True):
    assert batch["features"].dtype == np.float32
    expected = [
      _Encoder(1)(PROCESSOR.normalise(clip)[None])[0]
      for clip in plain["pixels"]
    ]
    np.testing.assert_array_equal(batch["features"], expected)


def test_features_on_disk_spare_decoding_and_encoding(
  root, tokenizer, tmp_path, monkeypatch
):
  cache = feature_cache.FeatureCache(tmp_path)
  first = _evaluate(tokenizer, _features(root, _Encoder(1), cache=cache), GOOD)
  other = _Encoder(1)
  _evaluate(
    tokenizer, _features(root, other, cache=cache, identity="other"), GOOD
  )
  assert len(other.calls) == 3  # Another model has entries of its own.

  def fail(*args, **kwargs):
    raise AssertionError("decoded again")

  encoder = _Encoder(1)
  source = _features(root, encoder, cache=cache)
  monkeypatch.setattr(source.clips, "decode", fail)
  _assert_equal(first, _evaluate(tokenizer, source, GOOD))
  assert encoder.calls == []


def test_memory_is_bounded(root):
  source = _features(root, _Encoder(1), memory_items=2)
  for row in GOOD[:3]:
    assert source(row).shape == (NUM_TOKENS, 3)
  assert len(source._memory) == 2


def test_features_of_a_bad_clip_are_zero_and_marked(root, tokenizer):
  rows = _rows(["0.mp4", "bad.mp4"])
  (batch,) = _evaluate(tokenizer, _features(root, _Encoder(1)), rows)
  assert batch["valid"].tolist() == [True, False, False, False]
  assert batch["features"][0].any() and not batch["features"][1].any()


def test_features_can_be_loaded_in_another_process(root, tmp_path):
  cache = feature_cache.FeatureCache(tmp_path)
  source = _features(root, _Encoder(1), cache=cache)
  there = pickle.loads(pickle.dumps(source))
  name, features, pictures = there.load(GOOD[0])
  assert features is None and pictures.shape == (4, 32, 32, 3)
  expected = source.finish([(name, features, pictures)])[0]
  name, features, pictures = there.load(GOOD[0])
  assert pictures is None
  np.testing.assert_array_equal(features, expected)


def test_any_function_of_a_question_can_give_the_features(tokenizer):
  def features_of(row):
    return np.full((NUM_TOKENS, 3), int(row.id[1:]), np.float32)

  batch = _train(tokenizer, features_of)[0]
  expected = [int(row.id[1:]) for row in batch["questions"]]
  assert batch["features"][:, 0, 0].tolist() == expected


def test_features_must_match_the_tokens_of_the_prompt(tokenizer):
  with pytest.raises(errors.UserError, match="clips have 5 video tokens"):
    _train(tokenizer, lambda row: np.zeros((5, 3), np.float32))


def test_the_bucket_holds_the_longest_prompt(tokenizer):
  length = pipeline.prompt_length(GOOD, tokenizer, NUM_TOKENS)
  longest = max(
    tokenizer.encode_prompt(row.prompt, NUM_TOKENS).length for row in GOOD
  )
  assert length % 16 == 0 and longest <= length < longest + 16


def test_frame_rules_always_give_the_static_number_of_frames():
  trainer = pipeline.FrameRule(4, frames.TRAIN_RULE)
  assert trainer(100, 10.0).tolist() == [0, 33, 66, 99]
  # Two seconds would give two frames: four are spaced instead.
  assert trainer(20, 2.0).tolist() == [0, 6, 13, 19]
  assert trainer(9, 0.9).size == 0
  assert pipeline.FrameRule(4)(20, 0.9).tolist() == [0, 6, 12, 19]
  with pytest.raises(errors.UserError, match="frame rule 'random'"):
    pipeline.FrameRule(4, "random")


def test_without_questions_there_is_no_order():
  with pytest.raises(errors.UserError, match="give at least one"):
    pipeline.Order(0, seed=1)


def test_small_frames_are_refused_and_their_features_told_apart(root):
  # The clips have 64 x 64 pixels.
  source = _features(root, _Encoder(1))
  assert _source(root, min_side=63).load(GOOD[0]).shape == (4, 32, 32, 3)
  with pytest.raises(video.VideoError, match="bad shape .a frame of 64 x 64"):
    _source(root, min_side=64).load(GOOD[0])
  key = source.key(GOOD[0])
  source.clips.min_side = 28
  assert source.key(GOOD[0]) != key


def test_an_odd_shape_can_cross_processes():
  error = pickle.loads(pickle.dumps(frames.ShapeError("too long", "cut it")))
  assert (error.detail, error.mend) == ("too long", "cut it")
  assert str(error) == "too long; cut it"
