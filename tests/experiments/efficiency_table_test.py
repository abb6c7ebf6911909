"""The efficiency table: rows, counts, files, and what the paper says."""

import csv
import dataclasses
import json

import jax
import pytest

from cacovid_jax import compressors, errors
from cacovid_jax.data import answer_log
from cacovid_jax.evals import latency, paper, tables, timing
from cacovid_jax.inference import methods as methods_lib
from cacovid_jax.models import checkpoints
from cacovid_jax.synthetic import tiny_checkpoints
from experiments import efficiency_table, made_up
from tests.evals import charts_test
from tests.experiments import commands

METHODS = ["cacovid", "uniform", "fastv"]
FILES = {*tables.EFFICIENCY_FILES, "results.json"}


@pytest.fixture(scope="module")
def make(tmp_path_factory):
  folder = tmp_path_factory.mktemp("efficiency")

  def run(**changes):
    flags = dict(
      size="tiny",
      workdir=folder / "table",
      methods=METHODS,
      ratios=[0.5, 0.2],
      repeats=1,
      stages="",
    )
    commands.run(efficiency_table, **flags | changes)
    return folder / "table"

  return run


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
  assert {path.name for path in made.iterdir()} == FILES | {
    "weights",
    "rows.jsonl",
  }
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
    assert len(row.pop("git_commit", "-" * 40)) >= 7
    for name, value in row.items():
      assert written[name] == str(value)
  shown = charts_test.texts((made / "prefill.svg").read_text())
  assert {"vanilla, 100%", "cacovid, 50%", "fastv, 50%"} <= set(shown)
  assert {"tower and prompt", "choosing tokens", "prefill"} <= set(shown)
  # FastV could not be run there.
  assert "fastv, 20%" not in shown


def test_weights_are_drawn_once(made, make):
  before = (made / "weights" / "config.json").stat().st_mtime_ns
  make(methods="uniform", ratios=0.5)
  assert (made / "weights" / "config.json").stat().st_mtime_ns == before
  with pytest.raises(errors.UserError, match="another run .*grid.* size"):
    make(size="qwen-tiny")
  with pytest.raises(errors.UserError, match="holds another model"):
    make(
      size="qwen-tiny", workdir=made.parent / "other", weights=made / "weights"
    )


def test_the_weights_are_told(made):
  sha256 = checkpoints.identity(str(made / "weights"))["sha256"]
  expected = {"size": "tiny", "seed": 0, "sha256": sha256}
  assert read(made)["checkpoint"] == expected


@pytest.fixture(scope="module")
def subject(made):
  size = efficiency_table.SIZES["tiny"]
  checkpoint = made_up.checkpoint(size.config(), size.dtype, made / "weights")
  return made_up.subject(checkpoint, size.grid)


@pytest.fixture
def timed(subject, tmp_path, monkeypatch):
  """Returns (calls, f(specs, path) -> results); nothing is really run."""
  calls, trouble = [], {}

  def cost(self, method, ratio):
    if method is None:
      return latency.Cost(0.0, answer=self.vanilla())
    calls.append((method.label, ratio))
    if method.label in trouble:
      raise trouble[method.label]
    return latency.Cost(float(len(calls)), 2.0, 3.0)

  def vanilla(self):
    calls.append("vanilla")
    return 10.0

  monkeypatch.setattr(latency.Stopwatch, "cost", cost)
  monkeypatch.setattr(latency.Stopwatch, "vanilla", vanilla)
  monkeypatch.setattr(latency.Stopwatch, "embed", lambda self: 1.0)

  def measure(function, repeats):
    calls.append("tower")
    return timing.Timing.of([5.0])

  monkeypatch.setattr(timing, "measure", measure)

  def run(*specs, path=tmp_path / "rows.jsonl", repeats=1):
    methods = [methods_lib.Method.parse(spec) for spec in specs]
    identity = efficiency_table.run_of("tiny", repeats)
    with answer_log.AnswerLog(path, identity) as rows:
      return efficiency_table.measure(
        subject, "tiny", methods, (0.5, 0.25), repeats, rows
      )

  return calls, trouble, run


def test_a_table_that_was_stopped_measures_the_rest(timed, tmp_path):
  """Killed at the fourth row; the last line is cut off."""
  calls, trouble, run = timed
  whole = run("uniform", "divprune", path=tmp_path / "whole.jsonl")
  assert calls == ["tower", "vanilla", ("uniform", 0.5), ("divprune", 0.5),
                   ("uniform", 0.25), ("divprune", 0.25)]  # fmt: skip
  calls.clear()
  trouble["divprune"] = KeyboardInterrupt()
  with pytest.raises(KeyboardInterrupt):
    run("uniform", "divprune")
  assert calls == ["tower", "vanilla", ("uniform", 0.5), ("divprune", 0.5)]
  with open(tmp_path / "rows.jsonl", "a") as f:
    f.write('{"method": "divpr')
  trouble.clear()
  again = run("uniform", "divprune")
  assert calls[4:] == [("divprune", 0.5), ("uniform", 0.25), ("divprune", 0.25)]
  for first, second in zip(whole["rows"][:2], again["rows"][:2], strict=True):
    assert first["prefill_ms"] == second["prefill_ms"]
  assert [row["rule_ms"] for row in again["rows"]] == [0.0, 3.0, 5.0, 6.0, 7.0]
  # Other options are another row, whatever its label is.
  run("uniform", "divprune=divprune?exact_budget=True")
  assert calls[7:] == [("divprune", 0.5), ("divprune", 0.25)]


def test_a_row_out_of_memory_keeps_its_reason(timed, tmp_path):
  calls, trouble, run = timed
  trouble["divprune"] = jax.errors.JaxRuntimeError(
    "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 3 bytes."
  )
  out = run("divprune", "uniform")
  status = {(r["method"], r["ratio"]): r["status"] for r in out["rows"]}
  assert status["uniform", 0.25] == "ok"
  reason = status["divprune", 0.5]
  assert reason.startswith("out of the device's memory (RESOURCE_EXHAUSTED: ")
  out["size"] = "tiny"
  assert reason in tables.efficiency_markdown(out)
  # It is tried again, on a device with more of it.
  trouble.clear()
  calls.clear()
  out = run("divprune", "uniform")
  assert {row["status"] for row in out["rows"]} == {"ok"}
  assert calls == [("divprune", 0.5), ("divprune", 0.25)]
  trouble["fastv"] = jax.errors.JaxRuntimeError("INTERNAL: a bug")
  with pytest.raises(jax.errors.JaxRuntimeError, match="a bug"):
    run("fastv")


def test_a_table_without_a_vanilla_row_is_written(timed, tmp_path, monkeypatch):
  _, _, run = timed

  def vanilla(self):
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

  monkeypatch.setattr(latency.Stopwatch, "vanilla", vanilla)
  out = run("uniform")
  assert out["rows"][0]["status"].startswith("out of the device's memory")
  tables.write_efficiency(tmp_path, out)
  assert "| uniform | 50% | 64 |" in (tmp_path / "table.md").read_text()


def test_times_of_another_run_are_not_mixed(timed, subject, tmp_path):
  _, _, run = timed
  run("uniform")
  with pytest.raises(errors.UserError, match="another run .differs in repeats"):
    run("uniform", repeats=2)
  checkpoint = dataclasses.replace(
    subject.checkpoint, identity={"sha256": "0" * 64}
  )
  other = dataclasses.replace(subject, checkpoint=checkpoint)
  identity = efficiency_table.run_of("tiny", 1)
  with (
    answer_log.AnswerLog(tmp_path / "rows.jsonl", identity) as rows,
    pytest.raises(errors.UserError, match="not the weights that earlier rows"),
  ):
    efficiency_table.measure(other, "tiny", [], (0.5,), 1, rows)


def test_one_process_at_a_time(tmp_path, make):
  identity = efficiency_table.run_of("tiny", 1)
  with (
    answer_log.AnswerLog(tmp_path / "rows.jsonl", identity),
    pytest.raises(errors.UserError, match="another process is writing to"),
  ):
    make(workdir=tmp_path)
  assert {path.name for path in tmp_path.iterdir()} == {"rows.jsonl"}


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_a_place_that_is_taken_is_refused_before_drawing(
  tmp_path, make, monkeypatch, kind
):
  drawn = []
  monkeypatch.setattr(
    tiny_checkpoints, "write_random", lambda *args: drawn.append(args)
  )
  taken = tmp_path / "taken"
  if kind == "folder":
    taken.mkdir()
    (taken / "thesis.tex").write_text("years of work")
  else:
    taken.write_text("years of work")
  with pytest.raises(errors.UserError, match="taken holds something else than"):
    make(workdir=tmp_path / "table", weights=taken)
  assert not drawn


def test_a_dry_run_counts_what_is_measured(made, make, tmp_path, capsys):
  folder = tmp_path / "dry"
  told = []
  with pytest.MonkeyPatch.context() as patch:
    real = efficiency_table.dry_run
    patch.setattr(
      efficiency_table, "dry_run", lambda *args: told.append(real(*args))
    )
    make(
      workdir=folder, dry_run=True, tflops=0.5, gbps=1.0,
      methods=["uniform", "fastv"], repeats=3,
    )  # fmt: skip
  assert not folder.exists() and "MiB" in capsys.readouterr().out
  (out,) = told
  # Two matrices each of 32 x 32 and 32 x 16, three of 32 x 48, three layers.
  weights = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48
  rows = {(row["method"], row["ratio"]): row for row in out["rows"]}
  flops = 3 * (2 * 140 * weights + 4 * 140**2 * 32) + 2 * 32 * 64
  row = rows["uniform", 0.5]
  assert row["prefill_tflops"] == pytest.approx(flops / 1e12)
  assert row["prefill_ms"] == pytest.approx(1e3 * flops / 0.5e12)
  assert row["kv_mib"] == pytest.approx(3 * 140 * 2 * 16 * 4 / 2**20)
  assert rows["fastv", 0.2]["status"] == "cannot be run at this ratio"
  prefills = sum(row.get("prefill_ms", 0) for row in out["rows"]) / 1e3
  assert out["seconds"] > 4 * prefills
  files = (made / "weights").glob("*.safetensors")
  size = sum(path.stat().st_size for path in files)
  # Beside the headers, and what a file has and nothing reads.
  assert out["disk_bytes"] == pytest.approx(size, rel=0.2)


def test_the_other_family_is_timed_as_well(tmp_path, make):
  make(size="qwen-tiny", workdir=tmp_path, methods="uniform", ratios=0.5)
  out = read(tmp_path)
  # No newline behind the video.
  assert (out["grid"], out["prompt_rows"]) == ([4, 4, 6], 75 + 96)
  assert out["rows"][1]["kept_tokens"] == 48


def test_the_papers_times_stand_beside_its_own_methods_and_ratio():
  for spec, ratio, expected in (
    ("cacovid", 0.25, (11.2, 53.2)),
    ("cacovid=cacovid?importance_ratio=0.5", 0.25, (11.2, 53.2)),
    ("divprune", 0.25, (134.3, 53.2)),
    ("cacovid", 0.1, None),
    ("fastv", 0.25, None),
    # Other options, and another method, under the paper's name.
    ("cacovid=cacovid?importance_ratio=1.0", 0.25, None),
    ("prunevid=prunevid?llm_stage=True", 0.25, None),
    ("divprune=uniform", 0.25, None),
  ):
    found = efficiency_table._reported(methods_lib.Method.parse(spec), ratio)
    names = "paper_compression_ms", "paper_prefill_ms"
    assert found == dict(zip(names, expected or (), strict=bool(expected)))
  assert efficiency_table._reported(None, 1.0) == {"paper_prefill_ms": 200.4}
  assert paper.COMPRESSION_MS["prunevid"] == 34.1


def test_the_papers_times_stand_beside_its_own_model_alone(made):
  assert not any("paper_prefill_ms" in row for row in read(made)["rows"])
  sizes = efficiency_table.SIZES
  assert [name for name in sizes if sizes[name].paper] == ["ov-7b"]


def test_every_method_is_a_row_by_default():
  specs = commands.parse(efficiency_table).config.evals.methods
  labels = [methods_lib.split_label(spec)[0] for spec in specs]
  known = set(compressors.names()) - set(made_up.UNTRAINED)
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
    (dict(ratios=2.0), "above 0 and at most 1"),
    (dict(methods="fastw"), "did you mean"),
    (dict(methods="decisive_boxes"), "knows where the answer lies"),
    (dict(methods=["uniform", "uniform"]), "lists uniform twice"),
    (dict(size="ov-70b"), "--size=ov-70b: choose ov-7b or"),
    ({"config.table.size": "ov-70b", "size": None}, "size=ov-70b: use ov-7b"),
    (dict(dry_run=True, tflops=-1.0), "--tflops is -1"),
  ],
)
def test_mistakes_are_named(make, changes, message):
  with pytest.raises(errors.UserError, match=message):
    make(**changes)
