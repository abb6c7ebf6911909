"""A jinja2 sandbox with a budget of steps and characters.

Whatever takes longer for longer values is charged for their whole size before
it runs: operators, comparisons and hashing, filters, tests and calls. A list
that holds one list twice counts it twice, as Python walks it.
"""

import collections.abc
import contextlib
import contextvars
import functools
import json
import re
import types
from collections.abc import Iterable, Iterator, Sequence

import jinja2
import jinja2.ext
import jinja2.sandbox

# What a template can raise while it renders; and while it compiles, where more
# than 20 nested blocks, for example, are no Python.
FAULTS = (jinja2.TemplateError, TypeError, ValueError, ArithmeticError,
          RecursionError, AttributeError, LookupError, NameError,
          MemoryError)  # fmt: skip
UNFIT = (*FAULTS, SyntaxError)

# A character that is handled costs one, a step of the program `_STEP`, an
# attribute `_LOOK`, each node of a body that runs `_NODE`. Real templates spend
# a few hundred steps.
_BUDGET, _STEP, _LOOK, _NODE = 2**23, 64, 16, 4
_MAX_RANGE, _MAX_NUMBER = 10_000, 100_000
# Functions whose result may be as long as the product of their arguments.
_MULTIPLYING = frozenset(
  "replace join format format_map expandtabs translate indent".split()
)
# Filters of which no chat template has a use: they draw at random, or take
# longer than their text is long.
_DROPPED = "pprint random striptags urlencode urlize wordwrap xmlattr".split()
# What looks at no more of a value than its type or its length.
_SHALLOW = frozenset(
  "boolean callable count d default defined escaped false filter first integer"
  " iterable last length mapping none number sameas sequence test true"
  " undefined".split()
)
# Tests of a number's remainder: of a text, the operator would format.
_REMAINDERS = ("odd", "even", "divisibleby")
# A width or precision of formatted text, as in "{:1000000}" and "%1000000d",
# or one that an argument gives, as in "{:{}}".
_WIDE = re.compile(r"\d{5}|:[^{}]*\{")

_left = contextvars.ContextVar("left")


@contextlib.contextmanager
def budget() -> Iterator[None]:
  """Gives what runs inside, in this thread, a budget of its own."""
  token = _left.set([_BUDGET])
  try:
    yield
  finally:
    _left.reset(token)


def compiled(text: str) -> jinja2.Template:
  """Returns a template, to be rendered within a `budget`; raises `UNFIT`."""
  env = _environment()
  # Constants are evaluated here already, and charged for.
  with budget():
    tree = _Counted().visit(env.parse(text))
    return jinja2.Template.from_code(
      env, env.compile(tree), env.make_globals(None)
    )


def _spend(amount: int) -> None:
  """Takes from the budget of the rendering that this thread is in."""
  left = _left.get()
  left[0] -= abs(amount)
  if left[0] < 0:
    raise jinja2.sandbox.SecurityError("it runs too long or grows too large")


def _measure(value) -> int:
  """Returns the characters and items of a value, taken from the budget."""
  size = 0
  if isinstance(value, jinja2.utils.Namespace):
    value = value._Namespace__attrs  # They are spelled with it.
  if isinstance(value, (str, bytes)):
    size = len(value)
  elif isinstance(value, collections.abc.Mapping):
    size = sum(_measure(key) + _measure(item) for key, item in value.items())
  elif isinstance(value, collections.abc.Collection):
    size = len(value) + sum(map(_measure, value))
  elif isinstance(value, int) and abs(value) >= 2**63:
    raise jinja2.sandbox.SecurityError("a number beyond 64 bits")
  _spend(size if isinstance(value, (str, bytes)) else _STEP)
  return size


def _charge(value):
  """Takes the size of a value from the budget; returns the value."""
  _measure(value)
  return value


def _check_arguments(name: str, values: Sequence) -> None:
  """Refuses what would make the function `name` give a huge result."""
  _spend(_STEP)
  product = 1
  for value in values:
    number = isinstance(value, (int, float))
    if number and not abs(value) <= _MAX_NUMBER:
      raise jinja2.sandbox.SecurityError(f"an argument above {_MAX_NUMBER}")
    # Of a number as well: it may be a width, or a count of digits.
    size = int(abs(value)) if number else _measure(value)
    _spend(size if number else 0)
    product *= max(1, size)
  # Measured before: its text may be longer than any budget.
  if name in ("format", "format_map") and _WIDE.search(str(values[0])):
    raise jinja2.sandbox.SecurityError("a format wider than 9999")
  if name in _MULTIPLYING and product > _BUDGET:
    raise jinja2.sandbox.SecurityError(f"{name} of texts this long")


class _Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
  """A sandbox that counts calls and looks at what operators are given."""

  intercepted_binops = frozenset(("+", "-", "*", "**", "/", "//", "%"))

  def call_binop(self, context, operator, left, right):
    numbers = isinstance(left, (int, float)) and isinstance(right, (int, float))
    if operator == "%" and isinstance(left, str):
      values = right if isinstance(right, tuple) else (right,)
      _check_arguments("format", (left, *values))
    elif operator in ("*", "**", "%") and not (numbers and operator != "**"):
      raise jinja2.sandbox.SecurityError(f"{operator} on these values")
    _charge(left)
    _charge(right)
    return _charge(super().call_binop(context, operator, left, right))

  # Leading underscores, as in the base class: keywords of a template's call
  # must not collide.
  def call(_self, _context, _obj, *args, **kwargs):  # noqa: N805
    bound = getattr(_obj, "__wrapped__", _obj)
    name = getattr(bound, "__name__", "")
    owner = getattr(bound, "__self__", None)
    if not isinstance(owner, (bytes, collections.abc.Collection)):
      owner = None
    elif hasattr(owner, "__html__") and name == "striptags":
      raise jinja2.sandbox.SecurityError("striptags")
    args = _settled(args)
    _check_arguments(name, (owner, *args, *kwargs.values()))
    return _charge(super().call(_context, _obj, *args, **kwargs))

  def getitem(self, obj, argument):
    _spend(_LOOK)
    _charge(argument)  # It is hashed, and shown where it is missing.
    return super().getitem(obj, argument)

  def getattr(self, obj, attribute):
    _spend(_LOOK)
    return super().getattr(obj, attribute)


class _Counted(jinja2.visitor.NodeTransformer):
  """Makes what no environment intercepts take from the budget.

  That is bodies that may run again, comparisons, keys, slices, literal text
  and `~`.
  """

  def _filter(self, node, name, *arguments):
    arguments = [jinja2.nodes.Const(x, lineno=node.lineno) for x in arguments]
    made = jinja2.nodes.Filter(node, name, arguments, [], None, None)
    return made.set_lineno(node.lineno).set_environment(_environment())

  def visit_For(self, node):  # noqa: N802
    weight, visit = _weight(node), self.generic_visit
    if node.recursive:  # What `loop` is called with is no `node.iter`.
      if node.test or node.else_:
        told = "`if` or `else` of a recursive loop"
        raise jinja2.sandbox.SecurityError(told)
      visit = self.visit_Macro
    node = visit(node)
    node.iter = self._filter(node.iter, "_steps", weight)
    return node

  def visit_Macro(self, node):  # noqa: N802
    text = jinja2.nodes.Const("", lineno=node.lineno)
    first = self._filter(text, "_weighed", _weight(node))
    node = self.generic_visit(node)
    output = jinja2.nodes.Output([first], lineno=node.lineno)
    node.body = [output, *node.body]
    return node

  visit_CallBlock = visit_Block = visit_Macro  # noqa: N815

  def visit_Compare(self, node):  # noqa: N802
    node = self.generic_visit(node)
    for place in (node, *node.ops):
      place.expr = self._filter(place.expr, "_charged")
    return node

  def visit_Pair(self, node):  # noqa: N802
    node = self.generic_visit(node)
    node.key = self._filter(node.key, "_charged")
    return node

  def visit_Getitem(self, node):  # noqa: N802
    node = self.generic_visit(node)
    if isinstance(node.arg, jinja2.nodes.Slice):
      return self._filter(node, "_sliced")
    return node

  def visit_TemplateData(self, node):  # noqa: N802
    text = jinja2.nodes.Const(node.data, lineno=node.lineno)
    return self._filter(text, "_text")

  def visit_Concat(self, node):  # noqa: N802
    node = self.generic_visit(node)
    parts = jinja2.nodes.List(node.nodes, lineno=node.lineno)
    return self._filter(parts, "_joined")


def _weight(node) -> int:
  """Returns what running everything below a node once costs."""
  return _NODE * sum(1 for _ in node.find_all(jinja2.nodes.Node))


class _Generation(jinja2.ext.Extension):
  """`{% generation %}` blocks, which mark a model's turns, render as is."""

  tags = {"generation"}

  def parse(self, parser):
    line = next(parser.stream).lineno
    body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
    return jinja2.nodes.Scope(body).set_lineno(line)


@functools.cache
def _environment() -> _Environment:
  env = _Environment(
    trim_blocks=True,
    lstrip_blocks=True,
    extensions=[_Generation, "jinja2.ext.loopcontrols"],
    finalize=_charge,
  )
  env.globals["raise_exception"] = _raise_exception
  env.globals["range"] = _bounded_range
  del env.globals["lipsum"]
  env.filters["tojson"] = _to_json
  for name in _DROPPED:
    del env.filters[name]
  for functions in (env.filters, env.tests):
    for name, function in functions.items():
      functions[name] = _guarded(name, function)
  # With the context, so that jinja2 does not evaluate them while it compiles.
  # A template that calls them itself gains nothing.
  own = {
    "_steps": _counted,
    "_text": lambda text: text,  # `finalize` charges for it.
    "_joined": lambda parts: "".join(map(str, _charge(parts))),
    "_charged": _charge,
    "_sliced": lambda part: _spend(len(part) + _STEP) or part,
    "_weighed": lambda text, weight: _spend(weight) or text,
  }
  for name, function in own.items():
    env.filters[name] = jinja2.pass_context(
      lambda _, *args, function=function: function(*args)
    )
  return env


def _guarded(name: str, function):
  """Returns a filter or test that charges for what it is given and gives."""

  @functools.wraps(function)  # Also marks that it wants the context.
  def guarded(*args, **kwargs):
    first = int(hasattr(function, "jinja_pass_arg"))
    values = _settled(args[first:])
    if name in _SHALLOW:
      _spend(_STEP)
    else:
      _check_arguments(name, (*values, *kwargs.values()))
    if name in _REMAINDERS and isinstance(values[0], str):
      raise jinja2.sandbox.SecurityError(f"{name} of a text")
    # It adds lists up, too, and copies them each time.
    if name == "sum" and not isinstance(
      kwargs.get("start", values[2] if values[2:] else 0), (int, float)
    ):
      raise jinja2.sandbox.SecurityError("a sum of what is no number")
    return _charge(function(*args[:first], *values, **kwargs))

  return guarded


def _settled(values: Sequence) -> list:
  """Returns values with lazy ones, as of `map`, in full: to be measured."""
  return [
    list(_counted(value)) if isinstance(value, types.GeneratorType) else value
    for value in values
  ]


def _counted(values: Iterable, weight: int = 0) -> Iterator:
  for value in values:
    _spend(_STEP + abs(weight))
    yield value


def _raise_exception(message):
  raise jinja2.TemplateError(str(message))


def _bounded_range(*args):
  values = range(*args)
  if len(values) > _MAX_RANGE:
    raise jinja2.sandbox.SecurityError(f"range above {_MAX_RANGE}")
  return values


def _to_json(
  value, ensure_ascii=False, indent=None, separators=None, sort_keys=False
) -> str:
  """Returns JSON as it is: jinja2's own filter escapes it for HTML."""
  encoder = json.JSONEncoder(
    ensure_ascii=ensure_ascii,
    indent=indent,
    separators=separators,
    sort_keys=sort_keys,
  )
  # Piece by piece: each holds an indent and a separator of any length.
  pieces = []
  for piece in encoder.iterencode(value):
    _spend(len(piece))
    pieces.append(piece)
  return "".join(pieces)
