"""The repository itself: what is tracked, configs, packaging, commands."""

import pathlib
import re
import subprocess
import sys

import pytest

import cacovid_jax
from cacovid_jax import config as config_lib
from cacovid_jax import errors

_ROOT = pathlib.Path(__file__).parent.parent
_CONFIGS = sorted(
  path
  for path in (_ROOT / "configs").glob("*.py")
  if path.stem not in ("__init__", "common")
)


def _files():
  """Returns the tracked files; of an unpacked archive, all of its folders."""
  done = subprocess.run(
    ["git", "ls-files", "-z"], cwd=_ROOT, capture_output=True, check=False
  )
  if done.returncode == 0 and done.stdout:
    paths = [_ROOT / name for name in done.stdout.decode().split("\0") if name]
  else:
    folders = ("cacovid_jax", "configs", "experiments", "tests")
    paths = [*_ROOT.glob("*"), *(_ROOT / ".ci").glob("*")]
    for folder in folders:
      paths += (_ROOT / folder).rglob("*")
  return [
    path for path in paths if path.is_file() and "__pycache__" not in path.parts
  ]


def _texts():
  for path in _files():
    try:
      yield path.relative_to(_ROOT), path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
      continue


def test_no_file_names_a_folder_of_one_machine():
  # Written in pieces, so that this file does not hold them itself.
  pattern = re.compile(
    r"(?<![\w.$}])/(?:" + "|".join(["work", "root", "home", "Users"]) + r")/\w"
    "|/tm" + r"p/\w"
  )
  found = [
    f"{path}: {match.group()}"
    for path, text in _texts()
    for match in pattern.finditer(text)
  ]
  assert not found


def test_only_sources_and_assets_are_tracked():
  for path in _files():
    name = path.relative_to(_ROOT).as_posix()
    assert not re.search(
      r"(^|/)(workdirs|build|dist|\.venv\w*|__pycache__|\.jax_cache)/", name
    ), name
    # The folders of assets are allowed 8 MB each; nothing is larger.
    assert path.stat().st_size <= 8e6, name


def test_each_asset_folder_is_small():
  assets = _ROOT / "cacovid_jax" / "assets"
  for folder in assets.iterdir() if assets.is_dir() else ():
    size = sum(file.stat().st_size for file in folder.rglob("*"))
    assert size <= 8 * 2**20, folder.name


def test_every_module_is_in_a_package_and_has_a_docstring():
  for name, text in _texts():
    if name.suffix == ".py" and name.parts[0] == "cacovid_jax":
      assert (_ROOT / name.parent / "__init__.py").exists(), name
      assert not text or text.startswith(('"""', 'r"""')), name


def _runs(module: str) -> bool:
  """Returns whether `python -m` runs a dotted name."""
  path = _ROOT / module.replace(".", "/")
  return path.with_suffix(".py").exists() or (path / "__main__.py").exists()


@pytest.mark.parametrize("path", _CONFIGS, ids=lambda path: path.stem)
def test_every_config_loads(path):
  config = config_lib.load(path)
  assert config.is_locked
  # Saved and read again it is the same config.
  assert config_lib.config_hash(config)
  try:
    debug = config_lib.load(f"{path}:debug")
  except errors.UserError as error:
    pytest.fail(f"{path.name} has no debug form: {error}")
  assert config_lib.config_hash(debug) != config_lib.config_hash(config)


@pytest.mark.parametrize("path", _CONFIGS, ids=lambda path: path.stem)
def test_every_config_names_its_own_command(path):
  text = path.read_text(encoding="utf-8")
  assert f"configs/{path.name}" in text
  for module in re.findall(r"python -m (cacovid_jax[\w.]*)", text):
    assert _runs(module), module


def test_the_version_is_stated_once():
  citation = (_ROOT / "CITATION.cff").read_text(encoding="utf-8")
  assert f"\nversion: {cacovid_jax.__version__}\n" in citation
  changelog = (_ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
  assert f"## {cacovid_jax.__version__}" in changelog


# Classes of lmms-eval, which alone imports this file.
_OF_AN_EXTRA = {"cacovid_jax.integrations.lmms_eval.model"}


def test_importing_the_library_needs_no_optional_package():
  modules = [
    ".".join(name.with_suffix("").parts)
    for name, _ in _texts()
    if name.parts[0] == "cacovid_jax"
    and name.suffix == ".py"
    and name.stem != "__init__"
    and "assets" not in name.parts
  ]
  assert set(modules) >= _OF_AN_EXTRA
  modules = [name for name in modules if name not in _OF_AN_EXTRA]
  optional = ("torch", "transformers", "tensorflow", "lmms_eval", "decord")
  code = (
    "import importlib, sys\n"
    f"for name in {modules!r}:\n"
    "  importlib.import_module(name)\n"
    f"print([name for name in {optional!r} if name in sys.modules])"
  )
  done = subprocess.run(
    [sys.executable, "-c", code],
    cwd=_ROOT,
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  assert done.stdout.splitlines()[-1] == "[]"
