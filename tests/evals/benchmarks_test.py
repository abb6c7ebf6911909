"""Released folders of benchmarks, read as an evaluation reads them."""

import pathlib
import re
import types

import pytest

from cacovid_jax import base_config, errors
from cacovid_jax import config as config_lib
from cacovid_jax.evals import benchmarks, evaluation
from tests.data import benchmark_files

CASES = [
  (name, layout)
  for name, layouts in benchmark_files.LAYOUTS.items()
  for layout in layouts
]


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def written(request, tmp_path_factory):
  name, layout = request.param
  return benchmark_files.write(name, tmp_path_factory.mktemp(name), layout)


def test_every_row_and_clip_of_a_folder_is_found(written):
  found = benchmarks.load(written.root, benchmark=written.name)
  assert (found.name, found.split) == (written.name, written.split)
  assert found.task is benchmarks.task(written.name)
  assert len(found.questions) == written.num_questions
  assert {question.video for question in found.questions} == set(written.clips)
  assert len({question.id for question in found.questions}) == len(
    found.questions
  )
  left_out = written.num_left_out
  assert found.report.num_rows == written.num_questions + left_out
  assert sum(found.report.left_out.values()) == left_out
  assert not found.report.bad_rows and not found.report.missing
  if found.task.macro:
    kinds = {question.category for question in found.questions}
    assert kinds == set(found.task.macro)
  if found.task.duration_groups:
    groups = {question.duration for question in found.questions}
    assert groups == set(found.task.duration_groups)


def test_a_right_answer_counts_under_both_rules(written):
  found = benchmarks.load(written.root, benchmark=written.name)
  for question in found.questions:
    for rule in ("paper", "lmms-0.7.3"):
      scored = found.task.score(question, question.answer, rule=rule)
      assert scored == (1.0, question.answer, False, "")


def test_the_rules_that_a_config_leaves_to_the_benchmark():
  config = base_config.get_config()

  def settings(**changes):
    changed = config_lib.replace(config, changes)
    return evaluation.settings(types.SimpleNamespace(config=changed))

  for name in benchmarks.names():
    found = settings(**{"evals.benchmark": name})
    assert found.rule == ("own" if name == "own" else "paper")
    assert found.rouge == "unicode"
  found = settings(**{"evals.benchmark": "own", "evals.rule": "paper"})
  assert found.rule == "paper"
  assert settings(rouge="public").rouge == "public"
  with pytest.raises(errors.UserError, match="rule is 'x'; .* one of paper"):
    settings(**{"evals.rule": "x"})
  with pytest.raises(errors.UserError, match="rouge is 'x'; it must be one"):
    settings(rouge="x")


def test_prompts_in_the_style_of_training(written):
  found = benchmarks.load(
    written.root, benchmark=written.name, style="video-r1"
  )
  question = found.questions[0]
  lines = question.prompt.split("\n")
  assert lines[0] == question.question
  assert lines[1] == f"A. {question.options[0]}"
  assert lines[-1].startswith(" Please provide only the single option letter")
  with pytest.raises(errors.UserError, match="'video-r1', or ''"):
    benchmarks.load(written.root, benchmark=written.name, style="plain")


def test_folders_splits_and_names_that_do_not_exist(tmp_path):
  for name in benchmarks.names():
    if name != benchmarks.PREPARED:
      with pytest.raises(errors.UserError, match="holds none of"):
        benchmarks.load(tmp_path, benchmark=name)
  with pytest.raises(
    errors.UserError, match="no videomme split 'train'; there"
  ):
    benchmarks.load(tmp_path, "train", benchmark="videomme")
  with pytest.raises(errors.UserError, match="no benchmark 'imagenet'"):
    benchmarks.load(tmp_path, benchmark="imagenet")
  with pytest.raises(errors.UserError, match="holds mlvu_dev as --data"):
    benchmarks.load(tmp_path / "absent", benchmark="mlvu_dev")


def test_the_guide_says_what_is_read_and_counted():
  folder = pathlib.Path(__file__).parents[2] / "docs"
  lines = (folder / "benchmarks.md").read_text(encoding="utf-8").splitlines()
  rows = [line.split("|")[1:-1] for line in lines if line.startswith("| `")]
  assert rows[0][0].strip() == "`--benchmark`"
  names = []
  for name, split, files, _, number in rows[1:]:
    names.append(name.strip(" `"))
    task = benchmarks.task(names[-1])
    assert split.strip() == task.default_split
    assert re.findall("`(.*?)`", files) == list(task.splits[task.default_split])
    metric, kind = re.fullmatch(" `(.*)`, (.*) ", number).groups()
    wanted = "%" if task.scale == 100 else "fraction"
    count = (
      f" as mean of {len(task.macro)} tasks"
      if task.macro
      else (" of questions")
    )
    assert (metric, kind) == (task.metric, wanted + count)
  assert set(names) == set(benchmark_files.LAYOUTS)
