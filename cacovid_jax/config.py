"""Configs: Python files that return a `ConfigDict`, and typed overrides.

A run is fully described by a file, its argument and its overrides:
`--config configs/x.py:debug --config.sampling.ratio=0.05`. The resolved config
is locked, so that a mistyped key fails, and lives as `config.json` in the
workdir, so that a workdir belongs to one config.
"""

import ast
import copy
import difflib
import hashlib
import importlib.util
import json
import math
import os
import pathlib
import sys

import ml_collections

from cacovid_jax import base_config, errors, extensions, files

# Groups and keys that change how a run is recorded or spread over a machine, or
# that belong to other commands, and not what training computes: they may differ
# between a run's start and its continuation.
NOT_HASHED = (
  "blind",
  "ckpt",
  "data.feature_cache",
  "data.memory_items",
  "data.num_threads",
  "data.num_workers",
  "evals",
  "log_every",
  "mesh",
  "prepare",
  "table",
  "tfds",
  "wandb",
)

# Keys of earlier versions: old key -> (today's, its value from the old one).
_RENAMED = {
  "prepare.variant": ("prepare.variants", lambda name: (name,)),
  # Text tokens of the longest prompt, 0 to look for it.
  "data.max_text_tokens": (
    "data.prompt_rows",
    lambda count: (16 * (count // 16 + 1),) if count else (),
  ),
}
# `NOT_HASHED` of the versions that had those.
_NOT_HASHED_BEFORE = (
  "ckpt",
  "data.feature_cache",
  "data.memory_items",
  "data.num_threads",
  "data.num_workers",
  "evals",
  "log_every",
  "mesh",
)

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

_WORDS = {"true": True, "false": False, "none": None, "null": None}


def load(spec, overrides=(), *, fill=False):
  """Returns the locked config of "path/to/file.py:argument".

  Args:
    spec: a Python file that defines `get_config(arg=None)`, optionally with an
      argument after a colon; or a workdir's `config.json`, which names no code.
    overrides: texts "key.subkey=value"; a value must have the type of the one
      it replaces.
  """
  path, _, arg = str(spec).partition(":")
  if path.endswith(".json"):
    config = read_json(pathlib.Path(path))
    _refuse_code(config, set(map(_key, overrides)), path)
  else:
    config = _call_get_config(pathlib.Path(path), arg or None)
  if fill:
    complete(config)
  _override_all(config, overrides)
  return config.lock()


def _override_all(config, texts):
  """Applies overrides; those first that say which others there may be."""
  for text in sorted(texts, key=lambda text: _key(text) not in extensions.KEYS):
    override(config, text)


def _key(text):
  return text.partition("=")[0]


def _refuse_code(config, given, path):
  """Stops at a value that names code, of a key that is not among `given`."""
  for key, value in _flat(config):
    names_code = any(mark in str(value) for mark in (".py:", "?module="))
    if key in extensions.KEYS and key.endswith(".module"):
      names_code = value not in extensions.BUILT_IN
    elif key in extensions.KEYS:
      names_code = ":" in str(value)
    if names_code and key not in given:
      raise errors.UserError(
        f"{path} was trained with {key}={value!r}, and a file of data runs no"
        f" code: give --config.{key}={value!r} if you trust it"
      )


def override(config, text):
  """Applies one "key.subkey=value" to `config`, in place.

  A value "+a,b" of a tuple adds to what there is.
  """
  key, equals, value = text.partition("=")
  if not equals or not key:
    raise errors.UserError(
      f"config override {text!r} has no value: write key.subkey=value"
    )
  if _is_option(config, key):
    section, _, name = key.partition(".")
    if name not in config[section]:
      with config[section].unlocked():
        config[section][name] = _parse_literal(value)
      return
  group, leaf = _find(config, key)
  old = group[leaf]
  if isinstance(old, ml_collections.ConfigDict):
    raise errors.UserError(
      f"config key {key!r} is a group, not a value: set one of "
      + ", ".join(f"{key}.{child}" for child in sorted(old))
    )
  adds = isinstance(old, tuple) and value.startswith("+")
  new = parse_value(value[adds:], old, name=key, kind=group.get_type(leaf))
  assign(config, key, (*old, *new) if adds else new)


def _is_option(config, key):
  """Returns whether a key is an option of one's own code, which has it."""
  section, _, name = key.partition(".")
  spec = extensions.own(config, section)
  known = extensions.SECTIONS.get(section, ())
  if not spec or not name or name in known:
    return False
  found, _ = extensions.load(spec, f"config.{section}.{known[0]}")
  extensions.fitting(found, section, {name: None})
  return True


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
  """Returns a locked copy of a config.

  Args:
    config: locked or not.
    changes: {"key.subkey": value}.
    overrides: texts, as of `load`.
  """
  config = copy.deepcopy(config)
  for key, value in changes.items():
    assign(config, key, value)
  _override_all(config, overrides)
  return config.lock()


def train_files(config):
  """Returns the paths of the question files of config.data."""
  names = (name.strip() for name in config.data.train_file.split(","))
  return [os.path.join(config.data.root, name) for name in names if name]


def complete(config):
  """Returns the config with what it leaves out of `base_config`, unlocked.

  Its own further keys stay, such as options of one's own policy; but `evals`
  has none, so a mistyped one is named.
  """
  defaults = base_config.get_config()
  for key in config.get("evals", ()):
    if key not in defaults.evals:
      raise _unknown_key(defaults, f"evals.{key}")
  return _fill(config.unlock(), defaults, defaults)


def parse_value(text, like, *, name="value", kind=None):
  """Returns the value that `text` writes, of the type of `like`.

  Args:
    text: "3e-4", "true", "a word", "(1, 2)" or "1,2"; "none" empties any field
      that holds neither a text nor a truth value.
    like: the value that is replaced.
    name: of the field, for the error message.
    kind: the type to read when `like` is None, such as that of a placeholder;
      without it the text is read as the Python literal it looks like.
  """
  if like is not None:
    kind = type(like)
  if kind in (None, type(None)):
    return _parse_literal(text)
  if kind is str:
    return None if like is None and text.lower() == "none" else text
  word = _WORDS.get(text.strip().lower(), text)
  if word is None and kind is not bool:
    return None
  try:
    if kind in (tuple, list):
      return _parse_sequence(text, like or (), name, kind)
    if kind is bool and isinstance(word, bool):
      return word
    if kind is int:
      return _parse_int(text)
    if kind is float and not math.isnan(value := float(text)):
      return value
  except ValueError:
    pass
  expected = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    tuple: "values separated by commas",
    list: "values separated by commas",
  }.get(kind, f"a {kind.__name__}")
  raise errors.UserError(
    f"{name}={text} is not {expected} (it is {like!r} now)"
  )


def no_config():
  """Returns the error of a command without the config that it needs."""
  return errors.UserError(
    "no config given: add --config=configs/x.py" + _known_files("configs")
  )


def to_dict(config):
  """Returns plain nested dicts, lists, numbers and texts of a config."""
  return {key: _plain(config[key], key) for key in sorted(config)}


def dumps(config):
  """Returns a config as JSON text, keys in order."""
  return json.dumps(to_dict(config), indent=2, sort_keys=True) + "\n"


def save(config, path):
  """Writes a config as JSON, all or nothing."""
  files.write(path, dumps(config))


def config_hash(config, *, before=False):
  """Returns 16 hexadecimal digits of the config without `NOT_HASHED` keys.

  Args:
    config: see `base_config`.
    before: whether it is of an earlier version, and hashed as that one did.
  """
  skipped = _NOT_HASHED_BEFORE if before else NOT_HASHED
  text = json.dumps(_hashed(to_dict(config), skipped), sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()[:16]


def upgraded(config, like=None):
  """Returns a config of a workdir under today's keys, locked.

  Args:
    config: read from its config.json, whichever version wrote that.
    like: config whose keys it gets where it lacks them, with the values of
      `base_config`; all of that by default.
  """
  config = copy.deepcopy(config).unlock()
  for old, (new, convert) in _RENAMED.items():
    try:
      group, leaf = _find(config, old)
    except errors.UserError:
      continue
    value = convert(group[leaf])
    del group[leaf]
    config.update_from_flattened_dict({new: value})
  # A base model's training has sections of its own.
  if "pretrain" not in config:
    known = base_config.get_config()
    config = _fill(config, known, known if like is None else like)
  return config.lock()


def claim_workdir(workdir, config):
  """Writes `config.json` in a new workdir; refuses one of another config."""
  workdir = pathlib.Path(workdir)
  path = workdir / "config.json"
  try:
    workdir.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise errors.UserError(
      f"cannot make workdir {workdir}: {error.strerror}; give another --workdir"
    ) from error
  if path.exists():
    there = read_json(path)
    now = upgraded(there, config)
    differences = _differences(
      *(_hashed(to_dict(each), NOT_HASHED) for each in (now, config))
    )
    old = to_dict(now) != to_dict(there)
    if not differences and old:
      if config_hash(there, before=True) != config_hash(config):
        raise errors.UserError(
          f"workdir {workdir} was written by an earlier version; continue it"
          f" after: python -m cacovid_jax.ckpt upgrade {workdir}"
        )
    if differences:
      shown = "; ".join(differences[:3])
      more = len(differences) - 3
      raise errors.UserError(
        f"workdir {workdir} belongs to another config: {shown}"
        + (f"; and {more} more" if more > 0 else "")
        + ". Give another --workdir, or the config the run started with"
      )
  save(config, path)


def _call_get_config(path, arg):
  """Returns the unlocked result of `get_config` of a Python file."""
  if not path.is_file():
    if path.name in _MOVED:
      now = ",".join(filter(None, (_MOVED[path.name], arg)))
      raise errors.UserError(
        f"no config file {path}: it is {path.parent / now} now"
      )
    raise errors.UserError(
      f"no config file {path}" + _known_files(path.parent or ".")
    )
  path = path.resolve()
  # Configs import their neighbours as `configs.common`, from any folder.
  root = path.parent
  while (root / "__init__.py").exists():
    root = root.parent
  spec = importlib.util.spec_from_file_location(f"_config_{path.stem}", path)
  if spec is None:
    raise errors.UserError(f"config {path} is not a .py or .json file")
  module = importlib.util.module_from_spec(spec)
  sys.path.insert(0, str(root))
  try:
    spec.loader.exec_module(module)
  except (SyntaxError, ImportError) as error:
    raise errors.UserError(
      f"config {path.name} does not load: {errors.one_line(error)}"
    ) from error
  finally:
    sys.path.remove(str(root))
  if not hasattr(module, "get_config"):
    raise errors.UserError(f"config {path.name} defines no get_config(arg)")
  config = module.get_config(arg)
  if not isinstance(config, ml_collections.ConfigDict):
    raise errors.UserError(
      f"get_config of {path.name} must return an ml_collections.ConfigDict"
    )
  return config


def read_json(path):
  """Returns the unlocked config in a JSON file; lists become tuples."""
  try:
    values = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(values, dict):
      raise ValueError("not an object")
  except FileNotFoundError:
    raise errors.UserError(f"no config file {path}") from None
  except ValueError as error:
    raise errors.UserError(
      f"{path} is not a config in JSON ({errors.one_line(error)}); "
      "restore it or use another workdir"
    ) from error
  return ml_collections.ConfigDict(_tuples(values))


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
  near = [other for other in known if other.split(".")[-1] == leaf]
  near += difflib.get_close_matches(key, known, n=3, cutoff=0.5)
  near += [
    other
    for other in known
    if difflib.SequenceMatcher(None, other.split(".")[-1], leaf).ratio() > 0.75
  ]
  near = list(dict.fromkeys(near))[:3] or sorted(config)
  return errors.UserError(
    f"unknown config key {key!r}; nearest: {', '.join(near)}"
  )


def _known_files(folder):
  names = sorted(
    str(path)
    for path in pathlib.Path(folder).glob("*.py")
    if path.stem not in ("__init__", "common")
  )
  return f"; there are {', '.join(names)}" if names else ""


def _flat(config, prefix=""):
  """Yields dotted name and value of all that nested mappings hold."""
  for key, value in config.items():
    if isinstance(value, (dict, ml_collections.ConfigDict)):
      yield from _flat(value, f"{prefix}{key}.")
    else:
      yield f"{prefix}{key}", value


def _differences(there, here, prefix=""):
  """Returns texts that name the differing keys of two nested dicts."""
  out = []
  for key in sorted({*there, *here}):
    name = f"{prefix}{key}"
    if key not in there:
      out.append(f"{name} is new")
    elif key not in here:
      out.append(f"{name} is gone")
    elif isinstance(there[key], dict) and isinstance(here[key], dict):
      out += _differences(there[key], here[key], f"{name}.")
    elif there[key] != here[key]:
      out.append(f"{name} is {there[key]!r} there and {here[key]!r} here")
  return out


def _hashed(values, skipped, prefix=""):
  return {
    key: _hashed(value, skipped, f"{prefix}{key}.")
    if isinstance(value, dict)
    else value
    for key, value in values.items()
    if f"{prefix}{key}" not in skipped
  }


def _plain(value, name):
  if isinstance(value, (dict, ml_collections.ConfigDict)):
    return {key: _plain(value[key], f"{name}.{key}") for key in sorted(value)}
  if isinstance(value, (tuple, list)):
    return [_plain(item, name) for item in value]
  if value is None or isinstance(value, (bool, int, float, str)):
    return value
  raise TypeError(f"config value {name} is a {type(value)}, which JSON lacks")


def _tuples(value):
  if isinstance(value, dict):
    return {key: _tuples(item) for key, item in value.items()}
  return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _parse_int(text):
  try:
    return int(text)
  except ValueError:
    value = float(text)  # "1e4" is the whole number 10000.
    if not value.is_integer():
      raise
    return int(value)


def _parse_literal(text):
  word = text.strip().lower()
  if word in _WORDS:
    return _WORDS[word]
  try:
    return ast.literal_eval(text)
  except (ValueError, SyntaxError, MemoryError, RecursionError):
    return text


def _parse_sequence(text, like, name, kind):
  """Returns a flat sequence; its items have the type of those of `like`."""
  body = text.strip()
  if body[:1] + body[-1:] in ("()", "[]"):
    body = body[1:-1]
  items = [item.strip() for item in body.split(",")]
  if items[-1] == "":  # A trailing comma, or nothing at all.
    items.pop()
  if not like:
    return kind(_parse_literal(item) for item in items)
  # One float among whole numbers makes all of them numbers.
  first = next((item for item in like if isinstance(item, float)), like[0])
  if isinstance(first, str):
    items = [item.strip("'\"") for item in items]
  return kind(parse_value(item, first, name=name) for item in items)
