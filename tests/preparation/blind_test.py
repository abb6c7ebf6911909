"""Answers without video against a plain loop; kept rows worked out by hand."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

from cacovid_jax import errors
from cacovid_jax import experiment as experiment_lib
from cacovid_jax.data import question as question_lib
from cacovid_jax.data import readers
from cacovid_jax.data import tokenizer as tokenizer_lib
from cacovid_jax.models import checkpoints
from cacovid_jax.preparation import blind_filter as blind
from cacovid_jax.synthetic import tiny_checkpoints
from tests.data import tokenizers_for_tests as toks
from tests.evals import tiny

NEW = 5
SETTINGS = blind.BlindSettings(batch_size=2, max_new_tokens=NEW)
LETTER_HINT = (
  "\n Please provide only the single option letter (e.g., A, B, C, D, etc.)."
)
TEXT_HINT = "\n Please provide your text answer."


def entry(number, problem, kind="multiple choice", **fields):
  """Returns a row of Video-R1-260k."""
  return {
    "problem_id": number,
    "problem": problem,
    "data_type": "video",
    "problem_type": kind,
    "options": [],
    "solution": "<answer>A</answer>",
    "path": f"./clips/{number}.mp4",
    "data_source": "drawn/short",
  } | fields


ROWS = [
  entry(3, "Which appears first?", options=["A. red moon", "B. blue star"]),
  entry(
    5,
    "What is below the grey ring? " * 5,
    options=["A. red moon", "B. blue star", "C. red star", "D. grey moon"],
    solution="<answer>B</answer>",
  ),
  # The shipped model says A without looking.
  entry(8, "How many objects are there?", options=["A. one", "B. two"]),
  entry(9, "What is it?", "free-form", solution="<answer>solid</answer>"),
  entry(11, "Which is last?", options=["(A) red star", "(B) grey moon"]),
]


def write(path, rows=ROWS):
  path.write_text(json.dumps(rows))
  return path


def plain_loop(checkpoint, directory, turns):
  """Returns greedy answers: one prompt, no cache, no padding that counts.

  Args:
    checkpoint: the model.
    directory: that it was read from.
    turns: whole prompts, written out.
  """
  tokenizer = tokenizers.Tokenizer.from_file(f"{directory}/tokenizer.json")
  model, room = checkpoint.model, 256

  @jax.jit
  def following(ids, length):
    rows = jnp.arange(room, dtype=jnp.int32)
    positions = jnp.broadcast_to(rows, (1, model.num_position_rows, room))
    x = model.embed_text(checkpoint.params, ids[None])
    hidden, _ = model.forward(checkpoint.params, x, positions)
    return model.logits(checkpoint.params, hidden[0, length - 1]).argmax()

  def answer(turn):
    ids, answer = tokenizer.encode(turn, add_special_tokens=False).ids, []
    while len(answer) < NEW:
      held = np.zeros(room, np.int32)
      held[: len(ids)] = ids
      answer.append(int(following(held, len(ids))))
      ids.append(answer[-1])
      if answer[-1] in checkpoint.eos_ids:
        break
    return tokenizer.decode(answer, skip_special_tokens=True).strip()

  return list(map(answer, turns))


@pytest.fixture(scope="module")
def shipped():
  return checkpoints.load(str(experiment_lib.SHIPPED_MODEL), jnp.float32)


@pytest.fixture(scope="module")
def asked(shipped, tmp_path_factory):
  """Returns (questions, answers, ledger path) of the shipped model."""
  folder = tmp_path_factory.mktemp("blind")
  rows = readers.read_video_r1(write(folder / "train.json"))
  path = folder / "answers.jsonl"
  return rows, blind.ask(shipped, rows, SETTINGS, path=path), path


def test_answers_are_those_of_a_plain_loop_over_prompts_without_video(
  shipped, asked
):
  def turn(text):
    return f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"

  texts = [
    "Which appears first?\nA. red moon\nB. blue star" + LETTER_HINT,
    "What is below the grey ring? " * 5
    + "\nA. red moon\nB. blue star\nC. red star\nD. grey moon"
    + LETTER_HINT,
    "How many objects are there?\nA. one\nB. two" + LETTER_HINT,
    "What is it?" + TEXT_HINT,
    "Which is last?\n(A) red star\n(B) grey moon" + LETTER_HINT,
  ]
  turns = list(map(turn, texts))
  expected = plain_loop(shipped, experiment_lib.SHIPPED_MODEL, turns)
  _, answers, _ = asked
  assert answers == expected
  # Otherwise the comparison would say little.
  assert len(set(answers)) > 1 and all(answers)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_models_with_three_rows_of_positions(family, tmp_path):
  directory, system = str(tmp_path / "model"), ""
  if family == "qwen3_vl":
    tiny_checkpoints.write_tiny(directory, family)
  else:
    directory = tiny.write_qwen_checkpoint(tmp_path)
    system = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
  checkpoint = checkpoints.load(directory)
  rows = readers.read_video_r1(write(tmp_path / "train.json", ROWS[2:4]))
  turns = [
    f"{system}<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
    for text in (
      "How many objects are there?\nA. one\nB. two" + LETTER_HINT,
      "What is it?" + TEXT_HINT,
    )
  ]
  expected = plain_loop(checkpoint, directory, turns)
  assert blind.ask(checkpoint, rows, SETTINGS) == expected


def test_a_stopped_run_goes_on_and_writes_the_same_bytes(
  shipped, asked, tmp_path
):
  rows, answers, whole = asked

  class StoppedError(Exception):
    pass

  class Stopping:
    def __init__(self, total, *, start, description):
      assert total == len(rows) and start == 0 and description

    def __enter__(self):
      return self

    def __exit__(self, *exc_info):
      pass

    def update(self, done):
      raise StoppedError

  path = tmp_path / "answers.jsonl"
  with pytest.raises(StoppedError):
    blind.ask(shipped, rows, SETTINGS, path=path, progress=Stopping)
  assert 0 < path.stat().st_size < whole.stat().st_size
  # A kill in the middle of a line, too.
  path.write_bytes(path.read_bytes() + b'{"method": "te')
  starts = []

  class Noting(Stopping):
    def __init__(self, total, *, start, description):
      starts.append(start)

    def update(self, done):
      pass

  assert blind.ask(shipped, rows, SETTINGS, path=path, progress=Noting) == (
    answers
  )
  # The longest prompt is alone in its bucket, and asked first.
  assert starts == [1] and path.read_bytes() == whole.read_bytes()


def test_answers_of_other_settings_are_refused(shipped, asked):
  rows, _, path = asked
  with pytest.raises(errors.UserError, match="max_new_tokens"):
    blind.ask(
      shipped, rows, dataclasses.replace(SETTINGS, max_new_tokens=2), path=path
    )


@pytest.mark.parametrize(
  ("kind", "gold", "text", "threshold", "expected"),
  [
    ("multiple choice", "B", "B. blue", 1.0, True),
    ("multiple choice", "B", "A", 0.1, False),
    ("numerical", "2.50", "2.5", 1.0, True),
    ("regression", "4", "4", 1.0, True),
    ("regression", "4", "3", 1.0, False),
    ("regression", "4", "3", 0.75, True),
    ("OCR", "no entry", "no exit", 1.0, False),
    ("OCR", "no entry", "no exit", 0.5, True),
    ("free-form", "a moon", "a moon", 1.0, True),
    ("free-form", "a moon", "", 0.1, False),
    ("free-form", "moon", "moon", 1.0, True),
    ("free-form", "moon", "<answer>moon</answer>", 1.0, True),
    ("regression", "0", "0", 1.0, True),
  ],
)
def test_what_counts_as_right(kind, gold, text, threshold, expected):
  question = question_lib.Question(
    id="1", video="1.mp4", question="?", answer=gold, problem_type=kind
  )
  assert blind.right(question, text, threshold) is expected


def test_written_rows_are_read_as_the_same_questions(tmp_path):
  rows = readers.read_video_r1(
    write(
      tmp_path / "train.json",
      [
        *ROWS,
        entry(12, "Plain?", options=["red", "blue"], data_source=""),
        entry("x7", "5 + ?", "numerical", solution="<answer>1.5</answer>"),
        entry(13, 'Says "A. x"?', category="signs", options=["A. x", "B. y"]),
      ],
    )
  )
  path = tmp_path / "filtered.json"
  blind.write(path, rows)
  assert readers.read_video_r1(path) == [
    # Options are no part of this format's question; all else is equal.
    dataclasses.replace(row, question=row.prompt.rpartition("\n")[0])
    for row in rows
  ]
  first = json.loads(path.read_text())[0]
  assert first == {
    "problem_id": 3,
    "problem": "Which appears first?\nA. red moon\nB. blue star",
    "solution": "<answer>A</answer>",
    "modality_type": "video",
    "problem_type": "multiple choice",
    "video": "clips/3.mp4",
    "data_source": "drawn/short",
    "options": ["A. red moon", "B. blue star"],
  }
  assert not (tmp_path / "filtered.json.partial").exists()


def test_rows_of_two_files_stay_apart(tmp_path):
  paths = [write(tmp_path / name, ROWS[:1]) for name in ("a.json", "b.json")]
  rows = readers.read_video_r1(paths)
  blind.write(tmp_path / "filtered.json", rows)
  got = readers.read_video_r1(tmp_path / "filtered.json")
  assert [row.id for row in got] == ["a/3", "b/3"]


def test_nothing_kept_is_an_empty_list(tmp_path):
  blind.write(tmp_path / "filtered.json", [])
  assert json.loads((tmp_path / "filtered.json").read_text()) == []


def test_rows_with_another_wording_cannot_be_written():
  question = question_lib.Question(
    id="1", video="1.mp4", question="?", answer="A", prompt="?"
  )
  with pytest.raises(errors.UserError, match="as training reads them"):
    blind.row(question)


@pytest.mark.parametrize(
  ("fields", "match"),
  [
    ({"batch_size": 0}, "batch_size is 0"),
    ({"max_new_tokens": 0}, "max_new_tokens is 0"),
    ({"threshold": 0.0}, "threshold is 0.0; .* above 0"),
    ({"threshold": 1.5}, "at most 1"),
  ],
)
def test_settings_without_sense(fields, match):
  with pytest.raises(errors.UserError, match=match):
    blind.BlindSettings(**fields)


def test_a_question_that_contains_the_video_token(shipped):
  with pytest.raises(errors.UserError, match="stands for the clip"):
    shipped.tokenizer.encode_blind("What does <video> mean?")


@pytest.mark.parametrize(
  "template",
  [toks.STRING_TEMPLATE, toks.HUB_TEMPLATE],
  ids=["plain text", "items"],
)
def test_both_forms_of_templates_write_a_question_alone(template):
  own = tokenizers.Tokenizer.from_file(
    str(experiment_lib.SHIPPED_MODEL / "tokenizer.json")
  )
  rendered = tokenizer_lib.Tokenizer(own, template).render_blind("Why?")
  assert rendered.endswith("<|im_end|>\n<|im_start|>assistant\n") or (
    rendered.endswith("<|im_end|><|im_start|>assistant\n")
  )
  assert "Why?" in rendered and "<video>" not in rendered


def test_a_template_that_always_shows_a_clip_is_refused():
  own = tokenizers.Tokenizer.from_file(
    str(experiment_lib.SHIPPED_MODEL / "tokenizer.json")
  )
  template = "<video>{{ messages[0]['content'] }}"
  with pytest.raises(errors.UserError, match="without a clip"):
    tokenizer_lib.Tokenizer(own, template).render_blind("Why?")


def test_the_table_counts_every_row():
  def question(number, source, kind):
    return question_lib.Question(
      id=str(number),
      video=f"{number}.mp4",
      question="?",
      answer="A",
      source=source,
      problem_type=kind,
    )

  rows = [
    question(1, "a", "OCR"),
    question(2, "a", "OCR"),
    question(3, "a", "numerical"),
    question(4, "b", "OCR"),
  ]
  got = blind.table(
    rows[:3], [rows[1]], {("a", "OCR"): 4, ("c", "OCR"): 1}, rows[3:]
  )
  names = (
    "source problem_type rows images_skipped clips_missing"
    " right_without_video kept"
  ).split()
  assert got == [
    dict(zip(names, values, strict=True))
    for values in (
      ("a", "OCR", 6, 4, 0, 1, 1),
      ("a", "numerical", 1, 0, 0, 1, 0),
      ("b", "OCR", 1, 0, 1, 0, 0),
      ("c", "OCR", 1, 1, 0, 0, 0),
      ("all", "all", 9, 5, 1, 2, 1),
    )
  ]
