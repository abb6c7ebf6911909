"""Every benchmark from its released folder to results.json."""

import json

import pytest

from cacovid_jax import errors, evaluate
from cacovid_jax.evals import benchmarks, evaluation, prompting
from tests.data import benchmark_files

NAMES = tuple(benchmark_files.LAYOUTS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  root = tmp_path_factory.mktemp("benchmarks")
  found = {}

  def make(name):
    if name not in found:
      found[name] = benchmark_files.write(name, root / name)
    return found[name]

  return make


@pytest.fixture(autouse=True)
def one_length(monkeypatch):
  """Pads all prompts to one length, so that the runs share their programs."""
  monkeypatch.setattr(prompting, "_LENGTH_STEP", 256)


@pytest.fixture(scope="module")
def request_of(checkpoint_dir, folder):
  def make(name, workdir, **changes):
    fields = dict(
      data=folder(name).data_dir,
      benchmark=name,
      workdir=str(workdir),
      checkpoint=checkpoint_dir,
      methods=("uniform",),
      ratios=(0.25,),
      num_frames=4,
      batch_size=4,
      max_new_tokens=2,
      num_examples=0,
    )
    return evaluation.Request(**fields | changes)

  return make


@pytest.mark.parametrize("name", NAMES)
def test_a_benchmark_is_evaluated(name, request_of, folder, tmp_path):
  out = evaluation.evaluate(request_of(name, tmp_path))
  fixture, task = folder(name), benchmarks.task(name)
  assert json.loads((tmp_path / "results.json").read_text()) == out
  assert (out["benchmark"], out["split"]) == (name, fixture.split)
  assert (out["metric"], out["scale"]) == (task.metric, task.scale)
  assert out["macro"] == list(task.macro)
  assert (out["rule"], out["left_out"], out["unreadable"]) == ("paper", {}, [])
  assert out["num_clips"] == len(fixture.clips)
  # What the answers say is scored as the task scores it, question by question.
  questions = {
    question.id: question
    for question in benchmarks.load(fixture.root, benchmark=name).questions
  }
  lines = (tmp_path / "answers.jsonl").read_text().splitlines()[1:]
  records = [json.loads(line) for line in lines]
  assert len(records) == 2 * fixture.num_questions
  for record in records:
    question = questions[record["question"]]
    scored = task.score(question, record["text"])
    assert (record["score"], record["letter"]) == scored[:2]
    assert record.get("fallback", False) == scored.fallback
  for spec, cell in [
    ("vanilla", out["vanilla"]),
    ("uniform", out["methods"]["uniform"]["0.25"]),
  ]:
    mine = [record for record in records if record["method"] == spec]
    assert cell["n"] == len(mine) == fixture.num_questions
    guesses = sum(record.get("fallback", False) for record in mine)
    assert cell.get("num_fallbacks", 0) == guesses
    groups = {}
    for record in mine:
      category = questions[record["question"]].category
      groups.setdefault(category, []).append(record["score"])
    means = [sum(scores) / len(scores) for scores in groups.values()]
    if task.macro:
      wanted = sum(means) / len(task.macro)
    else:
      wanted = sum(record["score"] for record in mine) / len(mine)
    assert cell["accuracy"] == pytest.approx(wanted, abs=1e-6)
    assert set(cell["by_category"]) == set(groups) - {None}
    assert set(cell["by_duration"]) == set(task.duration_groups)
