"""Evaluations of one policy at several ratios, and of each question's size."""

import json

import jax
import numpy as np
import pytest

from cacovid_jax import compressors
from cacovid_jax.evals import benchmarks, evaluation
from cacovid_jax.inference import methods as methods_lib
from cacovid_jax.policy import loading, network
from tests.evals import tiny

SIZED = "cacovid?size=question"


@pytest.fixture(scope="module")
def policy_path(checkpoint, tmp_path_factory):
  """A policy that reads the ratio, trained at 10 to 25 %."""
  path = tmp_path_factory.mktemp("run") / "policy.safetensors"
  options = {"num_halvings": 2, "budget_embedding": 3}
  llm = checkpoint.model.config.text
  policy, _ = loading.make_policy(llm, options)
  params = policy.init_from_llm(jax.random.key(1), checkpoint.params)
  shape = params["budget"]["kernel"].shape
  kernel = np.random.default_rng(0).normal(size=shape).astype(np.float32)
  params |= {"budget": {"kernel": kernel}}
  described = {"policy": options, "ratios": [0.1, 0.25]}
  loading.export(path, policy, params, described)
  return path


@pytest.fixture(scope="module")
def experiment(checkpoint_dir, data_dir, policy_path, tmp_path_factory):
  return tiny.experiment(
    tmp_path_factory.mktemp("work"),
    data=data_dir,
    checkpoint=checkpoint_dir,
    policies={"policy": policy_path},
    methods=("cacovid", f"sized={SIZED}"),
    ratios=(0.25, 0.1),
    batch_size=2,
    max_new_tokens=2,
    select_on="validation",
  )


@pytest.fixture(scope="module")
def found(experiment):
  with tiny.shared_programs():
    yield evaluation.evaluate(experiment)


@pytest.fixture
def engine(experiment, checkpoint, data_dir):
  questions = benchmarks.load(data_dir, "validation").questions
  given = checkpoint, data_dir, questions, (2, 2)
  return tiny.engine_of(*given, policies=experiment.policies)


def test_thresholds_are_chosen_on_validation(experiment, found):
  record = found["calibrated"]["sized"]
  assert (record["split"], record["n"]) == ("validation", 6)
  assert list(record["thresholds"]) == ["0.25", "0.10"]
  cells = found["methods"]["sized"]
  method = methods_lib.Method.parse(record["spec"])
  for ratio in (0.25, 0.1):
    sizes = method.compressor.row_sizes(tiny.GRID, ratio)
    cell = cells[f"{ratio:.2f}"]
    assert cell["status"] == "ok"
    most = cell.get("kept_tokens_p95", cell["kept_tokens"])
    assert sizes[0] <= cell["kept_tokens"] <= most <= sizes[-1]
    threshold = record["thresholds"][f"{ratio:.2f}"]
    assert [ratio, threshold] in map(list, cell["options"]["threshold"])
  lines = (experiment.workdir / "answers.jsonl").read_text().splitlines()
  kept = [
    answer["kept"]
    for answer in map(json.loads, lines[1:])
    if answer.get("method") == record["spec"] and answer["ratio"] == 0.25
  ]
  assert len(kept) == 6 and cells["0.25"]["kept_tokens"] == np.mean(kept)


def test_the_mean_on_validation_is_at_most_the_asked_share(found, engine):
  method = methods_lib.Method.parse(found["calibrated"]["sized"]["spec"])
  for ratio in (0.25, 0.1):
    condition = methods_lib.Condition(method, ratio)
    kept = engine.kept(engine.questions, [condition]).values()
    mean = np.mean([len(row.index) for (row,) in kept]) / tiny.NUM_VIDEO
    assert ratio / 4 < mean <= ratio


def test_scores_are_of_each_ratio_and_of_one_program(engine, caplog):
  batch = engine.batch(engine.questions[:2])
  method = methods_lib.Method.parse("cacovid")
  policy = engine.policies["policy"]

  @jax.jit
  def alone(params, prompt, ratio):
    return network.score(policy.module, params, prompt, batch.grid, ratio)

  for ratio in (0.25, 0.1, 0.25):
    condition = methods_lib.Condition(method, ratio)
    prompt = jax.tree.map(lambda leaf: leaf[1], batch.batch)
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a[1], b, rtol=1e-4, atol=1e-5),
      batch.inputs(condition).scores,
      alone(policy.params, prompt, ratio),
    )
    engine.check(condition, tiny.GRID)
  assert len(batch._scores) == 2 and engine.programs.compiled["scores"] == 1
  first, second = batch._scores.values()
  assert not np.array_equal(first.token, second.token)
  assert not caplog.records
  engine.check(methods_lib.Condition(method, 0.5), tiny.GRID)
  assert "trained from 0.1 to 0.25: its scores at 0.5" in caplog.text


def test_a_question_is_answered_from_rows_of_its_size(engine):
  batch = engine.batch(engine.questions[:2])
  for threshold, rows in ((1.0, 4), (0.0, 64)):
    method = methods_lib.Method.parse(f"{SIZED}&threshold={threshold}")
    condition = methods_lib.Condition(method, 0.25)
    assert batch.select(condition).index.shape == (2, rows)
  assert compressors.get(SIZED).rows(tiny.GRID, 0.25) == 64
