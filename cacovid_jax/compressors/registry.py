"""Names and options of compressors -> the method, imported when asked for."""

import dataclasses
import difflib
import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any
from urllib import parse as url_parse

from cacovid_jax import config_values, errors, extensions
from cacovid_jax.compressors import base

# In the order of tables.
_METHODS = {
  "cacovid": "cacovid:CaCoVID",
  "random": "simple:Random",
  "uniform": "simple:Uniform",
  "evs": "simple:EVS",
  "vidcom2": "vidcom2:VidCom2",
  "fastv": "fastv:FastV",
  "visionzip": "visionzip:VisionZip",
  "divprune": "divprune:DivPrune",
  "prunevid": "prunevid:PruneVID",
  "framefusion": "framefusion:FrameFusion",
  "holitom": "holitom:HoliTom",
  "fastvid": "fastvid:FastVID",
  "flashvid": "flashvid:FlashVID",
  "unicomp": "unicomp:UniComp",
  "floc": "floc:FLoC",
  "scissor": "scissor:Scissor",
  "dyto": "dyto:DyTo",
  "em": "em:EM",
  "vqtoken": "vqtoken:VQToken",
  "last_query": "simple:LastQuery",
  "density_peaks": "simple:DensityPeaks",
  "cacovid_untrained": "cacovid:Untrained",
  "cacovid_other_question": "cacovid:OtherQuestion",
}
_ORACLES = {"decisive_boxes": "simple:DecisiveBoxes"}
# Parameters of a bare function; whatever else it takes is an option.
_INTERFACE = {*"features grid num_keep text aux rng ratio rounding".split()}
# What files gave, by name and sha256: the same content is the same method.
_LOADED = {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class FunctionCompressor(base.Compressor):
  """A bare `f(features, *, grid, num_keep, text, aux, rng)` -> `Selection`.

  `aux` are the `CompressorInputs`. It may also take `ratio` and `rounding`
  ("exact" or "reference"); every further parameter is an option.
  """

  function: Callable[..., base.Selection]
  # f(grid, ratio, **options), see `reference_rows`; None rounds down.
  own_rows: Callable[..., int] | None = None
  values: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  def __hash__(self):
    # Values of options may be of any type.
    return hash((self.name, self.source, self.function))

  @property
  def rounds_itself(self):
    """True if the function is told of the rounding and it is its own."""
    return "rounding" in _parameters(self.function) and not self.exact_budget

  @property
  def known_options(self):
    """Names of the function's further parameters, sorted."""
    return tuple(sorted(set(_parameters(self.function)) - _INTERFACE))

  @property
  def options(self):
    """The options that were set, for the record."""
    return self.values

  def with_options(self, *, exact_budget=None, **options):
    """See `base.Compressor.with_options`."""
    out = super().with_options(exact_budget=exact_budget)
    return dataclasses.replace(out, values={**self.values, **options})

  def reference_rows(self, grid, ratio):
    """See `base.Compressor.reference_rows`."""
    if self.own_rows is None:
      return base.budget(grid, ratio)
    takes = _parameters(self.own_rows)
    every = any(p.kind is p.VAR_KEYWORD for p in takes.values())
    known = {n: v for n, v in self.values.items() if every or n in takes}
    return self.own_rows(grid, ratio, **known)

  def choose(self, inputs, num_keep, ratio):
    """Returns what the function returns."""
    rounding = "exact" if self.exact_budget else "reference"
    extra = {"ratio": ratio, "rounding": rounding}
    takes = _parameters(self.function)
    extra = {name: extra[name] for name in extra if name in takes}
    extra |= {"grid": inputs.grid, "num_keep": num_keep, "text": inputs.text}
    extra |= {"aux": inputs, "rng": inputs.rng}
    return self.function(inputs.features, **extra, **self.values)


def _parameters(function):
  return inspect.signature(function).parameters


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
    options[key] = config_values.literal(url_parse.unquote(value), words=())
  return name, options


def get(spec: str, exact_budget: bool = True, **options):
  """Returns the method called `spec`, with `options` set.

  Args:
    spec: a known name, or `path/file.py:attribute` or
      `package.module:attribute` for the user's own, optionally followed by
      `?option=value&...`. The attribute is a `Compressor`, its class, or a
      bare function, see `FunctionCompressor`; a function may say what it reads
      by attributes `requires` (or `needs`) and `stochastic`, and by
      `reference_rows` how many tokens it keeps without exact budget.
    exact_budget: False to round budgets as the method's own publication does,
      also as an option in `spec`.
    **options: of the method; they win over those in `spec`.

  Raises UserError for unknown names, options, or files without a compressor.
  """
  name, parsed = parse(spec)
  options = {**parsed, **options}
  for exact in (exact_budget, options.get("exact_budget", True)):
    told = f"method {name!r}: exact_budget is {exact!r}; give True or False"
    errors.check(isinstance(exact, bool), told)
  exact_budget = options.pop("exact_budget", True) and exact_budget
  method = _load(name) if ":" in name else _known(name)
  known = method.known_options
  for key in options:
    if key not in known:
      raise errors.UserError(
        f"method {name!r} has no option {key!r}; known options:"
        f" {', '.join(known) or 'none'}"
      )
  if options or not exact_budget:
    method = method.with_options(exact_budget=exact_budget, **options)
  told = f"method {name!r} is trained: give its parameters, as weights=FILE"
  errors.check(not method.trained or method.weights, told)
  return method


def _known(name: str) -> base.Compressor:
  known = _METHODS | _ORACLES
  if name not in known:
    close = difflib.get_close_matches(name, names(), n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    raise errors.UserError(
      f"unknown method {name!r}; {hint}known: {', '.join(names())}, or"
      " your own as path/file.py:function"
    )
  module, attribute = known[name].split(":")
  module = importlib.import_module(f"cacovid_jax.compressors.{module}")
  return getattr(module, attribute)()


def _load(spec: str) -> base.Compressor:
  found, digest = extensions.load(spec, "method")
  attribute = spec.rpartition(":")[2]
  found = _LOADED.setdefault((spec, digest), found)
  if isinstance(found, type) and issubclass(found, base.Compressor):
    found = found()
  if isinstance(found, base.Compressor):
    name = found.name or attribute
    return dataclasses.replace(found, name=name, source=digest)
  told = f"method {spec!r}: {attribute} is neither a Compressor nor a function"
  errors.check(callable(found), told)
  if missing := {"grid", "num_keep"} - set(_parameters(found)):
    raise errors.UserError(
      f"method {spec!r}: {attribute} does not take {', '.join(sorted(missing))}"
      "; its signature is (features, *, grid, num_keep, text, aux, rng)"
    )
  requires = getattr(found, "requires", getattr(found, "needs", ()))
  return FunctionCompressor(
    name=attribute,
    source=digest,
    function=found,
    requires=frozenset(requires),
    stochastic=bool(getattr(found, "stochastic", False)),
    own_rows=getattr(found, "reference_rows", None),
  )
