"""Chat templates of checkpoints: programs of others, rendered in a sandbox.

A template turns messages into the text that a model was trained on. It comes
with the weights, so it is untrusted: jinja2's sandbox keeps it from Python's
objects, and a budget of steps and characters ends what would run or grow
without end.
"""

import contextvars
import functools
import json
import os
import re
import types
from collections.abc import Iterable, Iterator, Sequence

import jinja2
import jinja2.ext
import jinja2.sandbox
import msgspec

from cacovid_jax import errors, schema

# What a template can raise while it renders.
FAULTS = (jinja2.TemplateError, TypeError, ValueError, ArithmeticError,
          RecursionError, AttributeError, LookupError,
          MemoryError)  # fmt: skip
MAX_TEMPLATE_CHARS, MAX_RENDERED_CHARS = 65_536, 1_048_576

# A character that is handled costs one, a step of the program `_STEP`. Real
# templates spend a few hundred steps.
_BUDGET, _STEP = 2**23, 64
_MAX_RANGE, _MAX_NUMBER = 10_000, 100_000
MAX_FILE_BYTES = 256 * 2**20
# Functions whose result may be as long as the product of their arguments.
_MULTIPLYING = frozenset(
  "replace join format format_map expandtabs translate indent wordwrap".split()
)
# A width or precision of formatted text, as in "{:1000000}" and "%1000000d".
_WIDE = re.compile(r"\d{5}")

_left = contextvars.ContextVar("left", default=None)


class Template:
  """One compiled chat template."""

  def __init__(self, text: str, name: str):
    """Compiles `text`; `name` tells in errors where it came from."""
    if len(text) > MAX_TEMPLATE_CHARS:
      raise errors.UserError(
        f"{name}: the chat template has {len(text)} characters, more than"
        f" {MAX_TEMPLATE_CHARS}; use the checkpoint's original template"
      )
    self.text, self.name = text, name
    env = _environment()
    try:
      tree = _Counted().visit(env.parse(text))
      self._template = jinja2.Template.from_code(
        env, env.compile(tree), env.make_globals(None)
      )
    except (jinja2.TemplateError, RecursionError) as error:
      raise errors.UserError(
        f"{name}: the chat template does not parse ({error}); use the"
        " checkpoint's original template"
      ) from error

  def render(self, messages: Sequence[dict], **variables) -> str:
    """Returns the text of the messages; raises one of `FAULTS`.

    Messages are {"role": ..., "content": ...}, content a text or a list of
    {"type": "video"} and {"type": "text", "text": ...}; further variables are
    what else the template may read, such as special tokens.
    """
    token, text = _left.set([_BUDGET]), ""
    try:
      for piece in self._template.generate(messages=messages, **variables):
        text += piece
        if len(text) > MAX_RENDERED_CHARS:
          raise jinja2.TemplateError(f"more than {MAX_RENDERED_CHARS} letters")
    finally:
      _left.reset(token)
    return text


def read(directory, prefer: str = "processor") -> tuple[str, str]:
  """Returns the text of a checkpoint's template, and the file it came from.

  `prefer` is "tokenizer" for the template of tokenizer_config.json, "processor"
  for that of the other files. Where one is missing, the other is taken.
  """
  found = {}
  for name in (
    "chat_template.jinja",
    "chat_template.json",
    "processor_config.json",
    "tokenizer_config.json",
  ):
    path = os.path.join(directory, name)
    text = _template_in(path)
    if text is not None:
      kind = "tokenizer" if name.startswith("tokenizer") else "processor"
      found.setdefault(kind, (text, path))
  if not found:
    raise errors.UserError(
      f"{directory}: no chat template (chat_template.jinja,"
      " chat_template.json, or chat_template in tokenizer_config.json); copy it"
      " from the checkpoint's origin"
    )
  return found.get(prefer) or next(iter(found.values()))


def has_tokenizer_template(directory) -> bool:
  """Returns whether tokenizer_config.json brings a template of its own."""
  found = _template_in(os.path.join(directory, "tokenizer_config.json"))
  return found is not None


def check_size(path) -> None:
  """Refuses a file of a checkpoint above `MAX_FILE_BYTES`."""
  if os.path.getsize(path) > MAX_FILE_BYTES:
    raise errors.UserError(f"{path}: above {MAX_FILE_BYTES} bytes")


def read_json(path) -> dict:
  """Returns the JSON object at `path`; {} if there is no such file."""
  if not os.path.isfile(path):
    return {}
  return schema.read(path, dict, most_bytes=MAX_FILE_BYTES)


class _Named(msgspec.Struct):
  name: str
  template: str


def _template_in(path) -> str | None:
  """Returns the template in a file; of several named ones the "default"."""
  if path.endswith(".jinja"):
    if not os.path.isfile(path):
      return None
    try:
      with open(path, encoding="utf-8") as f:
        return f.read(MAX_TEMPLATE_CHARS + 1)
    except (OSError, UnicodeDecodeError) as error:
      raise errors.UserError(
        f"{path}: not readable as text ({error}); copy it again"
      ) from error
  entry = read_json(path).get("chat_template")
  if isinstance(entry, list):
    named = schema.fit(entry, list[_Named], path, key="chat_template")
    entry = {item.name: item.template for item in named}
  if isinstance(entry, dict):
    entry = entry.get("default")
  return entry if isinstance(entry, str) else None


def _spend(amount: int) -> None:
  """Takes from the budget of the rendering that this thread is in."""
  left = _left.get()
  if left is None:  # While compiling, where only constants are seen.
    return
  left[0] -= amount
  if left[0] < 0:
    raise jinja2.sandbox.SecurityError("it runs too long or grows too large")


def _measure(value) -> int:
  """Returns the characters and items of a value, taken from the budget."""
  size = 0
  if isinstance(value, str):
    size = len(value)
  elif isinstance(value, dict):
    size = sum(_measure(key) + _measure(item) for key, item in value.items())
  elif isinstance(value, (list, tuple, set, frozenset, range)):
    size = len(value) + sum(map(_measure, value))
  elif isinstance(value, int) and abs(value) >= 2**63:
    raise jinja2.sandbox.SecurityError("a number beyond 64 bits")
  _spend(size if isinstance(value, str) else _STEP)
  return size


def _charge(value):
  """Takes the size of a value from the budget; returns the value."""
  _measure(value)
  return value


def _check_arguments(name: str, values: Sequence) -> None:
  """Refuses what would make the function `name` give a huge result."""
  if name in ("format", "format_map") and _WIDE.search(str(values[0])):
    raise jinja2.sandbox.SecurityError("a format wider than 9999")
  _spend(_STEP)
  product = 1
  for value in values:
    number = isinstance(value, (int, float))
    if number and not abs(value) <= _MAX_NUMBER:
      raise jinja2.sandbox.SecurityError(f"an argument above {_MAX_NUMBER}")
    product *= max(1, int(abs(value)) if number else _measure(value))
  if name in _MULTIPLYING and product > _BUDGET:
    raise jinja2.sandbox.SecurityError(f"{name} of texts this long")


class _Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
  """A sandbox that counts calls and looks at what operators are given."""

  intercepted_binops = frozenset(("+", "*", "**", "%"))

  def call_binop(self, context, operator, left, right):
    numbers = isinstance(left, (int, float)) and isinstance(right, (int, float))
    if operator == "%" and isinstance(left, str):
      values = right if isinstance(right, tuple) else (right,)
      _check_arguments("format", (left, *values))
    elif operator == "**" or operator in "*%" and not numbers:
      raise jinja2.sandbox.SecurityError(f"{operator} on these values")
    _charge(left)
    _charge(right)
    return _charge(super().call_binop(context, operator, left, right))

  # Leading underscores, as in the base class: keywords of a template's call
  # must not collide.
  def call(_self, _context, _obj, *args, **kwargs):  # noqa: N805
    bound = getattr(_obj, "__wrapped__", _obj)
    name, owner = getattr(bound, "__name__", ""), None
    args = _settled(name, args)
    if isinstance(getattr(bound, "__self__", None), str):
      owner = bound.__self__
    _check_arguments(name, (owner, *args, *kwargs.values()))
    return _charge(super().call(_context, _obj, *args, **kwargs))


class _Counted(jinja2.visitor.NodeTransformer):
  """Makes loops, literal text and `~` of a template take from the budget."""

  def _filter(self, node, name):
    made = jinja2.nodes.Filter(node, name, [], [], None, None)
    return made.set_lineno(node.lineno).set_environment(_environment())

  def visit_For(self, node):  # noqa: N802
    node = self.generic_visit(node)
    node.iter = self._filter(node.iter, "_steps")
    return node

  def visit_TemplateData(self, node):  # noqa: N802
    text = jinja2.nodes.Const(node.data, lineno=node.lineno)
    return self._filter(text, "_text")

  def visit_Concat(self, node):  # noqa: N802
    node = self.generic_visit(node)
    parts = jinja2.nodes.List(node.nodes, lineno=node.lineno)
    return self._filter(parts, "_joined")


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
  env.filters = {
    name: _guarded(name, function) for name, function in env.filters.items()
  }
  # With the context, so that jinja2 does not evaluate them while it compiles.
  env.filters |= {
    "_steps": jinja2.pass_context(lambda _, values: _counted(values)),
    # `finalize` charges for it.
    "_text": jinja2.pass_context(lambda _, text: text),
    "_joined": jinja2.pass_context(
      lambda _, parts: "".join(map(str, _charge(parts)))
    ),
  }
  return env


def _guarded(name: str, function):
  """Returns a filter that charges for what it is given and what it gives."""

  @functools.wraps(function)  # Also marks that it wants the context.
  def guarded(*args, **kwargs):
    args = _settled(name, args)
    values = args[1:] if hasattr(function, "jinja_pass_arg") else args
    _check_arguments(name, (*values, *kwargs.values()))
    return _charge(function(*args, **kwargs))

  return guarded


def _settled(name: str, args) -> Sequence:
  """Returns arguments with lazy ones, as of `map`, in full: to be measured."""
  if name not in _MULTIPLYING:
    return args
  return [
    list(_counted(value)) if isinstance(value, types.GeneratorType) else value
    for value in args
  ]


def _counted(values: Iterable) -> Iterator:
  for value in values:
    _spend(_STEP)
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
  return json.dumps(
    value,
    ensure_ascii=ensure_ascii,
    indent=indent,
    separators=separators,
    sort_keys=sort_keys,
  )
