"""Benchmarks on disk as tasks of lmms-eval: rows, functions and YAML files."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

import cacovid_jax
from cacovid_jax import errors
from cacovid_jax.evals import benchmarks
from cacovid_jax.integrations.lmms_eval import export, functions
from tests.data import benchmark_files


def test_a_row_is_a_question_and_the_way_to_its_clip(tmp_path):
  root = benchmark_files.write("nextqa", tmp_path / "nextqa").root
  path = export.write(root, tmp_path / "tasks", benchmark="nextqa")
  lines = path.with_suffix(".jsonl").read_text().splitlines()
  questions = benchmarks.load(root, benchmark="nextqa").questions
  assert len(lines) == len(questions)
  first = json.loads(lines[0])
  assert os.path.isfile(first["video"]) and os.path.isabs(first["video"])
  assert functions.doc_to_visual(first) == [first["video"]]
  assert functions.doc_to_text(first) == (
    "why did the boy take cup 0\nA. red\nB. green\nC. blue\nD. grey\nE. pink"
  )
  assert (first["question_id"], first["answer"]) == (questions[0].id, "A")


def test_the_task_names_its_rows_functions_and_longest_answer(tmp_path):
  root = benchmark_files.write("longvideobench", tmp_path / "lvb").root
  path = export.write(root, tmp_path, benchmark="longvideobench")
  assert path == tmp_path / "cacovid_longvideobench.yaml"
  text = path.read_text()
  assert f'test: "{tmp_path}/cacovid_longvideobench.jsonl"\n' in text
  assert "\ntask: cacovid_longvideobench\n" in f"\n{text}"
  assert "\n  max_new_tokens: 32\n" in text


@pytest.mark.parametrize(
  "path", [*export.TASKS.glob("*.yaml"), None], ids=lambda path: str(path)[-30:]
)
def test_every_function_that_a_task_names_is_there(path, tmp_path):
  if path is None:
    root = benchmark_files.write("videomme", tmp_path / "data").root
    path = export.write(root, tmp_path, benchmark="videomme")
  names = [
    line.rpartition("!function ")[2].rpartition(".")
    for line in path.read_text().splitlines()
    if "!function cacovid_jax" in line
  ]
  assert len(names) >= 3
  for module, _, name in names:
    assert module == functions.__name__
    assert callable(getattr(functions, name))


def test_both_rules_score_one_answer():
  row = {
    "video_name": "a.mp4",
    "question": "What?\n(A) x\n(B) y",
    "candidates": ["x", "y", "z", "u", "v", "w"],
    "answer": "F",
    "task_type": "ego",
  }
  found = functions.process_mlvu_test(row, ["F. w"])
  assert sorted(found) == ["lmms_0_7_3", "paper"]
  # By the paper's rule only what stands before ")" counts.
  assert (found["paper"]["score"], found["paper"]["letter"]) == (0.0, "")
  lmms = found["lmms_0_7_3"]
  assert (lmms["score"], lmms["letter"]) == (1.0, "F")
  assert (lmms["video"], lmms["category"]) == ("a.mp4", "ego")


def _scored(benchmark, pairs):
  return [
    {"benchmark": benchmark, "category": category, "score": score}
    for category, score in pairs
  ]


def test_the_number_is_the_benchmarks_own():
  # Mean over the questions, in per cent.
  pairs = [("a", 1.0), ("a", 0.0), ("b", 1.0), ("b", 1.0)]
  assert functions.aggregate(_scored("videomme", pairs)) == 75.0
  # Fraction.
  assert functions.aggregate(_scored("nextqa", pairs)) == 0.75
  # Mean over seven types, five of which nobody asked about.
  pairs = [("ego", 1.0), ("ego", 0.0), ("count", 1.0)]
  assert functions.aggregate(_scored("mlvu_dev", pairs)) == pytest.approx(
    100 * 1.5 / 7
  )
  # Mean over the tasks that are there.
  pairs = [("moving_count", 1.0), ("moving_count", 0.0), ("state_change", 1.0)]
  assert functions.aggregate(_scored("mvbench", pairs)) == 75.0


def test_mistakes_are_told(tmp_path):
  with pytest.raises(errors.UserError, match="no benchmark 'mlvu'; there are"):
    export.write(tmp_path, tmp_path, benchmark="mlvu")
  with pytest.raises(errors.UserError, match="there is no data in"):
    export.write(tmp_path / "none", tmp_path, benchmark="mlvu_test")


def test_the_command_prints_where_the_packages_tasks_are():
  done = subprocess.run(
    [sys.executable, "-m", "cacovid_jax.integrations.lmms_eval.export"],
    cwd=pathlib.Path(cacovid_jax.__file__).parent.parent,
    capture_output=True,
    text=True,
    check=True,
  )
  folder = pathlib.Path(done.stdout.strip())
  assert (folder / "mlvu_test_paper.yaml").is_file()
