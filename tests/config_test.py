"""Configs: typed overrides, one-line mistakes, workdirs of one config."""

import importlib
import json
import os
import pathlib
import subprocess
import sys
import textwrap

import ml_collections
import pytest
from ml_collections import config_dict

from cacovid_jax import base_config, command, errors
from cacovid_jax import config as config_lib
from configs import common

_FILE = """
import ml_collections
from ml_collections import config_dict
from configs import common

def get_config(arg=None):
  arg = common.parse_arg(arg, ratio=0.02, debug=False, name="x")
  config = ml_collections.ConfigDict()
  config.seed = 42
  config.name = arg.name
  config.log_every = 10
  config.shuffle = True
  config.clamp = None
  config.limit = config_dict.placeholder(float)
  config.ladder = (0.01, 0.02)
  config.modules = ()
  config.sampling = dict(ratio=arg.ratio, num_combinations=32)
  config.optimizer = dict(policy=dict(lr=3e-4))
  return config
"""


@pytest.fixture
def path(tmp_path):
  path = tmp_path / "run.py"
  path.write_text(_FILE)
  return path


def test_what_cannot_be_a_config_is_one_line(tmp_path):
  os.mkfifo(tmp_path / "pipe.json")
  os.mkfifo(tmp_path / "pipe.py")
  (tmp_path / "folder.json").mkdir()
  (tmp_path / "folder.py").mkdir()
  os.symlink("nowhere", tmp_path / "link.py")
  os.symlink("loop.json", tmp_path / "loop.json")
  names = [*os.listdir(tmp_path), "n" * 300, "n" * 300 + ".py", "a/" * 3000]
  for name in [*names, "n" * 300 + ".json"]:
    with pytest.raises(errors.UserError, match=name[:100]):
      config_lib.load(f"{tmp_path}/{name}")


@pytest.mark.parametrize(
  ("key", "value", "given"),
  [
    ("policy.module", "evil:Policy", "mine:Policy"),
    ("policy.module", "evil.py:Policy", ""),
    ("policy.module", "cacovid_jax.policy.network:Head", ""),
    ("sampling.module", "evil:Sampler", ""),
    ("objective.module", "evil.py:Objective", "mine:Objective"),
    ("rollout.reward", "evil:reward", "accuracy"),
    ("evals.methods", ["random", "evil.py:rule?a=1"], "random,"),
    ("evals.candidates.cacovid", ["evil.py:rule"], "cacovid,"),
    ("evals.policies", ["p=W?module=evil:Policy"], "p=W"),
    ("validation.method", "evil.py:rule", "cacovid"),
  ],
)
def test_a_json_config_names_no_code(tmp_path, key, value, given):
  path = tmp_path / "config.json"
  for name in reversed(key.split(".")):
    value = {name: value}
  path.write_text(json.dumps(value))
  with pytest.raises(errors.UserError, match=f"{key}=.*--config.{key}="):
    config_lib.load(path, ["seed=1"])
  config_lib.load(path, [f"{key}={given}"])


def test_a_json_config_names_the_papers_policy(tmp_path):
  path = tmp_path / "config.json"
  for module in ("", "cacovid_jax.policy.network:Policy"):
    values = {"policy": {"module": module}, "evals": {"methods": ["cacovid"]}}
    path.write_text(json.dumps(values))
    assert config_lib.load(path).policy.module == module


def test_argument_sets_fields(path):
  config = config_lib.load(f"{path}:ratio=0.05,name=a")
  assert config.sampling.ratio == 0.05
  assert config.name == "a"


@pytest.mark.parametrize(
  "text, key, value",
  [
    ("seed=7", "seed", 7),
    ("seed=1_000", "seed", 1000),
    ("seed=1e4", "seed", 10000),
    ("sampling.ratio=1", "sampling.ratio", 1.0),
    ("optimizer.policy.lr=1e-5", "optimizer.policy.lr", 1e-5),
    ("shuffle=false", "shuffle", False),
    ("name=1=2", "name", "1=2"),
    ("name=none", "name", "none"),
    ("clamp=0.5", "clamp", 0.5),
    ("clamp=None", "clamp", None),
    ("clamp=word", "clamp", "word"),
    ("clamp=(1, 'a')", "clamp", (1, "a")),
    ("limit=3", "limit", 3.0),
    ("limit=none", "limit", None),
    ("ladder=0.1,1", "ladder", (0.1, 1.0)),
    ("ladder=(0.1,)", "ladder", (0.1,)),
    ("ladder=()", "ladder", ()),
    ("modules=a,2", "modules", ("a", 2)),
    ("modules=((16, 4), (8, 4))", "modules", ((16, 4), (8, 4))),
  ],
)
def test_overrides_take_the_type_of_the_field(path, text, key, value):
  found = config_lib.load(path, [text])
  for part in key.split("."):
    found = found[part]
  assert found == value
  assert type(found) is type(value)


@pytest.mark.parametrize(
  "text, message",
  [
    ("sampling.ratoi=1", "unknown config key 'sampling.ratoi'; .*ling.ratio"),
    ("optimizer.lr=1", "nearest: optimizer.policy.lr"),
    ("zzz=1", "unknown config key 'zzz'"),
    ("seed.x=1", "unknown config key 'seed.x'"),
    ("sampling=1", "group.*sampling.num_combinations, sampling.ratio"),
    ("seed", "has no value"),
    ("seed=1.5", "seed=1.5 is not a whole number .it is 42 now"),
    ("seed=many", "is not a whole number"),
    ("shuffle=maybe", "is not true or false"),
    ("sampling.ratio=nan", "is not a number"),
    ("limit=far", "is not a number"),
    ("ladder=0.1,x", "is not a number"),
  ],
)
def test_mistyped_overrides_are_named(path, text, message):
  with pytest.raises(errors.UserError, match=message) as raised:
    config_lib.load(path, [text])
  assert "\n" not in str(raised.value)


def test_a_key_with_a_dot_is_named(tmp_path):
  path = tmp_path / "config.json"
  path.write_text('{"frame.cap": 1}')
  with pytest.raises(errors.UserError, match="config.json: .*frame.cap"):
    config_lib.load(path)


def test_loaded_config_is_locked(path):
  config = config_lib.load(path)
  with pytest.raises(AttributeError):
    config.sampling.ratoi = 1


def test_bad_files_are_named(tmp_path, path):
  with pytest.raises(errors.UserError, match="no config file.*run.py"):
    config_lib.load(tmp_path / "rum.py")
  for text, message in [
    ("def get_config(:", "does not load"),
    ("import not_a_module", "not_a_module"),
    ("x = 1", "no get_config"),
    ("def get_config(arg=None): return {}", "must return"),
  ]:
    path.write_text(text)
    with pytest.raises(errors.UserError, match=message):
      config_lib.load(path)
  (tmp_path / "c.json").write_text("[1")
  with pytest.raises(errors.UserError, match="c.json: not readable as JSON"):
    config_lib.load(tmp_path / "c.json")


def test_parse_arg_reads_flags_and_values():
  arg = common.parse_arg("debug,ratio=0.5", ratio=0.02, debug=False)
  assert (arg.debug, arg.ratio) == (True, 0.5)
  assert common.parse_arg(None, debug=False).debug is False
  with pytest.raises(errors.UserError, match="'debg'.*nearest: debug"):
    common.parse_arg("debg", debug=False, ratio=0.1)
  with pytest.raises(errors.UserError, match="ratio=VALUE"):
    common.parse_arg("ratio", ratio=0.1)
  with pytest.raises(errors.UserError, match="ratio=x is not a number"):
    common.parse_arg("ratio=x", ratio=0.1)


def test_hash_ignores_only_how_a_run_is_recorded(path):
  def hash_of(*overrides):
    return config_lib.config_hash(config_lib.load(path, overrides))

  assert hash_of() == hash_of("log_every=3")
  assert hash_of() != hash_of("seed=43")
  assert hash_of() != hash_of("optimizer.policy.lr=1e-3")


def test_saved_config_loads_as_the_same_config(tmp_path, path):
  config = config_lib.load(path)
  config_lib.save(config, tmp_path / "config.json")
  again = config_lib.load(tmp_path / "config.json", ["seed=42"])
  assert again.ladder == (0.01, 0.02)
  assert config_lib.config_hash(again) == config_lib.config_hash(config)


def test_placeholders_and_references_are_written_as_values():
  config = ml_collections.ConfigDict()
  config.a = config_dict.FieldReference(2)
  config.b = config.get_ref("a") * 2
  config.c = config_dict.placeholder(int)
  assert config_lib.to_dict(config) == {"a": 2, "b": 4, "c": None}


def test_values_that_json_lacks_are_named():
  with pytest.raises(TypeError, match="config value a"):
    config_lib.dumps(ml_collections.ConfigDict({"a": object()}))


def test_a_workdir_belongs_to_one_config(tmp_path, path):
  workdir = tmp_path / "w"
  config = config_lib.load(path)
  config_lib.claim_workdir(workdir, config)
  config_lib.claim_workdir(workdir, config)
  config_lib.claim_workdir(workdir, config_lib.load(path, ["log_every=1"]))
  saved = json.loads((workdir / "config.json").read_text())
  assert saved["log_every"] == 1
  # One that lacks a key of today goes on with its default alone.
  config = config_lib.complete(config_lib.load(path)).lock()
  config_lib.claim_workdir(tmp_path / "new", config)
  before = json.loads((tmp_path / "new" / "config.json").read_text())
  del before["data"]["max_replaced"], before["optimizer"]["average"]
  (tmp_path / "new" / "config.json").write_text(json.dumps(before))
  strict = config_lib.replace(config, {"data.max_replaced": 0.0})
  with pytest.raises(errors.UserError, match="data.max_replaced is new"):
    config_lib.claim_workdir(tmp_path / "new", strict)
  averaging = config_lib.replace(config, {"optimizer.average": 0.9})
  with pytest.raises(errors.UserError, match="optimizer.average is new"):
    config_lib.claim_workdir(tmp_path / "new", averaging)
  config_lib.claim_workdir(tmp_path / "new", config)
  other = config_lib.load(path, ["sampling.ratio=0.5", "ladder=1,2"])
  with pytest.raises(
    errors.UserError,
    match=r"another config: .*sampling.ratio is 0.02 there and 0.5 here",
  ):
    config_lib.claim_workdir(workdir, other)
  assert json.loads((workdir / "config.json").read_text()) == saved
  (tmp_path / "file").write_text("")
  with pytest.raises(errors.UserError, match="cannot write"):
    config_lib.claim_workdir(tmp_path / "file" / "w", config)


@pytest.mark.parametrize("decode", ["workers", "in_process"])
def test_a_workdir_goes_on_whatever_decodes_its_clips(tmp_path, decode):
  config = base_config.get_config()
  older = base_config.get_config()
  del older.data["decode"]
  config_lib.save(older, tmp_path / "config.json")
  assert config_lib.config_hash(older) == config_lib.config_hash(config)
  config.data.decode = decode
  config_lib.claim_workdir(tmp_path, config)
  saved = json.loads((tmp_path / "config.json").read_text())
  assert saved["data"]["decode"] == decode


_MAIN = textwrap.dedent("""
  from cacovid_jax import command
  flags = {
    "ratio": command.Flag("Kept share.", "sampling.ratio", old=("topk",)),
    "shuffle": command.Flag("Whether to mix.", default=True),
    "count": command.Flag("How many.", default=1),
    "to": command.Flag("Where to.", choices=("here", "there")),
  }
  made = command.Command("Runs.", flags, config="required", num_arguments=1)
  def main(args):
    print(args.config.sampling.ratio, args.arguments, args.shuffle, args.to)
  made.run(main)
""")


def _run(*arguments):
  return subprocess.run(
    [sys.executable, "-c", _MAIN, *arguments],
    capture_output=True,
    text=True,
    check=False,
  )


def test_flags_of_an_entry_point(path):
  done = _run(f"--config={path}:ratio=0.1", "--config.sampling.ratio=0.3", "x")
  assert done.stdout == "0.3 ['x'] True None\n"
  for arguments in (
    (f"--config={path}", "--config.sampling.ratoi=0.3"),
    (f"--config={path}", "--config.seed=x"),
    (f"--config={path}", "--config.seed"),
    (f"--config={path}", "--unknown=1"),
    (f"--config={path}", "--ratio=x"),
    (f"--config={path}", "--count=x"),
    (f"--config={path}", "--count"),
    (f"--config={path}", "--to=nowhere"),
    (f"--config={path}", "one", "two"),
    (f"--config={path}:nothing",),
    ("--config=missing.py",),
    (),
  ):
    done = _run(*arguments)
    assert done.returncode == 2, arguments
    assert done.stderr.startswith("error: "), done.stderr
    assert done.stderr.count("\n") == 1, done.stderr


def test_a_flag_is_another_name_of_a_key(path):
  done = _run(
    f"--config={path}", "--config.sampling.ratio=0.3", "--ratio", "0.2",
    "--noshuffle", "--to=there",
  )  # fmt: skip
  assert (done.stdout, done.stderr) == ("0.2 [] False there\n", "")
  # The last of several counts, and a key that the file lacks has its default.
  done = _run(f"--config={path}", "--ratio=0.2", "--config.sampling.ratio=0.3")
  assert done.stdout == "0.3 [] True None\n"
  done = _run(f"--config={path}", "--config.evals.seeds=1,2")
  assert done.stdout == "0.02 [] True None\n"


def test_an_old_spelling_of_a_flag_tells_the_new_one(path):
  done = _run(f"--config={path}", "--topk=0.2")
  assert done.stdout == "0.2 [] True None\n"
  assert done.stderr == "hint: --topk is --ratio now\n"


@pytest.mark.parametrize(
  ("word", "match"),
  [
    ("--ratoi=1", "unknown flag --ratoi; nearest: --ratio, "),
    ("--config.evals.ratoi=1", "'evals.ratoi'; nearest: evals.ratios"),
    ("--ratio=x", "--ratio=x is not a number .it is 0.02 now"),
    ("--to=nowhere", "--to=nowhere: choose here or there"),
    ("--to=a\0b", r"--to is 'a\\x00b'; it must be a text without NUL"),
    ("--config=a\0b.json", "--config is .* without NUL"),
    ("--many=0", "--many is 0; it must be a whole number at least 1"),
    ("--many=9999999999", "--many is 9999999999; .* at most 2147483647"),
    ("--free=-inf", "--free is -inf; it must be a number"),
  ],
)
def test_a_mistyped_flag_names_the_nearest(path, word, match):
  made = command.Command(
    "",
    {
      "ratio": command.Flag("", "sampling.ratio"),
      "to": command.Flag("", choices=("here", "there")),
      "many": command.Flag("", default=1, least=1),
      "free": command.Flag("", default=0.5),
    },
  )
  with pytest.raises(errors.UserError, match=match):
    made.parse(["x", f"--config={path}", word])


def test_defaults_without_a_config_are_those_of_the_command():
  made = command.Command(
    "", {"dtype": command.Flag("", "model.dtype")},
    defaults={"model.dtype": "float32"},
  )  # fmt: skip
  args = made.parse(["x"])
  assert args.config.model.dtype == "float32" and args.config.is_locked
  assert not args.given and not args.spec
  args = made.parse(["x", "--dtype=bfloat16"])
  assert args.config.model.dtype == "bfloat16"
  assert args.given == {"model.dtype"}


def test_a_config_of_its_own_sections_is_completed(path):
  config = config_lib.load(path, fill=True)
  assert config.sampling.ratio == 0.02 and config.name == "x"
  assert config.evals.seeds == (0,) and config.sampling.group_size == 2
  path.write_text(_FILE.replace("config.seed", "config.evals = dict(seed=1)#"))
  with pytest.raises(
    errors.UserError, match="evals.seed'; nearest: .*ls.seeds"
  ):
    config_lib.load(path, fill=True)


COMMANDS = (
  "train", "evaluate", "doctor", "answer", "prepare", "pretrain", "ckpt",
  "preparation.blind_filter", "preparation.encode_features",
  "preparation.tfds_build",
)  # fmt: skip
HELP = pathlib.Path(__file__).parent / "help.txt"


def test_help_shows_the_config_and_every_flag():
  """Compares with help.txt; `python -m tests.config_test` writes it anew."""
  assert HELP.read_text("utf-8") == help_of_all()


def help_of_all():
  """Returns what --help prints of each command, less its documentation."""
  parts = []
  for name in COMMANDS:
    module = importlib.import_module(f"cacovid_jax.{name}")
    text = module.COMMAND.help()
    assert text.startswith(module.__doc__.strip())
    assert ("--config=FILE" in text) == (name != "ckpt")
    parts.append(f"{name}\n{text[len(module.__doc__.strip()) :].lstrip()}")
  return "\n".join(parts)


if __name__ == "__main__":
  HELP.write_text(help_of_all(), "utf-8")
