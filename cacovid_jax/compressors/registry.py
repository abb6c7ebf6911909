"""Names and options of compressors -> `Compressor`."""

import ast
import dataclasses
import difflib
import functools
import importlib.util
import inspect
import os
from typing import Any
from urllib import parse as url_parse

from cacovid_jax import errors
from cacovid_jax.compressors import (
  base,
  cacovid,
  density_peaks,
  divprune,
  last_query,
  oracle,
  random,
  uniform,
)

# Parameters of the interface; whatever else a function takes is an option.
_INTERFACE = frozenset(
  ["features", "grid", "num_keep", "text", "aux", "rng", "ratio"]
)

_COMPRESSORS = {
  compressor.name: compressor
  for compressor in [
    base.Compressor(
      name="cacovid",
      function=cacovid.compress,
      needs=frozenset(["scores"]),
    ),
    base.Compressor(
      name="cacovid_untrained",
      function=cacovid.compress_untrained,
      needs=frozenset(["untrained_scores"]),
    ),
    base.Compressor(
      name="cacovid_other_question",
      function=cacovid.compress_other_question,
      needs=frozenset(["other_scores"]),
    ),
    base.Compressor(name="random", function=random.compress, stochastic=True),
    base.Compressor(name="uniform", function=uniform.compress),
    base.Compressor(
      name="last_query",
      function=last_query.compress,
      needs=frozenset(["attention"]),
    ),
    base.Compressor(name="divprune", function=divprune.compress),
    base.Compressor(name="density_peaks", function=density_peaks.compress),
    base.Compressor(
      name="decisive_boxes",
      function=oracle.decisive_boxes,
      needs=frozenset(["decisive"]),
      oracle=True,
    ),
  ]
}


def names() -> tuple[str, ...]:
  """Returns the methods that `get` knows; oracles are not methods."""
  return tuple(name for name, c in _COMPRESSORS.items() if not c.oracle)


def oracles() -> tuple[str, ...]:
  """Returns the rules that know where the answer lies; `get` builds them."""
  return tuple(name for name, c in _COMPRESSORS.items() if c.oracle)


def parse(spec: str) -> tuple[str, dict[str, Any]]:
  """Splits `name?option=value&option=value` into name and options.

  Values are Python literals where they read as such, else strings.
  """
  name, _, query = spec.strip().partition("?")
  options = {}
  for part in query.split("&") if query else ():
    key, equals, value = part.partition("=")
    if not key or not equals:
      raise errors.UserError(f"method {spec!r}: {part!r} is not option=value")
    try:
      options[key] = ast.literal_eval(url_parse.unquote(value))
    except (ValueError, SyntaxError):
      options[key] = url_parse.unquote(value)
  return name, options


def get(spec: str, **options) -> base.Compressor:
  """Returns the compressor called `spec`, with `options` set.

  Args:
    spec: a known name, or `path/file.py:attribute` for one's own, optionally
      followed by `?option=value&...`. The attribute is a `Compressor`, or a
      function with the interface of `Compressor.compress`; a function may say
      what it reads by attributes `needs` and `stochastic`.
    **options: keyword options of the method; they win over those in `spec`.

  Raises:
    UserError: unknown name, unknown option, or a file that gives no compressor.
  """
  name, parsed = parse(spec)
  options = {**parsed, **options}
  if ".py:" in name:
    compressor = _load(name)
  elif name in _COMPRESSORS:
    compressor = _COMPRESSORS[name]
  else:
    close = difflib.get_close_matches(name, names(), n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    raise errors.UserError(
      f"unknown method {name!r}; {hint}known: {', '.join(names())}, or"
      " your own as path/file.py:function"
    )
  if not options:
    return compressor
  known = set(inspect.signature(compressor.function).parameters) - _INTERFACE
  for key in options:
    if key not in known:
      listed = ", ".join(sorted(known)) or "none"
      raise errors.UserError(
        f"method {name!r} has no option {key!r}; known options: {listed}"
      )
  return dataclasses.replace(
    compressor,
    function=functools.partial(compressor.function, **options),
    options={**compressor.options, **options},
  )


def _load(spec: str) -> base.Compressor:
  path, _, attribute = spec.rpartition(":")
  if not os.path.isfile(path):
    raise errors.UserError(f"method {spec!r}: there is no file {path}")
  module_spec = importlib.util.spec_from_file_location(
    "cacovid_jax_user_" + os.path.basename(path)[:-3], path
  )
  module = importlib.util.module_from_spec(module_spec)
  try:
    module_spec.loader.exec_module(module)
  except Exception as error:
    raise errors.UserError(
      f"method {spec!r}: importing {path} failed with"
      f" {type(error).__name__}: {error}"
    ) from error
  if not hasattr(module, attribute):
    raise errors.UserError(f"method {spec!r}: {path} has no {attribute}")
  found = getattr(module, attribute)
  if isinstance(found, base.Compressor):
    return found
  if not callable(found):
    raise errors.UserError(
      f"method {spec!r}: {attribute} is neither a Compressor nor a function"
    )
  missing = {"grid", "num_keep"} - set(inspect.signature(found).parameters)
  if missing:
    raise errors.UserError(
      f"method {spec!r}: {attribute} does not take {', '.join(sorted(missing))}"
      "; its signature is (features, *, grid, num_keep, text, aux, rng)"
    )
  return base.Compressor(
    name=attribute,
    function=found,
    needs=frozenset(getattr(found, "needs", ())),
    stochastic=bool(getattr(found, "stochastic", False)),
  )
