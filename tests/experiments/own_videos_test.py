"""The guide's two commands, word for word, on clips that are made here."""

import json
import os
import pathlib
import re
import shlex
import subprocess
import sys

import pytest

import tests
from cacovid_jax import config as config_lib
from cacovid_jax import errors, experiment
from tests.evals import tiny
from tests.experiments import quickstart_test

ROOT = pathlib.Path(__file__).parent.parent.parent
CONFIG = ROOT / "configs" / "own_videos.py"
GUIDE = ROOT / "docs" / "own_videos.md"
CLIPS = ("kitchen/0001.mp4", "kitchen/0002.mp4", "kitchen/0003.mp4")


def commands():
  """Returns the guide's commands as lists of words."""
  blocks = re.findall(r"```bash\n(.*?)```", GUIDE.read_text("utf-8"), re.S)
  return [shlex.split(block.replace("\\\n", " ")) for block in blocks]


def table():
  """Returns the guide's table, its clips on given sides, and one row more."""
  text = re.search(r"```csv\n(.*?)```", GUIDE.read_text("utf-8"), re.S)[1]
  header, *rows = text.splitlines()
  sides = ["train", "train", "test"]
  rows.append("kitchen/0003.mp4,Which is last?,oil|butter,oil,order")
  return "\n".join(
    [f"{header},split"]
    + [
      f"{row},{side}" for row, side in zip(rows, [*sides, "test"], strict=True)
    ]
  )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Returns a folder with the videos and a small model."""
  folder = tmp_path_factory.mktemp("own")
  quickstart_test.write_base_model(folder / "base_model")
  for number, name in enumerate(CLIPS):
    tiny.write_clip(folder / "my_videos" / name, seed=number)
  (folder / "my_videos" / "questions.csv").write_text(table())
  return folder


def run(folder, words, *flags):
  """Runs a command of the guide in the folder, on the small model."""
  words = [
    word.replace("configs/own_videos.py:", f"{CONFIG}:debug,") for word in words
  ]
  assert words[:2] == ["python", "-m"]
  return subprocess.run(
    [
      sys.executable,
      *words[1:],
      f"--config.model.path={folder / 'base_model'}",
      "--config.policy.init=",
      "--config.policy.num_halvings=1",
      "--config.rollout.max_new_tokens=2",
      *flags,
    ],
    cwd=folder,
    env=os.environ
    | {
      "PYTHONPATH": str(ROOT),
      "JAX_PLATFORMS": "cpu",
      "XLA_FLAGS": tests.xla_flags(),
    },
    capture_output=True,
    text=True,
    check=False,
  )


def test_the_guides_commands_train_and_evaluate(folder):
  train, with_model, evaluate = commands()
  assert "model=LLAVA_ONEVISION_7B" in with_model[4]
  done = run(folder, train)
  assert done.returncode == 0, done.stderr
  workdir = folder / "workdirs" / "own"
  assert (workdir / "policy" / "policy.safetensors").exists()
  assert len((workdir / "metrics.jsonl").read_text().splitlines()) == 2
  done = run(folder, evaluate, "--methods=cacovid", "--num_examples=0")
  assert done.returncode == 0, done.stderr
  found = json.loads((workdir / "results.json").read_text())
  assert (found["benchmark"], found["split"]) == ("own", "test")
  # The free-form row of the guide and the one that was added.
  assert found["vanilla"]["n"] == 2 and found["num_clips"] == 2
  assert (found["rule"], found["rouge"]) == ("own", "unicode")
  assert set(found["vanilla"]["by_category"]) == {"order", "text"}
  assert found["methods"]["cacovid"]["0.10"]["status"] == "ok"
  assert (workdir / "report.html").exists()
  # Features were kept where the guide says: one entry per clip of a split.
  assert list((folder / "workdirs" / "own_features").rglob("*.features"))


def test_missing_clips_are_counted_before_training_starts(tmp_path):
  (tmp_path / "questions.csv").write_text(table())
  config = config_lib.load(f"{CONFIG}:data={tmp_path}")
  with pytest.raises(errors.UserError) as error:
    experiment.read_questions(config)
  assert "1 of 1 clips are missing (2 of 2 questions)" in str(error.value)
  assert CLIPS[0] in str(error.value)


def test_a_reader_that_there_is_not(tmp_path):
  with pytest.raises(errors.UserError, match="must be one of video-r1, own"):
    config_lib.load(f"{CONFIG}:data={tmp_path}", ["data.reader=video-r2"])
