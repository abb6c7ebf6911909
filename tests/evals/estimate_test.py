"""What a table would take, against loops and against what was run."""

import math

import numpy as np
import pytest

from cacovid_jax import errors
from cacovid_jax.data import question as question_lib
from cacovid_jax.evals import benchmarks, cost, estimate, runner
from cacovid_jax.models import checkpoints
from tests.data import benchmark_files
from tests.evals import tiny

SPEED = cost.Speed(flops=1e12, bytes=1e9)


def request(benchmark="videomme", **fields):
  known = dict(
    checkpoint="",
    benchmark=benchmark,
    methods=("uniform", "fastv", "cacovid", "framefusion"),
    ratios=(0.5, 0.25),
    num_frames=32,
    dtype="bfloat16",
    batch_size=4,
    select_on="none",
  )
  return tiny.experiment(None, **known | fields)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
  root = tmp_path_factory.mktemp("videomme")
  benchmark_files.write("videomme", root)
  return benchmarks.load(root, benchmark="videomme")


@pytest.mark.parametrize("name", estimate.RELEASED)
def test_released_models_on_questions_that_are_here(name, loaded):
  checkpoint = estimate.describe("nowhere", name, "bfloat16")
  assert checkpoint.params is None and checkpoint.tokenizer is None
  out = estimate.estimate(
    checkpoint, {"videomme": request()}, {"videomme": loaded}, SPEED
  )
  row = out["benchmarks"]["videomme"]
  # 6 questions about 3 clips; vanilla and four methods at two ratios.
  assert (row["questions"], row["clips"], row["answers"]) == (6, 3, 6 * 9)
  num_video = 32 * 14 * 14 if name.startswith("ov") else 16 * 12 * 21
  assert row["video_tokens"] == 6 * num_video
  assert out["memory"]["weights"] == cost.weight_bytes(
    checkpoint.model.config, "bfloat16"
  )
  assert out["memory"]["total"] == sum(
    value for key, value in out["memory"].items() if key != "total"
  )
  assert out["total"] == {k: v for k, v in row.items() if k != "published"}


def test_operations_and_tokens_are_those_of_loops(loaded):
  checkpoint = estimate.describe("", "ov0.5b", "bfloat16")
  config, num_video = checkpoint.model.config, 6272
  found = estimate.estimate(
    checkpoint,
    {"videomme": request(methods=("uniform", "fastv"), ratios=(0.25,))},
    {"videomme": loaded},
    SPEED,
  )["benchmarks"]["videomme"]
  # A token per four bytes, and thirty of the template.
  texts = [
    math.ceil(len(question.prompt.encode()) / 4) + 30
    for question in loaded.questions
  ]
  # FastV: 24 layers, two of which see everything.
  behind = int((0.25 * 24 * num_video - 2 * num_video) / 22)
  layers = {
    "vanilla": [num_video] * 24,
    "uniform": [num_video // 4] * 24,
    "fastv": [num_video] * 2 + [behind] * 22,
  }
  tokens = sum(
    text + sum(rows) / 24 for rows in layers.values() for text in texts
  )
  assert found["llm_tokens"] == pytest.approx(tokens)
  longest, flops = max(texts), 3 * cost.tower_flops(config, (32, 14, 14))
  for rows in layers.values():
    padded = [row + longest for row in rows]
    # Six questions in two batches of four.
    flops += 8 * cost.prefill_flops(config.text, padded)
    flops += 8 * cost.decode_flops(config.text, padded)
  assert found["flops"] == flops
  weights = cost.weight_bytes(config, "bfloat16")
  seconds = flops / 1e12 + 2 * 3 * weights / 1e9
  assert found["seconds"] == pytest.approx(seconds)
  assert found["feature_bytes"] == 3 * 6272 * 896 * 4


def test_a_policy_and_the_towers_signals_cost_more(loaded):
  checkpoint = estimate.describe("", "ov0.5b", "bfloat16")

  def told(*methods):
    return estimate.estimate(
      checkpoint,
      {"videomme": request(methods=methods, ratios=(0.25,))},
      {"videomme": loaded},
      SPEED,
    )

  plain, learned = told("uniform"), told("cacovid")
  policy = estimate.policy_of(
    checkpoint.model.config.text, [runner.Method.parse("cacovid")]
  )
  longest = max(
    math.ceil(len(question.prompt.encode()) / 4) + 30
    for question in loaded.questions
  )
  more = learned["total"]["flops"] - plain["total"]["flops"]
  assert more == 8 * cost.policy_flops(policy, 6272 + longest, (32, 14, 14))
  assert plain["memory"]["policy"] == 0
  assert learned["memory"]["policy"] == cost.policy_bytes(policy)
  seen = told("visionzip")
  tower = cost.tower_flops(checkpoint.model.config, (32, 14, 14))
  assert seen["total"]["flops"] - plain["total"]["flops"] == 3 * tower
  # Attention and keys of 72 values beside the features.
  assert seen["total"]["feature_bytes"] - plain["total"]["feature_bytes"] == (
    3 * 6272 * 73 * 4
  )


def test_a_benchmark_that_is_not_here_has_its_published_size():
  checkpoint = estimate.describe("", "qwen3b", "bfloat16")
  out = estimate.estimate(
    checkpoint, {"mlvu_test": request("mlvu_test")}, {}, SPEED
  )
  row = out["benchmarks"]["mlvu_test"]
  assert row["questions"] == row["clips"] == 502 and row["published"]
  limited = request("mlvu_test", num_questions=10)
  out = estimate.estimate(checkpoint, {"mlvu_test": limited}, {}, SPEED)
  assert out["total"]["questions"] == 10


def test_programs_are_counted_by_what_they_share():
  def count(*specs, ratios=(0.5, 0.25), grid=(4, 4, 4)):
    methods = [runner.Method.parse(spec) for spec in specs]
    return estimate.num_programs(methods, ratios, 3, grid)

  # Prompt and answers of all tokens; two choices, two answers.
  assert count("uniform") == 2 + 2 + 2
  # Other choices, the same answers.
  assert count("uniform", "random") == 2 + 4 + 2
  # One label more is no program more.
  assert count("uniform", "again=uniform") == 2 + 2 + 2
  assert count("cacovid") == 3 + 2 + 2
  # At 25 % it cannot be run: one of three layers sees everything.
  assert count("fastv") == 2 + 1
  assert count("framefusion") == 2 + 2
  # Reads counts on the host.
  assert count("framefusion?mode=bucketed") == 2


def test_videos_of_several_grids_are_counted_apart(monkeypatch):
  checkpoint = estimate.describe("", "qwen3b", "bfloat16")
  grids = {"a.mp4": (16, 12, 21), "b.mp4": (16, 18, 14)}
  monkeypatch.setattr(estimate, "_grids", lambda *args: grids)
  asked = [
    question_lib.Question(
      id=f"{i}", video=name, question="", answer="A", prompt=""
    )
    for i, name in enumerate(["a.mp4", "b.mp4", "a.mp4"])
  ]
  benchmark = benchmarks.Benchmark(
    "videomme", "test", "", asked, {}, task=benchmarks.task("videomme")
  )
  only = request(methods=("uniform",), ratios=(0.5,))
  found = estimate.estimate(
    checkpoint, {"videomme": only}, {"videomme": benchmark}, SPEED
  )
  row = found["benchmarks"]["videomme"]
  assert (row["questions"], row["clips"]) == (3, 2)
  assert row["video_tokens"] == 2 * 16 * 12 * 21 + 16 * 18 * 14
  # Each with four programs and the tower's.
  assert row["programs"] == 2 * 5


def test_memory_is_that_of_the_largest_benchmark():
  checkpoint = estimate.describe("", "ov7b", "bfloat16")
  requests = {"mlvu_dev": request("mlvu_dev", batch_size=1),
              "mlvu_test": request("mlvu_test", batch_size=8)}  # fmt: skip
  out = estimate.estimate(checkpoint, requests, {}, SPEED, model_shards=4)
  alone = estimate.estimate(
    checkpoint, {"mlvu_test": requests["mlvu_test"]}, {}, SPEED, model_shards=4
  )
  assert out["memory"] == alone["memory"]
  config = checkpoint.model.config
  assert out["memory"]["weights"] == cost.weight_bytes(config, "bfloat16", 4)
  assert out["memory"]["weights"] < cost.weight_bytes(config, "bfloat16") / 2


def test_mistakes_are_named(tmp_path):
  with pytest.raises(errors.UserError, match="no config.json in .*--base="):
    estimate.describe(str(tmp_path), None, "float32")
  for flags, name in (((0.0, 1.0), "tflops"), ((1.0, math.inf), "gbps")):
    with pytest.raises(errors.UserError, match=f"--table_{name}"):
      estimate.speed_of(*flags, "float32")


def test_a_speed_that_is_not_stated_is_measured(monkeypatch):
  measured = cost.Speed(5e12, 6e9)
  monkeypatch.setattr(cost, "measure_speed", lambda dtype: measured)
  assert estimate.speed_of(None, 2.0, "float32") == (5e12, 2e9)
  assert estimate.speed_of(3.0, 2.0, "float32") == (3e12, 2e9)
  assert np.isclose(SPEED.seconds(1e12, 1, 10**9), 2.0)


def test_models_are_made_without_weights():
  for name in estimate.RELEASED:
    config = estimate.describe("", name, "bfloat16").model.config
    assert config == estimate.RELEASED[name]()
    assert isinstance(checkpoints.param_shapes(config), dict)
