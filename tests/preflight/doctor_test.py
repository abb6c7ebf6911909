"""The doctor on a good set-up and on broken ones, each made here."""

import errno
import functools
import json
import os
import shutil
from collections import namedtuple

import jax
import numpy as np
import pytest

from cacovid_jax import base_config, doctor, errors, files
from cacovid_jax import config as config_lib
from cacovid_jax import experiment as experiment_lib
from cacovid_jax.evals import cost
from cacovid_jax.models import checkpoints, safetensors_io
from cacovid_jax.policy import loading
from cacovid_jax.preflight import case as case_lib
from cacovid_jax.preflight import checks
from cacovid_jax.synthetic import build, tiny_checkpoints
from cacovid_jax.training import run
from tests import object_store
from tests.evals import tiny
from tests.models import hub_test
from tests.preparation import blind_test

CHECKS = ["weights", "data", "policy", "clips", "mesh", "memory", "disk",
          "programs", "hours"]  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  """Returns a folder with a base model, its policy, clips and questions."""
  folder = tmp_path_factory.mktemp("made")
  base = folder / "base"
  tiny_checkpoints.write_tiny(base, "llava_onevision")
  tensors = safetensors_io.list_directory(base)
  tensors = {tensor.name: np.array(tensor.view()) for tensor in tensors}
  safetensors_io.write_directory(base, tensors, 100_000)
  (folder / "data").mkdir()
  tiny.write_data(folder / "data")
  rows = [
    blind_test.entry(
      number,
      "What colour is the block?",
      options=["A. red", "B. green"],
      path=f"videos/test{number}.mp4",
      solution="<answer>B</answer>",
    )
    for number in range(3)
  ]
  (folder / "data" / "train.json").write_text(json.dumps(rows))
  checkpoint = checkpoints.load(base)
  options = {"num_halvings": 2, "dtype": "float32"}
  policy, _ = loading.make_policy(checkpoint.model.config.text, options)
  params = policy.init_from_llm(jax.random.key(0), checkpoint.params)
  described = {"policy": options, "base_model": checkpoint.identity}
  described |= {"grid": [4, 4, 4], "ratios": [0.25]}
  path = folder / "policy" / "policy.safetensors"
  loading.export(path, policy, params, described)
  return folder


@pytest.fixture
def folder(made, tmp_path):
  """Returns a copy that a test may harm."""
  return shutil.copytree(made, tmp_path / "own")


def config_of(folder, **changes):
  changes = {
    "model.path": str(folder / "base"),
    "model.dtype": "float32",
    "policy.dtype": "float32",
    "policy.num_halvings": 2,
    "data.root": str(folder / "data"),
    "data.num_frames": 4,
    "data.decode": "in_process",
    "mesh.data": 1,
    "sampling.num_combinations": 8,
    "rollout.max_new_tokens": 2,
    "evals.methods": ("cacovid", "uniform"),
    "evals.oracles": (),
    "evals.ratios": (0.25,),
    "evals.select_on": "none",
    "evals.batch_size": 2,
    "evals.policies": (f"policy={folder / 'policy'}",),
    "table.tflops": 1.0,
    "table.gbps": 1.0,
  } | changes
  return config_lib.replace(base_config.get_config(), changes)


def case_of(folder, split, changes=(), **fields):
  experiment = experiment_lib.Experiment.from_config(
    config_of(folder, **dict(changes)), folder / "workdir", split=split
  )
  return case_lib.Case(experiment, **fields)


def examine(folder, split="videos_per_step", changes=(), **fields):
  """Returns (check -> its first finding, names of those that failed)."""
  found = checks.examine(case_of(folder, split, changes, **fields))
  failed = [one.check for one in found if one.verdict == checks.FAILED]
  first = {one.check: one for one in reversed(found)}
  assert sorted(first) == sorted(CHECKS)
  return first, failed


ASKS = "evals.batch_size"
SPLITS = ("videos_per_step", ASKS)


@pytest.mark.parametrize("split", SPLITS)
def test_a_good_set_up(split, folder):
  before = sorted(folder.rglob("*"))
  found, failed = examine(folder, split)
  assert failed == []
  assert sorted(folder.rglob("*")) == before
  assert "3 files of" in found["weights"].found
  assert "F32" in found["weights"].found
  assert found["clips"].found == "3 decoded, 4 frames of each"
  # The tests' process has eight devices.
  assert found["mesh"].verdict == checks.WARNING
  assert "data 1 x model 1 of 8 devices" in found["mesh"].found
  assert "estimate" in found["memory"].found
  if split == ASKS:
    assert found["data"].found == "blocks test: 6 questions about 3 clips"
    assert "trained at ratios 0.25" in found["policy"].found
    assert "of this base model" in found["policy"].found
    assert found["hours"].verdict == checks.OK
  else:
    assert found["data"].found == "3 questions about 3 clips to train"
    assert found["hours"].remedy.endswith("--seconds_per_video")


def test_no_weight_is_loaded(folder, monkeypatch):
  def refuse(*args, **options):
    raise AssertionError("weights were loaded")

  monkeypatch.setattr(checkpoints, "load_params", refuse)
  for split in SPLITS:
    assert examine(folder, split)[1] == []


def test_sizes_are_those_of_a_run(folder):
  changes = {"total_steps": 10_000, "ckpt.keep": 3}
  case = case_of(folder, "videos_per_step", changes)
  experiment = experiment_lib.Experiment.from_config(
    case.config, folder / "run", split="videos_per_step"
  )
  real = run.Run(experiment)
  state = real.init_state()
  assert jax.tree.map(np.shape, state) == jax.tree.map(np.shape, case.state)
  assert case.prompts == real.batches.prompts.text_rows
  kept = [one.ladder.num_keep for one in real.programs.configs.values()]
  assert [one.ladder.num_keep for one in case.steps] == kept
  parts = checks.training_memory(case)
  model = case.model.config
  assert parts["weights"] == cost.weight_bytes(model, "float32")
  assert (
    sum(x.nbytes for x in jax.tree.leaves(state))
    + sum(x.nbytes for x in jax.tree.leaves(state.params))
    == (parts["policy and optimiser"])
  )
  (programs,) = checks.examine(case)[-2:-1]
  count = len(case.prompts) * real.programs.limit(case.steps[0].ladder.bucket)
  assert programs.found.startswith(f"at most {count} to compile")


def test_hours_are_given_measured_or_estimated(folder):
  found, _ = examine(folder, changes={"total_steps": 100},
                     seconds_per_video=36.0)  # fmt: skip
  assert found["hours"].found == "1 for 100 videos of 36 s (given)"
  (folder / "workdir").mkdir()
  (folder / "workdir" / "metrics.jsonl").write_text(
    '{"step": 10, "seconds_per_step": 72.0}\n'
  )
  with open(folder / "workdir" / "metrics.jsonl", "a") as file:
    file.write('{"step": 20, "seconds_per_step": "abc"}\n')
  found, failed = examine(folder, changes={"total_steps": 100})
  assert failed == []
  told = "2 for 100 videos of 72 s (measured in the workdir)"
  assert found["hours"].found == told
  slow, fast = (
    examine(folder, ASKS, {"table.tflops": x, "table.gbps": x})[0]["hours"]
    for x in (1e-6, 1e6)
  )
  assert "estimate" in slow.found and slow != fast


# Broken set-ups: (what harms a folder, config, check that fails, its words).


def _missing_shard(folder):
  (folder / "base" / hub_test.SHARD).unlink()


def _truncated_shard(folder):
  path = folder / "base" / hub_test.SHARD
  path.write_bytes(path.read_bytes()[:-100])


def _other_shapes(folder):
  path = folder / "base" / "config.json"
  described = json.loads(path.read_text())
  described["text_config"]["intermediate_size"] *= 2
  path.write_text(json.dumps(described))


def _no_tokenizer(folder):
  (folder / "base" / "tokenizer.json").unlink()


def _policy_of_another(folder):
  path = folder / "policy" / loading.CONFIG
  described = json.loads(path.read_text())
  described["base_model"]["sha256"] = "0" * 64
  files.write_json(path, described)


def _absent_clip(folder):
  (folder / "data" / "videos" / "test1.mp4").unlink()


def _bad_clip(folder):
  (folder / "data" / "videos" / "test1.mp4").write_bytes(b"no clip" * 100)


def _nothing(folder):
  del folder


BROKEN = {
  "missing shard": (
    _missing_shard, {}, "weights", f"{hub_test.SHARD} is missing"),
  "truncated shard": (_truncated_shard, {}, "weights", hub_test.SHARD),
  "other shapes": (_other_shapes, {}, "weights", "misshaped"),
  "no tokenizer": (_no_tokenizer, {}, "weights", "no tokenizer.json"),
  "absent clip": (_absent_clip, {}, "data", "1 of 3 clips are missing"),
  "undecodable clip": (_bad_clip, {}, "clips", "1 of 3 cannot be used"),
  "too many devices": (
    _nothing, {"mesh.data": 4, "mesh.model": 4}, "mesh", "there are 8"),
  "heads not shared": (
    _nothing, {"mesh.model": 3, "mesh.data": 1}, "mesh", "does not divide the"),
  "batch not shared": (
    _nothing, {"mesh.data": 3}, "mesh", "does not divide among the 3"),
  "unknown name": (
    _nothing, {"model.path": "org/unknown"}, "weights", "not in the Hugging"),
}  # fmt: skip


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", BROKEN)
def test_what_is_broken_is_one_line_with_a_remedy(name, split, folder):
  harm, changes, check, told = BROKEN[name]
  harm(folder)
  found, failed = examine(folder, split, changes)
  assert failed == [check]
  assert told in found[check].found
  assert found[check].remedy and "\n" not in found[check].found
  # What depends on it is not told again.
  words = [one.found for one in found.values() if one.verdict == checks.FAILED]
  assert len(set(words)) == len(words)


def test_half_a_download(folder, tmp_path, monkeypatch):
  monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
  there = hub_test.lay_out(tmp_path / "hub", folder / "base")
  changes = {"model.path": hub_test.NAME}
  assert examine(folder, changes=changes)[1] == []
  (there / "snapshots" / hub_test.REVISION / hub_test.SHARD).unlink()
  found, failed = examine(folder, changes=changes)
  assert failed == ["weights"]
  assert "hf download some-org/tiny" in found["weights"].remedy


def test_a_policy_of_another_base_model(folder):
  _policy_of_another(folder)
  found, failed = examine(folder, ASKS)
  assert failed == ["policy"]
  assert "trained with another base model" in found["policy"].found
  assert found["policy"].remedy == "give that one's --checkpoint"


def test_policies_that_do_not_fit(folder):
  found, failed = examine(folder, ASKS, {"evals.policies": ()})
  assert failed == ["policy"] and found["policy"].remedy == "give --policy"
  found, failed = examine(
    folder, ASKS, {"evals.policies": (), "evals.methods": ("uniform",)}
  )
  assert failed == []
  found, failed = examine(folder, ASKS, {"data.num_frames": 8})
  assert failed == [] and found["policy"].verdict == checks.WARNING
  assert "4 x 4 x 4 video tokens, not the 8 x 4 x 4" in found["policy"].found
  # What a training starts from is of the same shapes.
  init = str(folder / "policy" / "policy.safetensors")
  assert examine(folder, changes={"policy.init": init})[1] == []
  changes = {"policy.init": init, "policy.num_halvings": 3}
  assert examine(folder, changes=changes)[1] == ["policy"]


@pytest.mark.parametrize("split", SPLITS)
def test_too_little_memory(split, folder):
  found, failed = examine(folder, split, device_bytes=10_000)
  assert failed == ["memory"]
  assert "of 9.766 KiB (estimate: weights" in found["memory"].found
  assert "config.mesh.model" in found["memory"].remedy


@pytest.mark.parametrize("split", SPLITS)
def test_a_small_disk(split, folder, monkeypatch):
  usage = namedtuple("usage", "total used free")
  monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(9, 8, 1))
  cache = str(folder / "cache")
  found, failed = examine(folder, split, {"data.feature_cache": cache})
  assert failed == ["disk"]
  # 3 clips of 64 tokens of 32 float32 values.
  assert f"{cache} 24 KiB" in found["disk"].found


def test_the_cache_that_is_there_needs_no_room(folder):
  (folder / "cache").mkdir()
  (folder / "cache" / "x").write_bytes(bytes(3 * 64 * 32 * 4))
  cache = str(folder / "cache")
  found, _ = examine(folder, changes={"data.feature_cache": cache})
  assert f"{cache} 0 bytes" in found["disk"].found


# What stops a run at once: (what harms a folder, changes, check, its words).


def _no_validation(folder):
  (folder / "data" / "validation.parquet").unlink()


def _two_tables(folder):
  path = folder / "base" / "config.json"
  described = json.loads(path.read_text())
  described["tie_word_embeddings"] = True
  described["text_config"]["tie_word_embeddings"] = True
  path.write_text(json.dumps(described))


def _other_workdir(folder):
  other = config_of(folder, **{"sampling.num_combinations": 4})
  config_lib.claim_workdir(folder / "workdir", config_lib.complete(other))


def _other_rows(folder):
  (folder / "workdir").mkdir()
  path = folder / "workdir" / "left_out.json"
  files.write_json(path, {"questions": 9, "missing_clips": {}})


def _broken_description(folder, **changes):
  path = folder / "policy" / loading.CONFIG
  files.write_json(path, json.loads(path.read_text()) | changes)


CHOOSES = {"evals.select_on": "validation", "evals.methods": ("last_query",)}
NO_POLICY = {"evals.policies": ()}
STOPS = {
  "no validation": (
    ASKS, _no_validation, CHOOSES, "data", "has no validation.parquet"),
  "ratios alike": (
    ASKS, _nothing, {"evals.ratios": (0.25, 0.25)}, "data", "names several"),
  "empty frames": (
    ASKS, _nothing, {"evals.empty_frames": "drop"}, "memory",
    "empty_frames=drop is for models"),
  "ratio too small": (
    ASKS, _nothing, {"evals.ratios": (0.0001,)}, "data", "names none"),
  "untrained": (
    ASKS, _nothing, NO_POLICY | {"evals.methods": ("cacovid_untrained",)},
    "policy", "cacovid_untrained needs a trained policy"),
  "other question": (
    ASKS, _nothing, NO_POLICY | {"evals.methods": ("cacovid_other_question",)},
    "policy", "cacovid_other_question needs a trained policy"),
  "unknown policy": (
    ASKS, _nothing, {"evals.methods": ("cacovid?policy=x",)},
    "policy", "no policy 'x'; there are"),
  "ratios of a text": (
    ASKS, functools.partial(_broken_description, ratios="abc"), {},
    "policy", "ratios is 'abc'; it must be a list"),
  "no ratios": (
    ASKS, functools.partial(_broken_description, ratios=None), {},
    "policy", "ratios is None; it must be a list"),
  "a number for a grid": (
    ASKS, functools.partial(_broken_description, grid=7), {},
    "policy", "grid is 7; it must be a list"),
  "tied tables that differ": (
    "videos_per_step", _two_tables, {}, "weights", "config.json ties"),
  "no decisive file": (
    "videos_per_step", _nothing, {"data.decisive_file": "none.jsonl"},
    "data", "none.jsonl"),
  "decisive tokens of more frames": (
    "videos_per_step", _nothing,
    {"data.decisive_file": "decisive.jsonl", "data.num_frames": 1},
    "data", "config.data.decisive_file names token"),
  "unknown validation method": (
    "videos_per_step", _nothing,
    {"validation.every_steps": 1, "validation.method": "none"},
    "data", "'none'"),
  "workdir of another config": (
    "videos_per_step", _other_workdir, {}, "disk",
    "sampling.num_combinations is 4 there and 8 here"),
  "workdir of other rows": (
    "videos_per_step", _other_rows, {}, "data", "began with 9 questions"),
}  # fmt: skip


@pytest.mark.parametrize("name", STOPS)
def test_what_stops_a_run_at_once_fails(name, folder):
  split, harm, changes, check, told = STOPS[name]
  harm(folder)
  before = sorted(folder.rglob("*"))
  found = checks.examine(case_of(folder, split, changes))
  (one,) = [one for one in found if one.verdict == checks.FAILED]
  assert one.check == check and told in f"{one.found}; {one.remedy}"
  assert sorted(folder.rglob("*")) == before


def test_options_are_chosen_on_validation(folder):
  found = checks.examine(case_of(folder, ASKS, CHOOSES))
  told = [one.found for one in found if one.check == "data"]
  assert told == [f"blocks {split}: 6 questions about 3 clips"
                  for split in ("test", "validation")]  # fmt: skip


def test_a_workdir_of_the_same_config_is_gone_on_with(folder):
  case = case_of(folder, "videos_per_step")
  config_lib.claim_workdir(folder / "workdir", case.config)
  experiment_lib.read_questions(case.config, folder / "workdir")
  assert examine(folder)[1] == []


def test_no_clip_is_there(folder):
  shutil.rmtree(folder / "data" / "videos")
  found, failed = examine(folder, ASKS, {"evals.on_missing": "count"})
  assert failed == []
  for name in ("clips", "hours"):
    assert found[name].verdict == checks.WARNING
    assert found[name].remedy == "fetch them"


def test_devices_share_the_questions_of_a_batch(folder):
  parts = []
  for data in (1, 2):
    changes = {"mesh.data": data, "evals.batch_size": 4}
    parts.append(case_of(folder, ASKS, changes).estimate["memory"])
  alone, shared = parts
  assert shared["weights"] == alone["weights"]
  for name in ("features", "prompts", "cache"):
    assert 2 * shared[name] == alone[name]


def test_sizes_are_never_in_powers_of_ten():
  told = {999: "999 bytes", 999.7 * 1024: "999.7 KiB", 1024: "1 KiB"}
  assert [checks._told(size) for size in told] == [*told.values()]


def test_clips_that_are_left_out_are_counted(folder):
  _absent_clip(folder)
  found, failed = examine(folder, changes={"data.on_missing": "skip"})
  assert failed == [] and found["data"].verdict == checks.WARNING
  assert "2 questions about 2 clips to train" in found["data"].found
  assert "1 missing clips" in found["data"].found
  found, failed = examine(folder, ASKS, {"evals.on_missing": "count"})
  assert failed == []
  assert found["data"].verdict == checks.WARNING
  assert "1 clips are absent, 2 questions lost" in found["data"].found


# The command.


def parse(folder, *words, **changes):
  path = folder / "config.json"
  config_lib.save(config_of(folder, **changes), path)
  words = ["doctor", f"--config={path}", *words]
  return doctor.COMMAND.parse(words)


def test_the_command(folder, capsys):
  workdir = f"--workdir={folder / 'workdir'}"
  assert doctor.main(parse(folder, workdir)) == 0
  out = capsys.readouterr().out
  assert out.endswith("nothing failed\n")
  assert all(name in out for name in ("verdict", "remedy", *CHECKS))
  args = parse(folder, workdir, "--run=evaluate", "--device_gib=0.00001")
  assert doctor.main(args) == 1
  assert capsys.readouterr().out.endswith("failed: memory\n")
  assert not os.path.exists(folder / "workdir")
  with pytest.raises(errors.UserError, match="add --workdir"):
    doctor.main(parse(folder))
  with pytest.raises(errors.UserError, match="--run=no: choose train or"):
    parse(folder, "--run=no")


@pytest.fixture
def store(tmp_path, monkeypatch):
  return object_store.made(tmp_path, monkeypatch)


def failed_line(capsys):
  """Returns what the one failed check found, and its remedy."""
  lines = [line.split("│")[1:-1] for line in capsys.readouterr().out.split("\n")
           if "│" in line]  # fmt: skip
  rows = []
  for cells in lines:  # A row goes on where no check stands in front.
    if cells[0].strip():
      rows.append([""] * len(cells))
    rows[-1] = [a + b.strip(" ") for a, b in zip(rows[-1], cells, strict=True)]
  (one,) = [row for row in rows if row[1] == checks.FAILED]
  assert one[0] == "disk"
  return one[2].replace(" ", ""), one[3]


def is_refused(folder, workdir, run, capsys, place):
  """Looks at a set-up whose workdir fails because of a place."""
  words = f"--workdir={workdir}", f"--run={run}"
  assert doctor.main(parse(folder, *words)) == 1
  found, remedy = failed_line(capsys)
  assert found == f"{place}isnofolderthatcanbewritten"
  assert remedy.startswith("give another place")


@pytest.mark.parametrize("run", ["train", "evaluate"])
@pytest.mark.parametrize("place", ["file", "file/below"])
def test_a_workdir_that_is_a_file_is_one_line(folder, run, place, capsys):
  (folder / "file").write_text("")
  is_refused(folder, folder / place, run, capsys, folder / "file")


@pytest.mark.parametrize("run", ["train", "evaluate"])
def test_a_workdir_that_may_not_be_written_is_one_line(
  folder, run, capsys, monkeypatch
):
  real, workdir = os.access, folder / "workdir"
  workdir.mkdir()
  # Root may write everywhere.
  monkeypatch.setattr(
    os, "access", lambda path, *how: path != workdir and real(path, *how)
  )
  is_refused(folder, workdir, run, capsys, workdir)


@pytest.mark.parametrize("run", ["train", "evaluate"])
def test_a_store_that_may_not_be_written_is_one_line(
  folder, run, store, capsys
):
  words = "--workdir=gs://bucket/run", f"--run={run}"
  assert doctor.main(parse(folder, *words)) == 0
  assert not object_store.names(store)
  capsys.readouterr()

  def refuse(denied, operation, path):
    if operation in denied:
      raise PermissionError(errno.EACCES, "denied")

  for denied in ("write", "delete"):
    object_store.use(store, functools.partial(refuse, (denied,)))
    assert doctor.main(parse(folder, *words)) == 1
    found, remedy = failed_line(capsys)
    assert found.startswith(f"cannot{denied}gs://bucket/run/")
    assert remedy.startswith("see to the bucket's")
  # What may not be deleted stays, where no run looks.
  assert object_store.names(store) == ["bucket/run/locks/doctor"]
  object_store.use(store, functools.partial(refuse, ("list",)))
  with pytest.raises(errors.UserError, match="cannot read gs://bucket/run: "):
    doctor.main(parse(folder, *words))


def test_an_object_is_no_workdir(folder, store):
  path = store / "bucket%2Frun"
  path.write_text("")
  args = parse(folder, "--workdir=gs://bucket/run")
  with pytest.raises(errors.UserError, match="gs://bucket/run is an object, n"):
    doctor.main(args)
  assert object_store.names(store) == ["bucket/run"]


def test_the_quickstarts_set_up_is_ready(tmp_path):
  """Its rows are read one by one, from a TFDS data set."""
  overrides = [f"data.root={tmp_path / 'data' / 'dense'}", "mesh.data=1"]
  config = config_lib.load("configs/synthetic.py:debug", overrides, fill=True)
  build.prepare(config, num_workers=1)
  experiment = experiment_lib.Experiment.from_config(
    config, tmp_path / "workdir", split="videos_per_step"
  )
  found = checks.examine(case_lib.Case(experiment))
  assert [one.check for one in found if one.verdict == checks.FAILED] == []
  assert found[1].found.startswith("16 questions about 4 clips")
