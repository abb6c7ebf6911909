"""A policy by name, from its files on disk, and from a user's own file."""

import hashlib
import json
import os
import pathlib
import shutil
import sys
from importlib import resources

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cacovid_jax import base_config, command, errors, files
from cacovid_jax import config as config_lib
from cacovid_jax.models import checkpoints, qwen2, token_grid
from cacovid_jax.policy import loading, network, objective, selection
from tests.evals import tiny

FILE = os.path.join(os.path.dirname(__file__), "bilinear_policy.py")
GRID = (2, 2, 3)
ROWS = np.arange(2, 14)


def make(**options):
  policy_class = loading.find_policy({"module": f"{FILE}:Bilinear"})[0]
  # As the trainer calls it: with the options of every policy.
  policy = policy_class.from_llm_config(
    qwen2.Qwen2Config.tiny(), dtype=jnp.bfloat16, num_halvings=4, **options
  )
  return policy, policy.init_from_llm(jax.random.key(0), {})


@pytest.mark.parametrize("name", ["", "cacovid_jax.policy.network:Policy"])
def test_names_of_the_papers_policy(name):
  assert loading.find_policy({"module": name}) == (network.Policy, "", {})


def test_it_scores_learns_and_selects():
  policy, params = make(rank=4)
  assert params["question"]["kernel"].shape == (32, 4)
  x = jax.random.normal(jax.random.key(1), (16, 32))
  positions = jnp.arange(16)[None]
  memory = objective.Memory(
    token_mask=np.arange(24).reshape(2, 12) % 3 == 0,
    token_reward=np.float32([0, 1]),
    token_valid=np.ones(2, bool),
    frame_mask=np.eye(2, dtype=bool),
    frame_reward=np.float32([0, 1]),
    frame_valid=np.ones(2, bool),
  )
  memory.token_mask[1] = ~memory.token_mask[1]

  @jax.jit
  def step(params):
    def loss(params):
      scores = policy.apply({"params": params}, x, positions, ROWS, GRID, 16)
      old = jax.lax.stop_gradient(scores)
      return objective.loss(scores, old, memory)[0], scores

    return jax.grad(loss, has_aux=True)(params)

  grads, scores = step(params)
  assert scores.token.shape == (12, 2) and scores.frame.shape == (2, 2)
  assert all(np.any(g) for g in jax.tree.leaves(grads))
  index = selection.select(scores, selection.budget(GRID, 0.5))
  assert index.shape == (6,)


def test_in_a_bucket_it_selects_as_alone():
  policy, params = make(rank=4)
  bucket = token_grid.GridBucket(3, 10, 24)
  x = np.full((30, 32), 9.0, np.float32)
  x[:16] = np.random.default_rng(1).standard_normal((16, 32))
  rows = np.full(24, 30)
  rows[:12] = ROWS

  @jax.jit
  def select(budget, *prompt):
    scores = policy.apply({"params": params}, *prompt)
    return selection.select(scores, budget)

  budget = selection.budget(GRID, 0.5, bucket=bucket)
  positions = np.arange(30)[None]
  index = select(budget, x, positions, rows, budget.grid, 16)
  alone = policy.apply(
    {"params": params}, x[:16], positions[:, :16], ROWS, GRID
  )
  expected = selection.select(alone, selection.budget(GRID, 0.5))
  assert budget.kept == 6
  np.testing.assert_array_equal(index[:6], expected)
  assert (np.asarray(index[6:]) == 24).all()


def test_its_weights_are_kept_under_its_own_names(tmp_path):
  policy, params = make()
  path = tmp_path / "mine.safetensors"
  loading.save(path, policy, params)
  assert "question/kernel" in loading.read(path)
  back = loading.load(path, policy, params)
  jax.tree.map(np.testing.assert_array_equal, back, params)
  other, other_params = make(rank=3)
  with pytest.raises(errors.UserError, match="misshaped question/bias"):
    loading.load(path, other, other_params)


@pytest.mark.parametrize(
  ("spec", "named"),
  [
    ("bilinear", "must read"),
    (":Bilinear", "must read"),
    ("no/such/file.py:Bilinear", "no file"),
    ("no_such_package.module:Bilinear", "ModuleNotFoundError"),
    (f"{FILE}:Trilinear", "has no Trilinear"),
    (f"{FILE}:nn", "no class"),
    ("cacovid_jax.policy.network:Head", "lacks from_llm_config"),
  ],
)
def test_a_name_that_leads_nowhere_is_refused(spec, named):
  with pytest.raises(errors.UserError, match=named):
    loading.find_policy({"module": spec})


def test_a_file_that_fails_is_named_with_its_error(tmp_path):
  path = tmp_path / "broken.py"
  path.write_text("1 / 0\n")
  with pytest.raises(errors.UserError, match=r"broken\.py.*ZeroDivisionError"):
    loading.find_policy({"module": f"{path}:Any"})


@pytest.fixture(scope="module")
def checkpoint_dir(tmp_path_factory):
  return tiny.write_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def checkpoint(checkpoint_dir):
  return tiny.load_checkpoint(checkpoint_dir)


@pytest.fixture
def write(checkpoint, tmp_path):
  """Returns a function that writes W/policy as training does, and gives W."""

  def write(**described):
    tiny.write_policy(tmp_path / "policy", checkpoint)
    path = tmp_path / "policy" / "policy_config.json"
    path.write_text(json.dumps(described))
    return tmp_path

  return write


def test_policy_folders(checkpoint, tmp_path):
  path = tiny.write_policy(tmp_path / "policy", checkpoint)
  # The file, its folder, and the training workdir around it.
  loaded = [
    loading.load_policy(place, checkpoint)
    for place in (path, tmp_path / "policy", str(tmp_path))
  ]
  assert len({policy.identity for policy in loaded}) == 1
  assert isinstance(loaded[0].module, network.Policy)
  with pytest.raises(errors.UserError, match="no policy in"):
    loading.load_policy(tmp_path / "other", checkpoint)


def test_a_policy_of_another_base_model_is_refused(checkpoint, write):
  workdir = write(policy={"module": ""}, base_model={"sha256": "other"})
  with pytest.raises(errors.UserError, match="another base model"):
    loading.load_policy(workdir, checkpoint)


def test_weights_are_those_that_were_exported(checkpoint, tmp_path, caplog):
  policy = loading.make_policy(
    checkpoint.model.config.text, {"module": "", "num_halvings": 2}
  )[0]
  params = policy.init_from_llm(jax.random.key(0), checkpoint.params)
  path = tmp_path / "run" / "policy.safetensors"
  described = {"policy": {"module": "", "num_halvings": 2}}
  caplog.set_level("INFO")
  loading.export(path, policy, params, described)
  config = json.loads((tmp_path / "run/policy_config.json").read_text())
  digest = hashlib.sha256(path.read_bytes()).hexdigest()
  assert config == {**described, "weights_sha256": {path.name: [digest]}}
  loaded = loading.load_policy(tmp_path / "run", checkpoint)
  assert loaded.identity == digest and not caplog.records
  # Any bit of the tensors, of which the format itself checks none.
  whole = path.read_bytes()
  for place in (len(whole) // 2, len(whole) - 1):
    damaged = bytearray(whole)
    damaged[place] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(errors.UserError, match="is not what training wrote"):
      loading.load_policy(path, checkpoint)
  # Without a record it is read, and said so.
  path.write_bytes(damaged)
  (tmp_path / "run/policy_config.json").write_text(json.dumps(described))
  loading.load_policy(path, checkpoint)
  [record] = caplog.records
  assert "read unverified, no sha256" in record.getMessage()


def test_a_kill_between_config_and_weights_leaves_both_readable(
  checkpoint, tmp_path, monkeypatch
):
  policy = loading.make_policy(
    checkpoint.model.config.text, {"module": "", "num_halvings": 2}
  )[0]
  described = {"policy": {"module": "", "num_halvings": 2}}
  path = tmp_path / "best.safetensors"
  first, second = (
    policy.init_from_llm(jax.random.key(seed), checkpoint.params)
    for seed in (0, 1)
  )
  loading.export(path, policy, first, described)
  before, write = path.read_bytes(), files.write_json

  def killed(*given):
    write(*given)
    raise KeyboardInterrupt

  monkeypatch.setattr(files, "write_json", killed)
  for params in (second, second, first, second):
    with pytest.raises(KeyboardInterrupt):
      loading.export(path, policy, params, described)
    assert path.read_bytes() == before
    loading.load_policy(path, checkpoint)
  monkeypatch.undo()
  loading.export(path, policy, second, described)
  assert path.read_bytes() != before
  loading.load_policy(path, checkpoint)
  # So are those of an earlier version, which listed none.
  before = path.read_bytes()
  (tmp_path / "policy_config.json").write_text(json.dumps(described))
  monkeypatch.setattr(files, "write_json", killed)
  with pytest.raises(KeyboardInterrupt):
    loading.export(path, policy, first, described)
  assert path.read_bytes() == before
  loading.load_policy(path, checkpoint)
  monkeypatch.undo()
  # One that cannot be read is written anew.
  (tmp_path / "policy_config.json").write_text("{")
  loading.export(path, policy, second, described)
  loading.load_policy(path, checkpoint)


def test_the_shipped_policy_is_verified():
  folder = resources.files("cacovid_jax") / "assets" / "policy"
  described = json.loads((folder / "policy_config.json").read_text())
  weights = (folder / "policy.safetensors").read_bytes()
  digest = hashlib.sha256(weights).hexdigest()
  assert described["weights_sha256"] == {"policy.safetensors": [digest]}


# As in a folder that was downloaded: a module beside the file that names it.
EVIL = """
import pathlib
pathlib.Path("PWNED").write_text("this module was run")
"""
EVIL_CONFIG = {
  "policy": {
    "backend": "auto",
    "dtype": "float32",
    "module": "downloaded.evil:Policy",
    "num_halvings": 0,
  },
  "grid": [16, 7, 7],
  "ratios": [0.05],
  "steps": 12,
}


@pytest.mark.parametrize("place", ["policy", "config", "checkpoint", "workdir"])
def test_a_downloaded_folder_runs_nothing(
  checkpoint, checkpoint_dir, tmp_path, monkeypatch, place
):
  folder = tmp_path / "downloaded"
  if place == "checkpoint":
    shutil.copytree(checkpoint_dir, folder)
  inner = folder / "policy" if place == "workdir" else folder
  folder.mkdir(exist_ok=True)
  tiny.write_policy(inner, checkpoint)
  for where in (folder, inner):
    (where / "evil.py").write_text(EVIL)
    for name in ("policy_config.json", "config.json"):
      if not (where / name).exists():
        (where / name).write_text(json.dumps(EVIL_CONFIG))
  monkeypatch.chdir(tmp_path)
  monkeypatch.syspath_prepend(str(tmp_path))
  if place == "checkpoint":
    checkpoint = checkpoints.load("downloaded")
  calls = [lambda: loading.load_policy("downloaded", checkpoint)]
  if place in ("config", "workdir"):
    run = command.Command("", {}, config="required")
    files_of = ["config.json", "policy_config.json"]
    calls += [
      lambda name=name: run.parse(["", f"--config=downloaded/{name}"])
      for name in files_of
      if (folder / name).exists()
    ]
  for call in calls:
    with pytest.raises(errors.UserError, match="runs no code"):
      call()
  if place == "workdir":
    with pytest.raises(errors.UserError, match="belongs to another config"):
      config_lib.claim_workdir("downloaded", base_config.get_config())
  assert not (tmp_path / "PWNED").exists()
  assert "downloaded.evil" not in sys.modules


OWN = """
from cacovid_jax.policy import network
class Mine(network.Policy):
  pass
"""


def test_a_users_own_policy_is_run_only_when_asked_for(
  checkpoint, write, tmp_path, caplog
):
  source = tmp_path / "mine.py"
  source.write_text(OWN)
  module = f"{source}:Mine"
  workdir = write(
    policy={"module": module, "num_halvings": 2, "dtype": "float32"},
    base_model={"sha256": checkpoint.identity["sha256"]},
    module_sha256=hashlib.sha256(OWN.encode()).hexdigest(),
  )
  with pytest.raises(errors.UserError) as error:
    loading.load_policy(workdir, checkpoint)
  assert f"trained with '{module}'" in str(error.value)
  assert f"--policy={workdir}?module='{module}'" in str(error.value)
  spec = f"{workdir}?module={module}"
  assert loading.has_policy(spec)
  policy = loading.load_policy(spec, checkpoint)
  assert type(policy.module).__name__ == "Mine"
  assert not caplog.records
  source.write_text(OWN + "# Changed since.\n")
  loading.load_policy(spec, checkpoint)
  [record] = caplog.records
  assert "trained with another text of" in record.getMessage()


def test_a_record_without_sha256_is_no_reason_to_warn(
  checkpoint, write, tmp_path, caplog
):
  (tmp_path / "mine.py").write_text(OWN)
  workdir = write(policy={"module": "elsewhere.py:Mine", "num_halvings": 2})
  spec = f"{workdir}?module={tmp_path / 'mine.py'}:Mine"
  policy = loading.load_policy(spec, checkpoint)
  assert type(policy.module).__name__ == "Mine"
  assert not caplog.records


@pytest.mark.parametrize(
  "module",
  [
    "evil:Policy",
    "policy.evil:Policy",
    "policy/evil.py:Policy",
    "cacovid_jax.policy.network:Head",
    "os:system",
  ],
)
@pytest.mark.parametrize("place", ["policy", ".", "policy/policy.safetensors"])
def test_a_module_that_a_file_of_data_names_never_runs(
  checkpoint, write, monkeypatch, module, place
):
  workdir = write(policy={"module": module, "num_halvings": 2})
  (workdir / "policy" / "evil.py").write_text("open('RUN', 'w')\n")
  monkeypatch.chdir(workdir)
  monkeypatch.syspath_prepend(str(workdir))
  monkeypatch.syspath_prepend(str(workdir / "policy"))
  with pytest.raises(errors.UserError, match=f"trained with '{module}'"):
    loading.load_policy(place, checkpoint)
  assert not (workdir / "RUN").exists()


def test_nor_does_one_beside_a_checkpoint(
  checkpoint, checkpoint_dir, tmp_path, monkeypatch
):
  released = tmp_path / "released"
  shutil.copytree(checkpoint_dir, released)
  tiny.write_policy(released, checkpoint)
  described = {"policy": {"module": f"{released}/evil.py:Policy"}}
  (released / "policy_config.json").write_text(json.dumps(described))
  (released / "evil.py").write_text("open('RUN', 'w')\n")
  monkeypatch.chdir(tmp_path)
  base = checkpoints.load(str(released))
  assert loading.has_policy(str(released))
  with pytest.raises(errors.UserError, match="trained with"):
    loading.load_policy(str(released), base)
  assert not (tmp_path / "RUN").exists()


@pytest.mark.parametrize(
  ("described", "message"),
  [
    ({"policy": -1}, "policy is -1; it must be an object"),
    ({"policy": "F64"}, "policy is 'F64'; it must be an object"),
    ({"policy": {"module": ["a"]}}, "policy.module is .'a'.; it must be a t"),
    ({"policy": {"dtype": None}}, "policy.dtype is None; it must be one of fl"),
    ({"policy": {"backend": 1e308}}, "policy.backend is 1e.308; it must"),
    ({"policy": {"backend": ["", 10**18]}}, "policy.backend is .* one of auto"),
    ({"policy": {"num_halvings": True}}, "policy.num_halvings .* whole number"),
    ({"policy": {"num_halvings": -1}}, "policy.num_halvings is -1; it"),
    ({"policy": {"num_halvings": 2, "": ""}}, "Policy takes other options"),
    ({"base_model": []}, r"base_model is \[\]; it must be an object"),
    ({"base_model": {"sha256": 3}}, "base_model.sha256 is 3; it must be"),
    (
      {"policy": {}, "weights_sha256": "a"},
      "weights_sha256 is 'a'; it must be an object",
    ),
    (
      {"weights_sha256": {"policy.safetensors": "a"}},
      r"weights_sha256\[...\] must be a list",
    ),
    ({"policy": {}, "module_sha256": 3}, "module_sha256 is 3; it must be a"),
  ],
)
def test_values_of_wrong_kinds_are_named(checkpoint, write, described, message):
  with pytest.raises(errors.UserError, match=message) as error:
    loading.load_policy(write(**described), checkpoint)
  assert "policy_config.json" in str(error.value)
  assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_recorded_descriptions_of_wrong_types_are_one_line(
  checkpoint, write, number
):
  path = pathlib.Path(__file__).parent / f"cases/policy_config_{number}.json"
  described = json.loads(path.read_text())
  del described["base_model"]  # Of another model than the tests'.
  key = {2: "policy.backend", 4: r"ratios\[0\]"}.get(number, "policy")
  with pytest.raises(errors.UserError, match=f"{key} is .*must be") as error:
    loading.load_policy(write(**described), checkpoint)
  assert "policy_config.json: " in str(error.value)
  assert len(str(error.value).splitlines()) == 1
