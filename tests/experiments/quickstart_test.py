"""The quickstart end to end, in its shortest form, with a tiny base model."""

import dataclasses
import json
import os
import pathlib
import re
import shlex
import subprocess
import sys

import jax
import numpy as np
import pytest

import tests
from cacovid_jax import errors
from cacovid_jax.data import tokenizer as tokenizer_lib
from cacovid_jax.models import checkpoints, llava_onevision, siglip
from cacovid_jax.policy import loading
from cacovid_jax.synthetic import packing
from cacovid_jax.synthetic import tokenizer as tokenizer_training
from experiments import quickstart as experiment

ROOT = pathlib.Path(__file__).parent.parent.parent
# One of each kind: the policy, its controls, attention and features alone.
METHODS = (
  "cacovid",
  "cacovid_other_question",
  "cacovid_untrained",
  "last_query",
  "divprune",
)


def write_base_model(directory):
  """Writes a random model of the shipped one's grid, 16 x 7 x 7 tokens."""
  tokenizer_training.train(
    packing.corpus(20),
    576,
    directory,
    image_size=112,
    patch_size=8,
    max_length=1024,
  )
  tokenizer = tokenizer_lib.Tokenizer.from_directory(directory)
  sizes = llava_onevision.LlavaOnevisionConfig.tiny()
  sizes = dataclasses.replace(
    sizes,
    vision=dataclasses.replace(
      siglip.SiglipConfig.tiny(), image_size=112, patch_size=8, num_layers=1
    ),
    text=dataclasses.replace(
      sizes.text,
      vocab_size=tokenizer.vocab_size,
      num_layers=2,
      max_positions=1024,
    ),
    image_token_id=tokenizer.token_id("<image>"),
    video_token_id=tokenizer.video_id,
  )
  # Drawn by NumPy: compiling the initialisers would take longer than the rest.
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda leaf: rng.normal(0, 0.1, leaf.shape).astype(np.float32),
    jax.eval_shape(
      llava_onevision.LlavaOnevisionModel(sizes).init, jax.random.key(0)
    ),
  )
  checkpoints.save(
    directory, sizes, params, eos_ids=tokenizer.eos_ids, pad_id=tokenizer.pad_id
  )


def overrides(folder):
  """Returns the flags of a tiny model, few clips and few methods."""
  return [
    f"--config.model.path={folder / 'base_model'}",
    f"--config.data.root={folder / 'data'}",
    f"--config.data.feature_cache={folder / 'features'}",
    "--config.prepare.clips=2,2,2,0",
    f"--config.evals.methods={','.join(METHODS)}",
  ]


def command(folder, arguments):
  """Runs a command on the tiny model and returns the finished process."""
  environment = os.environ | {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": tests.xla_flags(),
  }
  return subprocess.run(
    [sys.executable, *arguments, *overrides(folder)],
    cwd=ROOT,
    env=environment,
    capture_output=True,
    text=True,
    check=False,
  )


def quickstart(folder, *flags, workdir="run"):
  """Runs the quickstart's shortest form."""
  workdir = f"--workdir={folder / workdir}"
  arguments = ["-m", "experiments.quickstart", "--smoke", workdir, *flags]
  return command(folder, arguments)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("quickstart")
  write_base_model(folder / "base_model")
  return folder


@pytest.fixture(scope="module")
def finished(folder):
  done = quickstart(folder)
  assert done.returncode == 0, done.stderr
  return done


def test_it_leaves_a_table_a_report_and_a_policy(folder, finished):
  workdir = folder / "run"
  found = json.loads((workdir / "results.json").read_text())
  assert found["schema"] == 1 and found["split"] == "test"
  assert found["grid"] == [16, 7, 7]
  assert set(METHODS) == set(found["methods"])
  for cells in found["methods"].values():
    assert cells["0.10"]["status"] == "ok"
    assert cells["0.10"]["kept_tokens"] == 78
  assert set(found["chosen"]) >= {"cacovid", "cacovid_untrained", "last_query"}
  for name in ("report.html", "metrics.jsonl", "config.json", "checkpoints"):
    assert (workdir / name).exists(), name
  assert (workdir / "policy" / "policy.safetensors").exists()
  out = finished.stdout
  assert str(workdir / "report.html") in out
  for stage in ("prepare", "load", "train", "evaluate", "in all"):
    assert stage in out
  assert "cacovid_untrained" in out and "10% kept" in out
  # Libraries keep their news to themselves.
  assert "orbax" not in finished.stderr.lower()


def test_given_again_it_goes_on_where_it_stopped(folder, finished):
  workdir = folder / "run"
  before = (workdir / "results.json").read_bytes()
  metrics = (workdir / "metrics.jsonl").read_bytes()
  answers = (workdir / "answers.jsonl").read_bytes()
  (workdir / "results.json").unlink()
  again = quickstart(folder)
  assert again.returncode == 0, again.stderr
  assert "compiled" not in again.stderr  # Nothing was trained anew.
  assert (workdir / "results.json").read_bytes() == before
  assert (workdir / "metrics.jsonl").read_bytes() == metrics
  assert (workdir / "answers.jsonl").read_bytes() == answers


@pytest.mark.parametrize(
  ("flags", "named"),
  [
    (["--ratios=0.1,1.5"], "1.5; it must be a number above 0 and at most 1"),
    (["--config.total_steps=3"], "belongs to another config: total_steps"),
  ],
)
def test_a_mistake_is_one_line_and_harms_nothing(
  folder, finished, flags, named, monkeypatch
):
  before = (folder / "run" / "results.json").read_bytes()
  # A new workdir where the mistake is not the workdir itself.
  workdir = "run" if "another config" in named else "other"
  words = ["--smoke", f"--workdir={folder / workdir}", *flags]
  monkeypatch.chdir(ROOT)
  with pytest.raises(errors.UserError) as error:
    experiment.main(
      experiment.COMMAND.parse(["quickstart", *words, *overrides(folder)])
    )
  assert named in str(error.value) and "\n" not in str(error.value)
  assert (folder / "run" / "results.json").read_bytes() == before


def test_a_policy_of_ones_own_by_the_readmes_command(folder, finished):
  text = (ROOT / "README.md").read_text(encoding="utf-8")
  block = re.search(r"```bash\n([^`]*bilinear_policy[^`]*)```", text)[1]
  words = shlex.split(block.replace("\\\n", " "))
  assert words[:3] == ["python", "-m", "cacovid_jax.train"]
  changed = {
    "configs/synthetic.py:size=quickstart": "configs/synthetic.py:debug",
    "workdirs/bilinear": str(folder / "bilinear"),
  }
  assert set(changed) < set(words)
  words = [changed.get(word, word) for word in words[1:]]
  done = command(folder, words)
  assert done.returncode == 0, done.stderr
  # An evaluation finds it in the workdir, and runs its module when asked to.
  checkpoint = checkpoints.load(folder / "base_model")
  module = "tests/policy/bilinear_policy.py:Bilinear"
  with pytest.raises(errors.UserError, match=f"trained with '{module}'"):
    loading.load_policy(folder / "bilinear", checkpoint)
  policy = loading.load_policy(
    f"{folder / 'bilinear'}?module={ROOT / module}", checkpoint
  )
  assert type(policy.module).__name__ == "Bilinear"
  assert policy.params["question"]["kernel"].shape == (32, 16)
