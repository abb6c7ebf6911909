"""Work that is shared gives the table of one process, byte for byte."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from cacovid_jax import errors
from cacovid_jax.data import answer_log
from cacovid_jax.evals import evaluation, provenance, shards
from cacovid_jax.evals import evaluator as evaluator_lib
from tests.evals import tiny

CHOSEN = dict(
  methods=("random",), ratios=(0.25,), batch_size=2, max_new_tokens=3
)


pytestmark = pytest.mark.usefixtures("one_compilation")


def request_of(workdir, checkpoint_dir, data_dir, **changes):
  return tiny.experiment(
    workdir, data=data_dir, checkpoint=checkpoint_dir, **CHOSEN | changes
  )


def command(request, shard):
  """Returns the command line of one process."""
  return [
    sys.executable,
    "-m",
    "cacovid_jax.evaluate",
    f"--shard={shard}",
    f"--data={request.config.data.root}",
    f"--checkpoint={request.config.model.path}",
    f"--workdir={request.workdir}",
    f"--methods={','.join(request.config.evals.methods)}",
    "--oracles=",
    "--ratios=0.25",
    "--select_on=none",
    "--num_frames=4",
    "--batch_size=2",
    "--max_new_tokens=3",
    "--num_examples=0",
  ]


def test_a_stopped_shard_and_two_processes_equal_one(
  checkpoint_dir, data_dir, tmp_path, monkeypatch
):
  alone = request_of(tmp_path / "alone", checkpoint_dir, data_dir)
  out = evaluation.evaluate(alone)
  assert out["vanilla"]["n"] == 6  # Three batches of two.
  expected = (tmp_path / "alone" / "results.json").read_bytes()

  shared = tmp_path / "shared"
  request = request_of(shared, checkpoint_dir, data_dir, shard=(0, 2))
  add, batches = answer_log.AnswerLog.add, []

  def stop(self, records):
    if batches:
      raise KeyboardInterrupt
    batches.append(1)
    add(self, records)

  with monkeypatch.context() as patch:
    patch.setattr(answer_log.AnswerLog, "add", stop)
    with pytest.raises(KeyboardInterrupt):
      evaluation.evaluate(request)
  # The second of its two batches was being written.
  path = shared / "answers-0-of-2.jsonl"
  lines = path.read_bytes().splitlines(keepends=True)
  assert len(lines) == 1 + 2 * 2
  path.write_bytes(b"".join(lines) + lines[-1][:30])

  # This process goes on while another one works.
  with subprocess.Popen(
    command(request, "1/2"),
    env=os.environ | {"JAX_PLATFORMS": "cpu"},
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  ) as other:
    evaluation.evaluate(request)
    said = other.communicate()[0]
  assert other.returncode == 0, said
  assert (shared / "results.json").read_bytes() == expected
  # Nothing is asked twice, and no process has asked everything.
  files = [shared / f"answers-{i}-of-2.jsonl" for i in (0, 1)]
  asked = [
    [
      (line["question"], line["method"])
      for line in map(json.loads, file.read_text().splitlines()[1:])
    ]
    for file in files
  ]
  assert [len(keys) for keys in asked] == [2 * 2 * 2, 2 * 2]
  assert not set(asked[0]) & set(asked[1])
  assert path.read_bytes().startswith(b"".join(lines))
  timings = json.loads((shared / "timings-1-of-2.json").read_text())
  assert timings["grids"] == 1 and timings["programs"] >= 4


def test_a_clip_that_comes_later_is_asked_about(
  checkpoint_dir, data_dir, tmp_path
):
  """By one process or by several, as if it had been there from the start."""
  data = tmp_path / "data"
  shutil.copytree(data_dir, data)
  clip = data / "videos" / "test1.mp4"

  def run(name, shard=(0, 1)):
    out = evaluation.evaluate(
      request_of(
        tmp_path / name,
        checkpoint_dir,
        str(data),
        on_missing="count",
        shard=shard,
      )
    )
    return out and (tmp_path / name / "results.json").read_bytes()

  expected = run("whole")
  clip.rename(tmp_path / "later.mp4")
  lacking = run("alone")
  assert lacking != expected
  (entry,) = json.loads(lacking)["unreadable"]
  assert entry == {
    "video": "data/test1.mp4",  # The first place to look for it.
    "reason": "missing",
    "questions": 2,
  }
  # Still not there: nothing is asked, nothing is written.
  before = (tmp_path / "alone" / "answers.jsonl").read_bytes()
  assert run("alone") == lacking
  assert (tmp_path / "alone" / "answers.jsonl").read_bytes() == before
  shutil.copytree(tmp_path / "alone", tmp_path / "shared")
  (tmp_path / "later.mp4").rename(clip)
  assert run("alone") == expected
  after = (tmp_path / "alone" / "answers.jsonl").read_bytes()
  # Vanilla and one row about two questions, behind what was known.
  assert after.startswith(before)
  assert len(after.splitlines()) == len(before.splitlines()) + 2 * 2
  assert run("shared", (1, 2)) is None
  assert run("shared", (0, 2)) == expected
  # A finished process whose answers are lost is named, whatever is left.
  for path in (tmp_path / "shared").glob("answers*.jsonl"):
    if path.name != "answers-1-of-2.jsonl":
      path.write_bytes(b"")
  with pytest.raises(errors.UserError, match="ledger was cut") as caught:
    run("shared", (1, 2))
  assert "--shard=0/2 to 1/2" in str(caught.value)
  assert "\n" not in str(caught.value)
  assert run("shared", (0, 2)) == expected


def test_a_table_of_two_machines_names_both(
  checkpoint_dir, data_dir, tmp_path, monkeypatch
):
  def run(shard):
    return evaluation.evaluate(
      request_of(tmp_path, checkpoint_dir, data_dir, shard=shard)
    )

  here = provenance.environment()
  assert run((0, 2)) is None
  there = {**here, "device": "gpu X", "packages": {"jax": "0"}}
  monkeypatch.setattr(provenance, "environment", lambda: there)
  found = run((1, 2))["provenance"]
  assert found["environments"] == [here, there]
  assert found["device"] == "cpu, gpu X"
  assert found["packages"]["jax"] == ", ".join(
    sorted(["0", here["packages"]["jax"]])
  )
  assert found["git_commit"] == here["git_commit"]


def test_shards_of_a_table_say_when_work_is_left(
  checkpoint_dir, data_dir, tmp_path, monkeypatch, capsys
):
  """Without a model: what is asked, noted, and put together."""
  request = request_of(tmp_path, checkpoint_dir, data_dir)
  shown = []

  def run(self, questions, cells, answers, *, description, shard):
    failures = {}
    shown.append(description)
    for number, batch in list(enumerate(self.engine.batches(questions)))[
      shard[0] :: 3
    ]:
      for cell in cells:
        if cell.method is not None and number > 0:
          # A mistake that the later two batches show, in their own words.
          failures[cell.place] = evaluator_lib.Failure(
            f"in {number}", 0.5, number
          )
          continue
        for question in batch:
          fields = {"score": 1.0, "kept": 64, "letter": "A"}
          if cell.key(question.id) not in answers:
            answers.add([(cell.key(question.id), fields)])
    return failures

  monkeypatch.setattr(evaluator_lib.Evaluator, "run", run)

  def shard(index):
    return evaluation.evaluate(
      evaluation.dataclasses.replace(request, shard=(index, 3))
    )

  assert shard(2) is None
  assert shard(0) is None
  assert capsys.readouterr().err.splitlines() == [
    f"test answers {i}/3: done, left to {rest}; the last one writes the table"
    for i, rest in ((2, "0/3, 1/3"), (0, "1/3"))
  ]
  assert not (tmp_path / "results.json").exists()
  out = shard(1)
  assert shown == [f"test answers {i}/3" for i in (2, 0, 1)]
  assert out["vanilla"]["accuracy"] == 1.0
  # The reason is the first batch's, as one process alone would have it.
  cell = out["methods"]["random"]["0.25"]
  assert cell == {"status": "in 1", "minimum_ratio": 0.5}
  assert json.loads((tmp_path / "results.json").read_text()) == out
  # Other work: what was noted before does not count.
  request = request.replace({"evals.ratios": (0.5,)})
  assert shard(0) is None
  note = tmp_path / "answers-1-of-3.done.json"
  note.write_text('{"work": ')
  with pytest.raises(errors.UserError, match="--shard=1/3 again") as error:
    shard(0)
  assert str(note) in str(error.value)


def test_files_of_a_shard(tmp_path):
  assert shards.Shard().file("answers.jsonl") == "answers.jsonl"
  mine = shards.Shard(1, 4)
  assert mine.file("answers.jsonl") == "answers-1-of-4.jsonl"
  assert mine.file("answers.done.json") == "answers-1-of-4.done.json"
  names = [
    "answers.jsonl",
    "answers-1-of-4.jsonl",
    "answers-10-of-16.jsonl",
    "answers-1-of-4.done.json",
    "validation_answers-1-of-4.jsonl",
    "answers-old.jsonl",
  ]
  for name in names:
    (tmp_path / name).touch()
  found = [path.name for path in shards.ledgers(tmp_path, names[0])]
  assert found == sorted(names[:3])
  found = shards.ledgers(tmp_path, "validation_answers.jsonl")
  assert [path.name for path in found] == names[4:5]


@pytest.mark.parametrize(
  "text,match",
  [
    ("2/2", "give 0/2 to 1/2"),
    ("-1/2", "give I/N"),
    ("1", "give I/N"),
    ("0/0", "no process"),
    ("a/b", "give I/N"),
  ],
)
def test_shards_that_do_not_exist(text, match):
  with pytest.raises(errors.UserError, match=match):
    shards.Shard.parse(text)
  assert shards.Shard.parse(" 3/4") == (3, 4)


def test_a_request_checks_its_shard(checkpoint_dir, data_dir, tmp_path):
  with pytest.raises(errors.UserError, match="give 0/2 to 1/2"):
    evaluation.evaluate(
      request_of(tmp_path, checkpoint_dir, data_dir, shard=(2, 2))
    )
  assert tiny.FRAMES == 4
