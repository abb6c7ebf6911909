"""JSON files of a Hugging Face directory, and the fields of `config.json`.

Every size comes from the file, never from a library's class defaults: several
of those are wrong for the released checkpoints.
"""

import dataclasses
import json

from cacovid_jax import errors

_REQUIRED = object()


def read_json(path):
  """Returns the dict in a JSON file."""
  try:
    with open(path, encoding="utf-8") as file:
      value = json.load(file)
  except FileNotFoundError as error:
    raise errors.UserError(
      f"{path} is missing; give a Hugging Face checkpoint directory"
    ) from error
  except (OSError, ValueError, RecursionError) as error:
    reason = errors.one_line(error)
    raise errors.UserError(f"{path} is not readable JSON ({reason})") from error
  if not isinstance(value, dict):
    raise errors.UserError(f"{path} does not hold a JSON object")
  return value


def section(config, name):
  """Returns the nested dict `name` of a config."""
  value = config.get(name)
  if not isinstance(value, dict):
    raise errors.UserError(f"config.json has no section {name}; add it")
  return value


def number(config, name, kind=int, default=_REQUIRED, where=""):
  """Returns a positive number (`kind`, int or float) of a config.

  Required unless it has a default; `where` names the section in messages.
  """
  value = config.get(name)
  if value is None:
    if default is not _REQUIRED:
      return default
    raise errors.UserError(f"config.json lacks {where}{name}; add it")
  wanted = ""
  if isinstance(value, bool) or not isinstance(value, (int, float)):
    wanted = "number"
  elif value <= 0 or kind(value) != value:
    wanted = f"positive {kind.__name__}"
  check(not wanted, f"{where}{name} is {value!r}; give a {wanted}")
  return kind(value)


def key(name=None, default=dataclasses.MISSING, *, optional=False):
  """Returns a field that is a number of a config.json, under a name or its own.

  A file need not have it if it is optional; else the default is for code alone.
  """
  metadata = {"key": name, "optional": optional}
  return dataclasses.field(default=default, metadata=metadata)


def _keys(cls):
  """Yields (field, its name in a config.json)."""
  for field in dataclasses.fields(cls):
    if "key" in field.metadata:
      yield field, field.metadata["key"] or field.name


def numbers(cls, config, where=""):
  """Returns {field: positive number} of the fields of a class made by `key`."""
  found = {}
  for field, name in _keys(cls):
    default = field.default if field.metadata["optional"] else _REQUIRED
    found[field.name] = number(config, name, field.type, default, where)
  return found


def described(config):
  """Returns {name in a config.json: value} of these fields."""
  return {name: getattr(config, field.name) for field, name in _keys(config)}


def check(fine, message):
  """Stops with what is wrong in a config.json unless it is fine."""
  if not fine:
    raise errors.UserError(f"config.json: {message}")


def require(config, where="", **allowed):
  """Stops unless each field is absent or one of its allowed values.

  A tuple allows several values, anything else itself.
  """
  for name, values in allowed.items():
    values = values if isinstance(values, tuple) else (values,)
    value = config.get(name)
    check(
      value is None or value in values,
      f"{where}{name} is {value!r}; this model is implemented for"
      f" {' or '.join(map(repr, values))} only",
    )
