"""Rows are written out by hand in the published formats."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from cacovid_jax import errors
from cacovid_jax.data import question as question_lib
from cacovid_jax.data import readers, wording
from cacovid_jax.data.readers import validation

HINT = wording.HINTS["multiple choice"]
R1 = {
  "problem_id": 41,
  "problem": "What does the man pick up first?",
  "data_type": "video",
  "problem_type": "multiple choice",
  "options": ["A. A cup", "B. A rope", "C. A book", "D. A key"],
  "solution": "<answer>B</answer>",
  "path": "./demo/clip_0001.mp4",
  "data_source": "demo/short",
}
FILTERED = {
  "problem": "What does the man pick up first?\nA. A cup\nB. A rope",
  "solution": "<answer>B</answer>",
  "modality_type": "video",
  "problem_type": "multiple choice",
  "video": "demo/clip_0001.mp4",
}
VIDEOMME = {
  "video_id": "007",
  "duration": "medium",
  "domain": "Knowledge",
  "sub_category": "Astronomy",
  "url": "https://example.org/w?v=AbC_12",
  "videoID": "AbC_12",
  "question_id": "007-2",
  "task_type": "Counting Problem",
  "question": "How many moons appear?",
  "options": ["A. One.", "B. Two.", "C. Three.", "D. Four."],
  "answer": "B",
}


def _json(tmp_path, *rows, name="rows.json"):
  path = tmp_path / name
  path.write_text(json.dumps(list(rows)))
  return path


def _parquet(tmp_path, *rows):
  path = tmp_path / "rows.parquet"
  pa.parquet.write_table(pa.Table.from_pylist(list(rows)), path)
  return path


def test_a_row_of_video_r1_260k(tmp_path):
  (got,) = readers.read_video_r1(_json(tmp_path, R1))
  assert got == question_lib.Question(
    id="41",
    video="demo/clip_0001.mp4",
    question="What does the man pick up first?",
    options=("A cup", "A rope", "A book", "A key"),
    answer="B",
    problem_type="multiple choice",
    source="demo/short",
    prompt="What does the man pick up first?\nA. A cup\nB. A rope\nC. A book\n"
    f"D. A key\n{HINT}",
  )


def test_a_row_of_the_filtered_subset(tmp_path):
  (got,) = readers.read_video_r1(_json(tmp_path, FILTERED))
  assert got.id == "rows:1"
  assert got.video == "demo/clip_0001.mp4"
  assert got.options == ("A cup", "A rope")
  assert got.answer == "B"
  assert got.prompt == f"{FILTERED['problem']}\n{HINT}"


@pytest.mark.parametrize(
  "problem_type, solution, answer",
  [
    ("numerical", "<answer> 3.50 </answer>", "3.50"),
    ("OCR", "<answer>EXIT 12</answer>", "EXIT 12"),
    ("free-form", "A man runs.", "A man runs."),
    ("regression", "<answer>0.4</answer>", "0.4"),
  ],
)
def test_the_types_without_options(tmp_path, problem_type, solution, answer):
  row = {
    **R1,
    "problem_type": problem_type,
    "solution": solution,
    "options": [],
  }
  (got,) = readers.read_video_r1(_json(tmp_path, row))
  assert (got.answer, got.options) == (answer, ())
  assert got.prompt == f"{R1['problem']}\n{wording.HINTS[problem_type]}"


def test_options_without_letters_get_them(tmp_path):
  row = {**R1, "options": ["A cup", "A rope"]}
  (got,) = readers.read_video_r1(_json(tmp_path, row))
  assert got.options == ("A cup", "A rope")
  assert got.prompt == f"{R1['problem']}\nA. A cup\nB. A rope\n{HINT}"


@pytest.mark.parametrize(
  "problem, options",
  [
    ("Which? (A) red (B) blue", ("red", "blue")),
    ("Which?\nA) red\nB) blue\nC) A. B. Smith", ("red", "blue", "A. B. Smith")),
    ("Which? A: red B: blue", ("red", "blue")),
  ],
)
def test_options_are_found_in_the_text(tmp_path, problem, options):
  row = {**FILTERED, "problem": problem}
  (got,) = readers.read_video_r1(_json(tmp_path, row))
  assert got.options == options


def test_image_rows_are_left_out_and_counted(tmp_path):
  report = readers.Report()
  image = {**R1, "problem_id": 42, "data_type": "image"}
  rows = readers.read_video_r1(_json(tmp_path, image, R1), report=report)
  assert [row.id for row in rows] == ["41"]
  assert (report.num_rows, report.num_images, report.bad_rows) == (2, 1, [])


def test_several_files_keep_their_ids_apart(tmp_path):
  first = _json(tmp_path, R1, name="a.json")
  second = _json(tmp_path, R1, name="b.json")
  rows = readers.read_video_r1(f"{first},{second}")
  assert [row.id for row in rows] == ["a/41", "b/41"]
  assert rows == readers.read_video_r1([first, second])


BAD = [
  ({"problem": None}, "problem", "missing"),
  ({"problem": " "}, "problem", "empty"),
  ({"problem": "\ud800"}, "problem", "half a surrogate pair"),
  ({"problem": 3}, "problem", "a text is needed, not int"),
  ({"problem": "x" * 100_001}, "problem", "above 100000 characters"),
  ({"problem_type": "riddle"}, "problem_type", "'riddle' is none of"),
  ({"data_type": "audio"}, "data_type", "neither video nor image"),
  ({"solution": "<answer> </answer>"}, "solution", "the answer is empty"),
  ({"solution": "<answer>E</answer>"}, "solution", "'E' is not one of"),
  ({"solution": "b"}, "solution", "not one of the letters ABCD"),
  ({"solution": "Banana"}, "solution", "'Banana' is not one of the letters"),
  ({"solution": "A rope"}, "solution", "is not A with its option 'A cup'"),
  ({"solution": "B. A cup"}, "solution", "is not B with its option 'A rope'"),
  ({"solution": "B or C"}, "solution", "is not B with its option 'A rope'"),
  ({"options": []}, "options", "without options"),
  ({"options": "A. cup"}, "options", "a list is needed, not str"),
  ({"options": ["A. cup", None]}, "options", "None is not a text"),
  ({"options": ["x"] * 27}, "options", "27 are more than there are letters"),
  ({"path": "../clip.mp4"}, "path", "climbs with .."),
  ({"path": "/clip.mp4"}, "path", "is absolute"),
  ({"path": "http://example.org/clip.mp4"}, "path", "URLs"),
  ({"path": None}, "path", "missing"),
  ({"problem_id": [1]}, "problem_id", "neither number nor text"),
]


@pytest.mark.parametrize("change, field, reason", BAD)
def test_a_bad_row_names_row_field_and_reason(tmp_path, change, field, reason):
  path = _json(tmp_path, R1, {**R1, "problem_id": 42, **change})
  with pytest.raises(errors.UserError) as caught:
    readers.read_video_r1(path)
  message = str(caught.value)
  assert f"rows.json: row 2, field '{field}'" in message
  assert reason in message and "\n" not in message
  report = readers.Report()
  rows = readers.read_video_r1(path, on_bad_row="skip", report=report)
  assert [row.id for row in rows] == ["41"]
  ((bad),) = report.bad_rows
  assert (bad.row, bad.field) == (2, field)


@pytest.mark.parametrize(
  "answer", ["B", "(B)", "B.", "B)", " B ", "B. {}", "(B) {}", "B {}", "B.{}"]
)
def test_an_answer_is_a_letter_and_perhaps_its_option(tmp_path, answer):
  for solution in ("<answer>{}</answer>", "<answer> {}\n</answer>", "{}"):
    text = solution.format(answer.format("a  rope."))
    (got,) = readers.read_video_r1(_json(tmp_path, {**R1, "solution": text}))
    assert got.answer == "B", text
    # Of options inside the text, too.
    row = {**FILTERED, "solution": text}
    (got,) = readers.read_video_r1(_json(tmp_path, row))
    assert got.answer == "B", text
  row = {**VIDEOMME, "answer": answer.format("Two.")}
  (got,) = readers.read_videomme(_parquet(tmp_path, row))
  assert got.answer == "B"


def test_rows_that_are_no_objects_and_duplicate_ids(tmp_path):
  with pytest.raises(errors.UserError, match="row 1, field 'row': an object"):
    readers.read_video_r1(_json(tmp_path, [1]))
  with pytest.raises(errors.UserError, match="row 2, field 'id': '41' occurs"):
    readers.read_video_r1(_json(tmp_path, R1, R1))


@pytest.mark.parametrize(
  "text, message",
  [
    ("{", "not readable as JSON"),
    ('{"a": 1}', "it must be a list; give"),
    ("[]", "no usable row among 0"),
    ("[" * 100_000, "not readable as JSON"),
    (b"\xff\xfe\x00", "not readable as JSON"),
  ],
)
def test_a_file_that_is_no_list_of_rows(tmp_path, text, message):
  path = tmp_path / "rows.json"
  path.write_bytes(text if isinstance(text, bytes) else text.encode())
  with pytest.raises(errors.UserError, match=message):
    readers.read_video_r1(path)


def test_files_roots_and_switches_that_do_not_exist(tmp_path):
  path = _json(tmp_path, R1)
  with pytest.raises(errors.UserError, match="no such file"):
    readers.read_video_r1(tmp_path / "absent.json")
  with pytest.raises(errors.UserError, match="no such folder"):
    readers.read_video_r1(path, tmp_path / "absent")
  with pytest.raises(errors.UserError, match="'raise' or 'skip'"):
    readers.read_video_r1(path, on_bad_row="ignore")
  with pytest.raises(errors.UserError, match="no such file"):
    readers.read_videomme(tmp_path / "absent.parquet")
  with pytest.raises(errors.UserError, match="prompt style"):
    readers.read_videomme(_parquet(tmp_path, VIDEOMME), style="plain")


def test_a_row_of_videomme(tmp_path):
  (got,) = readers.read_videomme(_parquet(tmp_path, VIDEOMME))
  assert got == question_lib.Question(
    id="007-2",
    video="data/AbC_12.mp4",
    question="How many moons appear?",
    options=("One.", "Two.", "Three.", "Four."),
    answer="B",
    problem_type="multiple choice",
    duration="medium",
    category="Counting Problem",
    groups=(("domain", "Knowledge"), ("sub_category", "Astronomy")),
    source="videomme",
    prompt=wording.videomme_prompt(VIDEOMME["question"], VIDEOMME["options"]),
  )


def test_both_formats_render_a_question_to_the_same_text(tmp_path):
  row = {**R1, "problem": VIDEOMME["question"], "options": VIDEOMME["options"]}
  (first,) = readers.read_video_r1(_json(tmp_path, row))
  (second,) = readers.read_videomme(
    _parquet(tmp_path, VIDEOMME), style="video-r1"
  )
  assert first.prompt == second.prompt


@pytest.mark.parametrize("place", ["data/AbC_12.mkv", "videos/AbC_12.mp4"])
def test_clips_are_found_where_they_lie(tmp_path, place):
  (tmp_path / place).parent.mkdir()
  (tmp_path / place).write_bytes(b"x")
  (got,) = readers.read_videomme(_parquet(tmp_path, VIDEOMME), tmp_path)
  assert got.video == place


@pytest.mark.parametrize(
  "change, field",
  [
    ({"answer": "E"}, "answer"),
    ({"answer": "Banana"}, "answer"),
    ({"answer": "Two."}, "answer"),
    ({"answer": "B. Three."}, "answer"),
    ({"answer": "(B"}, "answer"),
    ({"answer": "BC"}, "answer"),
    ({"answer": None}, "answer"),
    ({"options": ["A. One."]}, "options"),
    ({"options": None}, "options"),
    ({"question": ""}, "question"),
    ({"videoID": "../x"}, "videoID"),
    ({"question_id": "007-2"}, "id"),
  ],
)
def test_a_bad_row_of_videomme(tmp_path, change, field):
  bad = {**VIDEOMME, "question_id": "007-3", **change}
  path = _parquet(tmp_path, VIDEOMME, bad)
  with pytest.raises(errors.UserError, match=f"row 2, field '{field}'"):
    readers.read_videomme(path)
  assert len(readers.read_videomme(path, on_bad_row="skip")) == 1


def test_parquet_files_that_cannot_be_used(tmp_path):
  path = tmp_path / "rows.parquet"
  path.write_bytes(b"PAR1 nothing PAR1")
  with pytest.raises(errors.UserError, match="not readable as parquet"):
    readers.read_videomme(path)
  short = {k: v for k, v in VIDEOMME.items() if k != "answer"}
  with pytest.raises(errors.UserError, match=r"columns \['answer'\] are"):
    readers.read_videomme(_parquet(tmp_path, short))


def test_missing_clips_are_listed_with_their_questions(tmp_path):
  (tmp_path / "here.mp4").write_bytes(b"x")
  names = ["here.mp4", "b.mp4", "a.mp4", "b.mp4"]
  missing = {"a.mp4": 1, "b.mp4": 2}
  assert readers.find_missing(names, tmp_path) == missing
  assert readers.find_missing(names, tmp_path, on_missing="skip") == missing
  with pytest.raises(errors.UserError, match=r"2 of 3 clips .*\(3 of 4 q"):
    readers.find_missing(names, tmp_path, on_missing="raise")
  with pytest.raises(errors.UserError, match="media root, or go without them$"):
    readers.find_missing(
      names, tmp_path, on_missing="raise", mend="go without them"
    )
  assert not readers.find_missing(names[:1], tmp_path, on_missing="raise")
  # Where no clip is left, nothing can be skipped.
  with pytest.raises(errors.UserError, match="2 of 2 clips"):
    readers.find_missing(names[1:], tmp_path, on_missing="skip")


def test_a_link_that_leaves_the_root_is_refused_and_not_called_missing(
  tmp_path,
):
  (tmp_path / "secret.mp4").write_bytes(b"x")
  root = tmp_path / "root"
  root.mkdir()
  (root / "a.mp4").symlink_to(tmp_path / "secret.mp4")
  (root / "here.mp4").write_bytes(b"x")
  (root / "link.mp4").symlink_to("here.mp4")
  names = ["0.mp4", "a.mp4", "here.mp4", "link.mp4"]
  assert readers.find_missing(names, root) == {"0.mp4": 1, "a.mp4": 1}
  message = (
    r"first: a.mp4 \(refused: it leads out of the media root\), 0.mp4; download"
  )
  with pytest.raises(errors.UserError, match=message):
    readers.find_missing(names, root, on_missing="raise")


@pytest.mark.parametrize("there", ["root/other/deep", "beside"])
def test_a_clip_in_another_folder_is_a_hint(tmp_path, there):
  (tmp_path / "root").mkdir()
  (tmp_path / there).mkdir(parents=True)
  (tmp_path / there / "b.mp4").write_bytes(b"x")
  with pytest.raises(errors.UserError) as error:
    readers.find_missing(
      ["a.mp4", "b.mp4"], tmp_path / "root", on_missing="raise"
    )
  assert f" b.mp4 (there is {tmp_path / there}/b.mp4); download" in str(
    error.value
  )


def test_the_look_into_other_folders_ends(tmp_path, monkeypatch):
  (tmp_path / "root" / "far").mkdir(parents=True)
  (tmp_path / "root" / "far" / "b.mp4").write_bytes(b"x")
  monkeypatch.setattr(validation, "MAX_LOOKED_AT", 0)
  with pytest.raises(errors.UserError, match="first: b.mp4; download"):
    readers.find_missing(["b.mp4"], tmp_path / "root", on_missing="raise")


def _damage(data: bytes, rng) -> bytes:
  data = bytearray(data)
  for place in rng.integers(0, len(data), 6):
    data[place] = int(rng.integers(0, 256))
  return bytes(data)


@pytest.mark.parametrize("kind", ["json", "parquet"])
def test_damaged_files_give_rows_or_one_clear_line(tmp_path, kind):
  rng = np.random.default_rng(0)
  if kind == "json":
    path, read = _json(tmp_path, R1, FILTERED), readers.read_video_r1
  else:
    path, read = _parquet(tmp_path, VIDEOMME), readers.read_videomme
  data, clear = path.read_bytes(), 0
  for _ in range(200):
    path.write_bytes(_damage(data, rng))
    try:
      assert all(isinstance(q, question_lib.Question) for q in read(path))
    except errors.UserError as error:
      assert "\n" not in str(error)
      clear += 1
  assert clear > 0
