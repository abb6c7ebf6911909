"""Code of one's own, found by name: a policy, a sampler, a compressor.

A command, a Python config and a caller may name code. A file of data may not:
JSON beside weights or in a workdir may be anybody's, and reading runs nothing.
"""

import difflib
import functools
import hashlib
import importlib
import importlib.util
import inspect
import os
import sys
from typing import Any

from cacovid_jax import errors, files

# The policy modules that a file of data may name: the paper's own.
BUILT_IN = ("", "cacovid_jax.policy.network:Policy")
# Sections of a config that may name code: the key that does, and the keys that
# are there whatever it names. All others are options of the code.
SECTIONS = {
  "policy": (
    "module", "init", "dtype", "num_halvings", "backend", "budget_embedding",
    "frame_residual",
  ),
  "sampling": ("module", "ratio"),
  "objective": ("module",),
  "rollout": ("reward", "marking", "max_new_tokens"),
}  # fmt: skip
KEYS = {f"{name}.{keys[0]}" for name, keys in SECTIONS.items()}


def load(spec: str, key: str) -> tuple[Any, str]:
  """Returns what a key names, and the sha256 of its file ("" without one)."""
  source, _, name = spec.rpartition(":") if isinstance(spec, str) else [""] * 3
  told = f"{key} {spec!r} must read path/to/file.py:name or package.module:name"
  errors.check(source and name, told)
  is_file = source.endswith(".py")
  if is_file and not os.path.isfile(source):
    raise errors.UserError(f"{key} {spec!r}: there is no file {source}")
  try:
    if is_file:
      module, digest = run_file(source)
    else:
      module = importlib.import_module(source)
      path = getattr(module, "__file__", None)
      digest = files.sha256(path) if path else ""
  except Exception as error:
    raise errors.UserError(
      f"{key} {spec!r}: importing {source} failed with"
      f" {type(error).__name__}: {errors.one_line(error)}"
    ) from error
  errors.check(hasattr(module, name), f"{key} {spec!r}: {source} has no {name}")
  return getattr(module, name), digest


def own(config, section: str) -> str:
  """Returns the code of one's own that a section names, "" if none."""
  if section not in SECTIONS or section not in config:
    return ""
  spec = config[section].get(SECTIONS[section][0], "")
  return spec if ":" in str(spec) and spec not in BUILT_IN else ""


def fitting(found, section: str, options, known=()) -> dict[str, Any]:
  """Returns the options that code takes; stops at one that it does not have.

  A class takes the arguments of `from_llm_config` or else of itself, a function
  its keyword-only ones; names among `known` are left out if they are others.
  """
  call = getattr(found, "from_llm_config", found)
  given = list(inspect.signature(call).parameters.values())
  if call is not found:
    given = given[1:]  # The language model's config.
  elif not inspect.isclass(found):
    given = [x for x in given if x.kind in (x.KEYWORD_ONLY, x.VAR_KEYWORD)]
  has = [x.name for x in given if x.kind != x.VAR_KEYWORD]
  takes_any = len(has) < len(given)
  called = getattr(found, "__name__", found)
  for name in options:
    if name in has or name in known or (takes_any and not has):
      continue
    near = difflib.get_close_matches(name, has, n=1, cutoff=0.4)
    told = f"the nearest is {near[0]!r}" if near else f"it has {sorted(has)}"
    raise errors.UserError(
      f"config.{section}.{name}: {called} has no option {name!r}, {told};"
      f" correct or remove the key, or add the option to {called}"
    )
  return {k: v for k, v in options.items() if takes_any or k in has}


def make(found, section: str, options, known=()) -> Any:
  """Returns an object of a class, or a function, with options as `fitting`."""
  options = fitting(found, section, options, known)
  if not inspect.isclass(found):
    if not options:
      return found
    return functools.update_wrapper(functools.partial(found, **options), found)
  try:
    made = found(**options)
    hash(made)  # Programs are told apart by it.
  except TypeError as error:
    raise errors.UserError(
      f"config.{section}: {found.__name__} cannot be made"
      f" ({errors.one_line(error)}); give its options defaults, and make it a"
      " frozen dataclass"
    ) from error
  return made


def run_file(path):
  """Returns a module and its file's sha256, of the very bytes that were run."""
  with open(path, "rb") as file:
    source = file.read()  # And not a cached .pyc beside it.
  digest = hashlib.sha256(source).hexdigest()
  name = f"_{os.path.basename(path)[:-3]}_{digest[:16]}"
  location = importlib.util.spec_from_file_location(name, path)
  module = importlib.util.module_from_spec(location)
  # Dataclasses, hence Linen modules, look their own module up by name.
  sys.modules[name] = module
  exec(location.loader.source_to_code(source, path), vars(module))
  return module, digest
