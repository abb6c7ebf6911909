"""What a table would take, against loops and against what was run."""

import math
import types

import numpy as np
import pytest

from cacovid_jax import base_config, errors
from cacovid_jax import config as config_lib
from cacovid_jax import experiment as experiment_lib
from cacovid_jax.data import question as question_lib
from cacovid_jax.evals import benchmarks, cost, estimate
from cacovid_jax.inference import methods as methods_lib
from cacovid_jax.models import checkpoints
from tests.data import benchmark_files

SPEED = cost.Speed(flops=1e12, bytes=1e9)


def without_weights(name, benchmark="videomme", chips=1, **changes):
  """Returns the evaluation of a released model that is not there."""
  changes = {
    "model.path": f"nowhere/{name}",
    "mesh.model": chips,
    "data.num_frames": 32,
    "evals.benchmark": benchmark,
    "evals.methods": ("uniform", "fastv", "cacovid", "framefusion"),
    "evals.ratios": (0.5, 0.25),
    "evals.batch_size": 4,
    "evals.select_on": "none",
    "evals.template": "tokenizer",
  } | {f"evals.{key}": value for key, value in changes.items()}
  config = config_lib.replace(base_config.get_config(), changes)
  return estimate.without_weights(experiment_lib.Experiment.from_config(config))


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
  root = tmp_path_factory.mktemp("videomme")
  benchmark_files.write("videomme", root)
  return benchmarks.load(root, benchmark="videomme")


@pytest.mark.parametrize("name", estimate.RELEASED)
def test_released_models_on_questions_that_are_here(name, loaded):
  experiment = without_weights(name)
  checkpoint = experiment.checkpoint
  assert checkpoint.params is None and checkpoint.tokenizer is None
  out = estimate.estimate({"videomme": experiment}, {"videomme": loaded}, SPEED)
  row = out["benchmarks"]["videomme"]
  # 6 questions about 3 clips; vanilla and four methods at two ratios.
  assert (row["questions"], row["clips"], row["answers"]) == (6, 3, 6 * 9)
  num_video = 32 * 14 * 14 if name.startswith("llava") else 16 * 12 * 21
  assert row["video_tokens"] == 6 * num_video
  assert out["memory"]["weights"] == cost.weight_bytes(
    checkpoint.model.config, "bfloat16"
  )
  assert out["memory"]["total"] == sum(
    value for key, value in out["memory"].items() if key != "total"
  )
  assert out["total"] == {k: v for k, v in row.items() if k != "published"}


def test_operations_and_tokens_are_those_of_loops(loaded):
  experiment = without_weights(
    "llava_onevision_0_5b", methods=("uniform", "fastv"), ratios=(0.25,)
  )
  config, num_video = experiment.checkpoint.model.config, 6272
  found = estimate.estimate(
    {"videomme": experiment}, {"videomme": loaded}, SPEED
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
  small = without_weights("llava_onevision_0_5b", ratios=(0.25,))
  checkpoint = small.checkpoint

  def told(*methods):
    experiment = small.replace({"evals.methods": methods})
    return estimate.estimate(
      {"videomme": experiment}, {"videomme": loaded}, SPEED
    )

  plain, learned = told("uniform"), told("cacovid")
  policy = estimate.policy_of(
    checkpoint.model.config.text, [methods_lib.Method.parse("cacovid")]
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
  experiment = without_weights("qwen2_5_vl_3b", "mlvu_test")
  out = estimate.estimate({"mlvu_test": experiment}, {}, SPEED)
  row = out["benchmarks"]["mlvu_test"]
  assert row["questions"] == row["clips"] == 502 and row["published"]
  limited = experiment.replace({"evals.num_questions": 10})
  out = estimate.estimate({"mlvu_test": limited}, {}, SPEED)
  assert out["total"]["questions"] == 10


def test_programs_are_counted_by_what_they_share():
  def count(*specs, ratios=(0.5, 0.25), grid=(4, 4, 4)):
    methods = [methods_lib.Method.parse(spec) for spec in specs]
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
  only = without_weights("qwen2_5_vl_3b", methods=("uniform",), ratios=(0.5,))
  found = estimate.estimate({"videomme": only}, {"videomme": benchmark}, SPEED)
  row = found["benchmarks"]["videomme"]
  assert (row["questions"], row["clips"]) == (3, 2)
  assert row["video_tokens"] == 2 * 16 * 12 * 21 + 16 * 18 * 14
  # Each with four programs and the tower's.
  assert row["programs"] == 2 * 5


def test_memory_is_that_of_the_largest_benchmark():
  large = without_weights(
    "llava_onevision_7b", "mlvu_test", chips=4, batch_size=8
  )
  small = large.replace({"evals.benchmark": "mlvu_dev", "evals.batch_size": 1})
  both = {"mlvu_dev": small, "mlvu_test": large}
  out = estimate.estimate(both, {}, SPEED)
  alone = estimate.estimate({"mlvu_test": large}, {}, SPEED)
  assert out["memory"] == alone["memory"]
  config = large.checkpoint.model.config
  assert out["memory"]["weights"] == cost.weight_bytes(config, "bfloat16", 4)
  assert out["memory"]["weights"] < cost.weight_bytes(config, "bfloat16") / 2


def test_devices_share_a_batch():
  given = {"": without_weights("llava_onevision_7b", batch_size=4)}, {}, SPEED
  alone, three = (estimate.estimate(*given, n)["memory"] for n in (1, 3))
  # ceil(4 / 3) questions on the fullest.
  assert 2 * three["cache"] == alone["cache"]


def test_mistakes_are_named(tmp_path):
  config = config_lib.replace(
    base_config.get_config(), {"model.path": str(tmp_path)}
  )
  experiment = experiment_lib.Experiment.from_config(config)
  with pytest.raises(errors.UserError, match="no config.json in .*--config"):
    estimate.without_weights(experiment)
  for name, value in (("tflops", 0.0), ("gbps", math.inf)):
    with pytest.raises(errors.UserError, match=f"table.{name} is .* above 0"):
      config_lib.replace(config, {f"table.{name}": value})


def table(tflops, gbps):
  return types.SimpleNamespace(tflops=tflops, gbps=gbps)


def test_a_speed_that_is_not_stated_is_measured(monkeypatch):
  measured = cost.Speed(5e12, 6e9)
  monkeypatch.setattr(cost, "measure_speed", lambda dtype: measured)
  assert estimate.speed_of(table(None, 2.0), "float32") == (5e12, 2e9)
  assert estimate.speed_of(table(3.0, 2.0), "float32") == (3e12, 2e9)
  assert np.isclose(SPEED.seconds(1e12, 1, 10**9), 2.0)


def test_models_are_made_without_weights():
  for name in estimate.RELEASED:
    config = without_weights(name).checkpoint.model.config
    assert config == estimate.RELEASED[name]()
    assert isinstance(checkpoints.param_shapes(config), dict)
