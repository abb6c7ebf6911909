"""Prompts against strings and ids written out by hand."""

import json
import pickle

import numpy as np
import pytest

from cacovid_jax import errors
from cacovid_jax.data import question as question_lib
from cacovid_jax.data import tokenizer as tokenizer_lib
from cacovid_jax.data import wording

from . import tokenizers_for_tests as toks


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
  return tokenizer_lib.Tokenizer.from_directory(
    toks.write(tmp_path_factory.mktemp("tokenizer"))
  )


def test_one_placeholder_becomes_all_video_tokens_and_the_newline(tokenizer):
  prompt = tokenizer.encode_prompt("What?", 5)
  before = tokenizer.encode("<|im_start|>user\n")
  after = tokenizer.encode("\nWhat?<|im_end|>\n<|im_start|>assistant\n")
  expected = before + [tokenizer.video_id] * 6 + after
  assert prompt.ids.tolist() == expected
  assert prompt.ids.dtype == np.int32
  assert prompt.length == len(expected)
  np.testing.assert_array_equal(prompt.video_rows, len(before) + np.arange(5))


@pytest.mark.parametrize(
  "template, expected",
  [
    (
      None,
      "<|im_start|>user\n<video>\nWhy?<|im_end|>\n<|im_start|>assistant\n",
    ),
    (
      toks.HUB_TEMPLATE,
      "<|im_start|>user <video>\nWhy?<|im_end|><|im_start|>assistant\n",
    ),
    (
      toks.STRING_TEMPLATE,
      "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
      "<|im_start|>user\n<video>\nWhy?<|im_end|>\n<|im_start|>assistant\n",
    ),
  ],
)
def test_the_three_published_forms_of_templates(tmp_path, template, expected):
  tokenizer = tokenizer_lib.Tokenizer.from_directory(
    toks.write(tmp_path, template=template)
  )
  assert tokenizer.render("Why?") == expected
  assert tokenizer.render("Why?") == expected  # Now that the form is known.


def test_the_tokenizers_own_template_can_be_preferred(tmp_path):
  toks.write(tmp_path)
  path = tmp_path / "tokenizer_config.json"
  entry = json.loads(path.read_text())
  entry["chat_template"] = [
    {"name": "tool_use", "template": "no"},
    {"name": "default", "template": toks.STRING_TEMPLATE},
  ]
  path.write_text(json.dumps(entry))
  first = tokenizer_lib.Tokenizer.from_directory(tmp_path)
  other = tokenizer_lib.Tokenizer.from_directory(tmp_path, template="tokenizer")
  assert "system" not in first.render("Why?")
  assert "system" in other.render("Why?")


def test_the_papers_evaluation_gives_the_tokenizers_template_plain_text(
  tmp_path,
):
  # A template that takes both forms, and writes them apart.
  toks.write(
    tmp_path,
    template="{% set c = messages[0]['content'] %}{% if c is string %}"
    "plain {{ c }}{% else %}items <video>{{ c[1]['text'] }}{% endif %}",
  )
  read = tokenizer_lib.Tokenizer.from_directory
  assert read(tmp_path).render("Why?") == "items <video>Why?"
  plain = read(tmp_path, template="tokenizer")
  assert plain.render("Why?") == "plain <video>\nWhy?"
  assert pickle.loads(pickle.dumps(plain)).render("Why?") == (
    "plain <video>\nWhy?"
  )
  with pytest.raises(errors.UserError, match="'processor' or 'tokenizer'"):
    read(tmp_path, template="model")


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
  return toks.write_qwen(tmp_path_factory.mktemp("qwen"))


def test_qwen_prompts_repeat_the_pad_between_start_and_end(qwen):
  tokenizer = tokenizer_lib.Tokenizer.from_directory(qwen)
  prompt = tokenizer.encode_prompt("What?", 5)
  before = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\n<|vision_start|>"
  )
  after = "<|vision_end|>What?<|im_end|>\n<|im_start|>assistant\n"
  before, after = tokenizer.encode(before), tokenizer.encode(after)
  pad = tokenizer.token_id("<|video_pad|>")
  assert prompt.ids.tolist() == before + [pad] * 5 + after
  np.testing.assert_array_equal(prompt.video_rows, len(before) + np.arange(5))
  assert tokenizer.decode(before[-1:], skip_special_tokens=False) == (
    "<|vision_start|>"
  )
  with pytest.raises(errors.UserError, match="the model takes 128"):
    tokenizer.encode_prompt("What?", 120)
  with pytest.raises(errors.UserError, match="video_pad.*stands for the clip"):
    tokenizer.render("What is <|video_pad|>?")


def test_qwen_plain_text_holds_the_whole_block(qwen):
  tokenizer = tokenizer_lib.Tokenizer.from_directory(qwen, template="tokenizer")
  again = pickle.loads(pickle.dumps(tokenizer))
  assert again.render("Why?") == (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\n<|vision_start|><|video_pad|><|vision_end|>Why?"
    "<|im_end|>\n<|im_start|>assistant\n"
  )


@pytest.mark.parametrize(
  "missing", ["<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
)
def test_a_qwen_tokenizer_without_a_token_is_named(tmp_path, missing):
  toks.write_qwen(tmp_path, drop=[missing])
  with pytest.raises(errors.UserError) as caught:
    tokenizer_lib.Tokenizer.from_directory(tmp_path)
  assert repr(missing) in str(caught.value)
  assert str(tmp_path) in str(caught.value)


def test_a_qwen_template_without_start_and_end_is_refused(qwen, tmp_path):
  toks.write_qwen(tmp_path)
  text = "<|video_pad|>{{ messages[0]['content'][1]['text'] }}"
  for name in ("chat_template.json", "tokenizer_config.json"):
    _edit(tmp_path / name, chat_template=text)
  tokenizer = tokenizer_lib.Tokenizer.from_directory(tmp_path)
  with pytest.raises(errors.UserError, match="vision_start"):
    tokenizer.render("Why?")


def test_white_space_that_a_template_trims_is_no_fault(tmp_path):
  tokenizer = tokenizer_lib.Tokenizer.from_directory(
    toks.write(
      tmp_path, template="<video>{{ messages[0]['content'][1]['text'] | trim }}"
    )
  )
  assert tokenizer.render("Directly.\n") == "<video>Directly."


def test_padding_is_on_the_right(tokenizer):
  first = tokenizer.encode_prompt("What?", 3)
  second = tokenizer.encode_prompt("What colour is the star?", 3)
  length = second.length + 2
  padded = tokenizer.pad([first, second], length)
  assert padded.ids.shape == (2, length)
  assert padded.length.tolist() == [first.length, second.length]
  np.testing.assert_array_equal(padded.video_rows, [first.video_rows] * 2)
  # A video of fewer tokens has no row behind its own.
  wider = tokenizer.pad([first, second], length, num_video_tokens=5)
  np.testing.assert_array_equal(wider.video_rows[:, :3], padded.video_rows)
  assert (wider.video_rows[:, 3:] == length).all()
  np.testing.assert_array_equal(padded.ids[0, : first.length], first.ids)
  assert set(padded.ids[0, first.length :]) == {tokenizer.pad_id}
  with pytest.raises(errors.UserError, match="does not fit into the bucket"):
    tokenizer.pad([first, second], second.length - 1)


def test_text_survives_encoding_and_special_tokens_are_left_out(tokenizer):
  text = "Ünïcode, 12 %\n\n  spaces — 你好 🎬"
  assert tokenizer.decode(tokenizer.encode(text)) == text
  ids = np.array(tokenizer.encode("B<|im_end|>"), np.int32)
  assert tokenizer.decode(ids) == "B"
  assert tokenizer.decode(ids, skip_special_tokens=False) == "B<|im_end|>"


def test_letters_are_single_tokens_after_the_header(tokenizer):
  header = tokenizer.encode("<|im_start|>assistant\n")
  for letter in "ABCDEF":
    together = tokenizer.encode(f"<|im_start|>assistant\n{letter}")
    assert together == header + [tokenizer.letter_id(letter)]
  assert tokenizer.letter_id("not one token") == -1


def test_answer_ids_are_only_for_lettered_questions(tokenizer):
  row = dict(id="1", video="v.mp4", question="q")
  lettered = question_lib.Question(answer="B", **row)
  free = question_lib.Question(answer="B", problem_type="free-form", **row)
  assert tokenizer.answer_id(lettered) == tokenizer.letter_id("B")
  assert tokenizer.answer_id(free) == -1


def test_ids_of_end_and_padding_come_from_the_files(tmp_path):
  toks.write(tmp_path)
  tokenizer = tokenizer_lib.Tokenizer.from_directory(tmp_path)
  assert tokenizer.eos_ids == (tokenizer.token_id("<|im_end|>"),)
  assert tokenizer.pad_id == tokenizer.token_id("<|endoftext|>")
  ids = [tokenizer.token_id("<|im_end|>"), tokenizer.token_id("<|endoftext|>")]
  (tmp_path / "generation_config.json").write_text(
    json.dumps({"eos_token_id": ids})
  )
  assert tokenizer_lib.Tokenizer.from_directory(tmp_path).eos_ids == tuple(ids)


def test_a_tokenizer_travels_to_worker_processes(tokenizer):
  again = pickle.loads(pickle.dumps(tokenizer))
  np.testing.assert_array_equal(
    again.encode_prompt("What?", 4).ids, tokenizer.encode_prompt("What?", 4).ids
  )
  assert (again.eos_ids, again.pad_id) == (tokenizer.eos_ids, tokenizer.pad_id)


def _edit(path, **changes):
  entry = json.loads(path.read_text()) if path.is_file() else {}
  entry.update(changes)
  path.write_text(json.dumps(entry))


def _break(directory, fault):
  if fault == "no tokenizer":
    (directory / "tokenizer.json").unlink()
  if fault == "broken tokenizer":
    (directory / "tokenizer.json").write_text("{}")
  if fault == "broken config":
    (directory / "tokenizer_config.json").write_text("{")
  if fault == "no template":
    (directory / "chat_template.jinja").unlink()
    (directory / "chat_template.json").unlink()
    _edit(directory / "tokenizer_config.json", chat_template=None)
  if fault == "huge template":
    (directory / "chat_template.jinja").write_text("x" * 70_000)
  if fault == "no text":
    (directory / "chat_template.jinja").write_bytes(b"\xff\xfe")
  if fault == "list":
    (directory / "config.json").write_text("[]")
  if fault == "wrong type":
    _edit(directory / "config.json", text_config=[1])
  if fault == "syntax":
    (directory / "chat_template.jinja").write_text("{% for %}")
  if fault == "other id":
    _edit(directory / "config.json", video_token_index=7)
  if fault == "half a pair":
    _edit(directory / "tokenizer_config.json", pad_token="\ud800")
  if fault == "no video token":
    _edit(directory / "processor_config.json", video_token="<film>")


@pytest.mark.parametrize(
  "fault, message",
  [
    ("no tokenizer", "no tokenizer.json"),
    ("broken tokenizer", "not a tokenizer file"),
    ("broken config", "not readable as JSON"),
    ("no template", "no chat template"),
    ("huge template", "more than 65536"),
    ("no text", "not readable as text"),
    ("list", "config.json: it is .*; it must be an object"),
    ("wrong type", "config.json: text_config is .*; it must be an object"),
    ("syntax", "does not parse"),
    ("other id", "gives the video token id 7"),
    ("no video token", "no video token '<film>'"),
    ("half a pair", "a special token is no text"),
  ],
)
def test_faults_of_a_directory_are_named(tmp_path, fault, message):
  toks.write(tmp_path)
  _break(tmp_path, fault)
  with pytest.raises(errors.UserError, match=message) as caught:
    tokenizer_lib.Tokenizer.from_directory(tmp_path)
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
  "template",
  [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.append(1) }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ 'a' * 1000000000 }}",
    "{{ 9 ** 9 ** 9 }}",
    "{% for i in range(1000000000) %}{% endfor %}",
    "{% for i in range(9999) %}{% for j in range(9999) %}aaaa{% endfor %}"
    "{% endfor %}",
    "{{ raise_exception('no') }}",
    "{{ undefined.attribute }}",
    "{{ 1 / 0 }}",
    "<video> and <video>",
    "nothing of the message",
  ],
)
def test_a_template_is_code_and_runs_in_a_sandbox(tmp_path, template):
  tokenizer = tokenizer_lib.Tokenizer.from_directory(
    toks.write(tmp_path, template=template)
  )
  with pytest.raises(errors.UserError, match="chat template"):
    tokenizer.encode_prompt("What?", 4)


def test_a_question_must_not_hold_the_placeholder(tokenizer):
  with pytest.raises(errors.UserError, match="stands for the clip"):
    tokenizer.encode_prompt("What is <video>?", 4)


def test_a_prompt_longer_than_the_model_takes(tmp_path):
  toks.write(tmp_path)
  _edit(tmp_path / "config.json", text_config={"max_position_embeddings": 40})
  tokenizer = tokenizer_lib.Tokenizer.from_directory(tmp_path)
  tokenizer.encode_prompt("What?", 8)
  with pytest.raises(errors.UserError, match="the model takes 40"):
    tokenizer.encode_prompt("What?", 60)


def test_hints_are_those_of_the_public_trainer():
  number = " Please provide the numerical value (e.g., 42 or 3.14)."
  assert wording.HINTS == {
    "multiple choice": " Please provide only the single option letter (e.g.,"
    " A, B, C, D, etc.).",
    "numerical": number,
    "regression": number,
    "OCR": " Please transcribe text from the image/video clearly and provide"
    " your text answer.",
    "free-form": " Please provide your text answer.",
  }


def test_options_are_added_only_where_the_problem_lacks_them():
  hint = wording.HINTS["multiple choice"]
  options = ["A. red", "B. blue"]
  assert (
    wording.training_prompt("Which?", options, "multiple choice")
    == f"Which?\nA. red\nB. blue\n{hint}"
  )
  whole = "Which?\nA. red\nB. blue"
  assert (
    wording.training_prompt(whole, options, "multiple choice")
    == f"{whole}\n{hint}"
  )
  assert wording.letter_options(["red", "blue"]) == options


def test_videomme_prompt_is_the_official_string():
  assert wording.videomme_prompt("How many?", ["A. One.", "B. Two."]) == (
    "Select the best answer to the following multiple-choice question based on"
    " the video and the subtitles. Respond with only the letter (A, B, C, or"
    " D) of the correct option.\nHow many?\nA. One.\nB. Two.\n\nAnswer with"
    " the option's letter from the given choices directly."
  )
