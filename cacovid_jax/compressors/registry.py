"""Names and options of compressors -> the method.

A module of this package offers its methods in a variable: `COMPRESSOR` for the
one that is called like the module, `COMPRESSORS` for several. A method is a
`base.Compressor`, or an object that acts inside the language model; here it is
enough that it has `name`, `needs`, `stochastic`, `options`, `oracle`,
`known_options` and `with_options`. Modules are imported when they are asked
for.
"""

import ast
import difflib
import importlib
import inspect
from typing import Any
from urllib import parse as url_parse

from cacovid_jax import errors, extensions
from cacovid_jax.compressors import base

# In the order of tables. Values are modules of this package.
_METHODS = {
  "cacovid": "cacovid",
  "random": "random",
  "uniform": "uniform",
  "evs": "evs",
  "vidcom2": "vidcom2",
  "fastv": "fastv",
  "visionzip": "visionzip",
  "divprune": "divprune",
  "prunevid": "prunevid",
  "framefusion": "framefusion",
  "holitom": "holitom",
  "fastvid": "fastvid",
  "flashvid": "flashvid",
  "unicomp": "unicomp",
  "floc": "floc",
  "scissor": "scissor",
  "dyto": "dyto",
  "em": "em",
  "vqtoken": "vqtoken",
  "last_query": "last_query",
  "density_peaks": "density_peaks",
  "cacovid_untrained": "cacovid",
  "cacovid_other_question": "cacovid",
}
_ORACLES = {"decisive_boxes": "oracle"}


def names() -> tuple[str, ...]:
  """Returns the methods that `get` knows; oracles are not methods."""
  return tuple(_METHODS)


def oracles() -> tuple[str, ...]:
  """Returns the rules that know where the answer lies; `get` builds them."""
  return tuple(_ORACLES)


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


def get(spec: str, exact_budget: bool = True, **options):
  """Returns the method called `spec`, with `options` set.

  Args:
    spec: a known name, or `path/file.py:attribute` for one's own, optionally
      followed by `?option=value&...`. The attribute is a `Compressor`, or a
      function with the interface of `Compressor.compress`; a function may say
      what it reads by attributes `needs` and `stochastic`, and by
      `reference_rows` how many tokens it keeps without exact budget.
    exact_budget: False to round budgets as the method's own publication does;
      an option of that name in `spec` says the same.
    **options: keyword options of the method; they win over those in `spec`.

  Raises:
    UserError: unknown name, unknown option, or a file that gives no compressor.
  """
  name, parsed = parse(spec)
  options = {**parsed, **options}
  for exact in (exact_budget, options.get("exact_budget", True)):
    if not isinstance(exact, bool):
      raise errors.UserError(
        f"method {name!r}: exact_budget is {exact!r}; give True or False"
      )
  exact_budget = options.pop("exact_budget", True) and exact_budget
  if ".py:" in name:
    method = _load(name)
  elif name in _METHODS or name in _ORACLES:
    method = _known(name)
  else:
    close = difflib.get_close_matches(name, names(), n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    raise errors.UserError(
      f"unknown method {name!r}; {hint}known: {', '.join(names())}, or"
      " your own as path/file.py:function"
    )
  known = method.known_options
  for key in options:
    if key not in known:
      raise errors.UserError(
        f"method {name!r} has no option {key!r}; known options:"
        f" {', '.join(known) or 'none'}"
      )
  if not exact_budget:
    return method.with_options(exact_budget=False, **options)
  return method.with_options(**options) if options else method


def _known(name: str):
  module = importlib.import_module(
    f"cacovid_jax.compressors.{(_METHODS | _ORACLES)[name]}"
  )
  several = getattr(module, "COMPRESSORS", None)
  for method in several or [module.COMPRESSOR]:
    if method.name == name:
      return method
  raise ValueError(f"{module.__name__} offers no method called {name}")


def _load(spec: str) -> base.Compressor:
  found, _ = extensions.load(spec, "method")
  attribute = spec.rpartition(":")[2]
  if isinstance(found, base.Compressor) or hasattr(found, "with_options"):
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
    reference_rows=getattr(found, "reference_rows", None),
  )
