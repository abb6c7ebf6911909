"""The efficiency table: rows, counts, files, and what the paper says."""

import csv
import dataclasses
import json

import jax
import numpy as np
import pytest
from absl.testing import flagsaver
from PIL import Image

from cacovid_jax import compressors, errors
from cacovid_jax.evals import paper, runner
from experiments import efficiency_files, efficiency_table

METHODS = ["cacovid", "uniform", "fastv"]
FILES = set(efficiency_files.NAMES)


@pytest.fixture(scope="module")
def make(tmp_path_factory):
  folder = tmp_path_factory.mktemp("efficiency")

  def run(**changes):
    flags = dict(
      table_size="tiny",
      table_workdir=str(folder / "table"),
      table_methods=METHODS,
      table_ratios=["0.5", "0.2"],
      timing_repeats=1,
    )
    with flagsaver.flagsaver(**flags | changes):
      efficiency_table.main(["efficiency_table"])
    return folder / "table"

  jax.config.update("jax_disable_most_optimizations", True)
  yield run
  jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def made(make):
  return make()


def read(made):
  return json.loads((made / "results.json").read_text())


def test_every_method_has_a_row_at_every_ratio(made):
  out = read(made)
  found = [(row["method"], row["ratio"]) for row in out["rows"]]
  assert found == [("vanilla", 1.0)] + [
    (name, ratio) for ratio in (0.5, 0.2) for name in METHODS
  ]
  assert {path.name for path in made.iterdir()} == FILES | {"weights"}
  assert (out["dtype"], out["grid"]) == ("float32", [8, 4, 4])
  # 75 tokens of text, 128 of the video and the newline behind it.
  assert out["prompt_rows"] == 204
  assert {"jax", "flax"} <= set(out["packages"]) and out["host"]["device"]


def test_a_budget_that_cannot_be_met_says_why(made):
  """One of three layers sees everything: at least a third."""
  (row,) = [
    row for row in read(made)["rows"]
    if (row["method"], row["ratio"]) == ("fastv", 0.2)
  ]  # fmt: skip
  assert "use at least" in row["status"] and "prefill_ms" not in row
  assert row["status"] in (made / "table.md").read_text()


def test_times_add_up(made):
  out = read(made)
  shared = out["tower_ms"] + out["embed_ms"]
  for row in out["rows"]:
    if row["status"] != "ok":
      continue
    compression = row["rule_ms"] + row["reads_ms"]
    assert row["compression_ms"] == pytest.approx(compression, abs=1e-3)
    both = compression + row["prefill_ms"]
    assert row["total_ms"] == pytest.approx(both, abs=1e-3)
    assert row["first_token_ms"] == pytest.approx(both + shared, abs=2e-3)
    assert row["prefill_ms"] > 0
    # The policy is read; other rules look at what is there already.
    assert (row["reads_ms"] > 0) == (row["method"] == "cacovid")


def test_counts_are_those_of_the_tokens_kept(made):
  """Two matrices each of 32 x 32 and 32 x 16, three of 32 x 48, by hand."""
  rows = {(r["method"], r["ratio"]): r for r in read(made)["rows"]}

  def flops(layers):
    weights = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48
    per_layer = [2 * n * weights + 4 * n * n * 32 for n in layers]
    return sum(per_layer) + 2 * 32 * 64

  # 76 rows around the video; FastV's first layer sees all 128 tokens.
  for name, layers in (
    ("uniform", [140, 140, 140]),
    ("fastv", [204, 108, 108]),
  ):
    row = rows[name, 0.5]
    assert row["prefill_tflops"] == pytest.approx(flops(layers) / 1e12)
    # Keys and values of 2 heads of 8 in float32.
    assert row["kv_mib"] == pytest.approx(sum(layers) * 2 * 16 * 4 / 2**20)
    assert row["kept_tokens"] == 64
  assert rows["vanilla", 1.0]["kept_tokens"] == 128
  assert rows["uniform", 0.2]["kept_tokens"] == 25


def test_the_csv_and_the_picture(made):
  with open(made / "table.csv", encoding="utf-8", newline="") as f:
    rows = list(csv.DictReader(f))
  for row, written in zip(read(made)["rows"], rows, strict=True):
    for name, value in row.items():
      assert written[name] == str(value)
  image = np.asarray(Image.open(made / "prefill.png").convert("L"))
  assert 0.005 < (image < 200).mean() < 0.6


def test_weights_are_drawn_once(made, make):
  before = (made / "weights" / "config.json").stat().st_mtime_ns
  make(table_methods=["uniform"], table_ratios=["0.5"])
  assert (made / "weights" / "config.json").stat().st_mtime_ns == before
  with pytest.raises(errors.UserError, match="holds another model"):
    make(table_size="qwen-tiny")


def test_the_other_family_is_timed_as_well(tmp_path, make):
  make(
    table_size="qwen-tiny",
    table_workdir=str(tmp_path),
    table_methods=["uniform"],
    table_ratios=["0.5"],
  )
  out = read(tmp_path)
  # No newline behind the video.
  assert (out["grid"], out["prompt_rows"]) == ([4, 4, 6], 75 + 96)
  assert out["rows"][1]["kept_tokens"] == 48


def test_the_papers_times_stand_beside_its_own_model_and_ratio():
  out = {"rows": []}
  released = efficiency_table.SIZES["ov-7b"]
  for size, name, ratio, expected in (
    (released, "vanilla", 1.0, {"paper_prefill_ms": 200.4}),
    (released, "cacovid", 0.25,
     {"paper_compression_ms": 11.2, "paper_prefill_ms": 53.2}),
    (released, "divprune", 0.25,
     {"paper_compression_ms": 134.3, "paper_prefill_ms": 53.2}),
    (released, "cacovid", 0.1, {}),
    (released, "fastv", 0.25, {}),
    (dataclasses.replace(released, paper=""), "cacovid", 0.25, {}),
  ):  # fmt: skip
    row = {"method": name, "ratio": ratio}
    efficiency_table._append(out, row, size, None)
    assert row == {"method": name, "ratio": ratio, **expected}
  assert paper.COMPRESSION_MS["prunevid"] == 34.1


def test_every_method_is_a_row_by_default():
  labels = [
    runner.split_label(spec)[0] for spec in efficiency_table.default_rows()
  ]
  known = set(compressors.names()) - set(efficiency_table._LEFT_OUT)
  assert set(labels) == known | set(efficiency_table.VARIANTS)
  assert {row.method for row in paper.ROWS} - {"vanilla"} <= set(labels)


@pytest.mark.parametrize("name", efficiency_table.SIZES)
def test_videos_fit_the_models(name):
  size = efficiency_table.SIZES[name]
  config = size.config()
  if hasattr(config, "pooled_side"):
    assert size.grid[1:] == (config.pooled_side,) * 2
  assert size.paper in ("", paper.model_of(config))


@pytest.mark.parametrize(
  "changes,message",
  [
    (dict(table_ratios=["2"]), "outside"),
    (dict(table_methods=["fastw"]), "did you mean"),
    (dict(table_methods=["decisive_boxes"]), "knows where the answer lies"),
  ],
)
def test_mistakes_are_named(make, changes, message):
  with pytest.raises(errors.UserError, match=message):
    make(**changes)
