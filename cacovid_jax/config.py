"""Configs: Python files that return a `ConfigDict`, and typed overrides.

The resolved config is locked, so that a mistyped key fails, and lives as
`config.json` in the workdir, so that a workdir belongs to one config.
"""

import copy
import difflib
import hashlib
import json
import os
import pathlib

import ml_collections

from cacovid_jax import (
  base_config,
  config_files,
  config_limits,
  config_values,
  errors,
  extensions,
  files,
  schema,
)

# What changes how a run is recorded or spread over a machine, or belongs to
# other commands, and not what training computes: it may differ between a run's
# start and its continuation.
NOT_HASHED = (
  "blind", "ckpt", "data.decode", "data.feature_cache", "data.memory_items",
  "data.num_threads", "data.num_workers", "evals", "log_every", "mesh",
  "model.layers", "prepare", "table", "tfds", "wandb",
)  # fmt: skip

# Keys of earlier versions: old key -> (today's, its value from the old one).
_RENAMED = {
  "prepare.variant": ("prepare.variants", lambda name: (name,)),
  # Text tokens of the longest prompt, 0 to look for it.
  "data.max_text_tokens": (
    "data.prompt_rows",
    lambda count: (16 * (count // 16 + 1),) if count else (),
  ),
}
# What earlier versions did where today's default is another.
_BEFORE = {"rouge": "public"}
# Those of `NOT_HASHED` that earlier versions did not have.
_NEW_GROUPS = ("blind", "prepare", "table", "tfds", "wandb")
# Hashed where they are not the default: earlier versions did not have them.
_NEW_KEYS = (
  "data.max_replaced", "model.float8_tower", "objective.frame_credit",
  "optimizer.average", "policy.budget_embedding", "policy.frame_residual",
  "ratio.range",
)  # fmt: skip


def load(spec, overrides=(), *, fill=False):
  """Returns the locked config of "path/to/file.py:argument", overridden.

  `spec` may also be a workdir's `config.json`, which names no code. With
  `fill`, it gets what it leaves out of `base_config`.
  """
  path, _, arg = str(spec).partition(":")
  if path.endswith(".json"):
    config = read_json(pathlib.Path(path))
    config_limits.check(config, path)
    _refuse_code(config, {text.partition("=")[0] for text in overrides}, path)
  else:
    config = config_files.run(pathlib.Path(path), arg or None)
  if fill:
    complete(config)
  return _overridden(config, overrides)


def _overridden(config, texts):
  """Returns a config with overrides applied, its values checked, locked."""
  # Those first that say which others there may be.
  keys = tuple(f"{key}=" for key in extensions.KEYS)
  for text in sorted(texts, key=lambda text: not text.startswith(keys)):
    override(config, text)
  config_limits.check(config)
  return config.lock()


def _refuse_code(config, given, path):
  """Stops at a value that names code, of a key that is not among `given`."""
  for key, value in _flat(config):
    marks = (":",) if key in extensions.KEYS else (".py:", "?module=")
    names_code = any(mark in str(value) for mark in marks)
    if key in extensions.KEYS and key.endswith(".module"):
      names_code = value not in extensions.BUILT_IN
    if names_code and key not in given:
      raise errors.UserError(
        f"{path} was trained with {key}={value!r}, and a file of data runs no"
        f" code: give --config.{key}={value!r} if you trust it"
      )


def override(config, text):
  """Applies one "key.subkey=value" to `config`, in place.

  The value must have the type of the one it replaces; "+a,b" of a tuple adds
  to what there is.
  """
  key, equals, value = text.partition("=")
  told = f"config override {text!r} has no value: write key.subkey=value"
  errors.check(equals and key, told)
  section, _, name = key.partition(".")
  spec, known = extensions.own(config, section), extensions.SECTIONS
  if spec and name and name not in known[section]:
    # An option of one's own code, which has it.
    found, _ = extensions.load(spec, f"config.{section}.{known[section][0]}")
    extensions.fitting(found, section, {name: None})
    if name not in config[section]:
      with config[section].unlocked():
        config[section][name] = config_values.literal(value)
      return
  group, leaf = _find(config, key)
  old = group[leaf]
  if isinstance(old, ml_collections.ConfigDict):
    names = ", ".join(f"{key}.{child}" for child in sorted(old))
    mend = f"set one of {names}" if names else "name its keys in a config file"
    raise errors.UserError(
      f"config key {key!r} is a group, not a value: {mend}"
    )
  adds = isinstance(old, tuple) and value.startswith("+")
  kind, like = group.get_type(leaf), old
  if old == () and config_limits.kinds().get(key) == config_limits.TEXTS:
    like = ("",)  # What is there already tells what else there may be.
  new = config_values.parse(value[adds:], like, name=key, kind=kind)
  assign(config, key, (*old, *new) if adds else new)


def assign(config, key, value):
  """Sets "key.subkey" of `config`, locked or not, to a value of any type."""
  group, leaf = _find(config, key)
  with group.unlocked(), group.ignore_type():
    group[leaf] = value


def value_of(config, key):
  """Returns the value of "key.subkey"."""
  group, leaf = _find(config, key)
  return group[leaf]


def replace(config, changes, overrides=()):
  """Returns a locked copy with {"key.subkey": value} and overrides applied."""
  config = copy.deepcopy(config)
  for key, value in changes.items():
    assign(config, key, value)
  return _overridden(config, overrides)


def train_files(config):
  """Returns the paths of the question files of config.data."""
  names = (name.strip() for name in config.data.train_file.split(","))
  return [os.path.join(config.data.root, name) for name in names if name]


def complete(config):
  """Returns the config with what it leaves out of `base_config`, unlocked.

  Further keys stay, such as options of one's own policy, but none of `evals`.
  """
  defaults = base_config.get_config()
  for key in config.get("evals", ()):
    if key not in defaults.evals:
      raise _unknown_key(defaults, f"evals.{key}")
  return _fill(config.unlock(), defaults, defaults)


def to_dict(config, name=""):
  """Returns plain nested dicts, lists, numbers and texts, or a TypeError."""
  if isinstance(config, (dict, ml_collections.ConfigDict)):
    prefix = f"{name}." if name else ""
    return {key: to_dict(config[key], prefix + key) for key in sorted(config)}
  if isinstance(config, (tuple, list)):
    return [to_dict(item, name) for item in config]
  if config is None or isinstance(config, (bool, int, float, str)):
    return config
  raise TypeError(f"config value {name} is a {type(config)}, which JSON lacks")


def dumps(config):
  """Returns a config as JSON text, keys in order."""
  return json.dumps(to_dict(config), indent=2, sort_keys=True) + "\n"


def save(config, path):
  """Writes a config as JSON, all or nothing."""
  files.write(path, dumps(config))


def config_hash(config, *, before=False):
  """Returns 16 hexadecimal digits of the config without `NOT_HASHED` keys.

  With `before`, an earlier version's config is hashed as that version did.
  """
  values = _hashed(config, {*NOT_HASHED} - {*(_NEW_GROUPS if before else ())})
  text = json.dumps(values, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()[:16]


def upgraded(config, like=None):
  """Returns a config of a workdir under today's keys, locked.

  Keys of `like` (by default all) that it lacks come from `base_config`.
  """
  config = copy.deepcopy(config).unlock()
  known = dict(_flat(config))
  for old, (new, convert) in _RENAMED.items():
    if old in known:
      group, leaf = _find(config, old)
      del group[leaf]
      config.update_from_flattened_dict({new: convert(known[old])})
  # A base model's training has sections of its own.
  if "pretrain" not in config:
    known = base_config.get_config()
    known.update(_BEFORE)
    config = _fill(config, known, known if like is None else like)
  return config.lock()


def claim_workdir(workdir, config):
  """Writes `config.json` in a new workdir; refuses one of another config."""
  files.make_folder(workdir)
  check_workdir(workdir, config)
  save(config, pathlib.Path(workdir, "config.json"))


def check_workdir(workdir, config):
  """Refuses a workdir of another config, or of an earlier version's."""
  path = pathlib.Path(workdir, "config.json")
  if path.exists():
    there = read_json(path)
    now = upgraded(there, config)
    found = differences(_hashed(now), _hashed(config))
    if found:
      shown = ", ".join(found[:3])
      more = len(found) - 3
      raise errors.UserError(
        f"workdir {workdir} belongs to another config: {shown}"
        + (f", and {more} more" if more > 0 else "")
        + "; give another --workdir, or the config the run started with"
      )
    renamed = to_dict(now) != to_dict(there)
    hashes = {config_hash(there, before=before) for before in (False, True)}
    if renamed and config_hash(config) not in hashes:
      raise errors.UserError(
        f"workdir {workdir} was written by an earlier version; continue it"
        f" after: python -m cacovid_jax.ckpt upgrade {workdir}"
      )


def read_json(path):
  """Returns the unlocked config in a JSON file; lists become tuples."""
  mend = "restore it or use another workdir"
  values = _tuples(schema.read(path, dict, mend))
  try:
    return ml_collections.ConfigDict(values)
  except ValueError as error:  # Of a key that holds a dot.
    raise errors.UserError(f"{path}: {error}; {mend}") from error


def _fill(group, known, wanted):
  """Returns the group with those keys of `known` that `wanted` has, too."""
  for key in known:
    if key not in wanted:
      continue
    if key not in group:
      group[key] = known[key]
    elif isinstance(known[key], ml_collections.ConfigDict):
      if not isinstance(group[key], ml_collections.ConfigDict):
        raise errors.UserError(f"config key {key!r} must be a group")
      _fill(group[key], known[key], wanted[key])
  return group


def _find(config, key):
  """Returns (the group of a key, its name there)."""
  *groups, leaf = key.split(".")
  group = config
  for part in groups:
    group = group.get(part)
    if not isinstance(group, ml_collections.ConfigDict):
      raise _unknown_key(config, key)
  if leaf not in group:
    raise _unknown_key(config, key)
  return group, leaf


def _unknown_key(config, key):
  known = [name for name, _ in _flat(config)]
  leaf = key.split(".")[-1]
  alike = {
    other: difflib.SequenceMatcher(None, other.split(".")[-1], leaf).ratio()
    for other in known
  }
  near = [other for other in known if alike[other] == 1]
  near += difflib.get_close_matches(key, known, n=3, cutoff=0.5)
  near += [other for other in known if alike[other] > 0.75]
  near = list(dict.fromkeys(near))[:3] or sorted(config)
  told = ", ".join(near)
  return errors.UserError(f"unknown config key {key!r}; nearest: {told}")


def _flat(config, prefix=""):
  """Yields dotted name and value of all that nested mappings hold."""
  for key, value in config.items():
    if isinstance(value, (dict, ml_collections.ConfigDict)):
      yield from _flat(value, f"{prefix}{key}.")
    else:
      yield f"{prefix}{key}", value


def differences(there, here, prefix=""):
  """Returns texts that name the differing keys of two nested dicts."""
  out = []
  for key in sorted({*there, *here}):
    name = f"{prefix}{key}"
    if key not in there:
      out.append(f"{name} is new")
    elif key not in here:
      out.append(f"{name} is gone")
    elif isinstance(there[key], dict) and isinstance(here[key], dict):
      out += differences(there[key], here[key], f"{name}.")
    elif there[key] != here[key]:
      out.append(f"{name} is {there[key]!r} there and {here[key]!r} here")
  return out


def _hashed(config, skipped=NOT_HASHED):
  """Returns a config as nested dicts without some keys."""
  values, flat = to_dict(config), dict(_flat(config))
  defaults = dict(_flat(base_config.get_config()))
  young = {key for key in _NEW_KEYS if flat.get(key) == defaults[key]}
  skipped = young.union(skipped)
  for key in skipped:
    *groups, leaf = key.split(".")
    group = values
    for name in groups:
      group = group.get(name, {})
    group.pop(leaf, None)
  return values


def _tuples(value):
  if isinstance(value, dict):
    return {key: _tuples(item) for key, item in value.items()}
  return tuple(map(_tuples, value)) if isinstance(value, list) else value
