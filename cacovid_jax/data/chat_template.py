"""Chat templates of checkpoints: programs of others, rendered in a sandbox.

A template turns messages into the text that a model was trained on. It comes
with the weights, so it is untrusted: jinja2's sandbox keeps it from Python's
objects, and a budget of steps and characters ends what would run or grow
without end.
"""

import os
from collections.abc import Sequence

import jinja2
import msgspec

from cacovid_jax import errors, schema
from cacovid_jax.data import sandbox

FAULTS = sandbox.FAULTS  # What a template can raise while it renders.
MAX_TEMPLATE_CHARS, MAX_RENDERED_CHARS = 65_536, 1_048_576

MAX_FILE_BYTES = 256 * 2**20


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
    try:
      self._template = sandbox.compiled(text)
    except sandbox.UNFIT as error:
      raise errors.UserError(
        f"{name}: the chat template does not parse"
        f" ({errors.one_line(error)[:200]}); use the checkpoint's original"
        " template"
      ) from error

  def render(self, messages: Sequence[dict], **variables) -> str:
    """Returns the text of the messages; raises one of `FAULTS`.

    Messages are {"role": ..., "content": ...}, content a text or a list of
    {"type": "video"} and {"type": "text", "text": ...}; further variables are
    what else the template may read, such as special tokens.
    """
    text = ""
    with sandbox.budget():
      for piece in self._template.generate(messages=messages, **variables):
        text += piece
        if len(text) > MAX_RENDERED_CHARS:
          raise jinja2.TemplateError(f"more than {MAX_RENDERED_CHARS} letters")
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
