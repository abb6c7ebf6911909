"""One's own questions: both files, both forms of options, and what is wrong."""

import json

import pytest

from cacovid_jax import errors
from cacovid_jax.data import question as question_lib
from cacovid_jax.data import readers
from cacovid_jax.data.readers import own
from cacovid_jax.evals import benchmarks

HINT = (
  "\n Please provide only the single option letter (e.g., A, B, C, D, etc.)."
)
HEADER = "video,question,options,answer,split\n"


def folder(path, text, name="questions.csv"):
  """Writes the file of questions and returns its folder."""
  data = text if isinstance(text, bytes) else text.encode()
  (path / name).write_bytes(data)
  return path


@pytest.mark.parametrize(
  ("name", "text"),
  [
    (
      "questions.csv",
      "video,question,options,answer,split,id,category\n"
      'a.mp4,"Red, or blue?",red|blue,B,test,q7,colour\n',
    ),
    (
      "questions.csv",
      "\ufeffvideo;question;option_a;option_b;option_c;answer;split;id;category"
      "\r\na.mp4;Red, or blue?;red;blue;;blue;test;q7;colour\r\n",
    ),
    (
      "questions.csv",
      "video,question,options,answer,split,id,category\n"
      './a.mp4,"Red, or blue?","[""A. red"", ""B. blue""]",(b),test,q7,colour',
    ),
    (
      "questions.json",
      '[{"video": "a.mp4", "question": "Red, or blue?", "answer": "BLUE",'
      ' "options": ["red", "blue"], "split": "test", "id": "q7",'
      ' "category": "colour"}]',
    ),
  ],
  ids=["bars", "columns", "list in a cell", "json"],
)
def test_every_form_of_a_question(tmp_path, name, text):
  assert readers.read_own(folder(tmp_path, text, name), split="test") == [
    question_lib.Question(
      id="q7",
      video="a.mp4",
      question="Red, or blue?",
      options=("red", "blue"),
      answer="B",
      category="colour",
      source="own",
      prompt="Red, or blue?\nA. red\nB. blue" + HINT,
    )
  ]


def test_questions_without_options_and_without_ids(tmp_path):
  rows = [
    {"video": "a.mp4", "question": "How many?", "answer": 3},
    {
      "video": "a.mp4",
      "question": "How many?",
      "answer": "3",
      "problem_type": "numerical",
    },
  ]
  got = readers.read_own(folder(tmp_path, json.dumps(rows), "questions.json"))
  assert [q.id for q in got] == ["1", "2"]
  assert [q.problem_type for q in got] == ["free-form", "numerical"]
  assert [q.answer for q in got] == ["3", "3"]
  assert got[1].prompt == (
    "How many?\n Please provide the numerical value (e.g., 42 or 3.14)."
  )


def test_clips_fall_into_splits_by_their_names(tmp_path):
  names = [f"clips/{number}.mp4" for number in range(400)]
  lines = [f"{name},Why?,x|y,{letter}\n" for name in names for letter in "AB"]
  path = folder(tmp_path, "video,question,options,answer\n" + "".join(lines))
  found = {split: readers.read_own(path, split=split) for split in own.SPLITS}
  sides = [{q.video for q in rows} for rows in found.values()]
  assert sum(map(len, sides)) == len(set.union(*sides)) == 400
  assert sum(map(len, found.values())) == len(readers.read_own(path)) == 800
  # Shares 80, 10, 10; deviations are 8 and 6.
  for side, expected in zip(sides, (320, 40, 40), strict=True):
    assert abs(len(side) - expected) < 25
  # The first 8 bytes of blake2b, little end first, modulo 100: PLACES.
  assert [own.split_of(name) for name, _ in PLACES] == [
    split for _, split in PLACES
  ]


PLACES = [
  ("336.mp4", "train"),  # 0
  ("268.mp4", "train"),  # 79
  ("107.mp4", "validation"),  # 80
  ("24.mp4", "validation"),  # 89
  ("101.mp4", "test"),  # 90
  ("126.mp4", "test"),  # 99
]


def test_the_benchmark_named_own(tmp_path):
  text = (
    HEADER
    + "a.mp4,Why?,x|y,A,train\nb.mp4,Why?,x|y,B,test\nc.mp4,?,,z y,validation\n"
  )
  found = benchmarks.load(folder(tmp_path, text), benchmark="own")
  assert (found.name, found.split, found.root) == (
    "own",
    "test",
    f"{tmp_path}/",
  )
  assert [q.video for q in found.questions] == ["b.mp4"]
  assert found.task.score(found.questions[0], "B.", rule="paper").score == 1.0
  other = benchmarks.load(tmp_path, "validation", benchmark="own")
  (question,) = other.questions
  assert other.task.score(question, "z y", rule="paper").score == 1.0
  with pytest.raises(errors.UserError, match="no own split 'dev'"):
    benchmarks.load(tmp_path, "dev", benchmark="own")


@pytest.mark.parametrize(
  ("row", "field", "reason"),
  [
    ("a.mp4,?,x|y,C,test", "answer", "neither one of the letters AB nor"),
    ("a.mp4,?,x|y|z,AB,test", "answer", "neither one of the letters ABC"),
    ("a.mp4,?,x|y,.,test", "answer", "neither one of the letters AB nor"),
    (f"a.mp4,?,x|y,{'1' * 5000},test", "answer", "neither one of the"),
    ("a.mp4,?,x|y,,test", "answer", "empty"),
    ("a.mp4,?,x,A,test", "options", "at least two"),
    ("a.mp4,?,B|A,A,test", "answer", "stands for several options: A, B"),
    ("a.mp4,?,x|x,x,test", "answer", "several options: A, B"),
    ("a.mp4,?,x||y,A,test", "options", "'' is not a text"),
    ('a.mp4,?,"[""x"",",A,test', "options", "no JSON list"),
    ("a.mp4,?,x|y,A,dev", "split", "'dev' is none of train, validation, test"),
    ("a.mp4,?,x|y,A,", "split", "empty"),
    ("../a.mp4,?,x|y,A,test", "video", "../a.mp4"),
    (",?,x|y,A,test", "video", "empty"),
    ("a.mp4,,x|y,A,test", "question", "empty"),
    ("a.mp4,one, two,x|y,A,test", "row", "more cells than the first line"),
    ("a.mp4,?,x|y", "answer", "missing"),
  ],
)
def test_a_bad_row_is_named_or_listed(tmp_path, row, field, reason):
  good = "b.mp4,?,x|y,A,test\n"
  path = folder(tmp_path, HEADER + good + row + "\n")
  with pytest.raises(errors.UserError) as error:
    readers.read_own(path)
  assert f"row 2, field '{field}'" in str(error.value)
  assert reason in str(error.value)
  report = readers.Report()
  (left,) = readers.read_own(path, on_bad_row="skip", report=report)
  assert left.video == "b.mp4"
  assert [(bad.row, bad.field) for bad in report.bad_rows] == [(2, field)]


@pytest.mark.parametrize(
  ("options", "answer", "texts", "letter"),
  [
    # As in a file that was handled wrongly: numbers are texts.
    ([1, 2, 3], 2, ("1", "2", "3"), "B"),
    ([1, 2, 3], "2", ("1", "2", "3"), "B"),
    ([1.5, -2, 1e3], 1000.0, ("1.5", "-2", "1000.0"), "C"),
    (["one", 2], "A", ("one", "2"), "A"),
    # Letters of other scripts, and the answers in them.
    (["А. кот", "Б. пёс"], "Б", ("кот", "пёс"), "B"),
    (["А. кот", "Б. пёс"], "B", ("кот", "пёс"), "B"),
    (["Ａ．猫", "Ｂ．犬"], "Ｂ", ("猫", "犬"), "B"),
    (["① 猫", "② 犬"], "②", ("猫", "犬"), "B"),
    (["① 猫", "② 犬"], 2, ("猫", "犬"), "B"),
    (["(क) बिल्ली", "(ख) कुत्ता"], "(ख)", ("बिल्ली", "कुत्ता"), "B"),
    (["أ. قطة", "ب. كلب"], "ب", ("قطة", "كلب"), "B"),
    (["a) cat", "b) dog"], "b", ("cat", "dog"), "B"),
    # The option as it was given, or under a prompt's letter.
    (["1. cat", "2. dog"], "2. dog", ("cat", "dog"), "B"),
    (["А. кот", "Б. пёс"], "Б. Пёс", ("кот", "пёс"), "B"),
    (["1. cat", "2. dog"], "B. dog", ("cat", "dog"), "B"),
    (["cat", "dog"], "ｂ", ("cat", "dog"), "B"),
  ],
)
def test_options_that_are_numbers_or_carry_letters(
  tmp_path, options, answer, texts, letter
):
  row = {"video": "a.mp4", "question": "?", "options": options}
  text = json.dumps([{**row, "answer": answer}])
  (got,) = readers.read_own(folder(tmp_path, text, "questions.json"))
  assert (got.options, got.answer) == (texts, letter)
  lines = [f"{x}. {y}" for x, y in zip("ABC", texts, strict=False)]
  assert got.prompt == "\n".join(["?", *lines]) + HINT


def test_numbers_in_columns_of_json(tmp_path):
  row = {"video": "a.mp4", "question": "?", "answer": 4}
  text = json.dumps([{**row, "option_a": 3, "option_b": 4}])
  (got,) = readers.read_own(folder(tmp_path, text, "questions.json"))
  assert (got.options, got.answer) == (("3", "4"), "B")


@pytest.mark.parametrize(
  ("options", "answer", "reason"),
  [
    ([True, False], "A", "True is not a text"),
    ([1, None], "A", "None is not a text"),
    ([1, [2]], "A", r"\[2\] is not a text"),
    ([1, float("nan")], "A", "nan is not a text"),
    ([1, float("inf")], "A", "inf is not a text"),
    ([1, 2], True, "a text is needed, not bool"),
    ([1, 2], 3, "neither one of the letters AB nor"),
    # 2 is the first option, and the number of the second.
    (["1. 2", "2. 1"], 2, "stands for several options: B, A"),
    (["cat", "dog"], "Б", "neither one of the letters AB nor"),
    (["1. cat", "2. dog"], "1. dog", "neither one of the letters AB nor"),
  ],
)
def test_options_that_are_no_texts(tmp_path, options, answer, reason):
  row = {"video": "a.mp4", "question": "?", "options": options}
  text = json.dumps([{**row, "answer": answer}])
  with pytest.raises(errors.UserError, match=f"row 1.*{reason}"):
    readers.read_own(folder(tmp_path, text, "questions.json"))


def test_ids_occur_once(tmp_path):
  text = "id,video,question,answer\n1,a.mp4,?,x\n1,b.mp4,?,y\n"
  with pytest.raises(errors.UserError, match="row 2.*'1' occurs twice"):
    readers.read_own(folder(tmp_path, text))


def test_a_hole_among_the_options(tmp_path):
  text = "video,question,answer,option_a,option_b,option_c\na.mp4,?,A,x,,z\n"
  with pytest.raises(errors.UserError, match="option_b.*a later option is not"):
    readers.read_own(folder(tmp_path, text))


def test_options_in_both_forms(tmp_path):
  text = "video,question,answer,options,option_a\na.mp4,?,A,x|y,z\n"
  with pytest.raises(errors.UserError, match="are both given"):
    readers.read_own(folder(tmp_path, text))


@pytest.mark.parametrize(
  ("text", "match"),
  [
    (
      "video,question,anwser\na.mp4,?,x\n",
      r"\['answer'\] are missing and .*\['anwser'\] are not known .*'answer'",
    ),
    ("video,question,answer,notes\n", r"columns \['notes'\] are not known"),
    ("video,question,answer,video\n", "column 'video' occurs twice"),
    ("", r"\['video', 'question', 'answer'\] are missing"),
    ("video,question,answer\n", "no usable row"),
    ('video,question,answer\na.mp4,"x\n', "is not CSV"),
    (
      "video,question,answer\na.mp4,ok,x\nb.mp4,größer?,x\n".encode("latin-1"),
      r"line 3 is not UTF-8 \(byte 0xf6\); save .*CSV UTF-8",
    ),
  ],
)
def test_a_bad_table(tmp_path, text, match):
  with pytest.raises(errors.UserError, match=match):
    readers.read_own(folder(tmp_path, text))


@pytest.mark.parametrize(
  ("text", "match"),
  [
    ('{"video": "a.mp4"}', "it must be a list; give"),
    ("[", "not readable as JSON"),
    ('[{"video": "a.mp4", "question": "?", "answer": "x"}, 3]', "object is"),
    (
      '[{"video": "a.mp4", "question": "?", "answer": "x", "options": 3}]',
      "a list is needed",
    ),
  ],
)
def test_a_bad_json_file(tmp_path, text, match):
  with pytest.raises(errors.UserError, match=match):
    readers.read_own(folder(tmp_path, text, "questions.json"))


def test_which_file_is_meant(tmp_path):
  with pytest.raises(errors.UserError, match="neither questions.json nor"):
    readers.read_own(tmp_path)
  folder(tmp_path, "[]", "questions.json")
  folder(tmp_path, HEADER)
  with pytest.raises(errors.UserError, match="exactly one of them"):
    benchmarks.load(tmp_path, benchmark="own")
  with pytest.raises(errors.UserError, match="no split 'dev'"):
    readers.read_own(tmp_path, split="dev")


def test_a_split_without_clips(tmp_path):
  text = "video,question,answer\na.mp4,?,x\n"
  there = own.split_of("a.mp4")
  other = next(split for split in own.SPLITS if split != there)
  with pytest.raises(errors.UserError, match="none of the 1 clips.*column"):
    readers.read_own(folder(tmp_path, text), split=other)
  with pytest.raises(errors.UserError, match="some rows this split"):
    readers.read_own(
      folder(tmp_path, HEADER + "a.mp4,?,x|y,A,test\n"), split="train"
    )
