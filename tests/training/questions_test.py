"""What training reads, and what it says of the rows that it leaves out."""

import json

import pytest

from cacovid_jax import errors, experiment
from cacovid_jax.data import tfds as tfds_lib
from cacovid_jax.training import loop
from tests.preparation import blind_test
from tests.training import tiny

CLIPS = ("a.mp4", "b.mp4", "gone.mp4", "gone.mp4", "lost.mp4")


def entries():
  """Returns five questions, three pictures of two sources and a bad row."""
  rows = [
    blind_test.entry(
      number,
      "What?",
      options=["A. red", "B. blue"],
      path=f"./{clip}",
      data_source="drawn",
    )
    for number, clip in enumerate(CLIPS)
  ]
  for number, source in enumerate(("charts", "charts", "maps"), start=10):
    changes = dict(data_type="image", data_source=source, problem_id=number)
    rows.append(rows[0] | changes)
  rows.append(rows[0] | {"problem_id": 20, "solution": "<answer>Z</answer>"})
  return rows


@pytest.fixture
def folder(tmp_path):
  (tmp_path / "train.json").write_text(json.dumps(entries()))
  for name in ("a.mp4", "b.mp4"):
    (tmp_path / name).write_bytes(b"x")
  return tmp_path


def config(folder, **changes):
  changes = {"data." + name: value for name, value in changes.items()}
  return tiny.config(**{"data.root": str(folder)} | changes)


def ids(rows):
  return [row.id for row in rows]


TOLD = [
  "left out 3 image rows: charts 2, maps 1",
  "left out 1 bad rows, first: {file}: row 9, field 'solution': 'Z' is not one"
  " of the letters AB",
  "left out 3 questions about 2 missing clips, first: gone.mp4, lost.mp4",
]


def test_what_is_left_out_is_told_and_listed(folder, capsys):
  made = config(folder, on_bad_row="skip", on_missing="skip")
  assert ids(experiment.read_questions(made, folder / "w")) == ["0", "1"]
  file = folder / "train.json"
  expected = [line.format(file=file) for line in TOLD]
  assert capsys.readouterr().out.splitlines() == expected
  assert json.loads((folder / "w" / "left_out.json").read_text()) == {
    "questions": 2,
    "images": [
      {"source": "charts", "problem_type": "multiple choice", "rows": 2},
      {"source": "maps", "problem_type": "multiple choice", "rows": 1},
    ],
    "bad_rows": [expected[1].partition("first: ")[2]],
    "missing_clips": {"gone.mp4": 2, "lost.mp4": 1},
  }
  # Only where a workdir is named.
  assert ids(experiment.read_questions(made)) == ["0", "1"]
  assert capsys.readouterr().out == ""


def test_missing_clips_stop_the_run_before_its_first_step(folder):
  with pytest.raises(errors.UserError) as error:
    loop.train(
      tiny.experiment_of(config(folder, on_bad_row="skip"), folder / "w")
    )
  assert "2 of 4 clips are missing (3 of 5 questions)" in str(error.value)
  assert "config.data.on_missing=skip" in str(error.value)
  assert not (folder / "w" / "left_out.json").exists()
  with pytest.raises(errors.UserError, match="must be one of raise, skip"):
    tiny.experiment_of(config(folder, on_missing="count"))


def test_a_folder_without_any_clip_is_never_skipped(folder):
  for name in ("a.mp4", "b.mp4"):
    (folder / name).unlink()
  made = config(folder, on_bad_row="skip", on_missing="skip")
  with pytest.raises(errors.UserError, match="4 of 4 clips are missing"):
    experiment.read_questions(made)


def test_a_run_goes_on_with_the_questions_that_it_began_with(folder):
  made = config(folder, on_bad_row="skip", on_missing="skip")
  for _ in range(2):
    experiment.read_questions(made, folder)
  before = (folder / "left_out.json").read_bytes()
  (folder / "lost.mp4").write_bytes(b"x")
  match = (
    "began with 2 questions and 2 missing clips, and now there are 3 and 1"
  )
  with pytest.raises(errors.UserError, match=match):
    experiment.read_questions(made, folder)
  assert (folder / "left_out.json").read_bytes() == before
  # A cache of features, which several configs share, is no run.
  rows = experiment.read_questions(made, folder, resumes=False)
  assert ids(rows) == ["0", "1", "4"]
  (folder / "left_out.json").write_text("{")
  with pytest.raises(errors.UserError, match="not readable"):
    experiment.read_questions(made, folder)


def test_rows_of_a_tfds_are_looked_for_too(folder):
  everything = config(folder, on_bad_row="skip", on_missing="skip")
  for name in ("gone.mp4", "lost.mp4"):
    (folder / name).write_bytes(b"x")
  rows = experiment.read_questions(everything)
  tfds_lib.prepare({"train": rows}, folder / "tfds")
  whole = experiment.read_questions(config(folder, tfds="tfds"))
  assert list(whole) == rows
  (folder / "gone.mp4").unlink()
  with pytest.raises(errors.UserError, match="1 of 4 clips.*2 of 5 questions"):
    experiment.read_questions(config(folder, tfds="tfds"))
  skipping = config(folder, tfds="tfds", on_missing="skip")
  found = list(experiment.read_questions(skipping))
  assert found == [rows[0], rows[1], rows[4]]


def test_own_rows_can_be_skipped_as_well(folder):
  (folder / "questions.csv").write_text(
    "video,question,answer,split\na.mp4,Who?,me,train\ngone.mp4,Who?,me,train\n"
  )
  with pytest.raises(errors.UserError, match="1 of 2 clips are missing"):
    experiment.read_questions(config(folder, reader="own"))
  made = config(folder, reader="own", on_missing="skip")
  rows = experiment.read_questions(made)
  assert [row.video for row in rows] == ["a.mp4"]


def test_evidence_tokens_of_more_frames_are_one_line(folder):
  (folder / "decisive.jsonl").write_text(
    '{"question_id": "q0", "tokens": [3, 70]}\n'
  )
  made = tiny.config(
    **{"data.root": str(folder), "data.decisive_file": "decisive.jsonl"}
  )
  # Four frames of 16 tokens.
  with pytest.raises(errors.UserError, match="token 70, and a video of 4 fra"):
    tiny.train(folder / "w", made)
