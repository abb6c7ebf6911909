"""What config files share: reading the argument after the colon."""

import difflib
import types

from cacovid_jax import config as config_lib
from cacovid_jax import errors


def parse_arg(arg, **defaults):
  """Returns the fields of "debug,ratio=0.02" with the types of their defaults.

  Args:
    arg: text after the colon of `--config file.py:arg`, or None. A name alone
      sets a truth value.
    **defaults: every field the argument may set.

  Returns:
    A namespace with one attribute per default.
  """
  fields = dict(defaults)
  for part in filter(None, (part.strip() for part in (arg or "").split(","))):
    name, equals, text = part.partition("=")
    if name not in defaults:
      near = difflib.get_close_matches(name, defaults, n=1, cutoff=0.4)
      names = ", ".join(near or sorted(defaults)) or "none"
      raise errors.UserError(
        f"unknown config argument {name!r} in {arg!r}; nearest: {names}"
      )
    if not equals and not isinstance(defaults[name], bool):
      raise errors.UserError(
        f"config argument {name!r} in {arg!r} needs a value: {name}=VALUE"
      )
    fields[name] = config_lib.parse_value(
      text if equals else "true", defaults[name], name=name
    )
  return types.SimpleNamespace(**fields)
