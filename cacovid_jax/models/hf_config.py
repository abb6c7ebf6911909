"""JSON files of a Hugging Face directory, and the fields of `config.json`.

Every size comes from the file, never from a library's class defaults: several
of those are wrong for the released checkpoints.
"""

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
    reason = " ".join(str(error).split())
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
  if isinstance(value, bool) or not isinstance(value, (int, float)):
    raise errors.UserError(
      f"config.json: {where}{name} is {value!r}; give a number"
    )
  if value <= 0 or kind(value) != value:
    raise errors.UserError(
      f"config.json: {where}{name} is {value!r}; give a positive"
      f" {kind.__name__}"
    )
  return kind(value)


def sizes(config, keys, where=""):
  """Returns {our name: positive int} of `keys` {our name: key of a config}."""
  return {ours: number(config, key, where=where) for ours, key in keys.items()}


def described(sizes, keys):
  """Returns {key of a config: value} of an object's attributes, see `sizes`."""
  return {key: getattr(sizes, ours) for ours, key in keys.items()}


def require(config, where="", **allowed):
  """Stops unless each field is absent or one of its allowed values."""
  for name, values in allowed.items():
    value = config.get(name)
    if value is not None and value not in values:
      raise errors.UserError(
        f"config.json: {where}{name} is {value!r}; this model is implemented"
        f" for {' or '.join(map(repr, values))} only"
      )
