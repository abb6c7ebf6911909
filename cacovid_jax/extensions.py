"""Code of one's own, found by name: a policy, a compressor.

Whoever gives a command, writes a Python config or calls a function may name
code. A file of data may not: JSON beside weights and the config.json of a
workdir are copied and downloaded, and reading them must run nothing.
"""

import hashlib
import importlib
import importlib.util
import os
import sys
from typing import Any, NamedTuple

from cacovid_jax import errors

# The policy modules that a file of data may name: the paper's own.
BUILT_IN = ("", "cacovid_jax.policy.network:Policy")


class Loaded(NamedTuple):
  """What a name leads to, and the sha256 of its file ("" if it has none)."""

  object: Any
  sha256: str


def load(spec: str, key: str) -> Loaded:
  """Returns the object called `path/to/file.py:name` or `package.module:name`.

  Args:
    spec: the name.
    key: what was set to it, for messages.

  Raises:
    UserError: no such file, module or object, or its code fails.
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
  return Loaded(getattr(module, name), digest)


def _import(name):
  module = importlib.import_module(name)
  if not getattr(module, "__file__", None):
    return module, ""
  with open(module.__file__, "rb") as file:
    return module, hashlib.sha256(file.read()).hexdigest()


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
