"""Answers to requests: those of an evaluation, in the order asked."""

import dataclasses
import logging
import pathlib

import numpy as np
import pytest

from cacovid_jax import errors
from cacovid_jax.data import answer_log
from cacovid_jax.evals import benchmarks
from cacovid_jax.evals import evaluator as evaluator_lib
from cacovid_jax.integrations.lmms_eval import answerer, arguments, requests
from tests.evals import tiny

pytestmark = pytest.mark.usefixtures("one_compilation")


@pytest.fixture(scope="module")
def questions(data_dir):
  return benchmarks.load(data_dir, "test").questions


@pytest.fixture
def make(checkpoint_dir, policy_file):
  """Returns a function from arguments to a model, closed at the end."""
  made = []

  def make(**given):
    given = {"max_frames_num": tiny.FRAMES, "policy": policy_file, **given}
    args = arguments.parse(pretrained=checkpoint_dir, **given)
    made.append(answerer.RequestAnswerer(args))
    return made[-1]

  yield make
  for model in made:
    model.close()


def _asked(questions, data_dir):
  return [
    requests.Asked(
      f"t/test/{row}",
      question.id,
      str(pathlib.Path(data_dir) / question.video),
      question.prompt,
    )
    for row, question in enumerate(questions)
  ]


def _evaluated(checkpoint, data_dir, questions, model, length):
  """Returns {id: record} of an evaluation that knows nothing of requests."""
  given = checkpoint, data_dir, questions, (2, length)
  engine = tiny.engine_of(*given, policies=model._policies)
  answers = answer_log.AnswerLog(None, {})
  with engine.source:
    evaluator = evaluator_lib.Evaluator(engine)
    evaluator.run(questions, [model.condition], answers)
  return {q.id: answers[model.condition.key(q.id)] for q in questions}


def test_answers_are_those_of_an_evaluation_in_the_order_asked(
  make, questions, data_dir, checkpoint
):
  model = make(method="cacovid", ratio=0.25, batch_size=2)
  asked = _asked(questions, data_dir)
  order = [3, 0, 5, 1, 0, 4, 2]
  replies = model.generate([asked[i] for i in order], [6] * len(order))
  expected = _evaluated(checkpoint, data_dir, questions, model, 6)
  assert len({record["text"] for record in expected.values()}) > 1
  encode = checkpoint.tokenizer.encode
  for place, reply in zip(order, replies, strict=True):
    question = questions[place]
    record = expected[question.id]
    assert reply.text == record["text"]
    prompt = checkpoint.tokenizer.encode_prompt(question.prompt, tiny.NUM_VIDEO)
    assert record["kept"] == tiny.NUM_VIDEO // 4
    assert reply.input_tokens == prompt.length - 3 * tiny.NUM_VIDEO // 4
    assert reply.output_tokens == len(encode(reply.text))


def test_every_request_gets_the_length_of_its_task(make, questions, data_dir):
  model = make(ratio=1, batch_size=2)
  asked = _asked(questions[:2], data_dir)
  longer = [reply.text for reply in model.generate(asked, [6, 6])]
  mixed = [reply.text for reply in model.generate(asked, [6, 2])]
  assert mixed[0] == longer[0]
  assert mixed[1] != longer[1] and longer[1].startswith(mixed[1])


def test_what_is_drawn_for_a_row_does_not_depend_on_other_rows(
  make, questions, data_dir
):
  model = make(method="random", ratio=0.25, batch_size=2)
  asked = _asked(questions[:3], data_dir)
  alone = [reply.text for reply in model.generate(asked, [6] * 3)]
  # Those of another task, which calls them the same.
  others = [
    requests.Asked(f"u/test/{row}", one.identity, one.video, "Who is it?")
    for row, one in enumerate(asked)
  ]
  replies = model.generate([*others, *asked], [6] * 6)
  assert [reply.text for reply in replies[3:]] == alone
  # Of the same words under other names, other tokens are drawn.
  renamed = [dataclasses.replace(one, identity="") for one in asked]
  replies = model.generate(renamed, [6] * 3)
  assert [reply.text for reply in replies] != alone


def test_a_clip_that_cannot_be_read_is_answered_by_nothing_and_told_once(
  make, questions, data_dir, caplog
):
  model = make(method="uniform", ratio=0.25, batch_size=2)
  asked = _asked(questions[:2], data_dir)
  lost = [
    requests.Asked(f"t/test/{row}", "", str(pathlib.Path(data_dir) / name), "?")
    for row, name in enumerate(["gone.mp4", "gone.mp4", "test.parquet"])
  ]
  lost[1] = requests.Asked("t/test/9", "", lost[1].video, "Else?")
  with caplog.at_level(logging.WARNING):
    replies = model.generate([lost[0], asked[0], *lost[1:]], [6] * 4)
  texts = [reply.text for reply in replies]
  assert texts[0] == texts[2] == texts[3] == "" != texts[1]
  told = [text for text in caplog.messages if "cannot be used" in text]
  assert len(told) == 2
  assert f"{data_dir}/gone.mp4 cannot be used (missing): 2 question" in told[0]


def test_a_learned_method_without_a_policy_is_refused(
  make, questions, data_dir
):
  model = make(policy="", ratio=0.25)
  with pytest.raises(errors.UserError, match="needs a trained policy"):
    model.generate(_asked(questions[:1], data_dir), [4])


def test_the_shipped_model_brings_its_policy():
  model = answerer.RequestAnswerer(arguments.parse())
  with model._source:
    assert list(model._policies) == ["policy"]


def test_likelihoods_come_in_the_order_asked(make, questions, data_dir):
  model = make(method="uniform", ratio=0.25, batch_size=2)
  asked = _asked(questions[:3], data_dir)
  gone = requests.Asked("t/test/9", "", "gone.mp4", "What?")
  texts = ["A", "B", "green", ""]
  pairs = [(one, text) for text in texts for one in (*asked, gone)]
  found = model.likelihoods(*zip(*pairs, strict=True))
  by_pair = {
    (one.place, text): got
    for (one, text), got in zip(pairs, found, strict=True)
  }
  for (place, text), got in by_pair.items():
    if place == "t/test/9":
      assert (got.log_prob, got.greedy) == (-np.inf, False)
    elif not text:
      assert (got.log_prob, got.greedy) == (0.0, True)
    else:
      assert got.log_prob < 0
  alone = model.likelihoods([asked[2]], ["green"])[0]
  np.testing.assert_allclose(
    by_pair["t/test/2", "green"].log_prob, alone.log_prob, rtol=1e-5
  )


def test_clips_of_several_shapes_are_answered_in_the_order_asked(tmp_path):
  directory = tiny.write_qwen_checkpoint(tmp_path)
  sizes = {"square.mp4": (32, 32), "wide.mp4": (32, 48), "other.mp4": (32, 32)}
  for seed, (name, size) in enumerate(sizes.items()):
    tiny.write_clip(tmp_path / name, seed, size=size)
  args = arguments.parse(
    pretrained=directory,
    method="uniform",
    ratio=0.25,
    max_frames_num=3,
    min_pixels=12 * 64,
    max_pixels=24 * 64,
    batch_size=2,
  )
  model = answerer.RequestAnswerer(args)
  with model._source:
    asked = [
      requests.Asked(f"t/test/{row}", "", str(tmp_path / name), "What is it?")
      for row, name in enumerate(["wide.mp4", "square.mp4", "other.mp4"])
    ]
    replies = model.generate(asked, [2] * 3)
  text = model.checkpoint.tokenizer.encode_prompt("What is it?", 1).length - 1
  # A quarter of 2 slices of 4 x 6 and of 4 x 4 tokens.
  kept = [reply.input_tokens - text for reply in replies]
  assert kept == [12, 8, 8]
  assert all(reply.text for reply in replies)
