"""Tokenizer and chat template of a checkpoint directory; prompts with a video.

A prompt is one user turn, video then text, and the header of the answer. The
single video placeholder of the rendered text becomes N + 1 ids: N video tokens
and the image newline that ends the block.
"""

import dataclasses
import functools
import json
import os
from collections.abc import Sequence

import jinja2
import jinja2.ext
import jinja2.sandbox
import numpy as np
import tokenizers

from cacovid_jax import errors
from cacovid_jax.data import questions

# What the public trainer appends to a question, by problem type. Each begins
# with a space, as there.
HINTS = {
  questions.MULTIPLE_CHOICE: (
    " Please provide only the single option letter (e.g., A, B, C, D, etc.)."
  ),
  questions.NUMERICAL: (
    " Please provide the numerical value (e.g., 42 or 3.14)."
  ),
  questions.OCR: (
    " Please transcribe text from the image/video clearly and provide your"
    " text answer."
  ),
  questions.FREE_FORM: " Please provide your text answer.",
  questions.REGRESSION: (
    " Please provide the numerical value (e.g., 42 or 3.14)."
  ),
}

# What a template can raise while it renders.
_TEMPLATE_FAULTS = (
  jinja2.TemplateError,
  TypeError,
  ValueError,
  ArithmeticError,
  RecursionError,
  AttributeError,
  LookupError,
)

MAX_TEMPLATE_CHARS = 65_536
MAX_RENDERED_CHARS = 1_048_576
MAX_FILE_BYTES = 256 * 2**20
_NEWLINE_TOKENS = 1


def letter_options(options: Sequence[str]) -> list[str]:
  """Returns the options with their letters, "A. first", "B. second", ..."""
  if len(options) > len(questions.LETTERS):
    raise errors.UserError(
      f"{len(options)} options are more than there are letters; give at most"
      f" {len(questions.LETTERS)}"
    )
  return [
    f"{letter}. {option}"
    for letter, option in zip(questions.LETTERS, options, strict=False)
  ]


def training_prompt(
  problem: str, lettered_options: Sequence[str], problem_type: str
) -> str:
  """Returns problem, options (if any are missing in it), and the hint."""
  lines = [problem]
  if not all(option in problem for option in lettered_options):
    lines += lettered_options
  return "\n".join(lines) + "\n" + HINTS[problem_type]


def videomme_prompt(question: str, lettered_options: Sequence[str]) -> str:
  """Returns the official VideoMME text (which always names the subtitles)."""
  return (
    "Select the best answer to the following multiple-choice question based on"
    " the video and the subtitles. Respond with only the letter (A, B, C, or"
    " D) of the correct option.\n"
    + question
    + "\n"
    + "\n".join(lettered_options)
    + "\n\nAnswer with the option's letter from the given choices directly."
  )


@dataclasses.dataclass(frozen=True, eq=False)
class Prompt:
  """One tokenised prompt: int32[L] ids and the row of its first video token."""

  ids: np.ndarray
  video_start: int
  num_video_tokens: int

  @property
  def length(self) -> int:
    """L: text, N video tokens and the newline."""
    return len(self.ids)


@dataclasses.dataclass(frozen=True, eq=False)
class PaddedPrompts:
  """Right-padded prompts: ids int32[B,L], length and video_start int32[B]."""

  ids: np.ndarray
  length: np.ndarray
  video_start: np.ndarray


class _Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
  """A sandbox in which a template cannot ask for a huge string or number."""

  intercepted_binops = frozenset(("*", "**"))

  def call_binop(self, context, operator, left, right):
    if operator == "**" or not all(
      isinstance(value, (int, float)) for value in (left, right)
    ):
      raise jinja2.sandbox.SecurityError(f"{operator} on these values")
    return super().call_binop(context, operator, left, right)


class _Generation(jinja2.ext.Extension):
  """`{% generation %}` blocks, which mark a model's turns, render as is."""

  tags = {"generation"}

  def parse(self, parser):
    line = next(parser.stream).lineno
    body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
    return jinja2.nodes.Scope(body).set_lineno(line)


def _raise_exception(message):
  raise jinja2.TemplateError(str(message))


def _bounded_range(*args):
  values = range(*args)
  if len(values) > 10_000:
    raise jinja2.sandbox.SecurityError("range above 10000")
  return values


def _compile(template: str, name: str) -> jinja2.Template:
  if len(template) > MAX_TEMPLATE_CHARS:
    raise errors.UserError(
      f"{name}: the chat template has {len(template)} characters, more than"
      f" {MAX_TEMPLATE_CHARS}; use the checkpoint's original template"
    )
  env = _Environment(
    trim_blocks=True,
    lstrip_blocks=True,
    extensions=[_Generation, "jinja2.ext.loopcontrols"],
  )
  env.globals["raise_exception"] = _raise_exception
  env.globals["range"] = _bounded_range
  try:
    return env.from_string(template)
  except (jinja2.TemplateError, RecursionError) as error:
    raise errors.UserError(
      f"{name}: the chat template does not parse ({error}); use the"
      " checkpoint's original template"
    ) from error


def _render(template: jinja2.Template, **variables) -> str:
  """Renders piece by piece, so that the size cap also bounds the work."""
  pieces, size = [], 0
  for piece in template.generate(**variables):
    pieces.append(piece)
    size += len(piece)
    if size > MAX_RENDERED_CHARS:
      raise jinja2.TemplateError(f"more than {MAX_RENDERED_CHARS} characters")
  return "".join(pieces)


def _read_json(path: str) -> dict:
  """Returns the JSON object at `path`; {} if there is no such file."""
  if not os.path.isfile(path):
    return {}
  try:
    if os.path.getsize(path) > MAX_FILE_BYTES:
      raise errors.UserError(f"{path}: above {MAX_FILE_BYTES} bytes")
    with open(path, encoding="utf-8") as f:
      entry = json.load(f)
  except (OSError, ValueError, RecursionError) as error:
    raise errors.UserError(
      f"{path}: not readable as JSON ({error}); copy it again"
    ) from error
  if not isinstance(entry, dict):
    raise errors.UserError(f"{path}: holds no JSON object; copy it again")
  return entry


def _chat_template(directory: str, prefer: str) -> tuple[str, str]:
  """Returns the template text and the name of the file it came from."""
  found = {}
  path = os.path.join(directory, "chat_template.jinja")
  if os.path.isfile(path):
    try:
      with open(path, encoding="utf-8") as f:
        found["processor"] = f.read(MAX_TEMPLATE_CHARS + 1), path
    except (OSError, UnicodeDecodeError) as error:
      raise errors.UserError(
        f"{path}: not readable as text ({error}); copy it again"
      ) from error
  for name in ("chat_template.json", "processor_config.json"):
    path = os.path.join(directory, name)
    text = _read_json(path).get("chat_template")
    if isinstance(text, str):
      found.setdefault("processor", (text, path))
  path = os.path.join(directory, "tokenizer_config.json")
  text = (_read_json(path) or {}).get("chat_template")
  if isinstance(text, list):  # Several named templates.
    named = {entry.get("name"): entry.get("template") for entry in text}
    text = named.get("default")
  if isinstance(text, str):
    found["tokenizer"] = text, path
  other = {"processor": "tokenizer", "tokenizer": "processor"}[prefer]
  if not found:
    raise errors.UserError(
      f"{directory}: no chat template (chat_template.jinja,"
      " chat_template.json, or chat_template in tokenizer_config.json); copy it"
      " from the checkpoint's origin"
    )
  return found.get(prefer) or found[other]


def _token_text(entry) -> str | None:
  """Special tokens are stored as text or as {"content": text, ...}."""
  return entry.get("content") if isinstance(entry, dict) else entry


class Tokenizer:
  """Text to ids and back, with the chat template of one checkpoint."""

  def __init__(
    self,
    tokenizer: tokenizers.Tokenizer,
    template: str,
    *,
    name: str = "tokenizer",
    video_token: str = "<video>",
    eos_tokens: Sequence[str] = ("<|im_end|>", "<|endoftext|>"),
    pad_token: str = "<|endoftext|>",
    max_length: int | None = None,
    variables: dict | None = None,
  ):
    self.name = name
    self.video_token = video_token
    self.max_length = max_length
    self._tokenizer = tokenizer
    self._template = template
    self._compiled = _compile(template, name)
    self._variables = variables or {}
    video_id = tokenizer.token_to_id(video_token)
    if video_id is None:
      raise errors.UserError(
        f"{name}: the tokenizer has no video token {video_token!r}; use the"
        " tokenizer of a video model's checkpoint"
      )
    self.video_id = video_id
    ids = [tokenizer.token_to_id(token) for token in eos_tokens]
    self.eos_ids = tuple(dict.fromkeys(i for i in ids if i is not None))
    if not self.eos_ids:
      raise errors.UserError(
        f"{name}: the tokenizer knows none of the end tokens"
        f" {list(eos_tokens)}; name them in generation_config.json"
      )
    pad_id = tokenizer.token_to_id(pad_token) if pad_token else None
    self.pad_id = self.eos_ids[-1] if pad_id is None else pad_id
    self._string_style = None

  @classmethod
  def from_directory(cls, directory, template="processor") -> "Tokenizer":
    """Reads tokenizer.json, the chat template and the special tokens.

    Args:
      directory: a Hugging Face checkpoint directory.
      template: "processor" takes the processor's chat template where there is
        one; "tokenizer" takes the tokenizer's, as the paper's evaluation does
        (it adds the default system turn).
    """
    directory = os.fspath(directory)
    path = os.path.join(directory, "tokenizer.json")
    if not os.path.isfile(path):
      raise errors.UserError(
        f"{directory}: no tokenizer.json; give a Hugging Face checkpoint"
        " directory, or save the tokenizer there in its fast form"
      )
    if os.path.getsize(path) > MAX_FILE_BYTES:
      raise errors.UserError(f"{path}: above {MAX_FILE_BYTES} bytes")
    try:
      tokenizer = tokenizers.Tokenizer.from_file(path)
    except Exception as error:  # The library raises a bare Exception.
      raise errors.UserError(
        f"{path}: not a tokenizer file ({error}); copy it again"
      ) from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    try:
      return cls._from_files(tokenizer, directory, template)
    except (TypeError, AttributeError, ValueError, OverflowError) as error:
      raise errors.UserError(
        f"{directory}: a value of the configuration files has the wrong type"
        f" ({error}); copy them from the checkpoint's origin"
      ) from error

  @classmethod
  def _from_files(cls, tokenizer, directory: str, template: str):
    join = functools.partial(os.path.join, directory)
    own = _read_json(join("tokenizer_config.json"))
    config = _read_json(join("config.json"))
    generation = _read_json(join("generation_config.json"))
    processor = _read_json(join("processor_config.json"))
    text, _ = _chat_template(directory, template)
    eos_token = _token_text(own.get("eos_token"))
    eos_ids = generation.get("eos_token_id", [])
    eos_ids = eos_ids if isinstance(eos_ids, list) else [eos_ids]
    eos_tokens = [tokenizer.id_to_token(i) for i in eos_ids if i is not None]
    if eos_token:
      eos_tokens.append(eos_token)
    eos_tokens = [token for token in eos_tokens if token]
    text_config = config.get("text_config") or config
    max_length = text_config.get("max_position_embeddings")
    result = cls(
      tokenizer,
      text,
      name=directory,
      video_token=processor.get("video_token") or "<video>",
      eos_tokens=eos_tokens or ("<|im_end|>", "<|endoftext|>"),
      pad_token=_token_text(own.get("pad_token")) or "<|endoftext|>",
      max_length=None if max_length is None else int(max_length),
      variables={
        key: _token_text(own.get(key)) or ""
        for key in ("bos_token", "eos_token", "pad_token", "unk_token")
      },
    )
    expected = config.get("video_token_index", config.get("video_token_id"))
    if expected is not None and expected != result.video_id:
      raise errors.UserError(
        f"{directory}: config.json gives the video token id {expected}, but"
        f" tokenizer.json gives {result.video_id}; take both from one"
        " checkpoint"
      )
    return result

  def __reduce__(self):
    return _rebuild, (
      self._tokenizer.to_str(),
      self._template,
      dict(
        name=self.name,
        video_token=self.video_token,
        eos_tokens=[self._tokenizer.id_to_token(i) for i in self.eos_ids],
        pad_token=self._tokenizer.id_to_token(self.pad_id),
        max_length=self.max_length,
        variables=self._variables,
      ),
    )

  @property
  def vocab_size(self) -> int:
    """Ids that the tokenizer knows, special tokens included."""
    return self._tokenizer.get_vocab_size(with_added_tokens=True)

  def token_id(self, token: str) -> int | None:
    """Returns the id of one token of the vocabulary; None if unknown."""
    return self._tokenizer.token_to_id(token)

  def encode(self, text: str) -> list[int]:
    """Returns the ids of `text`, nothing added."""
    return self._tokenizer.encode(text, add_special_tokens=False).ids

  def decode(self, ids, skip_special_tokens: bool = True) -> str:
    """Returns the text of int[...] ids."""
    ids = [int(i) for i in np.asarray(ids).reshape(-1)]
    return self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

  def letter_id(self, letter: str) -> int:
    """Returns the id of an option letter, -1 if it is not a single token.

    The assistant header ends in a newline, after which no pre-tokenizer of the
    supported models joins a letter to it; so the bare letter is what the model
    generates.
    """
    ids = self.encode(letter)
    return ids[0] if len(ids) == 1 else -1

  def answer_id(self, question: questions.Question) -> int:
    """Returns the id of the right letter; -1 if the answer is no letter."""
    return self.letter_id(question.answer) if question.lettered else -1

  def render(self, text: str) -> str:
    """Returns the turn before tokenisation, with one video placeholder."""
    if self.video_token in text:
      raise errors.UserError(
        f"the question {text[:40]!r} contains {self.video_token!r}, which"
        " stands for the clip; remove it from the text"
      )
    if self._string_style is not True:
      content = [{"type": "video"}, {"type": "text", "text": text}]
      try:
        rendered = self._render(content)
        if rendered.count(self.video_token) == 1 and text in rendered:
          self._string_style = False
          return rendered
      except _TEMPLATE_FAULTS:
        # A tokenizer's own template expects a plain string.
        pass
    try:
      rendered = self._render(f"{self.video_token}\n{text}")
    except _TEMPLATE_FAULTS as error:
      raise errors.UserError(
        f"{self.name}: the chat template fails on a question ({error}); use"
        " the checkpoint's original template"
      ) from error
    if rendered.count(self.video_token) != 1:
      raise errors.UserError(
        f"{self.name}: the chat template renders"
        f" {rendered.count(self.video_token)} video placeholders instead of"
        " one; use the checkpoint's original template"
      )
    self._string_style = True
    return rendered

  def _render(self, content) -> str:
    return _render(
      self._compiled,
      messages=[{"role": "user", "content": content}],
      add_generation_prompt=True,
      **self._variables,
    )

  def encode_prompt(self, text: str, num_video_tokens: int) -> Prompt:
    """Returns the ids of a question about a clip of N video tokens."""
    ids = self.encode(self.render(text))
    places = [i for i, token in enumerate(ids) if token == self.video_id]
    if len(places) != 1:
      raise errors.UserError(
        f"{self.name}: the rendered prompt holds {len(places)} video tokens"
        " instead of one; the tokenizer must keep"
        f" {self.video_token!r} as a single special token"
      )
    start = places[0]
    ids = np.insert(
      np.array(ids, np.int32),
      start,
      np.full(num_video_tokens + _NEWLINE_TOKENS - 1, self.video_id, np.int32),
    )
    if self.max_length and len(ids) > self.max_length:
      raise errors.UserError(
        f"the prompt {text[:40]!r} has {len(ids)} tokens, but the model takes"
        f" {self.max_length}; use fewer frames or shorten the question"
      )
    return Prompt(ids, start, num_video_tokens)

  def pad(self, prompts: Sequence[Prompt], length: int) -> PaddedPrompts:
    """Returns the prompts right-padded to `length` (the bucket)."""
    ids = np.full((len(prompts), length), self.pad_id, np.int32)
    for row, prompt in zip(ids, prompts, strict=True):
      if prompt.length > length:
        raise errors.UserError(
          f"a prompt of {prompt.length} tokens does not fit into the bucket of"
          f" {length}; raise the bucket to at least {prompt.length}"
        )
      row[: prompt.length] = prompt.ids
    return PaddedPrompts(
      ids,
      np.array([prompt.length for prompt in prompts], np.int32),
      np.array([prompt.video_start for prompt in prompts], np.int32),
    )


def _rebuild(text: str, template: str, options: dict) -> Tokenizer:
  """Unpickles a `Tokenizer` in a worker process."""
  return Tokenizer(tokenizers.Tokenizer.from_str(text), template, **options)
