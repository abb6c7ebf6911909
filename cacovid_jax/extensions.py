"""Code of one's own, found by name: a policy, a compressor.

A command, a Python config and a caller may name code. A file of data may not:
JSON beside weights or in a workdir may be anybody's, and reading runs nothing.
"""

import hashlib
import importlib
import importlib.util
import os
import sys
from typing import Any

from cacovid_jax import errors, files

# The policy modules that a file of data may name: the paper's own.
BUILT_IN = ("", "cacovid_jax.policy.network:Policy")


def load(spec: str, key: str) -> tuple[Any, str]:
  """Returns a named object, and the sha256 of its file ("" if it has none).

  Args:
    spec: `path/to/file.py:name` or `package.module:name`.
    key: what was set to it, for messages.
  """
  source, _, name = spec.rpartition(":") if isinstance(spec, str) else [""] * 3
  if not source or not name:
    raise errors.UserError(
      f"{key} {spec!r} must read path/to/file.py:name or package.module:name"
    )
  is_file = source.endswith(".py")
  if is_file and not os.path.isfile(source):
    raise errors.UserError(f"{key} {spec!r}: there is no file {source}")
  try:
    module, digest = _run(source) if is_file else _import(source)
  except Exception as error:
    raise errors.UserError(
      f"{key} {spec!r}: importing {source} failed with"
      f" {type(error).__name__}: {errors.one_line(error)}"
    ) from error
  if not hasattr(module, name):
    raise errors.UserError(f"{key} {spec!r}: {source} has no {name}")
  return getattr(module, name), digest


def _import(name):
  module = importlib.import_module(name)
  path = getattr(module, "__file__", None)
  return module, files.sha256(path) if path else ""


def _run(path):
  """Runs the very bytes that are hashed, never a cached .pyc beside them."""
  with open(path, "rb") as file:
    source = file.read()
  digest = hashlib.sha256(source).hexdigest()
  name = f"_{os.path.basename(path)[:-3]}_{digest[:16]}"
  location = importlib.util.spec_from_file_location(name, path)
  module = importlib.util.module_from_spec(location)
  # Dataclasses, hence Linen modules, look their own module up by name.
  sys.modules[name] = module
  exec(location.loader.source_to_code(source, path), vars(module))
  return module, digest
