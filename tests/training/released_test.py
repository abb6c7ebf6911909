"""Configs of released models: the paper's numbers, and their `:debug` form."""

import hashlib
import pathlib

import jax
import pytest

from cacovid_jax import config as config_lib
from cacovid_jax import errors
from cacovid_jax import experiment as experiment_lib
from cacovid_jax.data import chat_template as chat_template_lib
from cacovid_jax.evals import evaluation
from cacovid_jax.synthetic import build, tiny_checkpoints
from cacovid_jax.training import loop
from cacovid_jax.training import run as run_lib
from tests.training import tiny

CONFIGS = pathlib.Path(__file__).parent.parent.parent / "configs"
RELEASED = {
  "llava_onevision_7b": "llava_onevision",
  "llava_onevision_0_5b": "llava_onevision",
  "qwen2_5_vl_3b": "qwen2_5_vl",
  "qwen2_5_vl_7b": "qwen2_5_vl",
  "qwen3_vl_2b": "qwen3_vl",
  "qwen3_vl_4b": "qwen3_vl",
  "qwen3_vl_8b": "qwen3_vl",
}


def spec(name, *arguments):
  """Returns the config of a released model, as `--config` takes it."""
  family = RELEASED[name]
  size = name.removeprefix(f"{family}_")
  return f"{CONFIGS / family}.py:" + ",".join((f"size={size}", *arguments))


@pytest.mark.parametrize("name", RELEASED)
def test_a_released_model_is_trained_by_the_papers_recipe(name):
  config = config_lib.load(spec(name))
  # METHOD of the paper, sections on sampling, iterations and optimiser.
  expected = {
    "seed": 42,
    "total_steps": 0,
    "videos_per_step": 1,
    "iterations": 5,
    "sampling.num_combinations": 32,
    "ratio.adaptive": True,
    "ratio.start": 0.02,
    "optimizer.lr_heads": 1e-6,
    "optimizer.lr_layer": 1e-7,
    "optimizer.weight_decay": 0.01,
    "optimizer.clip": 5.0,
    "model.dtype": "bfloat16",
    "policy.dtype": "bfloat16",
    "data.num_frames": 32,
    "evals.ratios": (0.25, 0.2, 0.15, 0.1),
    "evals.rule": "",
    "evals.select_on": "none",
    "model.path": f"checkpoints/{name}",
  }
  if RELEASED[name] == "qwen3_vl":  # Which the public code does not know.
    expected |= {
      "optimizer.schedule": "cosine",
      "sampling.frame_cap": "per_frame",
      "data.frame_rule": "train_linspace_1fps",
    }
  else:
    expected |= {
      "optimizer.schedule": "cosine_repeated",
      "sampling.frame_cap": "public",
      "data.frame_rule": "public_linspace_1fps",
    }
  for key, value in expected.items():
    found = config
    for part in key.split("."):
      found = found[part]
    assert found == value, key
  # 128 to 256 tokens of 28 x 28 pixels, where a grid follows the frame.
  # Of Qwen3-VL 256 tokens of 32 x 32 for each of a clip's frames.
  pixels = {"qwen2_5_vl": (100352, 200704), "qwen3_vl": (0, 32 * 256 * 1024)}
  pixels = pixels.get(RELEASED[name], (0, 0))
  assert (config.data.min_pixels, config.data.max_pixels) == pixels
  assert config.data.num_frames == 32
  template = {"llava_onevision": "tokenizer"}
  assert config.evals.template == template.get(RELEASED[name], "")
  names = [method.partition("=")[0] for method in config.evals.methods]
  assert names == [
    "cacovid",
    "fastv",
    "visionzip",
    "divprune",
    "prunevid",
    "framefusion",
  ]
  eight = config_lib.load(spec(name, "devices=8"))
  assert eight.videos_per_step == 8


def test_debug_forms_of_a_family_are_one_run():
  # So that running one of each family, as below, runs all of them.
  debug = {
    name: config_lib.config_hash(config_lib.load(spec(name, "debug")))
    for name in RELEASED
  }
  for family in tiny_checkpoints.FAMILIES:
    of = {debug[name] for name, found in RELEASED.items() if found == family}
    assert len(of) == 1
  assert len(set(debug.values())) == 3


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
  """Returns a folder as `prepare --tiny_models` leaves it."""
  folder = tmp_path_factory.mktemp("tiny")
  for family in tiny_checkpoints.FAMILIES:
    tiny_checkpoints.write_tiny(folder / family, family)
  config = build.BuildConfig(variant="dense", seed=0, clips=(2, 0, 2, 0))
  build.build(config, folder / "dense", num_workers=0)
  (folder / "dense" / "decisive.jsonl").unlink()
  # Of the clips that are asked about, one cannot be read.
  broken = folder / "dense" / "videos" / "dense_test_00001.mp4"
  broken.write_bytes(b"no video")
  return folder


@pytest.mark.parametrize(
  "name", ["llava_onevision_7b", "qwen2_5_vl_3b", "qwen3_vl_2b"]
)
def test_the_debug_form_trains_and_evaluates(name, prepared, tmp_path):
  path = spec(name, "debug")
  config = config_lib.load(
    path,
    [
      f"model.path={prepared / RELEASED[name]}",
      f"data.root={prepared / 'dense'}",
      "mesh.data=1",
      "evals.num_questions=8",  # About both clips.
    ],
  )
  # The overrides name the folders of the form.
  named = pathlib.Path(config_lib.load(path).model.path).name
  assert pathlib.Path(config.model.path).name == named
  result = loop.train(tiny.experiment_of(config, tmp_path))
  assert int(result.state.step) == 2
  made = result.run.programs
  most = len(result.run.batches.prompts.text_rows) * sum(
    map(made.limit, made.configs)
  )
  assert len(made.compile_seconds) <= most
  config = config_lib.replace(config, {"evals.policies": (str(tmp_path),)})
  out = evaluation.evaluate(
    experiment_lib.Experiment.from_config(config, tmp_path)
  )
  assert set(out["methods"]) == {"cacovid", "divprune"}
  assert len(out["unreadable"]) == 1
  # Of LLaVA-OneVision the paper's evaluator takes the tokenizer's template.
  own = chat_template_lib.read(
    prepared / RELEASED[name],
    "tokenizer" if name.startswith("llava") else "processor",
  )[0]
  hashed = hashlib.sha256(own.encode()).hexdigest()
  assert out["provenance"]["template_hash"] == hashed
  assert ("You are a helpful" in own) == name.startswith("llava")
  for cells in out["methods"].values():
    assert cells["0.25"]["status"] == "ok"
    assert cells["0.25"]["equivalent_ratio"] == pytest.approx(0.25, abs=0.01)


def test_weights_are_read_onto_the_mesh_and_stay_there(prepared, tmp_path):
  config = config_lib.load(
    spec("llava_onevision_7b", "debug"),
    [
      f"model.path={prepared / 'llava_onevision'}",
      f"data.root={prepared / 'dense'}",
      "mesh.data=1",
      "mesh.model=2",
    ],
  )
  experiment = tiny.experiment_of(config, tmp_path)
  checkpoint = experiment.loaded
  run = run_lib.Run(experiment)

  def pointers(params):
    return [
      shard.data.unsafe_buffer_pointer()
      for leaf in jax.tree.leaves(params)
      for shard in leaf.addressable_shards
    ]

  kernel = checkpoint.params["language_model"]["layers"]["q_proj"]["kernel"]
  whole = kernel.shape[-1]
  # Each of the two devices has half of the columns, and no third has any.
  shapes = [shard.data.shape[-1] for shard in kernel.addressable_shards]
  assert shapes == [whole // 2] * 2
  # The run's weights are these, not a copy of them.
  assert pointers(run.constants.params) == pointers(checkpoint.params)


def test_no_total_steps_is_one_epoch():
  config = tiny.config(total_steps=0, videos_per_step=4)
  experiment = tiny.experiment_of(config)
  found = run_lib.with_total_steps(experiment, tiny.questions(10)).config
  assert found.total_steps == 3 and config.total_steps == 0
  assert found.is_locked
  fixed = tiny.experiment_of(tiny.config(total_steps=7))
  assert run_lib.with_total_steps(fixed, tiny.questions(10)) is fixed


def test_a_tiny_checkpoint_replaces_nothing(tmp_path):
  (tmp_path / "model.safetensors").write_bytes(b"weights")
  with pytest.raises(errors.UserError, match="is not empty; name another"):
    tiny_checkpoints.write_tiny(tmp_path, "qwen2_5_vl")
  assert (tmp_path / "model.safetensors").read_bytes() == b"weights"
  with pytest.raises(errors.UserError, match="no tiny checkpoint of 'gpt'"):
    tiny_checkpoints.write_tiny(tmp_path / "new", "gpt")


def test_a_size_that_there_is_not_and_a_file_of_before_are_one_line():
  with pytest.raises(
    errors.UserError, match="unknown size '8b': use 7b or 0_5"
  ):
    config_lib.load(f"{CONFIGS}/llava_onevision.py:size=8b")
  half = config_lib.load(f"{CONFIGS}/llava_onevision.py:size=0.5b")
  assert half.model.path == "checkpoints/llava_onevision_0_5b"
  with pytest.raises(errors.UserError) as caught:
    config_lib.load(f"{CONFIGS}/qwen2_5_vl_3b.py:debug")
  now = f"{CONFIGS}/qwen2_5_vl.py:size=3b,debug"
  assert str(caught.value).endswith(f"it is {now} now")
  config_lib.load(now)
