"""Meshes side by side, in one process of eight CPU devices."""

import json
import re
from types import SimpleNamespace

import pytest

from cacovid_jax import errors
from experiments import directory_run, made_up_questions, mesh_table
from tests.experiments import commands

_FLAGS = {
  "size": "tiny-ov",
  "meshes": "1x1,2x2,1x3",
  "questions": 6,
  "repeats": 1,
  "videos": 2,
}
_SET = ["data.num_frames=4", "iterations=1", "sampling.num_combinations=4"]


@pytest.fixture
def called(monkeypatch):
  """Runs commands in this process; returns the meshes that were asked for."""
  monkeypatch.setattr(
    made_up_questions, "CLIPS", {"train": (2, 3), "validation": (), "test": ()}
  )
  seen, folders = [], []

  def run(stage, module, words):
    assert module == mesh_table.__name__
    seen.append(stage)
    log, code = folders[-1] / f"{stage}.log", 0
    try:
      code = mesh_table.main(mesh_table.COMMAND.parse([module, *words]))
    except errors.UserError as error:
      log.write_text(f"some output\nerror: {error}\n")
      code = 2
    return SimpleNamespace(code=code)

  def runner(workdir):
    folders.append(workdir)
    return run

  monkeypatch.setattr(directory_run, "Runner", runner)
  return seen


def test_meshes_keep_and_say_the_same(called, tmp_path, capsys, monkeypatch):
  flags = _FLAGS | {"workdir": tmp_path}
  args = commands.parse(mesh_table, **flags)
  args.set = _SET
  assert mesh_table.main(args) == 1
  assert called == ["1x1", "2x2", "1x3"]
  told = "1x3 went wrong: error: .*model=3 does not divide the base model's"
  assert re.search(told, capsys.readouterr()[0])
  out = json.loads((tmp_path / "results.json").read_text())
  one, four = out["meshes"].values()
  assert one["kept"] == four["kept"] and one["text"] == four["text"]
  # A quarter of 4 x 4 x 4 tokens, of two clips.
  assert {len(kept) for kept in one["kept"]} == {16}
  assert one["kept"][0] != one["kept"][1]
  assert len(one["rewards"]) == 2 * 4 and min(one["training_ms"], 1) > 0
  text = (tmp_path / "table.md").read_text()
  lines = text.splitlines()[2:]
  assert [line.split(" | ")[0] for line in lines] == ["| 1x1", "| 2x2"]
  for line in lines:
    assert line.count("100.00%") == 3
  # What is known is not measured again.
  measured = []
  monkeypatch.setattr(
    mesh_table, "measure", lambda args, workdir: measured.append(args.only)
  )
  monkeypatch.setattr(args, "meshes", ("1x1", "2x2"))
  assert mesh_table.main(args) == 0
  assert not measured and (tmp_path / "table.md").read_text() == text
  args.repeats, args.workdir = 2, str(tmp_path)
  assert mesh_table.main(args) == 1
  assert capsys.readouterr()[0].count("differs in repeats") == 2


def test_shares_by_hand():
  first = {
    "kept": [[0, 1], [2, 3]], "text": ["A", "b c"], "letter": ["A", ""],
    "rewards": [1.0, -2.0], "training_ms": 3.0, "evaluation_ms": 4.0,
    "training_gib": 2.5, "evaluation_gib": 0.0,
  }  # fmt: skip
  other = first | {
    "kept": [[0, 5], [3, 2]], "text": ["A", "b"], "rewards": [1.0, -1.5]
  }  # fmt: skip
  lines = mesh_table.markdown({"1x1": first, "4x1": other}).splitlines()
  assert lines[-1] == (
    "| 4x1 | 3 | 4 |  | 2.5 | 75.00% | 50.00% | 100.00% | 0.5 |"
  )


def test_mistakes_are_one_line(tmp_path):
  with pytest.raises(errors.UserError, match="which workdir"):
    commands.run(mesh_table)
  with pytest.raises(errors.UserError, match="--meshes=4: write DATAxMODEL"):
    commands.run(mesh_table, workdir=tmp_path / "none", meshes="1x1,4")
  with pytest.raises(errors.UserError, match="--only=8x1: give one of --mesh"):
    commands.run(mesh_table, workdir=tmp_path / "none", only="8x1")
  with pytest.raises(errors.UserError, match="--size=8b: choose .*qvl-7b"):
    commands.parse(mesh_table, size="8b")
  assert not list(tmp_path.iterdir())
