"""The plug-in under lmms-eval answers what our own evaluator answers."""

import json
import os
import subprocess
import sys

import pytest

from cacovid_jax import errors
from cacovid_jax.evals import benchmarks
from tests.integrations.lmms import conftest

_TASK = "cacovid_prepared"


@pytest.fixture(scope="module")
def ids(data_dir):
  return [q.id for q in benchmarks.load(data_dir, "test").questions]


@pytest.mark.parametrize(
  "spec, arguments, chat",
  [
    ("vanilla", {"ratio": 1.0}, False),
    ("vanilla", {"ratio": 1.0}, True),
    ("cacovid", {"ratio": 0.1}, False),
    ("cacovid", {"ratio": 0.1}, True),
    ("divprune", {"method": "divprune", "topk": 0.1}, False),
    ("random", {"method": "random", "ratio": 0.1}, True),
  ],
)
def test_every_answer_and_the_score_are_those_of_our_evaluator(
  spec, arguments, chat, evaluated, ids, task_dir
):
  out, expected = evaluated
  found = conftest.run(_TASK, task_dir, chat=chat, **arguments)
  said = conftest.answers(found, _TASK)
  assert [said[row] for row in range(len(ids))] == [
    expected[spec, name] for name in ids
  ]
  cell = out["vanilla"] if spec == "vanilla" else out["methods"][spec]["0.10"]
  score = found["results"][_TASK]["paper,none"]
  assert score == pytest.approx(cell["accuracy"])
  counts = found["samples"][_TASK][0]["token_counts"][0]
  assert counts["input_tokens"] > cell["kept_tokens"]
  assert counts["output_tokens"] >= 1


def test_the_shipped_model_answers_well_enough_for_these_to_mean_something(
  evaluated, ids
):
  out, expected = evaluated
  assert out["vanilla"]["accuracy"] >= 0.5
  assert len({expected["vanilla", name] for name in ids}) > 1


@pytest.mark.parametrize(
  "form", [["--force_simple"], []], ids=["simple", "chat"]
)
def test_the_command_line_finds_the_model_by_its_entry_point(
  form, evaluated, ids, task_dir, tmp_path
):
  out, expected = evaluated
  command = [
    sys.executable, "-m", "lmms_eval", "--model", "cacovid_jax", *form,
    "--model_args", "pretrained=,ratio=0.1,method=cacovid",
    "--tasks", _TASK, "--include_path", str(task_dir),
    "--batch_size", str(conftest.BATCH_SIZE),
    "--output_path", str(tmp_path), "--log_samples",
    "--process_docs_parallel", "1",
  ]  # fmt: skip
  done = subprocess.run(
    command, env=os.environ, capture_output=True, text=True, check=False
  )
  assert done.returncode == 0, done.stderr[-2000:]
  (results,) = tmp_path.glob("*_results.json")
  found = json.loads(results.read_text())["results"][_TASK]
  accuracy = out["methods"]["cacovid"]["0.10"]["accuracy"]
  assert found["paper,none"] == pytest.approx(accuracy)
  (samples,) = tmp_path.glob("*_samples_*.jsonl")
  rows = [json.loads(line) for line in samples.read_text().splitlines()]
  said = {row["doc_id"]: row["filtered_resps"][0] for row in rows}
  assert [said[row] for row in range(len(ids))] == [
    expected["cacovid", name] for name in ids
  ]


def test_a_mistake_in_the_arguments_is_told_in_one_line(task_dir):
  with pytest.raises(errors.UserError, match="unknown model argument 'topK'"):
    conftest.run(_TASK, task_dir, topK=0.1)
