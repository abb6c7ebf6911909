"""Our prompts and scores, against what lmms-eval 0.7.3 itself says of rows."""

import functools
import pathlib
import random

import lmms_eval
import pytest
from lmms_eval import utils as lmms_utils
from lmms_eval.tasks._task_utils import mcq_extract

from cacovid_jax.evals import benchmarks
from cacovid_jax.integrations.lmms_eval import export, functions
from tests.data import benchmark_files
from tests.evals import awkward_answers

_TASKS = pathlib.Path(lmms_eval.__file__).parent / "tasks"
_YAML = {
  "videomme": "videomme/videomme.yaml",
  "mlvu_dev": "mlvu/mlvu_dev.yaml",
  "longvideobench": "longvideobench/longvideobench_val_v.yaml",
  "egoschema": "egoschema/egoschema_subset.yaml",
  "nextqa": "nextqa/nextqa_mc_test.yaml",
}
_NAMES = (*_YAML, "mlvu_test", "mvbench")
_RULE = "lmms-0.7.3"


@functools.cache
def _config(path):
  return lmms_utils.load_yaml_config(yaml_path=str(path), mode="full")


def _task_file(name, question):
  """Returns the YAML file of the task of a question."""
  if name == "mlvu_test":
    # Its own asks the bare question and knows four of the six options.
    return export.TASKS / "mlvu_test_paper.yaml"
  if name == "mvbench":
    return _TASKS / "mvbench" / f"mvbench_{question.category}.yaml"
  return _TASKS / _YAML[name]


def _asked(name, folder):
  """Returns (our questions, rows, lmms-eval's tasks) of a benchmark."""
  fixture = benchmark_files.write(name, folder)
  questions = benchmarks.load(fixture.root, benchmark=name).questions
  rows = fixture.rows
  if name == "mvbench":
    # A file for each task, one row in each.
    by_task = {
      path.stem: row for path, row in zip(fixture.files, rows, strict=True)
    }
    rows = [by_task[question.category] for question in questions]
  assert len(questions) == len(rows) > 0
  configs = [_config(_task_file(name, question)) for question in questions]
  return questions, rows, configs


@pytest.mark.parametrize("name", _NAMES)
def test_prompts_are_lmms_evals_own_to_the_character(name, tmp_path):
  questions, rows, configs = _asked(name, tmp_path)
  for question, row, config in zip(questions, rows, configs, strict=True):
    kwargs = config.get("lmms_eval_specific_kwargs", {}).get("default")
    assert question.prompt == config["doc_to_text"](row, kwargs)


def test_the_papers_mlvu_test_asks_as_its_dev_does(tmp_path):
  questions, rows, _ = _asked("mlvu_test", tmp_path)
  for question, row in zip(questions, rows, strict=True):
    assert question.prompt == (
      row["question"] + "\nOnly give the best option.\nBest option: ("
    )


@pytest.mark.parametrize("name", _NAMES)
def test_answers_may_be_as_long_as_lmms_eval_lets_them(name, tmp_path):
  _, _, configs = _asked(name, tmp_path)
  allowed = {
    config.get("generation_kwargs", {}).get("max_new_tokens", 1024)
    for config in configs
  }
  assert allowed == {benchmarks.task(name).max_new_tokens}


def _right(name, config, row, text) -> bool:
  """Returns whether lmms-eval counts an answer as right."""
  if name == "mlvu_test":
    letters = list("ABCDEF")
    found = mcq_extract.extract_mcq_answer(text.strip(), choices=letters)
    return found == row["answer"]
  found = config["process_results"](row, [text.strip()])
  if name == "videomme":
    (said,) = found.values()
    return said["pred_answer"].upper() == said["answer"].upper()
  if name == "mlvu_dev":
    (said,) = found.values()
    return said["pred_answer"] == said["answer"]
  if name == "longvideobench":
    said = found["lvb_acc"]
    return said["parsed_pred"] == said["answer"]
  if name == "mvbench":
    (said,) = found.values()
    return bool(said["score"])
  if name == "egoschema":
    return str(found["score"]["pred"]) == str(found["score"]["ground_truth"])
  return bool(found["exact_match"])


@pytest.mark.parametrize("name", _NAMES)
def test_awkward_answers_are_scored_as_lmms_eval_scores_them(
  name, tmp_path, monkeypatch
):
  options = (*awkward_answers.OPTIONS, "a lamp")
  monkeypatch.setattr(
    benchmark_files, "options", lambda number, count: list(options[:count])
  )
  questions, rows, configs = _asked(name, tmp_path)
  drawn = []

  def choice(letters):
    drawn.append(letters)
    return letters[0]

  monkeypatch.setattr(random, "choice", choice)
  score = benchmarks.task(name).score
  guesses = 0
  for question, row, config in zip(questions, rows, configs, strict=True):
    for text in awkward_answers.ANSWERS:
      drawn.clear()
      expected = _right(name, config, row, text)
      found = score(question, text, rule=_RULE)
      told = f"{question.id}: {text!r} is {question.answer}? {found}"
      assert found.fallback == bool(drawn), told
      guesses += found.fallback
      if not found.fallback:
        assert bool(found.score) == expected, told
  draws = name in ("longvideobench", "egoschema", "nextqa")
  assert (guesses > 0) == draws


@pytest.mark.parametrize("name", _NAMES)
def test_the_number_of_a_benchmark_is_the_one_that_lmms_eval_prints(
  name, tmp_path
):
  questions, rows, configs = _asked(name, tmp_path)
  # Every second one is right; the rest say another letter that is an option.
  said = [
    question.answer if number % 2 else ("A" if question.answer != "A" else "B")
    for number, question in enumerate(questions)
  ]
  ours = [
    functions.process_results(functions.row(question, "a.mp4", name), [text])[
      "lmms_0_7_3"
    ]
    for question, text in zip(questions, said, strict=True)
  ]
  theirs = _aggregated(name, rows, configs, said)
  assert 0 < theirs < benchmarks.task(name).scale
  assert functions.aggregate(ours) == pytest.approx(theirs, abs=1e-5)


def _aggregated(name, rows, configs, said):
  """Returns lmms-eval's number."""
  found = [
    config["process_results"](row, [text])
    for row, config, text in zip(rows, configs, said, strict=True)
  ]
  if name == "mvbench":
    # lmms-eval prints twenty numbers; the table shows their mean.
    each = [
      config["metric_list"][0]["aggregation"]([one["mvbench_accuracy"]])
      for one, config in zip(found, configs, strict=True)
    ]
    return sum(each) / len(each)
  metric = configs[0]["metric_list"][0]
  values = [one[metric["metric"]] for one in found]
  if metric["aggregation"] == "mean":
    return sum(values) / len(values)
  if name == "mlvu_test":
    # Of the stock task, whose extractor is not asked here.
    aggregate = _config(_TASKS / "mlvu/mlvu_test.yaml")["metric_list"][0]
    return aggregate["aggregation"](
      [
        {
          "task_type": row["task_type"],
          "pred_answer": text,
          "answer": row["answer"],
        }
        for row, text in zip(rows, said, strict=True)
      ]
    )
  if name == "egoschema":
    return metric["aggregation"](values, None)
  return metric["aggregation"](values)
