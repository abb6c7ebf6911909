"""Whole runs on a tiny random model: resume, signals, refusals, export."""

import functools
import hashlib
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time
import types

import chex
import jax
import numpy as np
import pytest

import tests
from cacovid_jax import errors, metrics
from cacovid_jax.policy import loading, network
from cacovid_jax.training import checkpointing, loop
from tests import disks
from tests.training import tiny


class Log:
  """Remembers what every step saw."""

  def __init__(self, kill_at=None):
    self.steps, self.kill_at = {}, kill_at

  def __call__(self, step, questions, ids, rewards):
    self.steps[step] = [question.id for question in questions], ids, rewards


def assert_same(a, b):
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


class KilledError(Exception):
  """Stands for a kill: nothing of the loop runs behind it."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """Eight steps in one go."""
  workdir, log = tmp_path_factory.mktemp("whole"), Log()
  config = tiny.config(**{"total_steps": 8, "ckpt.every_steps": 4})
  result = tiny.train(workdir, config, on_step=log)
  return workdir, config, log, result


def test_eight_steps_equal_four_a_kill_and_four_more(whole, tmp_path):
  _, config, expected, result = whole
  first, second = Log(), Log()

  def die(step, *seen):
    first(step, *seen)
    # Results are looked at a step late: step 6 has begun by then.
    if step == 5:
      raise KilledError

  with pytest.raises(KilledError):
    tiny.train(tmp_path, config, on_step=die)
  assert checkpointing.steps(tmp_path / "checkpoints") == [4]
  again = tiny.train(tmp_path, config, on_step=second)
  assert sorted(second.steps) == [5, 6, 7, 8]
  assert_same(again.state, result.state)
  for step in range(1, 9):
    log = first if step <= 4 else second
    assert log.steps[step][0] == expected.steps[step][0]
    assert_same(log.steps[step][1:], expected.steps[step][1:])
  assert [line["step"] for line in metrics.read(tmp_path)] == list(range(1, 9))


def test_a_run_continues_on_another_number_of_devices(whole, tmp_path):
  workdir, _, expected, result = whole
  step = tmp_path / "checkpoints" / "4"
  shutil.copytree(workdir / "checkpoints" / "4", step)
  shutil.copy(workdir / "config.json", tmp_path)
  changes = {"total_steps": 8, "ckpt.every_steps": 4, "mesh.data": 2}
  log = Log()
  again = tiny.train(tmp_path, tiny.config(**changes), on_step=log)
  for done in range(5, 9):
    assert log.steps[done][0] == expected.steps[done][0]
    np.testing.assert_allclose(
      log.steps[done][2], expected.steps[done][2], rtol=1e-3, atol=1e-4
    )
  for x, y in zip(
    jax.tree.leaves(again.state.params),
    jax.tree.leaves(result.state.params),
    strict=True,
  ):
    # Sums are made in another order, and Adam enlarges what nearly cancels.
    np.testing.assert_allclose(x, y, rtol=1e-2, atol=1e-4)


def test_a_second_trainer_is_refused_and_the_first_unharmed(whole, tmp_path):
  _, config, _, result = whole
  refused = []

  def begin_another(step, *unused_seen):
    # Another config is not even compared.
    for other in (config, tiny.config(**{"total_steps": 9})):
      before = sorted(tmp_path.rglob("*"))
      with pytest.raises(errors.UserError) as error:
        tiny.train(tmp_path, other)
      assert sorted(tmp_path.rglob("*")) == before
      refused.append(str(error.value))

  again = tiny.train(tmp_path, config, on_step=begin_another)
  assert_same(again.state, result.state)
  assert [line["step"] for line in metrics.read(tmp_path)] == list(range(1, 9))
  assert set(refused) == {
    f"another trainer is writing to {tmp_path} (process {os.getpid()} on"
    f" {socket.gethostname()}); wait for it, or use another workdir"
  }
  assert not list(tmp_path.glob("*.lock"))


def test_a_full_disk_loses_nothing_but_the_step(whole, tmp_path, monkeypatch):
  _, config, _, result = whole
  save = checkpointing.save

  def save_on_a_full_disk(folder, step, *args, **options):
    # Below any array: how many of them share a file differs from run to run.
    with disks.no_file_above(64 if step > 4 else 2**40):
      return save(folder, step, *args, **options)

  with monkeypatch.context() as patch:
    patch.setattr(checkpointing, "save", save_on_a_full_disk)
    with pytest.raises(errors.UserError, match="cannot write .*free some sp"):
      tiny.train(tmp_path, config)
  assert os.listdir(tmp_path / "checkpoints") == ["4"]
  again = tiny.train(tmp_path, config)
  assert_same(again.state, result.state)
  assert [line["step"] for line in metrics.read(tmp_path)] == list(range(1, 9))


def test_finished_run_is_left_as_it_is(whole):
  workdir, config, _, result = whole
  log = Log()
  again = tiny.train(workdir, config, on_step=log)
  assert not log.steps
  assert_same(again.state, result.state)


def test_sigterm_saves_and_exits_143(whole, tmp_path):
  _, config, expected, result = whole

  def signal_at_two(step, *unused_seen):
    if step == 2:
      os.kill(os.getpid(), signal.SIGTERM)

  before = signal.getsignal(signal.SIGTERM)
  with pytest.raises(SystemExit) as stopped:
    tiny.train(tmp_path, config, on_step=signal_at_two)
  assert stopped.value.code == 143
  assert signal.getsignal(signal.SIGTERM) is before
  assert checkpointing.steps(tmp_path / "checkpoints") == [3]
  again = tiny.train(tmp_path, config)
  assert_same(again.state, result.state)


_OF_TWO = """
import itertools, pathlib, sys, time
import jax
import numpy as np
from jax.experimental import multihost_utils
from cacovid_jax.parallel import peers
from cacovid_jax.training import checkpointing
from tests.training import tiny

folder, port, number = sys.argv[1:]
folder = pathlib.Path(folder)
config = tiny.config(**{
  "mesh.data": 2,
  "total_steps": 3,
  "iterations": 1,
  "policy.module": "tests.policy.bilinear_policy:Bilinear",  # Compiles sooner.
})
ask = multihost_utils.reached_preemption_sync_point

def ask_until_told(step):
  # Step 2 lasts until the signal has come through, however long that takes:
  # a question of JAX's stands for a step, and all processes ask as many.
  if step != 2:
    return ask(step)
  (folder / f"reached.{number}").touch()
  limit = time.monotonic() + 1000
  for question in itertools.count(step):
    if ask(question):
      return True
    if time.monotonic() > limit:
      raise TimeoutError("JAX has not heard of the signal")
    time.sleep(0.01)

with peers.joined(f"localhost:{port}", 2, int(number)):
  multihost_utils.reached_preemption_sync_point = ask_until_told
  try:
    tiny.train(folder / "parts", config)
  except SystemExit as error:
    stopped = error
  multihost_utils.reached_preemption_sync_point = ask
  assert checkpointing.steps(folder / "parts" / "checkpoints") == [2]
  seen = []
  again = tiny.train(
    folder / "parts", config, on_step=lambda step, *unused: seen.append(step)
  )
  assert seen == [3], seen
  load, loaded = tiny.Store.load, []
  tiny.Store.load = lambda own, path: loaded.append(path) or load(own, path)
  whole = tiny.train(folder / "whole", config)
  # Three steps of two videos, of which each process reads its own.
  assert config.videos_per_step == 2 and len(loaded) == 3, loaded
  jax.tree.map(np.testing.assert_array_equal, again.state, whole.state)
  raise stopped
"""


def test_a_sigterm_to_two_processes_saves_and_exits_143(tmp_path):
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
  env = os.environ | {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": tests.xla_flags(),
    "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "PYTHONPATH": str(pathlib.Path(__file__).parents[2]),
  }
  command = [sys.executable, "-c", _OF_TWO, str(tmp_path), str(port)]
  two = [
    subprocess.Popen(
      [*command, str(number)], env=env, stderr=subprocess.PIPE, text=True
    )
    for number in range(2)
  ]
  try:
    while len(list(tmp_path.glob("reached.*"))) < 2:
      assert [process.poll() for process in two] == [None, None]
      time.sleep(0.05)
    for process in two:
      process.send_signal(signal.SIGTERM)
    told = [process.communicate(timeout=1500)[1] for process in two]
    assert [process.returncode for process in two] == [143, 143], told
  finally:
    for process in two:
      process.kill()


def test_metrics_are_written_for_every_step(whole):
  workdir, _, _, _ = whole
  lines = metrics.read(workdir)
  assert [line["step"] for line in lines] == list(range(1, 9))
  names = {
    "loss",
    "reward_token",
    "reward_token_greedy",
    "reward_frame",
    "reward_content",
    "gradient_norm",
    "lr_heads",
    "token_gap_std",
  }
  assert names <= set(lines[0])
  assert (workdir / "tensorboard").is_dir()
  # The rate of the last update is that before the schedule's end.
  assert 0 < lines[-1]["lr_heads"] < lines[0]["lr_heads"] <= 1e-2


def test_policy_is_exported_under_the_public_names(whole):
  workdir, _, _, result = whole
  path = workdir / "policy" / "policy.safetensors"
  assert result.policy_path == path
  tensors = loading.read(path)
  assert set(tensors) == set(network.to_public(result.state.params))
  assert all(name.startswith("compression_policy.") for name in tensors)
  loaded = loading.load(path, result.policy)
  assert_same(loaded, result.state.params)
  described = json.loads((workdir / "policy/policy_config.json").read_text())
  assert described["policy"]["num_halvings"] == 2
  assert "module_sha256" not in described
  assert described["base_model"] == {"path": "nowhere", "sha256": "0"}
  assert described["steps"] == 8


def test_mode_selection_is_not_trained(whole):
  _, _, _, result = whole
  before = result.run.init_params()
  assert_same(result.state.params["mode_selection"], before["mode_selection"])
  moved = result.state.params["layer"]["q_proj"]["kernel"]
  assert np.abs(moved - before["layer"]["q_proj"]["kernel"]).max() > 0


def test_workdir_of_another_config_is_refused(whole):
  workdir, _, _, _ = whole
  other = tiny.config(**{"total_steps": 8, "optimizer.lr_heads": 0.5})
  with pytest.raises(errors.UserError, match="lr_heads"):
    tiny.train(workdir, other)


def test_refused_steps_end_the_run_and_name_the_questions(tmp_path):
  def features(path):
    # Not a number in one clip alone; it is in half of all steps or more.
    return tiny.features(path) * (np.nan if path == "1.mp4" else 1)

  config = tiny.config(**{"total_steps": 8, "max_bad_steps": 2})
  rows = tiny.questions(2)
  with pytest.raises(errors.UserError, match=r"questions: q1;") as error:
    tiny.train(tmp_path, config, questions=rows, store=tiny.Store(features))
  assert "2 steps in a row" in str(error.value)
  [step] = checkpointing.steps(tmp_path / "checkpoints")
  state = checkpointing.read_manifest(tmp_path / "checkpoints", step)
  assert state["step"] in (2, 3)


_OWN_POLICY = '''
"""A policy of one's own: token and frame scores from one dense layer."""
import flax.linen as nn
import jax.numpy as jnp
from cacovid_jax.policy import network

class Own(nn.Module):
  width: int

  @classmethod
  def from_llm_config(cls, llm, **options):
    return cls(llm.hidden_size)

  @nn.compact
  def __call__(self, x, positions, video_rows, grid, length=None):
    v = x[video_rows].astype(jnp.float32)
    frames = v.reshape(grid[0], -1, self.width).mean(axis=1)
    return network.Scores(
      frame=nn.Dense(2, name="frames")(frames),
      token=nn.Dense(2, name="tokens")(v),
    )

  @nn.nowrap
  def init_from_llm(self, rng, llm_params):
    x = jnp.zeros((2, self.width))
    rows = jnp.zeros(1, jnp.int32)
    return self.init(rng, x, None, rows, (1, 1, 1))["params"]
'''


def test_a_users_own_policy_validation_and_best(tmp_path):
  file = tmp_path / "own.py"
  file.write_text(_OWN_POLICY)
  config = tiny.config(
    **{
      "policy.module": f"{file}:Own",
      "total_steps": 3,
      "iterations": 1,
      "validation.every_steps": 1,
    }
  )
  accuracies = iter([0.2, 0.6, 0.4])
  seen = []

  def validate(policy, params):
    seen.append(params)
    assert type(policy).__name__ == "Own"
    return {"accuracy": next(accuracies)}

  result = tiny.train(tmp_path / "run", config, validate=validate)
  folder = tmp_path / "run" / "policy"
  described = json.loads((folder / "policy_config.json").read_text())
  assert described["policy"]["module"] == f"{file}:Own"
  digest = hashlib.sha256(_OWN_POLICY.encode()).hexdigest()
  assert described["module_sha256"] == digest
  assert json.loads((folder / "best.json").read_text()) == {
    "step": 2,
    "accuracy": 0.6,
  }
  best = loading.load(folder / "best.safetensors", result.policy, seen[1])
  assert_same(best, seen[1])
  assert set(loading.read(folder / "policy.safetensors")) == {
    "frames/bias",
    "frames/kernel",
    "tokens/bias",
    "tokens/kernel",
  }
  change = result.state.params["tokens"]["kernel"] - seen[0]["tokens"]["kernel"]
  # Unknown names get the heads' rate of 1e-2, about that much per update.
  assert np.abs(change).max() > 2e-3


def test_the_average_is_validated_kept_and_exported(tmp_path):
  changes = {
    "policy.module": "tests.policy.bilinear_policy:Bilinear",
    "iterations": 1,
    "ckpt.every_steps": 2,
    "validation.every_steps": 1,
    "mesh.data": 2,
    "mesh.model": 2,
  }
  seen = {"plain": [], "averaged": []}

  def train(name, **more):
    def validate(policy, params):
      seen[name].append(params)
      return {"accuracy": [0.2, 0.6, 0.5, 0.1][len(seen[name]) - 1]}

    config = tiny.config(**changes, **more)
    return tiny.train(tmp_path / name, config, validate=validate)

  plain = train("plain")
  whole = train("averaged", **{"optimizer.average": 0.7})
  # The run itself is the same, up to rounding in another program.
  close = functools.partial(chex.assert_trees_all_close, rtol=1e-2, atol=1e-4)
  close(whole.state.params, plain.state.params)
  for n, found in enumerate(seen["averaged"]):
    weights = 0.7 ** np.arange(n, -1, -1.0)
    expected = jax.tree.map(
      lambda *past, w=weights: np.average(past, axis=0, weights=w),
      *seen["plain"][: n + 1],
    )
    close(found, expected)
  folder = tmp_path / "averaged" / "policy"
  for name, n in (("best", 1), ("policy", 3)):
    path = folder / f"{name}.safetensors"
    loaded = loading.load(path, whole.policy, seen["averaged"][n])
    assert_same(loaded, seen["averaged"][n])
  # The average is in the checkpoint: a run from the middle is the same.
  shutil.rmtree(tmp_path / "averaged" / "checkpoints" / "4")
  del seen["averaged"][2:]
  again = train("averaged", **{"optimizer.average": 0.7})
  assert len(seen["averaged"]) == 4
  assert_same(again.state, whole.state)


def test_the_first_of_several_processes_writes_the_best(tmp_path, monkeypatch):
  """Another one might find no folder yet."""
  run = types.SimpleNamespace(config=types.SimpleNamespace(policy=None))
  saver = loop._Saver(tiny.config(), tmp_path, run)
  told = []
  writer = types.SimpleNamespace(write_scalars=lambda *row: told.append(row))
  state = types.SimpleNamespace(final_params={})
  monkeypatch.setattr(jax, "process_index", lambda: 1)
  saver.keep_best(state, 1, writer, lambda policy, params: {"accuracy": 0.5})
  assert told == [(1, {"validation_accuracy": 0.5})]
  assert not list(tmp_path.iterdir())


def test_questions_without_letters_are_marked_on_the_host(tmp_path):
  rows = tiny.questions(2)
  rows += [
    tiny.question_lib.Question(
      id="n1",
      video="n.mp4",
      question="How many?",
      answer="3",
      problem_type=tiny.question_lib.NUMERICAL,
      prompt="How many?\n",
    )
  ]
  config = tiny.config(
    **{
      "total_steps": 1,
      "iterations": 1,
      "rollout.reward": "accuracy",
      "rollout.max_new_tokens": 2,
      "policy.module": "tests.policy.bilinear_policy:Bilinear",
    }
  )
  result = tiny.train(tmp_path, config, questions=rows)
  names = {name for _, name in result.run.programs.compile_seconds}
  assert "update" in names


def test_all_rungs_are_compiled_before_training_begins(tmp_path, capsys):
  config = tiny.config(
    **{
      "total_steps": 1,
      "iterations": 2,
      "ratio.adaptive": True,
      "ratio.rungs": (0.125, 0.25),
      "ratio.start": 0.125,
      "rollout.reward": "accuracy",
      "policy.module": "tests.policy.bilinear_policy:Bilinear",
    }
  )
  made = tiny.train(tmp_path, config).run.programs
  names = {"prepare_videos", "iterate_0", "iterate_1"}
  assert {name for _, name in made.compile_seconds} == names
  told = capsys.readouterr().err
  assert 0 < told.index("programs 3/3") < told.index("train 1/1")
  (line,) = metrics.read(tmp_path)
  # Of the step alone.
  assert 0 < line["seconds_per_step"]
  assert line["compile_seconds"] == sum(made.compile_seconds.values())


def test_a_run_of_one_step_compiles_no_other_length(tmp_path):
  config = tiny.config(
    **{
      "total_steps": 1,
      "iterations": 1,
      "data.prompt_rows": (64, 128, 400),
      "policy.module": "tests.policy.bilinear_policy:Bilinear",
    }
  )
  made = tiny.train(tmp_path, config).run.programs
  assert [shape.length for shape, _ in made.compile_seconds] == [
    tiny.NUM_VIDEO + 64
  ]


@pytest.mark.parametrize(
  "changes,message",
  [
    ({"videos_per_step": 3, "mesh.data": 2}, "videos_per_step=3"),
    ({"mesh.data": 16}, "16 devices"),
    ({"sampling.ratio": 0.001}, "keeps no token"),
    ({"sampling.ratio": 1.5}, "ratio is 1.5; it must be a number above"),
    ({"rollout.reward": "likelihood"}, "rollout.reward"),
    ({"policy.dtype": "float8"}, "policy.dtype is 'float8'; it must be one of"),
    ({"policy.backend": "cuda"}, "policy.backend is 'cuda'; it must be one of"),
    ({"policy.module": "nowhere.py:Own"}, "no file"),
    ({"iterations": 0}, "iterations"),
  ],
)
def test_mistakes_in_a_config_are_named(tmp_path, changes, message):
  with pytest.raises(errors.UserError, match=message):
    tiny.train(tmp_path, tiny.config(**changes))


def test_no_model_and_no_data_are_named(tmp_path):
  with pytest.raises(errors.UserError, match="config.model.path"):
    tiny.train(tmp_path / "a", checkpoint=None)
  with pytest.raises(errors.UserError, match="config.data.root"):
    tiny.train(tmp_path / "b", questions=None)
