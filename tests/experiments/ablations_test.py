"""Ablations: which rows there are, going on with them, and the table."""

import json
import pathlib
import shutil

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
from configs import common
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


def test_what_ours_and_the_papers_share_has_rows_of_the_public_code():
  rows = ablations.make_rows(recipes())
  public = common.released(None, family="qwen2_5_vl", sizes=("7b",))
  for name in ("public_decay", "public_frame_cap"):
    ((key, value),) = rows[name].changes.items()
    assert rows[name].recipe == rows[name].reference == "ours"
    assert config_lib.value_of(public, key) == value
    for recipe in recipes().values():
      assert config_lib.value_of(recipe, key) != value
    recipe = config_lib.replace(recipes()["ours"], rows[name].changes)
    assert experiment.Experiment.from_config(recipe)


def test_what_neither_recipe_has_are_rows_of_ours():
  both, added = recipes(), ablations.make_rows(recipes())
  added = {k: row for k, row in added.items() if k.startswith("ours+")}
  assert len(added) == 2
  for name, row in added.items():
    key = name.removeprefix("ours+")
    assert row.recipe == row.reference == "ours" and [*row.changes] == [key]
    usual = config_lib.value_of(base_config.get_config(), key)
    for recipe in both.values():
      assert config_lib.value_of(recipe, key) == usual != row.changes[key]
    recipe = config_lib.replace(both["ours"], row.changes)
    assert experiment.Experiment.from_config(recipe)


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


def folders(path, *names, also=(), seed=42):
  """Returns the folders of rows' evaluations and trainings."""
  both = recipes()
  rows = ablations.make_rows(both, also)
  made = [
    ablations.make_run(path, both[rows[n].recipe], n, rows[n], seed)
    for n in names
  ]
  return [run.folder for run in made], [run.policy for run in made]


def test_rows_of_ones_own_have_short_folders_of_their_own(tmp_path):
  """Two texts that differ in a sign, one with a path, one of 400 letters."""
  also = ["data.media=a/b", "data.media=a_b", f"data.media={'x' * 400}"]
  found, trained = folders(tmp_path, *also, also=also)
  assert len(set(found)) == len(set(trained)) == 3
  for folder in found:
    assert folder.parent.parent == tmp_path
    assert len(folder.parent.name) < 80
    assert folder.parent.name.startswith("data.media=")
  assert folders(tmp_path, "ours")[0] == [tmp_path / "ours" / "seed_42"]


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
    self.questions, self.keys = ["1", "2", "3", "4"], ("0.10", "0.05")

  def __call__(self, run, *, wait):
    self.asked.append((run.name, run.seed))
    if run.name in self.fails:
      raise errors.UserError("10 steps in a row were refused")
    number = len(self.asked) - 1
    found = self.scores[number % len(self.scores)]
    return {
      "all tokens": 0.75,
      "validation": None,
      "evidence": 0.25 + 0.5 * number,
      "seconds": 100.0 + number,
      "questions": self.questions,
      "clips": ["a", "a", "b", "c"],
      "scores": dict.fromkeys(self.keys, found),
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
  """Two seeds: 50 and 100 % of ours, 25 and 50 % of a fixed ratio."""
  measured.scores = ([1, 0, 0, 1], [1] * 4, [0, 0, 0, 1], [0, 0, 1, 1])
  run(tmp_path, "ours", "ours-ratio.adaptive", seed="42,43", ratios="0.1,0.05")
  ours = cells(tmp_path, "ours")
  # Of two values: their distance by the root of two.
  sd = 50 / 2**0.5
  mean = f"75.0 ± {sd:.1f}"
  evidence = f"50.0 ± {sd:.1f}"
  assert ours == ["2", "100.5 ± 0.7", "75.0 ± 0.0", "", evidence, mean, mean]
  sample = statistics.Sample(("a", "a", "b", "c"))
  values = sample.difference([0, 0, 0.5, 1], [1, 0.5, 0.5, 1])
  difference, low, high = (100 * value for value in values)
  assert difference == -37.5
  text = f"37.5 ± {sd / 2:.1f} (-37.5 [{low:+.1f}, {high:+.1f}])"
  assert cells(tmp_path, "ours-ratio.adaptive")[-2:] == [text, text]
  assert cells(tmp_path, "paper") == ["0", "", "", "", "", "", ""]
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
  with pytest.raises(errors.UserError, match="1 of 2 failed, see .*table.md"):
    run(tmp_path, "ours", "paper")
  text = (tmp_path / "table.md").read_text()
  assert "seed_42: 10 steps in a row were refused" in text
  assert cells(tmp_path, "paper")[0] == "1"
  measured.fails, measured.asked = (), []
  run(tmp_path, "ours", "paper")
  assert measured.asked == [("ours", 42)]
  assert "failed" not in (tmp_path / "table.md").read_text()


def test_a_failure_is_told_once(tmp_path, measured, capsys):
  measured.fails = ("ours",)
  with pytest.raises(errors.UserError, match="failed"):
    run(tmp_path, "ours")
  assert len(measured.asked) == 1
  told = "".join(capsys.readouterr())
  assert told.count("10 steps in a row were refused") == 1


def test_a_row_of_another_process_is_left_to_it(tmp_path, monkeypatch, capsys):
  """Its lock is waited for at last; nothing is told of it before."""
  made, claim, asked = Measured([1, 0, 0, 1]), files.claim, []
  monkeypatch.setattr(ablations, "measure", made)

  def refuse(path, *args, wait=False, **kwargs):
    if path.name == "row":
      asked.append((path.parent.parent.name, wait))
      if asked[-1] == ("ours", False):
        raise errors.TakenError("another process is writing")
    return claim(path, *args, wait=wait, **kwargs)

  monkeypatch.setattr(files, "claim", refuse)
  run(tmp_path, "ours", "paper")
  assert asked[:3] == [("ours", False), ("paper", False), ("ours", True)]
  assert made.asked == [("paper", 42), ("ours", 42)]
  assert "another process" not in "".join(capsys.readouterr())


@pytest.mark.parametrize("wait", [False, True])
def test_a_shared_training_is_waited_for_as_its_row_is(
  wait, tmp_path, monkeypatch
):
  def refuse(path, *, wait):
    raise errors.UserError(f"{path.parent.parent.name} {wait}")

  both = recipes()
  row = ablations.make_rows(both)["ours"]
  made = ablations.make_run(tmp_path, both["ours"], "ours", row, 42)
  monkeypatch.setattr(files, "claim", refuse)
  with pytest.raises(errors.UserError, match=f"policies {wait}"):
    ablations.measure(made, wait=wait)


def test_differences_are_of_the_seeds_that_both_have(tmp_path, measured):
  """Ours has two seeds, of 25 and 100 %; the other has the first, 75 %."""
  measured.scores = ([0, 0, 0, 1], [1] * 4, [1, 1, 0, 1])
  run(tmp_path, "ours", seed="42,43", ratios="0.1,0.05")
  run(tmp_path, "paper", ratios="0.1,0.05")
  sample = statistics.Sample(("a", "a", "b", "c"))
  low, high = (
    100 * x for x in sample.difference([1, 1, 0, 1], [0, 0, 0, 1])[1:]
  )
  assert (
    cells(tmp_path, "paper")[-1] == f"75.0 (+50.0 [{low:+.1f}, {high:+.1f}])"
  )


def test_other_questions_have_no_difference(tmp_path, measured):
  run(tmp_path, "ours", ratios="0.1,0.05")
  measured.questions = ["1", "2", "3", "5"]
  run(tmp_path, "paper", ratios="0.1,0.05")
  assert cells(tmp_path, "paper")[-2:] == ["50.0", "50.0"]
  # Of seeds of one row, they would make a false mean.
  measured.questions = ["1", "2", "3", "4"]
  with pytest.raises(errors.UserError, match="paper/seed_43: other questions"):
    run(tmp_path, "paper", seed=43, ratios="0.1,0.05")


def test_the_table_is_of_all_that_was_measured(tmp_path, measured):
  """Other seeds, a row of one's own and another base model, named before."""
  flags = dict(also="data.media=a/b", other_base=experiment.SHIPPED_MODEL)
  run(tmp_path, "ours", "data.media=a/b", "other_base", seed=7, **flags)
  run(tmp_path, "paper")
  assert cells(tmp_path, "ours")[0] == "1"
  assert cells(tmp_path, "data.media=a/b")[0] == "1"
  assert cells(tmp_path, "other_base")[0] == "1"
  assert "| data.media=a/b | data.media=a/b | 1 |" in (
    (tmp_path / "table.md").read_text()
  )


def test_a_ratio_has_one_name_in_head_and_chart(tmp_path, measured):
  """0.025 lies between two per cents; results.json calls it 0.03."""
  measured.keys = ("0.03",)
  run(tmp_path, "ours", ratios=0.025)
  assert "| 3% |" in (tmp_path / "table.md").read_text()
  assert "accuracy at 3% of" in (tmp_path / "accuracy.svg").read_text()


def test_the_plan_runs_nothing(tmp_path, measured, capsys):
  flags = dict(config=SMALL, seconds_per_video=0.006, seconds_per_row=60)
  rows = ("ours", "ours-importance_ratio", "dense_to_sparse")
  run(tmp_path / "x", *rows, plan="true", **flags)
  told = capsys.readouterr().out
  # 32 000 videos take 3.2 minutes, once; each row a further one.
  assert "3 to run, 6.2 minutes" in told
  twice = "iterations=10"
  run(tmp_path / "x", twice, plan="true", also=twice, **flags)
  assert "1 to run, 7.4 minutes" in capsys.readouterr().out
  run(tmp_path / "x", **flags)
  assert "paper_rates_7b" in capsys.readouterr().out
  assert not measured.asked and not (tmp_path / "x").exists()


@pytest.mark.parametrize(
  "rows,flags,message",
  [
    (["ourz"], {}, "no row 'ourz'; there are ours, ours-"),
    (["other_base"], {}, "no row 'other_base'; there are "),
    (["ours"], dict(other_base="nowhere"), "nowhere/model.safetensors is miss"),
    (["ours"], dict(also="iterations"), "write key.subkey=value"),
    (["ours"], dict(also="iteration=2"), "nearest: iterations"),
    (["ours"], dict(ratios="1.5"), "retention ratio 1.5 is outside"),
    (["ours"], dict(seconds_per_row=-1), "--seconds_per_row is -1"),
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
  with pytest.raises(errors.UserError, match="of another run: asked.config is"):
    run(tmp_path, "paper", overrides=["objective.kl_weight=0.2"])
  assert measured.asked == [("ours", 42)]


def test_rows_from_before_a_setting_are_known(tmp_path, measured):
  run(tmp_path, "ours")
  path = tmp_path / "ours" / "seed_42" / "row.json"
  row = json.loads(path.read_text())
  assert row["identity"]["evals"].pop("empty_frames") == "keep"
  del row["evidence"]  # Of a command that did not tell it.
  files.write_json(path, row)
  run(tmp_path, "ours")
  assert cells(tmp_path, "ours")[4] == ""
  assert measured.asked == [("ours", 42)]
  with pytest.raises(errors.UserError, match="empty_frames is 'keep' there"):
    run(tmp_path, "ours", overrides=["evals.empty_frames=drop"])


@pytest.fixture
def own_data(tmp_path):
  """Returns (folder, overrides) of a base model and a manifest beside it."""
  shutil.copytree(experiment.SHIPPED_MODEL, tmp_path / "base")
  (tmp_path / "dense").mkdir()
  files.write_json(tmp_path / "dense" / "manifest.json", {"seed": 0})
  return tmp_path, [
    f"model.path={tmp_path / 'base'}",
    f"data.root={tmp_path / 'dense'}",
  ]


@pytest.mark.parametrize("changed", ["base_model", "data"])
def test_what_was_measured_knows_what_it_was_made_from(
  changed, own_data, measured
):
  """Base model and data, at the same paths."""
  folder, overrides = own_data
  both = recipes()
  row = ablations.make_rows(both)["ours"]
  run(folder / "run", "ours", overrides=overrides)

  def policy():
    recipe = config_lib.replace(both["ours"], {}, overrides)
    ablations._weights.cache_clear()
    return ablations.make_run(folder, recipe, "ours", row, 42).policy

  before = policy()
  if changed == "data":
    files.write_json(folder / "dense" / "manifest.json", {"seed": 1})
  else:
    path = folder / "base" / "model.safetensors"
    weights = safetensors.numpy.load_file(path)
    name = min(weights)
    safetensors.numpy.save_file(weights | {name: weights[name] + 1}, path)
  assert policy() != before
  with pytest.raises(errors.UserError, match=f"run: asked.{changed}") as error:
    run(folder / "run", "paper", overrides=overrides)
  assert "\n" not in str(error.value)
  assert measured.asked == [("ours", 42)]


def test_data_may_come_after_a_row_that_lacked_it(own_data, measured):
  folder, overrides = own_data
  (folder / "dense" / "manifest.json").unlink()
  measured.fails = ("ours",)
  with pytest.raises(errors.UserError, match="failed"):
    run(folder / "run", "ours", overrides=overrides)
  files.write_json(folder / "dense" / "manifest.json", {"seed": 1})
  measured.fails = ()
  run(folder / "run", "ours", overrides=overrides)
  assert cells(folder / "run", "ours")[0] == "1"


@pytest.mark.parametrize("flags", [dict(rows="transfer"), dict(rows="all"), {}])
def test_transfer_is_from_dense_clips(flags, tmp_path, measured):
  """Of the variant sparse, "dense_to_sparse" would be neither."""
  config = f"{CONFIG},variant=sparse"
  with pytest.raises(errors.UserError, match="data.root=.*/sparse: transfer"):
    run(tmp_path / "x", config=config, **flags)
  assert not measured.asked and not (tmp_path / "x").exists()
  run(tmp_path / "x", "ours", config=config)
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
  rows, flags = ("ours", "twice_the_frames", "other_base"), dict(ratios=0.1)
  flags |= dict(other_base=folder / "other", overrides=overrides)
  run(folder / "run", *rows, **flags)
  return folder / "run", rows, flags


def read(workdir, name):
  folder = workdir / name / "seed_42"
  return results.read(folder), json.loads((folder / "row.json").read_text())


def test_one_training_is_asked_in_three_ways(finished):
  workdir, rows, _ = finished
  (policy,) = (workdir / "policies").iterdir()
  for name, frames in zip(rows, (8, 16, 8), strict=True):
    out, line = read(workdir, name)
    assert out["grid"] == [frames, 7, 7]
    # Decisive tokens were drawn for 16 frames.
    assert bool(out["frame_head"]) == (frames == 16)
    cell = out["methods"]["cacovid"]["0.10"]
    assert np.mean(line["scores"]["0.10"]) == pytest.approx(cell["accuracy"])
    assert len(line["clips"]) == cell["n"] and len(set(line["clips"])) == 2
    assert line["all tokens"] == out["vanilla"]["accuracy"]
    assert line["evidence"] == (out["frame_head"] or {}).get("hit")
    assert cells(workdir, name)[0] == "1"
  bases = [read(workdir, name)[0]["provenance"] for name in rows]
  assert bases[0]["policies"] == bases[2]["policies"]
  assert bases[0]["checkpoint"] == bases[1]["checkpoint"]
  assert bases[0]["checkpoint"] != bases[2]["checkpoint"]


def test_a_policy_that_is_there_is_not_trained_again(finished, monkeypatch):
  """Nor are scores those of options that were not chosen."""
  workdir, rows, flags = finished
  folder = workdir / "ours" / "seed_42"
  rows_there = json_lines.look(folder / "answers.jsonl", dict, "left out")
  other = {"method": "cacovid?importance_ratio=0.5"}
  others = [
    row | other | {"score": 1 - row["score"]}
    for row in rows_there
    if row.get("method") == "cacovid"
  ]
  assert others
  json_lines.append(folder / "answers.jsonl", others)
  before = (workdir / "table.md").read_bytes()
  monkeypatch.setattr(train, "train", None)
  (workdir / "ours" / "seed_42" / "row.json").unlink()
  run(workdir, *rows, **flags)
  assert (workdir / "table.md").read_bytes() == before
