"""Checkpoint directories from writing to evaluation, by the real commands."""

import dataclasses
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tests
from cacovid_jax import errors
from cacovid_jax import experiment as experiment_lib
from cacovid_jax.data import readers
from cacovid_jax.models import checkpoints, safetensors_io
from cacovid_jax.preflight import case as case_lib
from cacovid_jax.preflight import checks
from cacovid_jax.synthetic import tiny_checkpoints
from cacovid_jax.training import checkpointing
from experiments import directory_run, made_up_questions, parity_at_size
from tests.experiments import commands

# Of a run of seconds; clips of 1 to 6 seconds.
_SHORT = (
  "iterations=1", "sampling.num_combinations=4", "data.num_frames=4",
  "data.prompt_rows=(300,)", "evals.methods=cacovid",
)  # fmt: skip
_CLIPS = {"train": (2, 6), "validation": (3,), "test": (1,)}


@pytest.fixture(autouse=True)
def cheap(monkeypatch):
  monkeypatch.setattr(made_up_questions, "CLIPS", _CLIPS)
  jax.devices()  # Of this process as many as ever, of its commands one.
  monkeypatch.setenv("XLA_FLAGS", tests.xla_flags())


def test_a_directory_is_trained_stopped_resumed_and_evaluated(tmp_path):
  words = [f"--set={text}" for text in _SHORT]
  words += [f"--workdir={tmp_path}", "--steps=3", "--stop_after=1"]
  words += ["--size=tiny-q3vl", "--benchmarks=videomme,mvbench"]
  args = directory_run.COMMAND.parse(["directory_run", *words])
  code = directory_run.main(args)
  logs = {x.stem: x.read_text()[-2000:] for x in tmp_path.glob("*.log")}
  assert code == 0, logs
  # The step under way when the signal came was saved, and the run went on.
  assert "stopped by a signal after step 2, saved" in logs["train"]
  assert "continuing after step 2" in logs["resume"]
  assert checkpointing.steps(tmp_path / "run" / "checkpoints")[-1] == 3
  text = (tmp_path / "transcript.md").read_text()
  for stage in ("write", "clips", "doctor", "train", "resume"):
    assert f"| {stage} |" in text
  for name, metric in (
    ("videomme", "videomme_perception_score"), ("mvbench", "mvbench_accuracy")
  ):  # fmt: skip
    assert f"| evaluate_{name} |" in text
    folder = tmp_path / f"evaluate_{name}"
    found = json.loads((folder / "results.json").read_text())
    assert (found["benchmark"], found["metric"]) == (name, metric)
    told = found["provenance"]["settings"]
    assert told["prompt_rule"] == "transformers 4.57"
    cell = found["methods"]["cacovid"]["0.25"]
    assert (cell["status"], cell["n"]) == ("ok", 1)
    assert f"{name}, cacovid at 0.25: ok, {cell['accuracy']:.1%} right" in text
  # Gradients moved the layer, by about a rate of 1e-7 an update.
  policy = tmp_path / "run" / "policy" / "policy.safetensors"
  share, most = directory_run.moved(policy, tmp_path / "model")
  assert share > 0.5 and 1e-8 < most < 1e-6
  assert f"{share:.1%} of its parameters moved" in text
  with pytest.raises(errors.UserError, match="earlier run; give another"):
    directory_run.main(args)


@pytest.mark.parametrize("size", ["tiny-ov", "tiny-qvl"])
def test_the_other_families_are_written_and_fit(size, tmp_path):
  args = {"size": size, "workdir": tmp_path, "write_only": "true"}
  assert commands.run(directory_run, **args) == 0
  model, data = tmp_path / "model", tmp_path / "data"
  rows = readers.read_video_r1(str(data / "train.json"), str(data))
  assert [row.video for row in rows] == ["train_002s.mp4", "train_006s.mp4"]
  for split, lengths in _CLIPS.items():
    assert len(readers.read_own(data, data, split=split)) == len(lengths)
  config = directory_run.configured(size, model, data, (*_SHORT, "mesh.data=1"))
  experiment = experiment_lib.Experiment.from_config(
    config, tmp_path / "run", split="videos_per_step"
  )
  # Weights, prompts, clips at their grids, programs: what a run would need.
  found = checks.examine(case_lib.Case(experiment, seconds_per_video=1.0))
  assert not [one for one in found if one.verdict == checks.FAILED]
  # Written once; what is there stays.
  before = (model / "model.safetensors").stat().st_mtime_ns
  assert commands.run(directory_run, **args) == 0
  assert (model / "model.safetensors").stat().st_mtime_ns == before


@pytest.mark.parametrize("size", ["ov-0.5b", "qvl-3b", "q3vl-8b"])
def test_released_sizes_are_complete_in_shards_and_repeat(
  size, tmp_path, monkeypatch
):
  """Of a narrow layer: whole ones take gigabytes."""
  config = narrow(parity_at_size.CONFIGS[size]())
  monkeypatch.setattr(tiny_checkpoints, "_SHARD_BYTES", 2**20)
  for name, seed in (("a", 0), ("b", 0), ("c", 1)):
    tiny_checkpoints.write_complete(tmp_path / name, config, seed)
  shards = sorted(x.name for x in (tmp_path / "a").glob("*.safetensors"))
  assert len(shards) > 2
  same, other = (
    [(tmp_path / "a" / x).read_bytes() == (tmp_path / y / x).read_bytes()
     for x in shards]
    for y in "bc"
  )  # fmt: skip
  assert all(same) and not all(other)
  found = checkpoints.load(tmp_path / "a", jnp.dtype("bfloat16"))
  tokens, text = found.tokenizer, found.model.config.text
  assert (text.vocab_size, text.num_layers) == (
    config.text.vocab_size, config.text.num_layers
  )  # fmt: skip
  assert tokens.video_id == found.model.config.video_token_id
  assert found.eos_ids == tokens.eos_ids
  processor = found.model.read_processor(tmp_path / "a")
  assert processor.described["resample"] == 3
  stored = safetensors_io.list_directory(tmp_path / "a")
  assert {tensor.dtype for tensor in stored} == {np.dtype(jnp.bfloat16)}
  with pytest.raises(errors.UserError, match="is not empty; name another"):
    tiny_checkpoints.write_complete(tmp_path / "a", config)


def narrow(config):
  """Returns a config of one narrow layer; patches and ids as they are."""
  cut = parity_at_size.cut(config, 1)
  text = dataclasses.replace(
    cut.text, hidden_size=64, intermediate_size=64, num_heads=4,
    num_kv_heads=2, head_dim=128, vocab_size=4096,
  )  # fmt: skip
  vision = cut.vision
  if hasattr(vision, "out_hidden_size"):
    vision = dataclasses.replace(vision, out_hidden_size=64)
  return dataclasses.replace(cut, vision=vision, text=text)


def test_a_stage_that_goes_wrong_is_the_last(tmp_path, capsys):
  """Without weights the doctor fails, and nothing is trained."""
  flags = {"workdir": tmp_path, "model": tmp_path / "absent"}
  assert commands.run(directory_run, **flags) == 1
  assert "doctor went wrong; see " in capsys.readouterr().out
  assert not (tmp_path / "train.log").exists()


def test_too_few_steps_and_no_workdir_are_one_line(tmp_path):
  with pytest.raises(errors.UserError, match="which workdir"):
    commands.run(directory_run)
  with pytest.raises(errors.UserError, match="--stop_after=3: .* at most 2"):
    commands.run(directory_run, workdir=tmp_path, stop_after=3)
  with pytest.raises(errors.UserError, match="seedbench: choose of own, vid"):
    words = dict(workdir=tmp_path / "none", benchmarks="mvbench,seedbench")
    commands.run(directory_run, **words)
  with pytest.raises(errors.UserError, match="choose .*qvl-7b"):
    commands.parse(directory_run, size="8b")
  assert not os.listdir(tmp_path)
