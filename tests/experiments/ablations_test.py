"""Ablations: which rows there are, going on with them, and the table."""

import contextlib
import pathlib
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy

from cacovid_jax import (
  base_config,
  errors,
  experiment,
  files,
  json_lines,
  train,
)
from cacovid_jax import config as config_lib
from cacovid_jax.evals import results, statistics
from cacovid_jax.synthetic import build
from experiments import ablations
from tests.experiments import commands, quickstart_test

ROOT = pathlib.Path(__file__).parent.parent.parent
CONFIG = f"{ROOT}/configs/synthetic.py:debug"
SMALL = f"{ROOT}/configs/synthetic.py:size=small"


def run(workdir, *rows, overrides=(), **flags):
  """Runs these rows, with seed 42 unless the flags say otherwise."""
  flags = dict(config=CONFIG, workdir=workdir, seed=42) | flags
  words = [f"--{name}={value}" for name, value in flags.items()]
  words += [f"--row={name}" for name in rows]
  words += [f"--config.{text}" for text in overrides]
  ablations.main(ablations.COMMAND.parse(["ablations", *words]))


def recipes(config=SMALL):
  return ablations.read_recipes(commands.parse(ablations, config=config))


# Rows.


def test_every_departure_is_taken_back_alone():
  """All of them together lead from ours to the paper's, and back."""
  both = recipes()
  rows = ablations.make_rows(both)
  names = {}
  for name, sign, other in (("ours", "-", "paper"), ("paper", "+", "ours")):
    alone = {k: row for k, row in rows.items() if k.startswith(name + sign)}
    assert all(row.recipe == name for row in alone.values())
    changes = [row.changes for row in alone.values()]
    assert all(len(change) == 1 for change in changes)
    changes = {k: v for change in changes for k, v in change.items()}
    together = config_lib.replace(both[name], changes)
    assert config_lib.dumps(together) == config_lib.dumps(both[other])
    names[name] = {k.removeprefix(name + sign) for k in alone}
  assert names["ours"] == names["paper"]
  assert {"importance_ratio", "objective.kl_weight"} < names["ours"]


def test_the_papers_recipe_is_that_of_the_defaults():
  """But for rates, a ratio and a length that it does not use, and precision."""
  found = ablations.departures(recipes()["paper"], base_config.get_config())
  found.pop("policy.dtype", None)
  assert set(found) == {
    "optimizer.lr_heads", "optimizer.lr_layer",
    "rollout.max_new_tokens", "sampling.ratio",
  }  # fmt: skip


def test_a_row_of_ones_own_is_any_change_of_ours():
  text = "rollout.reward=log_likelihood;total_steps=7"
  row = ablations.make_rows(recipes(), [text])[text]
  assert row.recipe == "ours"
  assert row.changes == {"rollout.reward": "log_likelihood", "total_steps": 7}


def test_only_what_changes_training_is_trained_anew(tmp_path):
  both = recipes()
  rows = ablations.make_rows(both, other_base=experiment.SHIPPED_MODEL)

  def policy(name, seed=42):
    recipe = both[rows[name].recipe]
    return ablations.make_run(tmp_path, recipe, name, rows[name], seed).policy

  shared = ("dense_to_sparse", "twice_the_frames", "ours-importance_ratio")
  assert {policy(name) for name in shared} == {policy("ours")}
  assert policy("sparse_to_dense") == policy("sparse") != policy("ours")
  others = ("paper", "sparse", "ours-objective.kl_weight", "paper_rates_7b")
  different = {policy("ours"), policy("ours", 43), *map(policy, others)}
  assert len(different) == 6


# What is run.


class Measured:
  """Stands in for trainings: scores by hand, and who was asked for."""

  def __init__(self, *scores, fails=()):
    self.scores, self.fails, self.asked = scores, fails, []

  def __call__(self, run):
    self.asked.append((run.name, run.seed))
    if run.name in self.fails:
      raise errors.UserError("10 steps in a row were refused")
    number = len(self.asked) - 1
    found = self.scores[number % len(self.scores)]
    return {
      "all tokens": 0.75,
      "validation": None,
      "seconds": 100.0 + number,
      "clips": ["a", "a", "b", "c"],
      "scores": {"0.10": found, "0.05": found},
    }


@pytest.fixture
def measured(monkeypatch):
  made = Measured([1, 0, 0, 1])
  monkeypatch.setattr(ablations, "measure", made)
  return made


def cells(workdir, name):
  """Returns the cells of a row of table.md, from its number of seeds on."""
  lines = (workdir / "table.md").read_text().splitlines()
  (line,) = [line for line in lines if line.startswith(f"| {name} |")]
  return [cell.strip() for cell in line.split("|")[3:-1]]


def test_the_table_of_scores_written_by_hand(tmp_path, measured):
  """Two seeds: 50 and 100 % of ours, 25 and 50 % without the clamp."""
  measured.scores = ([1, 0, 0, 1], [1] * 4, [0, 0, 0, 1], [0, 0, 1, 1])
  run(tmp_path, "ours", "ours-ratio.adaptive", seed="42,43", ratios="0.1,0.05")
  ours = cells(tmp_path, "ours")
  # Of two values: their distance by the root of two.
  sd = 50 / 2**0.5
  mean = f"75.0 ± {sd:.1f}"
  assert ours == ["2", "100.5 ± 0.7", "75.0 ± 0.0", "", mean, mean]
  sample = statistics.Sample(("a", "a", "b", "c"))
  values = sample.difference([0, 0, 0.5, 1], [1, 0.5, 0.5, 1])
  difference, low, high = (100 * value for value in values)
  assert difference == -37.5
  text = f"37.5 ± {sd / 2:.1f} (-37.5 [{low:+.1f}, {high:+.1f}])"
  assert cells(tmp_path, "ours-ratio.adaptive")[-2:] == [text, text]
  assert cells(tmp_path, "paper") == ["0", "", "", "", "", ""]
  drawn = (tmp_path / "accuracy.svg").read_text()
  assert "ours-ratio.adaptive" in drawn and "paper" not in drawn
  assert "accuracy at 5% of the tokens" in drawn


def test_given_again_it_runs_what_is_missing(tmp_path, measured):
  run(tmp_path, "sparse", seed=43)
  run(tmp_path, rows="transfer", seed="42,43")
  names = {name for name, _ in measured.asked}
  assert names == {
    "sparse", "dense_to_sparse", "sparse_to_dense", "twice_the_frames"
  }  # fmt: skip
  assert measured.asked[:2] == [("sparse", 43), ("sparse", 42)]
  assert len(measured.asked) == len(set(measured.asked)) == 8
  before = (tmp_path / "table.md").read_bytes()
  # Seeds that this command does not name stay in the table.
  run(tmp_path, rows="transfer", seed=42)
  assert len(measured.asked) == 8
  assert (tmp_path / "table.md").read_bytes() == before


def test_a_row_that_fails_does_not_stop_the_others(tmp_path, measured):
  measured.fails = ("ours",)
  with pytest.raises(errors.UserError, match="1 of 2 failed, first .*ours/see"):
    run(tmp_path, "ours", "paper")
  text = (tmp_path / "table.md").read_text()
  assert "seed_42: 10 steps in a row were refused" in text
  assert cells(tmp_path, "paper")[0] == "1"
  measured.fails, measured.asked = (), []
  run(tmp_path, "ours", "paper")
  assert measured.asked == [("ours", 42)]
  assert "failed" not in (tmp_path / "table.md").read_text()


def test_a_row_of_another_process_is_left_to_it(tmp_path, monkeypatch):
  """It is tried at last, when the other one is gone."""
  other = contextlib.ExitStack()
  other.enter_context(files.claim(tmp_path / "ours" / "seed_42" / "row"))
  made = Measured([1, 0, 0, 1])

  def measure(run):
    other.close()
    return made(run)

  monkeypatch.setattr(ablations, "measure", measure)
  run(tmp_path, "ours", "paper")
  assert made.asked == [("paper", 42), ("ours", 42)]


def test_the_plan_runs_nothing(tmp_path, measured, capsys):
  flags = dict(config=SMALL, seconds_per_video=0.006, seconds_per_row=60)
  rows = ("ours", "ours-importance_ratio", "dense_to_sparse")
  run(tmp_path / "x", *rows, plan="true", **flags)
  told = capsys.readouterr().out
  # 16 000 videos take 1.6 minutes, once; each row a further one.
  assert "3 to run, 4.6 minutes" in told
  twice = "iterations=10"
  run(tmp_path / "x", twice, plan="true", also=twice, **flags)
  assert "1 to run, 4.2 minutes" in capsys.readouterr().out
  run(tmp_path / "x", **flags)
  assert "paper_rates_7b" in capsys.readouterr().out
  assert not measured.asked and not (tmp_path / "x").exists()


@pytest.mark.parametrize(
  "rows,flags,message",
  [
    (["ourz"], {}, "no row 'ourz'; --row is one of ours, ours-"),
    (["other_base"], {}, "no row 'other_base'; "),
    (["ours"], dict(other_base="nowhere"), "no config.json is there"),
    (["ours"], dict(also="iterations"), "write key.subkey=value"),
    (["ours"], dict(also="iteration=2"), "nearest: iterations"),
    (["ours"], dict(ratios="1.5"), "retention ratio 1.5 is outside"),
    (["ours"], dict(seconds_per_row=-1), "--seconds_per_row=-1"),
    (["ours"], dict(seed="a"), "--seed"),
    (["ours"], dict(rows="some"), "choose all or ablations or transfer"),
    (["ours"], dict(config=f"{ROOT}/configs/own_videos.py"), "'paper'"),
  ],
)
def test_mistakes_are_named_before_anything_runs(
  tmp_path, measured, rows, flags, message
):
  with pytest.raises(errors.UserError, match=message) as error:
    run(tmp_path / "x", *rows, **flags)
  assert "\n" not in str(error.value)
  assert not measured.asked and not (tmp_path / "x").exists()


def test_rows_of_another_recipe_are_refused(tmp_path, measured):
  run(tmp_path, "ours")
  with pytest.raises(errors.UserError, match="differs in asked, trained"):
    run(tmp_path, "paper", overrides=["objective.kl_weight=0.2"])
  assert measured.asked == [("ours", 42)]


# All of it, in its shortest form.


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  """Returns (workdir, overrides) of one training that three rows share."""
  folder = tmp_path_factory.mktemp("ablations")
  quickstart_test.write_base_model(folder / "base")
  shutil.copytree(folder / "base", folder / "other")
  path = folder / "other" / "model.safetensors"
  weights = safetensors.numpy.load_file(path)
  weights = {name: 2 * value for name, value in weights.items()}
  safetensors.numpy.save_file(weights, path)
  overrides = [
    f"model.path={folder / 'base'}",
    f"data.root={folder / 'dense'}",
    f"data.feature_cache={folder / 'features'}",
    "data.num_frames=8",
    "mesh.data=1",
    "evals.candidates.cacovid=cacovid",
    "data.decisive_file=",
    "prepare.clips=2,2,2,0",
  ]
  build.prepare(config_lib.load(CONFIG, overrides), num_workers=1)
  # Its tokens are those of 16 frames.
  (folder / "dense" / "decisive.jsonl").unlink()
  jax.config.update("jax_disable_most_optimizations", True)
  rows, flags = ("ours", "twice_the_frames", "other_base"), dict(ratios=0.1)
  flags |= dict(other_base=folder / "other", overrides=overrides)
  try:
    run(folder / "run", *rows, **flags)
  finally:
    jax.config.update("jax_disable_most_optimizations", False)
  return folder / "run", rows, flags


def read(workdir, name):
  folder = workdir / name / "seed_42"
  _, line = json_lines.look(folder / "row.jsonl", dict, "left out")
  return results.read(folder), line


def test_one_training_is_asked_in_three_ways(finished):
  workdir, rows, _ = finished
  (policy,) = (workdir / "policies").iterdir()
  config = config_lib.load(policy / "config.json")
  assert policy.name == config_lib.config_hash(config)
  for name, frames in zip(rows, (8, 16, 8), strict=True):
    out, line = read(workdir, name)
    assert out["grid"] == [frames, 7, 7]
    cell = out["methods"]["cacovid"]["0.10"]
    assert np.mean(line["scores"]["0.10"]) == pytest.approx(cell["accuracy"])
    assert len(line["clips"]) == cell["n"] and len(set(line["clips"])) == 2
    assert line["all tokens"] == out["vanilla"]["accuracy"]
    assert cells(workdir, name)[0] == "1"
  bases = [read(workdir, name)[0]["provenance"] for name in rows]
  assert bases[0]["policies"] == bases[2]["policies"]
  assert bases[0]["checkpoint"] == bases[1]["checkpoint"]
  assert bases[0]["checkpoint"] != bases[2]["checkpoint"]


def test_a_policy_that_is_there_is_not_trained_again(finished, monkeypatch):
  workdir, rows, flags = finished
  before = (workdir / "table.md").read_bytes()
  monkeypatch.setattr(train, "train", None)
  (workdir / "ours" / "seed_42" / "row.jsonl").unlink()
  run(workdir, *rows, **flags)
  assert (workdir / "table.md").read_bytes() == before


def test_seconds_are_those_of_all_steps(tmp_path):
  """Ten steps of 2 seconds, five of 3; validation has none."""
  lines = [
    {"step": 10, "seconds_per_step": 2.0},
    {"step": 10, "validation_accuracy": 0.5},
    {"step": 15, "seconds_per_step": 3.0},
  ]
  json_lines.append(tmp_path / "metrics.jsonl", lines)
  assert ablations.seconds_of(tmp_path) == 35
