"""A sweep: its runs, going on with them, and the table over seeds."""

import csv
import json
import pathlib
import subprocess

import pytest

import tests
from cacovid_jax import config as config_lib
from cacovid_jax import errors
from cacovid_jax.synthetic import build
from experiments import sweep
from tests.experiments import quickstart_test

ROOT = pathlib.Path(__file__).parent.parent.parent
CONFIG = f"{ROOT}/configs/synthetic.py:debug"


@pytest.fixture(scope="module")
def overrides(tmp_path_factory):
  """Returns overrides of the quickstart's config: a tiny model, few clips."""
  folder = tmp_path_factory.mktemp("sweep")
  quickstart_test.write_base_model(folder / "base_model")
  found = [
    f"model.path={folder / 'base_model'}",
    f"data.root={folder / 'data'}",
    f"data.feature_cache={folder / 'features'}",
    "prepare.clips=2,2,2,0",
  ]
  build.prepare(config_lib.load(CONFIG, found), num_workers=1)
  return found


def run(workdir, overrides=(), **changes):
  given = dict(config=CONFIG, seeds=[0, 1], workdir=workdir) | changes
  grid = given.pop("grid", ["optimizer.lr_heads=1e-3"])
  words = [f"--grid={text}" for text in grid]
  words += [f"--config.{text}" for text in overrides]
  for name, value in given.items():
    if isinstance(value, list):
      value = ",".join(map(str, value))
    if value is not None:
      words.append(f"--{name}={value}")
  sweep.main(sweep.COMMAND.parse(["sweep", *words]))


TRAINED_ONLY = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from configs import synthetic

def get_config(arg=None):
  config = synthetic.get_config("debug")
  del config["evals"]
  return config
"""


@pytest.fixture(scope="module")
def finished(overrides, tmp_path_factory):
  """Returns the folder of two runs that differ in their seed."""
  workdir = tmp_path_factory.mktemp("rates")
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("PYTHONPATH", str(ROOT))
    patch.setenv("XLA_FLAGS", tests.xla_flags())
    # The second run compiles nothing that the first one did.
    patch.setenv("JAX_COMPILATION_CACHE_DIR", str(workdir.parent / "compiled"))
    patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    (workdir / "config.py").write_text(TRAINED_ONLY)
    run(workdir, overrides, config=str(workdir / "config.py"))
  return workdir


def test_every_run_is_trained(finished):
  point = finished / "optimizer.lr_heads=1e-3"
  policies, rewards = set(), []
  for seed in (0, 1):
    folder = point / f"seed_{seed}"
    config = config_lib.load(folder / "config.json")
    assert (config.seed, config.optimizer.lr_heads) == (seed, 1e-3)
    policies.add((folder / "policy" / "policy.safetensors").read_bytes())
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    rewards.append(json.loads(lines[-1])["reward_token"])
  assert len(policies) == 2
  with open(finished / "table.csv", encoding="utf-8", newline="") as f:
    (row,) = csv.DictReader(f)
  a, b = rewards
  assert float(row["reward_token"]) == pytest.approx((a + b) / 2, abs=1e-5)
  # Of two values: their distance by the root of two.
  spread = abs(a - b) / 2**0.5
  assert float(row["reward_token_sd"]) == pytest.approx(spread, abs=1e-5)
  assert row["optimizer.lr_heads"] == "1e-3" and row["seeds"] == "2"


def test_given_again_nothing_is_run(finished, overrides, monkeypatch, capsys):
  config = {"config": str(finished / "config.py")}
  monkeypatch.setattr(subprocess, "Popen", None)
  before = (finished / "table.md").read_bytes()
  run(finished, overrides, **config)
  assert (finished / "table.md").read_bytes() == before
  capsys.readouterr()
  run(finished, overrides, dry_run=True, seeds=[0, 1, 2], **config)
  states = [line.split()[1:-1] for line in capsys.readouterr().out.splitlines()]
  assert states == [["done"], ["done"], ["to", "do"]]
  # Another config, though only in what may change between two starts.
  run(finished, [*overrides, "log_every=7"], dry_run=True, **config)
  assert "done" not in capsys.readouterr().out


class Processes:
  """Stands in for subprocesses; records commands, ends with given codes."""

  def __init__(self, codes=()):
    self.codes, self.commands = list(codes), []

  def __call__(self, command):
    self.commands.append(command)
    workdir = command[-1].removeprefix("--workdir=")
    pathlib.Path(workdir).mkdir(parents=True, exist_ok=True)
    return self

  def wait(self):
    return self.codes.pop(0) if self.codes else 0


def test_a_run_that_fails_does_not_stop_the_others(tmp_path, monkeypatch):
  """The second of four: its evaluation is not asked for, and it has no mark."""
  made = Processes([0, 0, 1])
  monkeypatch.setattr(subprocess, "Popen", made)
  grid = ["optimizer.lr_heads=1e-3,2e-3"]
  with pytest.raises(
    errors.UserError, match="1 of 4 runs failed, first .*=1e-3"
  ):
    run(tmp_path, grid=grid)
  assert [command[2] for command in made.commands] == [
    "cacovid_jax.train", "cacovid_jax.evaluate", "cacovid_jax.train",
    "cacovid_jax.train", "cacovid_jax.evaluate", "cacovid_jax.train",
    "cacovid_jax.evaluate",
  ]  # fmt: skip
  assert len((tmp_path / "table.csv").read_text().splitlines()) == 3
  again = Processes()
  monkeypatch.setattr(subprocess, "Popen", again)
  run(tmp_path, grid=grid)
  assert len(again.commands) == 2
  assert again.commands[0][-1] == made.commands[2][-1]


@pytest.mark.parametrize("code", [143, -15])
def test_a_signal_ends_the_sweep(tmp_path, monkeypatch, code):
  made = Processes([code])
  monkeypatch.setattr(subprocess, "Popen", made)
  with pytest.raises(SystemExit) as ended:
    run(tmp_path)
  assert ended.value.code == 143 and len(made.commands) == 1
  assert not (tmp_path / "table.md").exists()


def test_the_job_array_runs_what_the_sweep_runs(tmp_path, monkeypatch, capsys):
  run(tmp_path, grid=["optimizer.lr_heads=1e-3,2e-3"], slurm=True)
  script = capsys.readouterr().out
  assert script.startswith("#SBATCH --array=0-3\n")
  # Each task by a shell, with commands that only tell their arguments.
  said = []
  for task in range(4):
    done = subprocess.run(
      ["bash", "-c", "python() { printf '%s\\n' \"$@\"; }\n" + script],
      env={"SLURM_ARRAY_TASK_ID": str(task)},
      cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "No such file" in done.stderr  # No run has made its folder.
    said.append(done.stdout.splitlines())
  made = Processes()
  monkeypatch.setattr(subprocess, "Popen", made)
  run(tmp_path, grid=["optimizer.lr_heads=1e-3,2e-3"])
  commands = [command[1:] for command in made.commands]
  assert said == [commands[2 * i] + commands[2 * i + 1] for i in range(4)]


def test_a_table_of_numbers_written_by_hand(tmp_path):
  """20 steps: the last tenth are two. Three seeds, one without accuracy."""
  runs = []
  for seed, last in enumerate((0.2, 0.4, 0.9)):
    folder = tmp_path / f"seed_{seed}"
    folder.mkdir()
    lines = [{"step": i, "reward_token": 0.0} for i in range(1, 19)]
    lines += [{"step": i, "reward_token": last} for i in (19, 20)]
    (folder / "metrics.jsonl").write_text(
      "".join(json.dumps(line) + "\n" for line in lines)
    )
    if seed:
      cell = {"status": "ok", "accuracy": 0.25 * seed}
      out = {"methods": {"cacovid": {"0.10": cell, "0.05": {"status": "no"}}}}
      (folder / "results.json").write_text(json.dumps(out))
    runs.append(sweep.PointRun({"a.b": "x|y"}, seed, folder, "", ()))
  text = sweep.write_table(tmp_path, runs)
  assert text.splitlines()[2] == ("| x\\|y | 3 | 0.5 ± 0.36 | 37.5 ± 18 |")
  assert text == (tmp_path / "table.md").read_text()


@pytest.mark.parametrize(
  "changes,message",
  [
    (dict(config=None), "no config given"),
    (dict(grid=["optimizer.lr=1"]), "unknown config key 'optimizer.lr'"),
    (dict(grid=["total_steps=few"]), "total_steps=few is not a whole number"),
    (dict(grid=["total_steps"]), "write KEY=VALUE,VALUE"),
    (dict(grid=["total_steps=1,"]), "write KEY=VALUE,VALUE"),
    (dict(grid=["seed=1,2"]), "--seeds=0,1,2"),
    (dict(grid=["total_steps=1", "total_steps=2"]), "names total_steps twice"),
    (dict(grid=["total_steps=10,1e1"]), "lists a value twice"),
    (dict(seeds=[0, 0]), "lists a value twice"),
    (dict(seeds="a"), "--seeds"),
  ],
)
def test_mistakes_are_named_before_anything_runs(tmp_path, changes, message):
  with pytest.raises(errors.UserError, match=message):
    run(tmp_path / "sweep", **changes)
  assert not (tmp_path / "sweep").exists()


def test_values_that_hold_commas():
  found = sweep.parse_grid(["ratio.rungs=(0.02, 0.05);(0.1, 0.2)", "seed_=1"])
  assert found == {
    "ratio.rungs": ["(0.02, 0.05)", "(0.1, 0.2)"],
    "seed_": ["1"],
  }
