"""The main table: every benchmark, its average, drift, and going on with it."""

import csv
import dataclasses
import json
import pathlib
import shutil

import numpy as np
import pytest

from cacovid_jax import base_config, errors
from cacovid_jax import config as config_lib
from cacovid_jax.data import feature_cache
from cacovid_jax.data import question as question_lib
from cacovid_jax.data import tokenizer as tokenizer_lib
from cacovid_jax.evals import (
  benchmarks,
  combined,
  estimate,
  paper,
  scoring,
  tables,
)
from cacovid_jax.evals import evaluator as evaluator_lib
from cacovid_jax.inference import methods as methods_lib
from cacovid_jax.models import checkpoints, qwen2_5_vl
from cacovid_jax.synthetic import tiny_checkpoints
from experiments import main_table
from tests.data import benchmark_files
from tests.evals import charts_test, tiny
from tests.experiments import commands

CONFIG = """
import ml_collections

def get_config(arg=None):
  return ml_collections.ConfigDict(
    dict(
      model=dict(dtype="float32"),
      data=dict(num_frames=4),
      mesh=dict(data=1),
      # Reports have tests of their own.
      evals=dict(num_examples=0, batch_size=4, seeds=(0, 1, 2)),
    )
  )
"""
NAMES = ("mlvu_dev", "videomme")
METHODS = ("cacovid", "uniform", "fastv")
RATIOS = ("0.30",)


def score(self, question, text):
  """Returns a coin's score: a model of random weights is never right."""
  toss = question_lib.question_hash(f"{question.id} {text}") % 2
  return scoring.Scored(float(toss))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("main")
  (folder / "model").mkdir()
  (folder / "config.py").write_text(CONFIG)
  config, _ = tiny.write_tokenizer(folder / "model")
  # Drawn by NumPy: initialising the model would take longer than the table.
  tiny_checkpoints.write_random(folder / "model", config)
  checkpoint = checkpoints.load(folder / "model")
  tiny.write_policy(folder / "policy", checkpoint)
  for name in NAMES:
    benchmark_files.write(name, folder / "data" / name)
  return folder


@pytest.fixture(scope="module")
def make(folder):
  """Returns a function that makes a table in a folder below the one it has."""

  def run(name, **changes):
    workdir = folder / name
    flags = dict(
      workdir=workdir,
      data=folder / "data",
      model=folder / "model",
      policy=folder / "policy",
      benchmarks=NAMES,
      methods=METHODS,
      feature_cache=workdir / "features",
      ratios=RATIOS,
      config=folder / "config.py",
    )
    with pytest.MonkeyPatch.context() as p:
      p.setattr(evaluator_lib.Evaluator, "_score", score)
      commands.run(main_table, **flags | changes)
    return workdir

  return run


@pytest.fixture(scope="module")
def made(make):
  return make("whole")


def read(workdir):
  return json.loads((workdir / "results.json").read_text())


def answers(workdir, name):
  lines = (workdir / name / "answers.jsonl").read_text().splitlines()
  return [json.loads(line) for line in lines[1:]]


def test_every_benchmark_is_a_whole_evaluation(made):
  out = read(made)
  assert sorted(out["benchmarks"]) == sorted(NAMES)
  for name in NAMES:
    alone = json.loads((made / name / "results.json").read_text())
    assert out["benchmarks"][name] == alone
    assert sorted(alone["methods"]) == sorted(METHODS)
    assert (made / name / "report.html").is_file()
  assert out["absent"] == ["longvideobench", "mlvu_test"]
  assert out["provenance"]["decoder"].startswith("PyAV")


def test_averages_are_those_of_the_answers(made):
  """By hand: MLVU is a mean of means over categories, VideoMME plain."""
  out = read(made)["average"]
  task = benchmarks.task("mlvu_dev")
  rows = {name: answers(made, name) for name in NAMES}
  loaded = {
    name: benchmarks.load(made.parent / "data" / name, benchmark=name)
    for name in NAMES
  }
  for method, ratio in [("vanilla", 1.0), ("cacovid", 0.3), ("uniform", 0.3)]:
    found = {}
    for name in NAMES:
      found[name] = {
        row["question"]: row["score"] for row in rows[name]
        if (row["method"], row["ratio"]) == (method, ratio)
      }  # fmt: skip
    kinds = {q.id: q.category for q in loaded["mlvu_dev"].questions}
    means = [
      np.mean([v for k, v in found["mlvu_dev"].items() if kinds[k] == kind])
      for kind in task.macro
    ]
    assert len(means) == 7
    plain = np.mean(list(found["videomme"].values()))
    # Nothing follows from scores that are all alike.
    assert len(set(found["mlvu_dev"].values())) == 2
    cell = out["vanilla"]
    if method != "vanilla":
      cell = out["methods"][method][f"{ratio:.2f}"]
    expected = (np.mean(means) + plain) / 2
    assert cell["accuracy"] == pytest.approx(expected, abs=1e-6)
    assert cell["columns"]["mlvu_dev"] == pytest.approx(
      np.mean(means), abs=1e-6
    )
    low, high = cell["ci95"]
    assert 0 <= low <= expected + 1e-6 and expected - 1e-6 <= high <= 1
    short = [
      found["videomme"][q.id] for q in loaded["videomme"].questions
      if q.duration == "short"
    ]  # fmt: skip
    assert len(short) == 2
    assert cell["columns"]["videomme/short"] == np.mean(short)


def test_a_row_that_cannot_be_run_says_where(made):
  cell = read(made)["average"]["methods"]["fastv"]["0.30"]
  assert cell["status"].startswith("mlvu_dev: fastv")
  assert "accuracy" not in cell
  assert cell["status"] in (made / "table.md").read_text()


def test_nothing_is_called_reproduced_that_is_not(made):
  """A tiny model on a few questions is none of the paper's."""
  out = read(made)
  assert out["model"] is None
  for cells in out["average"]["methods"].values():
    for cell in cells.values():
      assert cell.get("reproduced") in (None, "not in the paper")
  text = (made / "table.md").read_text()
  assert "Absent: LongVideoBench, MLVU test." in text
  assert "a model that the paper has not" in text


def test_files_agree(made):
  out = read(made)
  with open(made / "table.csv", encoding="utf-8", newline="") as f:
    rows = list(csv.DictReader(f))
  found = [(row["method"], row["ratio"]) for row in rows]
  assert found == [("vanilla", "1.00")] + [
    (name, ratio) for ratio in RATIOS for name in METHODS
  ]
  for row in rows[1:]:
    cell = out["average"]["methods"][row["method"]][row["ratio"]]
    if cell["status"] == "ok":
      assert float(row["accuracy"]) == pytest.approx(
        100 * cell["accuracy"], abs=1e-4
      )
      videomme = 100 * cell["columns"]["videomme"]
      assert float(row["videomme"]) == pytest.approx(videomme, abs=1e-4)
      assert row["longvideobench"] == ""
  text = (made / "table.md").read_text()
  for name in METHODS:
    assert text.count(f"| {name} |") == len(RATIOS)
  shown = charts_test.texts((made / "accuracy.svg").read_text())
  assert {"vanilla", "cacovid", "uniform", "30", "average of 2 (%)"} <= set(
    shown
  )
  assert "main table; open points: the paper" in shown
  # FastV could not be run.
  assert "fastv" not in shown
  times = json.loads((made / "timings.json").read_text())
  assert set(times) == set(NAMES)
  assert "seconds" not in (made / "results.json").read_text()


def test_what_was_not_asked_is_told_beside_the_table(made):
  out = read(made)
  found = out["benchmarks"]["videomme"]
  found["unreadable"] = [
    {"video": "data/clip_1.mp4", "reason": "missing", "questions": 2}
  ]
  found["left_out"] = {"other_rows": {"about a picture": 3}}
  text = tables.main_markdown(out, tables.main_rows(out))
  assert (
    "- VideoMME: counted as wrong: 2 questions about data/clip_1.mp4 (missing)"
    "\n- VideoMME: left out: 3 rows, about a picture\n"
  ) in text


def test_a_dry_run_tells_what_the_run_took(folder, make, made, capsys):
  """Answers, tokens, programs and disk, counted in what was written."""
  name = "foretold"
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(checkpoints, "load_params", None)  # No weight is read.
    told = []
    real = estimate.estimate

    def recorded(*args, **options):
      told.append(real(*args, **options))
      return told[-1]

    patch.setattr(estimate, "estimate", recorded)
    make(name, dry_run=True, tflops=0.5, gbps=1.0)
  assert not (folder / name).exists()
  assert "memory of a device in GiB" in capsys.readouterr().out
  (told,) = told
  tokenizer = tokenizer_lib.Tokenizer.from_directory(str(folder / "model"))
  for name in NAMES:
    found = told["benchmarks"][name]
    rows = answers(made, name)
    assert found["answers"] == len(rows)
    loaded = benchmarks.load(folder / "data" / name, benchmark=name)
    texts = {
      question.id: tokenizer.encode_prompt(question.prompt, 64).length - 64
      for question in loaded.questions
    }
    tokens = sum(texts[row["question"]] + row["kept"] for row in rows)
    assert found["llm_tokens"] == tokens
    assert found["video_tokens"] == 64 * len(texts)
    times = json.loads((made / name / "timings.json").read_text())
    # The tower's program is not among those that are counted there.
    assert found["programs"] == times["programs"] + 1
  # Named by content: a clip that two benchmarks have is stored once.
  distinct = {
    row["frame_hash"] for name in NAMES for row in answers(made, name)
    if "frame_hash" in row
  }  # fmt: skip
  cache = feature_cache.FeatureCache(made / "features")
  stored = list((made / "features").rglob("*.features"))
  assert len(stored) == len(distinct)
  size = told["total"]["feature_bytes"] / told["total"]["clips"]
  for path in stored:
    assert cache.get(path.stem).arrays["features"].nbytes == size


@pytest.mark.parametrize("off", [0.0, 4.0])
def test_a_row_is_reproduced_only_beside_its_own_vanilla(
  folder, make, made, monkeypatch, off
):
  """The same answers, beside a paper that says them, or another vanilla."""
  cells = read(made)["average"]

  def row(model, method, ratio):
    cell = cells["vanilla"]
    if method != "vanilla":
      if method != "uniform":
        return None
      cell = cells["methods"]["uniform"]["0.30"]
    scores = {name: round(100 * cell["columns"][name], 1) for name in NAMES}
    if method == "vanilla":
      scores["videomme"] += off
    average = round(100 * cell["accuracy"], 1)
    return paper.Row(model, method, method, ratio, average, 100.0, scores)

  sizes = {"mlvu_dev": ("MLVU dev", 7), "videomme": ("VideoMME", 6)}
  monkeypatch.setattr(paper, "row", row)
  monkeypatch.setattr(paper, "model_of", lambda config: "ov7b")
  # Prompts are those of the default template here.
  model = dataclasses.replace(paper.MODELS["ov7b"], template="")
  monkeypatch.setattr(paper, "MODELS", {"ov7b": model})
  monkeypatch.setattr(paper, "NUM_FRAMES", 4)
  monkeypatch.setattr(paper, "BENCHMARKS", sizes)
  columns = tuple(name for name in paper.COLUMNS if name.split("/")[0] in sizes)
  monkeypatch.setattr(paper, "COLUMNS", columns)
  plans = []
  real = combined.combine

  def combine(*given):
    plans.append(given)
    return real(*given)

  monkeypatch.setattr(combined, "combine", combine)
  workdir = folder / f"beside{off:g}"
  for name in NAMES:
    shutil.copytree(made / name, workdir / name)
  make(workdir.name)
  out = read(workdir)
  average = out["average"]
  expected = True if not off else "vanilla off by 4.0 points (tolerance 1.0)"
  assert average["vanilla"]["reproduced"] == expected
  assert average["methods"]["uniform"]["0.30"]["reproduced"] == expected
  cell = average["methods"]["cacovid"]["0.30"]
  assert cell["reproduced"] == "not in the paper"
  assert out["drift"]["worst"] == off
  text = (workdir / "table.md").read_text()
  assert ("| yes |" in text) == (not off)
  assert (str(expected) in text) == bool(off)
  assert f"| {0.0 - off:+.1f} |" in text
  # A part of the questions says nothing of the whole, however close it is.
  (given,) = plans
  monkeypatch.setitem(sizes, "videomme", ("VideoMME", 12))
  out = real(*given)
  cell = out["average"]["methods"]["uniform"]["0.30"]
  assert cell["reproduced"] == "6 of 12 questions of VideoMME"
  monkeypatch.setattr(paper, "NUM_FRAMES", 32)
  monkeypatch.setitem(sizes, "videomme", ("VideoMME", 6))
  out = real(*given)
  cell = out["average"]["methods"]["uniform"]["0.30"]
  assert cell["reproduced"] == "4 frames instead of 32"
  monkeypatch.setattr(paper, "NUM_FRAMES", 4)
  # One question that is not there, and one whose clip is not.
  monkeypatch.setitem(sizes, "videomme", ("VideoMME", 7))
  cell = real(*given)["average"]["vanilla"]
  assert cell["reproduced"] == "6 of 7 questions of VideoMME"
  monkeypatch.setitem(sizes, "videomme", ("VideoMME", 6))
  path = workdir / "videomme" / "results.json"
  unreadable = [{"video": "a.mp4", "reason": "cut off", "questions": 1}]
  path.write_text(
    json.dumps(json.loads(path.read_text()) | {"unreadable": unreadable})
  )
  cell = real(*given)["average"]["vanilla"]
  assert cell["reproduced"] == "clips of 1 questions of VideoMME cannot be used"


def test_a_table_that_was_stopped_goes_on_to_the_same_bytes(made, make):
  """Killed in the first benchmark, in the middle of a line."""
  resumed = made.parent / "resumed"
  (resumed / "mlvu_dev").mkdir(parents=True)
  lines = (made / "mlvu_dev" / "answers.jsonl").read_bytes()
  lines = lines.splitlines(keepends=True)
  cut = b"".join(lines[:-5]) + lines[-5][:30]
  (resumed / "mlvu_dev" / "answers.jsonl").write_bytes(cut)
  shutil.copytree(made / "videomme", resumed / "videomme")
  make("resumed")
  same = (*tables.MAIN_FILES, "results.json")
  for name in [*same, "mlvu_dev/results.json", "mlvu_dev/answers.jsonl"]:
    assert (resumed / name).read_bytes() == (made / name).read_bytes(), name


def test_processes_that_share_the_work_make_one_table(made, make, capsys):
  """The first to end leaves the table to the other one."""
  shared = made.parent / "shared"
  for name in NAMES:
    (shared / name).mkdir(parents=True)
    lines = (made / name / "answers.jsonl").read_bytes()
    # Answered before one of them was stopped; nothing is asked again.
    (shared / name / "answers-0-of-2.jsonl").write_bytes(lines)
  make("shared", shard="1/2")
  assert "the last process to end writes the table" in capsys.readouterr().out
  assert not (shared / "results.json").exists()
  make("shared", shard="0/2")
  for name in ("results.json", "table.md", "table.csv"):
    assert (shared / name).read_bytes() == (made / name).read_bytes(), name


def test_another_rule_behind_a_label_makes_no_table_of_old_results(
  made, make, capsys
):
  """Labels, ratios and counts of what lies there are those asked for."""
  stale = made.parent / "stale"
  for name in NAMES:
    shutil.copytree(made / name, stale / name)
  # It cannot be run, so that nothing is compiled.
  methods = ["cacovid", "uniform=fastv", "fastv"]
  make("stale", shard="0/2", methods=methods)
  assert "the last process to end writes the table" in capsys.readouterr().out
  assert not (stale / "results.json").exists()


@pytest.mark.parametrize(
  "changes,message",
  [
    (dict(shard="2/2"), "shard 2/2"),
    (dict(frame_manifest="nowhere"), "no frame manifest nowhere"),
    (dict(benchmarks="videomm"), "no benchmark 'videomm'"),
    (dict(benchmarks="prepared"), "no column of the paper's"),
    (dict(benchmarks=["videomme"] * 2), "names videomme twice"),
    (dict(benchmarks=""), "is empty"),
    (
      dict(benchmarks=["videomme", "mlvu_test"]),
      r"mlvu_test: there is no data.*--benchmarks=videomme$",
    ),
    (dict(folders="nextqa=x"), "--folders=nextqa=x"),
    (dict(data=None), "add --data"),
    (dict(model=None), "add --model"),
    (dict(policy=None), r"add --policy.*uniform,fastv$"),
    (dict(methods="decisive_boxes"), "knows where the answer lies"),
    (dict(methods="divprun"), "did you mean divprune"),
    (dict(ratios=[0.1, 7]), "7.0; it must be a number above 0 and at most"),
    (dict(seeds="a"), "--seeds=a"),
    (dict(tolerance=-1.0), "tolerance is -1.0; it must be"),
    (dict(num_frames=0), "--num_frames is 0; .* number at least 1"),
    (
      dict(config=None, base="ov7b"),
      "it is configs/llava_onevision.py:size=7b now",
    ),
    (
      dict(folders="videomme=", data=None, benchmarks="videomme"),
      "--folders=videomme= names no folder",
    ),
    (
      dict(
        dry_run=True,
        config="configs/llava_onevision.py",
        model="llava_onevision_7b",
      ),
      "no config.json in llava_onevision_7b",
    ),
    (
      dict(dry_run=True, data="mistyped"),
      "no benchmark can be read; complete the folders",
    ),
    (
      dict(dry_run=True, tflops=-1.0),
      "--tflops is -1.0; it must be a number above 0",
    ),
  ],
)
def test_mistakes_are_named(make, changes, message):
  with pytest.raises(errors.UserError, match=message):
    make("mistaken", **changes)


def test_a_policy_of_another_model_is_refused(folder, make):
  described = {"base_model": {"sha256": "0" * 64}, "policy": {}}
  other = folder / "other"
  shutil.copytree(folder / "policy", other)
  (other / "policy_config.json").write_text(json.dumps(described))
  with pytest.raises(errors.UserError, match="trained with another base model"):
    make("another", policy=other)


def test_missing_clips_are_counted_before_the_start(folder, make, capsys):
  data = folder / "less"
  shutil.copytree(folder / "data", data)
  (data / "videomme" / "data" / "clip_1.mp4").unlink()
  with pytest.raises(errors.UserError) as caught:
    make("lacking", data=data)
  assert "videomme: 1 of 3 clips are missing" in str(caught.value)
  assert "(2 questions), first: data/clip_1.mp4" in str(caught.value)
  assert "--benchmarks=mlvu_dev" in str(caught.value)
  assert not (folder / "lacking").exists()
  shown = capsys.readouterr().out
  assert "mlvu_dev" in shown and "videomme" in shown


def test_the_papers_rows_are_printed(capsys):
  commands.run(main_table, paper_rows=True)
  lines = capsys.readouterr().out.splitlines()
  (row,) = [line for line in lines if "7B, CaCoVID, 10%" in line]
  assert row == (
    "| LLaVA-OneVision-7B, CaCoVID, 10% | `cacovid,0.10` | 55.2 | 60.6 | 44.6"
    " | 67.6 | 54.9 | 46.6 | 56.3 | 54.2 (96.1 %) | not run: needs the weights"
    " | the paper's policy |"
  )
  printed = [line.split("`")[1] for line in lines if "| `python -m" in line]
  assert printed == [
    "python -m experiments.main_table"
    " --config=configs/llava_onevision.py:size=7b"
    " --policy=workdirs/llava_onevision_7b --data=datasets",
    "python -m experiments.main_table"
    " --config=configs/llava_onevision.py:size=7b --data=datasets"
    " --methods=fastv,visionzip,divprune,prunevid,framefusion"
    " --workdir=workdirs/main_table_llava_onevision_7b_no_policy",
    "python -m experiments.main_table"
    " --config=configs/qwen2_5_vl.py:size=3b"
    " --policy=workdirs/qwen2_5_vl_3b --data=datasets",
    "python -m experiments.main_table"
    " --config=configs/qwen2_5_vl.py:size=3b --data=datasets"
    " --methods=uniform"
    " --workdir=workdirs/main_table_qwen2_5_vl_3b_no_policy",
    "python -m experiments.efficiency_table --size=ov-7b",
  ]
  models = [row.model for row in paper.ROWS]
  assert (models.count("ov7b"), models.count("qwen3b")) == (15, 5)


def planned(command):
  """Returns the plan of a command line, as it is printed."""
  return main_table.plan_of(main_table.COMMAND.parse(command.split()[2:]))


def test_printed_commands_fill_their_rows_in_folders_of_their_own():
  """One after another, none finds the answers of another."""
  workdirs = []
  for key in paper.MODELS:
    whole = planned(tables.paper_command(key))
    rest = planned(tables.paper_command(key, trained=False))
    first, second = (next(iter(plan.values())) for plan in (whole, rest))
    config, other = first.config, second.config
    methods = [methods_lib.Method.parse(spec) for spec in config.evals.methods]
    labels = {method.label for method in methods}
    for row in paper.ROWS:
      if row.model == key and row.method != paper.VANILLA:
        assert row.method in labels and row.ratio in config.evals.ratios
    for method in methods:
      assert method.label not in paper.METHODS or paper.is_method(method)
    assert config.evals.seeds == (0, 1, 2)
    assert list(first.policy_paths) == ["policy"]
    assert second.policy_paths == {}
    assert config.model.path == other.model.path
    assert config.evals.template == paper.MODELS[key].template
    workdirs += [first.workdir, second.workdir]
  assert len(set(workdirs)) == 4


def test_the_template_is_the_one_that_was_asked_for(folder):
  for given, expected in ((None, ""), ("tokenizer", "tokenizer")):
    args = commands.parse(
      main_table,
      model=folder / "model",
      data=folder,
      methods="uniform",
      config=folder / "config.py",
      template=given,
    )
    for experiment in main_table.plan_of(args).values():
      assert experiment.config.evals.template == expected


def plan_of(folder, changes):
  """Returns the plan of one benchmark by changes of a config."""
  changes = {
    "evals.methods": ("uniform", "fastv"), "data.num_frames": 32
  } | changes  # fmt: skip
  config = config_lib.replace(base_config.get_config(), changes)
  return main_table.make_plan(config, folder / "unused", {"videomme": "y"})


def test_a_policy_that_no_row_follows_makes_no_other_run(folder):
  plans = [
    plan_of(folder, {"model.path": "x", "evals.policies": policies})
    for policies in ((), ("policy=file",))
  ]
  assert plans[0]["videomme"].config == plans[1]["videomme"].config


def test_another_template_or_frame_size_is_told(folder, monkeypatch):
  def obstacles(model, **changes):
    changes = {name.replace("__", "."): new for name, new in changes.items()}
    plan = plan_of(folder, {"model.path": str(folder / "qwen")} | changes)
    return paper.obstacles(plan["videomme"].config, [], [], model)

  assert obstacles("ov7b", evals__template="tokenizer") == []
  for given, name in (("", "default"), ("processor", "processor")):
    assert obstacles("ov7b", evals__template=given) == [
      f"prompts by the {name} chat template instead of the tokenizer's"
    ]
    assert obstacles("qwen3b", evals__template=given) == []
  (folder / "qwen").mkdir()
  described = {"patch_size": 14, "merge_size": 2, "temporal_patch_size": 2,
               **tiny.QWEN_STATISTICS}  # fmt: skip
  path = folder / "qwen" / "preprocessor_config.json"
  path.write_text(json.dumps(described))
  config = qwen2_5_vl.Qwen2_5VLConfig.qwen2_5_vl_3b().to_hf()
  (folder / "qwen" / "config.json").write_text(json.dumps(config))
  # 128 and 256 tokens of 28 x 28 pixels.
  own = dict(data__min_pixels=100352, data__max_pixels=200704)
  assert obstacles("qwen3b", **own) == []
  assert obstacles("qwen3b", data__max_pixels=401408) == [
    "frames of 100352 to 401408 pixels instead of 100352 to 200704"
  ]


def test_results_of_other_questions_or_rows_are_not_complete(made, folder):
  """Labels and counts may be the same; what is behind them is compared."""

  def complete(methods=METHODS, ratios=(0.3,), seeds=(0, 1, 2), change=None):
    config = config_lib.replace(
      base_config.get_config(),
      {
        "model.path": "x",
        "evals.policies": ("policy=file",),
        "evals.methods": methods,
        "evals.ratios": ratios,
        "evals.seeds": seeds,
      },
    )
    folders = {"videomme": str(folder / "data" / "videomme")}
    (experiment,) = main_table.make_plan(config, made, folders).values()
    asked = loaded.questions
    if change:
      asked = [dataclasses.replace(asked[0], **change), *asked[1:]]
    return combined.is_complete(experiment, asked)

  loaded = benchmarks.load(folder / "data" / "videomme", benchmark="videomme")
  assert complete()
  assert not complete(methods=("cacovid", "uniform", "fastv=fastv?layer=1"))
  assert not complete(methods=METHODS[:2])
  assert not complete(ratios=(0.2,))
  assert not complete(seeds=(0,))
  other = "ABCD".replace(loaded.questions[0].answer, "")[0]
  assert not complete(change={"answer": other})
  assert not complete(change={"prompt": "another"})
  note = made / "videomme" / combined.ASKED
  text = note.read_text()
  try:
    note.write_text(json.dumps(json.loads(text) | {"run": {"dtype": "other"}}))
    assert not complete()
    note.write_text(text[:-20])
    with pytest.raises(errors.UserError, match="asked.json: not readable"):
      complete()
    note.unlink()
    assert not complete()
  finally:
    note.write_text(text)


def test_a_dry_run_tells_what_it_cannot_read(folder, make, capsys):
  """One folder is not there, one lacks a clip, and two were never given."""
  data = folder / "partial"
  shutil.copytree(folder / "data" / "videomme", data)
  (data / "data" / "clip_1.mp4").unlink()
  make(
    "dry",
    dry_run=True,
    tflops=1.0,
    gbps=1.0,
    data=None,
    benchmarks=["videomme", "mlvu_dev", "mlvu_test"],
    folders=[f"videomme={data}", "mlvu_dev=mistyped"],
  )
  shown = capsys.readouterr().out
  assert "videomme: 1 of 3 clips are missing below" in shown
  assert "mlvu_dev: there is no data" in shown
  assert "not counted: mlvu_dev" in shown
  assert "mlvu_test (published)" in shown and "502" in shown
  assert "mlvu_dev (published)" not in shown
  assert "videomme (published)" not in shown


def test_the_page_holds_exactly_these_rows():
  root = pathlib.Path(main_table.__file__).parent.parent
  text = (root / "docs" / "paper_table.md").read_text(encoding="utf-8")
  found = [line for line in text.splitlines() if line.startswith("|")]
  printed = tables.paper_markdown().splitlines()
  assert found == [line for line in printed if line]
