"""Config files: Python that defines `get_config(arg=None)`."""

import glob
import os
import pathlib
import sys

import ml_collections

from cacovid_jax import errors, extensions

# Config files of earlier versions: name -> today's file and argument.
_MOVED = {
  "llava_onevision_0_5b.py": "llava_onevision.py:size=0_5b",
  "llava_onevision_7b.py": "llava_onevision.py:size=7b",
  "qwen2_5_vl_3b.py": "qwen2_5_vl.py:size=3b",
  "qwen2_5_vl_7b.py": "qwen2_5_vl.py:size=7b",
  "synthetic_quickstart.py": "synthetic.py:size=quickstart",
  "synthetic_small.py": "synthetic.py:size=small",
  # Short names that tables had for them.
  "ov7b": "configs/llava_onevision.py:size=7b",
  "ov0.5b": "configs/llava_onevision.py:size=0_5b",
  "qwen3b": "configs/qwen2_5_vl.py:size=3b",
  "qwen7b": "configs/qwen2_5_vl.py:size=7b",
}


def run(path: pathlib.Path, arg: str | None) -> ml_collections.ConfigDict:
  """Returns the unlocked result of `get_config` of a Python file."""
  if not os.path.isfile(path):
    told = _known_files(path.parent)
    if path.name in _MOVED:
      now = ",".join(filter(None, (_MOVED[path.name], arg)))
      told = f": it is {path.parent / now} now"
    raise errors.UserError(f"no config file {path}{told}")
  path = path.resolve()
  # Configs import their neighbours as `configs.common`, from any folder.
  root = path.parent
  while (root / "__init__.py").exists():
    root = root.parent
  if path.suffix != ".py":
    raise errors.UserError(f"config {path} is not a .py or .json file")
  sys.path.insert(0, str(root))
  try:
    module, _ = extensions.run_file(path)
  except (SyntaxError, ImportError) as error:
    raise errors.UserError(
      f"config {path.name} does not load: {errors.one_line(error)}"
    ) from error
  finally:
    sys.path.remove(str(root))
  if not hasattr(module, "get_config"):
    raise errors.UserError(f"config {path.name} defines no get_config(arg)")
  config = module.get_config(arg)
  told = f"get_config of {path.name} must return an ml_collections.ConfigDict"
  errors.check(isinstance(config, ml_collections.ConfigDict), told)
  return config


def no_config():
  """Returns the error of a command without the config that it needs."""
  return errors.UserError(
    "no config given: add --config=configs/x.py" + _known_files("configs")
  )


def _known_files(folder):
  found = {*glob.glob("*.py", root_dir=folder)} - {"__init__.py", "common.py"}
  names = [str(pathlib.Path(folder, name)) for name in sorted(found)]
  return f"; there are {', '.join(names)}" if names else ""
