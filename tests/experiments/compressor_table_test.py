"""The table of all compressors: its rows, its files, and going on with it."""

import csv
import json
import re
import shutil

import numpy as np
import pytest

from cacovid_jax import base_config, compressors, errors
from cacovid_jax import config as config_lib
from cacovid_jax.inference import methods as methods_lib
from cacovid_jax.models import checkpoints
from experiments import compressor_table
from tests.evals import charts_test, tiny
from tests.experiments import commands

MINE = """
import jax.numpy as jnp
from cacovid_jax.compressors import base

def strongest(features, *, grid, num_keep, text=None, aux=None, rng=None):
  return base.take_top(features, jnp.linalg.norm(features, axis=-1), num_keep)
"""
ROWS = ("cacovid", "random", "uniform", "fastv", "strongest")
RATIOS = ("0.50", "0.10")


@pytest.fixture(scope="module")
def make(tmp_path_factory):
  """Returns a function that makes a table in a folder below the one it has."""
  folder = tmp_path_factory.mktemp("table")
  for name in ("model", "data"):
    (folder / name).mkdir()
  model = tiny.write_checkpoint(folder / "model")
  (folder / "mine.py").write_text(MINE)
  flags = dict(
    smoke=True,
    data=tiny.write_data(folder / "data", num_clips=3, per_clip=2),
    model=model,
    policy=tiny.write_policy(folder / "policy", checkpoints.load(model)),
    methods=[*ROWS[:-1], f"{folder / 'mine.py'}:strongest"],
    ratios=RATIOS,
    seeds=[0, 1],
    batch_size=4,
    repeats=2,
  )
  # Reports have tests of their own.
  flags["config.evals.num_examples"] = 0

  def run(name, **changes):
    workdir = folder / name
    commands.run(compressor_table, workdir=workdir, **flags | changes)
    return workdir

  return run


@pytest.fixture(scope="module")
def made(make):
  return make("whole")


def read_csv(workdir):
  with open(workdir / "table.csv", encoding="utf-8", newline="") as f:
    return list(csv.DictReader(f))


def test_every_row_is_in_every_file(made):
  out = json.loads((made / "results.json").read_text())
  assert tuple(out["methods"]) == tuple(sorted(ROWS))  # JSON sorts its keys.
  assert all(tuple(sorted(row)) == ("0.10", "0.50")
             for row in out["methods"].values())  # fmt: skip
  found = [(row["method"], row["ratio"]) for row in read_csv(made)]
  expected = [(name, ratio) for name in ROWS for ratio in RATIOS]
  oracle = [("decisive_boxes (oracle)", ratio) for ratio in RATIOS]
  assert found == expected + oracle
  text = (made / "table.md").read_text()
  page = (made / "report.html").read_text()
  for name in ROWS:
    assert text.count(f"| {name} |") == len(RATIOS)
    assert name in page


def test_a_budget_that_cannot_be_met_says_why(made):
  """One of the three layers sees all 256 tokens."""
  lowest = np.ceil(1e4 * (256 + 2) / (3 * 256)) / 1e4
  out = json.loads((made / "results.json").read_text())
  cell = out["methods"]["fastv"]["0.10"]
  assert cell["minimum_ratio"] == lowest and "accuracy" not in cell
  assert f"use at least {lowest:.4f}" in cell["status"]
  # 384 tokens for three layers: 256, and 64 for each of the others.
  able = out["methods"]["fastv"]["0.50"]
  assert (able["kept_tokens"], able["equivalent_ratio"]) == (64, 0.5)
  (row,) = [
    row
    for row in read_csv(made)
    if (row["method"], row["ratio"]) == ("fastv", "0.10")
  ]
  assert row["status"] == cell["status"]
  assert float(row["minimum_ratio"]) == lowest
  assert row["accuracy"] == row["selection_ms"] == ""
  for name in ("table.md", "report.html"):
    assert cell["status"] in (made / name).read_text()


def test_numbers_agree_with_results(made):
  out = json.loads((made / "results.json").read_text())
  paired = {
    (entry["method"], entry["ratio"]): entry
    for entry in out["paired"]
    if entry["vs"] == "cacovid"
  }
  for row in read_csv(made)[: len(ROWS) * len(RATIOS)]:
    cell = out["methods"][row["method"]][row["ratio"]]
    if cell["status"] != "ok":
      continue
    assert float(row["accuracy"]) == cell["accuracy"]
    assert [float(row["ci_low"]), float(row["ci_high"])] == cell["ci95"]
    assert float(row["kept_tokens"]) == cell["kept_tokens"]
    assert int(row["seeds"]) == (2 if row["method"] == "random" else 1)
    if row["method"] != "cacovid":
      mean = paired[row["method"], row["ratio"]]["mean"]
      assert float(row["vs_cacovid"]) == mean
    # Of the rule, and of what it reads for itself alone.
    assert float(row["selection_ms"]) >= float(row["reads_ms"])
    assert (float(row["reads_ms"]) > 0) == (row["method"] == "cacovid")
    both = float(row["selection_ms"]) + float(row["answer_ms"])
    assert float(row["first_token_ms"]) > both
  # The policy's options are chosen on validation, as in an evaluation.
  assert out["chosen"]["cacovid"]["best"].startswith("cacovid?")


def test_the_report_shows_accuracy_over_time(made):
  page = (made / "report.html").read_text()
  chart = page[page.index("over milliseconds to the first token") :]
  chart = chart[: chart.index("</svg>")]
  out = json.loads((made / "results.json").read_text())
  able = ["vanilla"] + [
    name for name, row in out["methods"].items()
    for cell in row.values() if cell["status"] == "ok"
  ]  # fmt: skip
  shown = re.findall(r"<circle .*?<title>(.*?)</title>", chart)
  assert sorted(shown) == sorted(able) and able


def test_times_go_to_their_own_file(made):
  times = json.loads((made / "timings.json").read_text())
  measured = times["selection"]["milliseconds"]
  assert times["selection"]["repeats"] == 2
  assert set(measured["random"]) == set(RATIOS)
  assert set(measured["fastv"]) == {"0.50"}
  assert "milliseconds" not in (made / "results.json").read_text()


def test_the_picture_shows_something(made):
  """All methods, by name, and a title."""
  shown = charts_test.texts((made / "accuracy_over_time.svg").read_text())
  assert {*ROWS, "vanilla", "all tokens"} <= set(shown)
  assert any(name.endswith(", test: a point for each share kept")
             for name in shown)  # fmt: skip


def test_a_table_that_was_stopped_goes_on_to_the_same_bytes(made, make):
  """Killed in the middle of a line, with nothing but answers and times."""
  resumed = made.parent / "resumed"
  resumed.mkdir()
  lines = (made / "answers.jsonl").read_bytes().splitlines(keepends=True)
  cut = b"".join(lines[:-5]) + lines[-5][:30]
  (resumed / "answers.jsonl").write_bytes(cut)
  shutil.copy(made / compressor_table.LEDGER, resumed)
  make("resumed")
  for name in ("results.json", "answers.jsonl", "report.html", "table.csv",
               "table.md", "accuracy_over_time.svg"):  # fmt: skip
    assert (resumed / name).read_bytes() == (made / name).read_bytes(), name


def test_every_method_is_a_row_by_default():
  config = commands.parse(compressor_table, methods="+mine.py:strongest").config
  *specs, mine = config.evals.methods
  assert mine == "mine.py:strongest"
  labels = [methods_lib.split_label(spec)[0] for spec in specs]
  assert [name for name in labels if name in compressors.names()] == list(
    compressors.names()
  )
  assert set(labels) - set(compressors.names()) == set(
    compressor_table.VARIANTS
  )
  assert labels.index("cacovid_merged") == labels.index("cacovid") + 1


def test_a_chosen_method_of_ones_own_is_found_again():
  listed = ("folder/rule.py:mine?a=1", "folder/rule.py:mine?a=2")
  config = config_lib.replace(
    base_config.get_config(), {"evals.candidates": {"mine": listed}}
  )
  spec = compressor_table._chosen_spec(config.evals, "mine", "mine?a=2")
  assert spec == "folder/rule.py:mine?a=2"
  # What is chosen without a list reads as a spec does.
  best = "last_query?layer=3"
  assert compressor_table._chosen_spec(config.evals, "last_query", best) == best


def test_variants_are_what_they_say():
  found = {
    label: methods_lib.Method.parse(f"{label}={spec}")
    for label, spec in compressor_table.VARIANTS.items()
  }
  assert found["cacovid_merged"].compressor.options == {"merge": "nearest"}
  assert found["cacovid_merged"].needs == {"scores"}
  # Its second stage acts inside the language model.
  assert hasattr(found["prunevid_llm"].compressor, "plan")


@pytest.mark.parametrize(
  "changes,message",
  [
    (dict(seeds="a"), "--seeds"),
    (dict(ratios=[0.1, 1.5]), "1.5; it must be a number above 0"),
    (dict(methods="randon"), "did you mean random"),
    (dict(data="nowhere"), "no data in nowhere"),
    (dict(repeats=0), "--repeats is 0; it must be a whole number at least"),
  ],
)
def test_mistakes_are_named(make, changes, message):
  with pytest.raises(errors.UserError, match=message):
    make("mistaken", **changes)


def test_damaged_times_are_measured_again(made, make):
  damaged = made.parent / "damaged"
  damaged.mkdir()
  shutil.copy(made / "answers.jsonl", damaged)
  ledger = damaged / compressor_table.LEDGER
  ledger.write_text("{\n")
  make("damaged")
  assert ledger.with_name(f"{ledger.name}.damaged").read_text() == "{\n"
  first = (made / compressor_table.LEDGER).read_text().splitlines()
  again = ledger.read_text().splitlines()
  assert again[0] == first[0] and len(again) == len(first)


def test_times_of_another_machine_or_number_of_runs_are_measured_anew(
  made, make
):
  other = made.parent / "other"
  other.mkdir()
  shutil.copy(made / "answers.jsonl", other)
  lines = (made / compressor_table.LEDGER).read_text().splitlines()
  run = json.loads(lines[0])
  run["run"]["repeats"] += 1
  del run["crc"]
  kept = [json.dumps(run), *lines[1:-1], "{}"]
  (other / compressor_table.LEDGER).write_text("\n".join(kept))
  make("other")
  again = (other / compressor_table.LEDGER).read_text().splitlines()
  assert again[0] == lines[0] and len(again) == len(lines)
