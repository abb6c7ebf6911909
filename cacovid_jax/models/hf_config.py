"""JSON files of a Hugging Face directory, and the fields of `config.json`.

Every size comes from the file, never from a library's class defaults: several
of those are wrong for the released checkpoints.
"""

import dataclasses

from cacovid_jax import errors, schema

# Far above any model's, and small enough for sizes of arrays.
LAYERS = schema.within(int, 1, 1024)
PIXELS = schema.within(int, 1, 8192)
_RANGES = {int: schema.within(int, 1, 2**24), float: schema.Positive}
_REQUIRED = object()


def read_json(path, kind=dict):
  """Returns what a JSON file of a Hugging Face directory holds, of a type."""
  return schema.read(path, kind, "give a complete Hugging Face checkpoint")


def section(config, name):
  """Returns the nested dict `name` of a config."""
  value = config.get(name)
  if not isinstance(value, dict):
    raise errors.UserError(f"config.json has no section {name}; add it")
  return value


def number(config, name, kind=int, default=_REQUIRED, where=""):
  """Returns a positive number of a config: int, float, or a `schema` range.

  Required unless it has a default; `where` names the section in messages.
  """
  value = config.get(name)
  if value is None:
    if default is not _REQUIRED:
      return default
    raise errors.UserError(f"config.json lacks {where}{name}; add it")
  kind = _RANGES.get(kind, kind)
  return schema.fit(value, kind, "config.json", key=f"{where}{name}")


def switch(config, name, default=False, where=""):
  """Returns a truth value of a config, the default where it has none."""
  value = config.get(name)
  value = default if value is None else value
  return schema.fit(value, bool, "config.json", key=f"{where}{name}")


def key(name=None, default=dataclasses.MISSING, *, optional=False, kind=None):
  """Returns a field that is a number of a config.json, under a name or its own.

  A file need not have it if it is optional; else the default is for code alone.
  Of `kind`, or of the field's type.
  """
  metadata = {"key": name, "optional": optional, "kind": kind}
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
    kind = field.metadata["kind"] or field.type
    found[field.name] = number(config, name, kind, default, where)
  return found


def described(config):
  """Returns {name in a config.json: value} of these fields."""
  return {name: getattr(config, field.name) for field, name in _keys(config)}


def check(fine, message):
  """Stops with what is wrong in a config.json unless it is fine."""
  errors.check(fine, f"config.json: {message}")


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
