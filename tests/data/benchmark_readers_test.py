"""Rows of the benchmarks, written out by hand as the releases have them.

Prompts are literal, to the character.
"""

import json
import re

import pyarrow as pa
import pyarrow.parquet
import pytest

from cacovid_jax import errors
from cacovid_jax.data import question as question_lib
from cacovid_jax.data import readers
from cacovid_jax.data.readers import mlvu, mvbench
from cacovid_jax.evals import benchmarks
from tests.data import benchmark_files
from tests.data.readers_test import VIDEOMME

MLVU = {
  "video_name": "plotQA_demo.mp4",
  "duration": 246.0,
  "question": (
    "What colour is the coat?\n(A) Yellow\n(B) Red\n(C) Green\n(D) Blue"
  ),
  "candidates": ["Yellow", "Red", "Green", "Blue"],
  "answer": "B",
  "task_type": "plotQA",
  "question_id": "PQA_0",
}
MLVU_ORIGINAL = {
  "video": "plot_1.mp4",
  "duration": 246,
  "question": "What colour is the coat?",
  "candidates": ["Yellow", "Red", "Green", "Blue"],
  "answer": "Red",
  "question_type": "plotQA",
}
LVB = {
  "video_id": "vX1",
  "id": "vX1_0",
  "video_path": "vX1.mp4",
  "subtitle_path": "vX1_en.json",
  "correct_choice": 2,
  "question": "Who enters after the kettle boils?",
  "option0": "A child",
  "option1": "A dog",
  "option2": "A chef",
  "option3": "Nobody",
  "option4": "N/A",
  "duration": 412.6,
  "duration_group": 600,
  "question_category": "T3E",
  "topic_category": "KC-Cooking-Recipes",
  "starting_timestamp_for_subtitles": 0.0,
}
MVBENCH = {
  "video": "000123.mp4",
  "question": "What happens to the cup?",
  "candidates": ["It is filled", "It is emptied"],
  "answer": "It is emptied",
}
EGOSCHEMA = {
  "question_idx": "12",
  "question": "What is C mainly doing?",
  "video_idx": "00aa-11bb",
  "option": ["A. C cooks.", "B. C paints.", "C. C reads.", "D. C sews.",
             "E. C runs."],
  "answer": "3",
}  # fmt: skip
NEXTQA = {
  "video": 1234567890,
  "frame_count": 369,
  "width": 640,
  "height": 480,
  "question": "why did the boy bend down",
  "answer": 2,
  "qid": 6,
  "type": "TP",
  "a0": "dance",
  "a1": "fall",
  "a2": "pick up ball",
  "a3": "rest",
  "a4": "play",
}


def _write(path, *rows):
  path.parent.mkdir(parents=True, exist_ok=True)
  if path.suffix == ".json":
    path.write_text(json.dumps(list(rows)))
  else:
    pa.parquet.write_table(pa.Table.from_pylist(list(rows)), path)
  return path


def _six(**changes):
  """A row of MLVU's test, with six options."""
  colours = ["Yellow", "Red", "Green", "Blue", "Pink", "Grey"]
  shown = "\n".join(
    f"({letter}) {colour}"
    for letter, colour in zip("ABCDEF", colours, strict=True)
  )
  row = {
    **MLVU,
    "question": f"What colour is the coat?\n{shown}",
    "candidates": colours,
    "answer": "F",
    "task_type": "sportsQA",
  }
  return {**row, **changes}


# Benchmark -> (where its questions are, a row of it).
ROWS = {
  "videomme": ("videomme/test-00000-of-00001.parquet", VIDEOMME),
  "mlvu_dev": ("mlvu/test-00000-of-00001.parquet", MLVU),
  "mlvu_test": ("mlvu/test-00000-of-00001.parquet", _six()),
  "longvideobench": ("validation-00000-of-00001.parquet", LVB),
  "mvbench": ("json/state_change.json", MVBENCH),
  "egoschema": ("Subset/test-00000-of-00001.parquet", EGOSCHEMA),
  "nextqa": ("MC/test-00000-of-00001.parquet", NEXTQA),
}


def _load(root, name, *rows, place=None, **options):
  _write(root / (place or ROWS[name][0]), *rows)
  return benchmarks.load(root, benchmark=name, **options)


def test_a_row_of_videomme(tmp_path):
  (got,) = _load(tmp_path, "videomme", VIDEOMME).questions
  assert got == question_lib.Question(
    id="007-2",
    video="data/AbC_12.mp4",
    question="How many moons appear?",
    options=("One.", "Two.", "Three.", "Four."),
    answer="B",
    duration="medium",
    category="Counting Problem",
    groups=(("domain", "Knowledge"), ("sub_category", "Astronomy")),
    source="videomme",
    prompt="Select the best answer to the following multiple-choice question "
    "based on the video and the subtitles. Respond with only the letter (A, B, "
    "C, or D) of the correct option.\nHow many moons appear?\nA. One.\n"
    "B. Two.\nC. Three.\nD. Four.\n\nAnswer with the option's letter from the "
    "given choices directly.",
  )


def test_a_row_of_mlvu_shows_its_question_as_it_is(tmp_path):
  (got,) = _load(tmp_path, "mlvu_dev", MLVU).questions
  assert got == question_lib.Question(
    id="PQA_0",
    video="plotQA_demo.mp4",
    question="What colour is the coat?",
    options=("Yellow", "Red", "Green", "Blue"),
    answer="B",
    category="plotQA",
    source="mlvu",
    prompt="What colour is the coat?\n(A) Yellow\n(B) Red\n(C) Green\n(D) Blue"
    "\nOnly give the best option.\nBest option: (",
  )


def test_a_row_of_the_original_mlvu_gets_the_same_text(tmp_path):
  found = _load(tmp_path, "mlvu_dev", MLVU_ORIGINAL, place="json/1_plotQA.json")
  (got,) = found.questions
  assert (got.id, got.answer) == ("1_plotQA:1", "B")
  assert got.video == "video/1_plotQA/plot_1.mp4"
  (other,) = _load(tmp_path, "mlvu_dev", MLVU).questions
  assert (got.prompt, got.options) == (other.prompt, other.options)


def test_tasks_of_mlvu_have_one_name_in_both_layouts(tmp_path):
  row = {**MLVU_ORIGINAL, "question_type": "findNeedle"}
  found = _load(tmp_path, "mlvu_dev", row, place="json/2_needle.json")
  assert found.questions[0].category == "needle"
  (got,) = _load(
    tmp_path, "mlvu_dev", {**MLVU, "task_type": "needle"}
  ).questions
  assert got.category == "needle"


def test_mlvu_without_candidates_finds_them_in_the_question(tmp_path):
  row = {
    k: v for k, v in MLVU.items() if k not in ("candidates", "question_id")
  }
  (got,) = _load(tmp_path, "mlvu_dev", row).questions
  assert got.options == ("Yellow", "Red", "Green", "Blue")
  assert got.id == "test-00000-of-00001:1"


def test_six_options_in_mlvu_test(tmp_path):
  original = {
    "video": "AR_0.mp4",
    "question_id": "AR_0",
    "question": "What colour is the coat?",
    "question_type": "sportsQA",
    "candidates": _six()["candidates"],
    "answer": "Grey",
  }
  found = _load(tmp_path, "mlvu_test", original, place="json/test.json")
  (got,) = found.questions
  assert (got.id, got.answer) == ("AR_0", "F")
  (other,) = _load(tmp_path, "mlvu_test", _six()).questions
  assert (other.answer, got.prompt) == ("F", other.prompt)
  assert got.prompt.endswith(
    "(E) Pink\n(F) Grey\nOnly give the best option.\nBest option: ("
  )


def test_generation_tasks_of_mlvu_are_left_out_and_counted(tmp_path):
  told = {**MLVU_ORIGINAL, "question_type": "summary"}
  del told["candidates"]
  _write(tmp_path / "json/9_summary.json", told, told)
  found = _load(tmp_path, "mlvu_dev", MLVU_ORIGINAL, place="json/1_plotQA.json")
  assert len(found.questions) == 1
  assert found.left_out() == {"other_rows": {"generation tasks": 2}}


def test_a_row_of_longvideobench_ends_in_a_newline(tmp_path):
  # Its subtitles are named and not there, which is no fault.
  (got,) = _load(tmp_path, "longvideobench", LVB).questions
  assert got == question_lib.Question(
    id="vX1_0",
    video="videos/vX1.mp4",
    question="Who enters after the kettle boils?",
    options=("A child", "A dog", "A chef", "Nobody"),
    answer="C",
    duration="600",
    category="T3E",
    groups=(("topic_category", "KC-Cooking-Recipes"),),
    source="longvideobench",
    prompt="Who enters after the kettle boils?\nA. A child\nB. A dog\n"
    "C. A chef\nD. Nobody\nAnswer with the option's letter from the given "
    "choices directly.\n",
  )


def test_both_files_of_longvideobench_say_the_same(tmp_path):
  (first,) = _load(tmp_path / "a", "longvideobench", LVB).questions
  row = {k: v for k, v in LVB.items() if not k.startswith("option")}
  row |= {"candidates": ["A child", "A dog", "A chef", "Nobody"], "level": "L2"}
  found = _load(tmp_path / "b", "longvideobench", row, place="lvb_val.json")
  assert found.questions == [first]


def test_a_row_of_mvbench(tmp_path):
  found = _load(tmp_path, "mvbench", MVBENCH)
  assert found.questions == [
    question_lib.Question(
      id="state_change:1",
      video="perception/videos/000123.mp4",
      question="What happens to the cup?",
      options=("It is filled", "It is emptied"),
      answer="B",
      category="state_change",
      source="mvbench",
      prompt="Question:What happens to the cup?\nOption:\n(A) It is filled\n"
      "(B) It is emptied\nOnly give the best option.\n",
    )
  ]


def test_tasks_of_mvbench_that_are_not_there_are_named(tmp_path):
  _write(tmp_path / "json/notes.json", {"video": "x.mp4"})
  found = _load(tmp_path, "mvbench", MVBENCH)
  left_out = found.left_out()
  assert len(left_out["not_there"]) == 19
  assert "state_change" not in left_out["not_there"]
  assert list(left_out["other_rows"]) == ["notes.json, no task of MVBench"]
  # The mean is one over the tasks that are there.
  assert found.task.sample(found.questions).names == ("state_change",)
  (tmp_path / "json/state_change.json").unlink()
  with pytest.raises(errors.UserError, match="no task of MVBench; its files"):
    benchmarks.load(tmp_path, benchmark="mvbench")


@pytest.mark.parametrize(
  "task, place",
  [
    ("action_sequence", "star/Charades_segment/000123.mp4"),
    ("action_sequence", "data0613/star/Charades_segment/000123.mp4"),
    ("object_existence", "data0613/clevrer/video_validation/000123.mp4"),
    ("object_existence", "video/clevrer/video_validation/000123.mp4"),
    ("fine_grained_pose", "nturgbd_convert/000123.mp4"),
  ],
)
def test_clips_of_mvbench_are_found_in_their_folders(tmp_path, task, place):
  (tmp_path / place).parent.mkdir(parents=True)
  (tmp_path / place).write_bytes(b"x")
  found = _load(tmp_path, "mvbench", MVBENCH, place=f"json/{task}.json")
  assert found.questions[0].video == place


def test_mvbench_has_its_20_tasks():
  assert len(set(mvbench.TASKS)) == 20 == len(benchmark_files._MVBENCH)
  folders = {
    task: folder.removeprefix("data0613/")
    for task, folder in benchmark_files._MVBENCH.items()
  }
  assert folders == mvbench.FOLDERS
  assert (len(mlvu.DEV_TYPES), len(mlvu.TEST_TYPES)) == (7, 9)


def test_a_row_of_egoschema(tmp_path):
  assert _load(tmp_path, "egoschema", EGOSCHEMA).questions == [
    question_lib.Question(
      id="12",
      video="videos/00aa-11bb.mp4",
      question="What is C mainly doing?",
      options=("C cooks.", "C paints.", "C reads.", "C sews.", "C runs."),
      answer="D",
      source="egoschema",
      prompt="What is C mainly doing?\nA. C cooks.\nB. C paints.\nC. C reads.\n"
      "D. C sews.\nE. C runs.\nAnswer with the option's letter from the given "
      "choices directly.",
    )
  ]


def test_a_row_of_nextqa_has_no_instruction(tmp_path):
  assert _load(tmp_path, "nextqa", NEXTQA).questions == [
    question_lib.Question(
      id="1234567890_6",
      video="NExTVideo/1234567890.mp4",
      question="why did the boy bend down",
      options=("dance", "fall", "pick up ball", "rest", "play"),
      answer="C",
      category="T",
      groups=(("type", "TN"),),  # TP is counted with TN.
      source="nextqa",
      prompt="why did the boy bend down\nA. dance\nB. fall\nC. pick up ball\n"
      "D. rest\nE. play",
    )
  ]


BAD = [
  ("videomme", {"answer": "E"}, "answer", "'E' is not one of the letters ABCD"),
  ("videomme", {"options": ["A. x", "C. y"]}, "options", "without a hole"),
  ("videomme", {"options": ["x", "y"]}, "options", "must begin by A., B., C."),
  (
    "videomme",
    {"options": ["A. x", "B. y", "C. z", "D. u", "E. v"]},
    "options",
    "5 options; the benchmark has 4 at most",
  ),
  ("videomme", {"question_id": None}, "question_id", "missing"),
  ("mlvu_dev", {"answer": "E"}, "answer", "not one of the letters ABCD"),
  ("mlvu_dev", {"answer": "Red"}, "answer", "none of the options"),
  ("mlvu_dev", {"task_type": "riddle"}, "task_type", "'riddle' is none of"),
  ("mlvu_dev", {"video_name": "../x.mp4"}, "video_name", "climbs with .."),
  ("mlvu_dev", {"candidates": ["x"] * 6}, "candidates", "4 at most"),
  ("mlvu_dev", {"candidates": ["x", ""]}, "candidates", "'' is not a text"),
  ("mlvu_test", {"answer": "G"}, "answer", "not one of the letters ABCDEF"),
  (
    "longvideobench",
    {"correct_choice": 4},
    "correct_choice",
    "4 is not one of the 4 options, from 0",
  ),
  (
    "longvideobench",
    {"correct_choice": -1},
    "correct_choice",
    "no answer; the validation split has them",
  ),
  (
    "longvideobench",
    {"option1": "N/A"},
    "option1",
    "an unused option stands before one that is used",
  ),
  ("longvideobench", {"option2": None}, "option2", "missing"),
  (
    "longvideobench",
    {"option1": "N/A", "option2": "N/A", "option3": "N/A"},
    "option0",
    "without options",
  ),
  ("longvideobench", {"duration_group": "x"}, "duration_group", "'x' is not a"),
  ("mvbench", {"answer": "It is"}, "answer", "'It is' is none of the options"),
  ("mvbench", {"candidates": ["It is emptied"]}, "candidates", "without opt"),
  ("mvbench", {"candidates": "It is emptied"}, "candidates", "a list is"),
  ("egoschema", {"answer": "5"}, "answer", "5 is not one of the 5 options"),
  ("egoschema", {"answer": None}, "answer", "missing"),
  ("egoschema", {"answer": "D"}, "answer", "'D' is not a whole number"),
  ("egoschema", {"option": ["A. x", "B. y", "D. z"]}, "option", "without a ho"),
  ("nextqa", {"answer": 5}, "answer", "5 is not one of the 5 options"),
  ("nextqa", {"a3": None}, "a3", "missing"),
  ("nextqa", {"a3": " "}, "a3", "empty"),
  ("nextqa", {"type": "XX"}, "type", "'XX' is none of CW, CH"),
]  # fmt: skip


def _renamed(name, row):
  """Returns the row under another identity."""
  field = {
    "videomme": "question_id",
    "mlvu_dev": "question_id",
    "mlvu_test": "question_id",
    "longvideobench": "id",
    "egoschema": "question_idx",
  }.get(name)
  if name == "nextqa":
    return {**row, "qid": 7}
  return {**row, field: "other"} if field else dict(row)


@pytest.mark.parametrize("name, change, field, reason", BAD)
def test_a_bad_row_names_itself_or_is_listed(
  tmp_path, name, change, field, reason
):
  place, row = ROWS[name]
  bad = {**_renamed(name, row), **change}
  if any(isinstance(value, str) for value in change.values()):
    # A parquet column has one type.
    row = {
      key: str(value) if key in change and isinstance(value, int) else value
      for key, value in row.items()
    }
  with pytest.raises(errors.UserError) as caught:
    _load(tmp_path, name, row, bad)
  message = str(caught.value)
  assert f"{tmp_path / place}: row 2, field '{field}': " in message
  assert reason in message and "\n" not in message
  assert "on_bad_row=skip" in message
  found = benchmarks.load(tmp_path, benchmark=name, on_bad_row="skip")
  assert len(found.questions) == 1
  (entry,) = found.left_out()["bad_rows"]
  assert (entry["file"], entry["row"]) == (place.rpartition("/")[2], 2)
  assert entry["field"] == field and reason in entry["reason"]


@pytest.mark.parametrize(
  "name",
  [n for n in ROWS if n != "mvbench"],  # Its rows have no names.
)
def test_two_rows_of_one_name_are_a_fault(tmp_path, name):
  row = ROWS[name][1]
  with pytest.raises(errors.UserError, match="row 2, field 'id': .* twice"):
    _load(tmp_path, name, row, row)


@pytest.mark.parametrize("name", ROWS)
def test_other_columns_are_named_with_those_that_are_missing(tmp_path, name):
  row = {
    ("frage" if key == "question" else key): value
    for key, value in ROWS[name][1].items()
  }
  with pytest.raises(errors.UserError) as caught:
    _load(tmp_path, name, row)
  message = str(caught.value)
  assert "columns ['question'] are missing (it has " in message
  assert "'frage'" in message and "\n" not in message


def test_clips_are_looked_for_below_another_media_root(tmp_path):
  (tmp_path / "clips/data").mkdir(parents=True)
  (tmp_path / "clips/data/AbC_12.mkv").write_bytes(b"x")
  for media in ("clips", str(tmp_path / "clips")):
    found = _load(tmp_path, "videomme", VIDEOMME, media=media)
    assert found.questions[0].video == "data/AbC_12.mkv"
    names = [question.video for question in found.questions]
    assert readers.find_missing(names, found.root) == {}
  with pytest.raises(errors.UserError, match="no such folder; give the media"):
    _load(tmp_path, "videomme", VIDEOMME, media="nowhere")


def test_damaged_files_give_one_clear_line(tmp_path):
  for name, (place, _) in ROWS.items():
    path = tmp_path / name / place
    path.parent.mkdir(parents=True)
    path.write_bytes(b"PAR1 nothing [{")
    with pytest.raises(errors.UserError, match="not readable as") as caught:
      benchmarks.load(tmp_path / name, benchmark=name)
    assert not re.search("\n", str(caught.value))
