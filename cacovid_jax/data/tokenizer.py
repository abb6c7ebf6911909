"""Tokenizer and chat template of a checkpoint directory; prompts with a video.

A prompt is one user turn, video then text, and the header of the answer. The
single video placeholder becomes N + 1 ids in LLaVA-OneVision, where the image
newline ends the block, and N between start and end tokens in Qwen2.5-VL.
"""

import dataclasses
import functools
import os
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import msgspec
import numpy as np
import tokenizers

from cacovid_jax import errors, schema
from cacovid_jax.data import chat_template as chat_template_lib
from cacovid_jax.data import question as question_lib
from cacovid_jax.data import wording

_MEND = "use the checkpoint's original template"


class _Token(msgspec.Struct):
  content: str = ""


class _Special(msgspec.Struct):
  """Special tokens in tokenizer_config.json: texts, or each an object."""

  bos_token: str | _Token | None = ""
  eos_token: str | _Token | None = ""
  pad_token: str | _Token | None = ""
  unk_token: str | _Token | None = ""


class _Text(msgspec.Struct):
  max_position_embeddings: schema.Count | None = None


class _Config(msgspec.Struct):
  """What config.json says of prompts."""

  model_type: str | None = None
  text_config: _Text | None = None
  max_position_embeddings: schema.Count | None = None
  video_token_index: schema.Size | None = None
  video_token_id: schema.Size | None = None


class _Generation(msgspec.Struct):
  eos_token_id: schema.Size | list[schema.Size] | None = None


class _Processor(msgspec.Struct):
  video_token: str | None = None


class Prompt(NamedTuple):
  """One tokenised prompt: int32[L] ids and int32[N] rows of video tokens."""

  ids: np.ndarray
  video_rows: np.ndarray

  @property
  def length(self) -> int:
    """L: text, N video tokens and, in LLaVA-OneVision, the newline."""
    return len(self.ids)


class PaddedPrompts(NamedTuple):
  ids: np.ndarray  # int32[B,L], padded on the right.
  length: np.ndarray  # int32[B].
  video_rows: np.ndarray  # int32[B,N], L behind those of a shorter video.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
  """What a checkpoint's files say beside its tokenizer and template."""

  name: str = "tokenizer"  # Of the checkpoint.
  style: wording.VideoStyle = wording.LLAVA_ONEVISION
  # Whether messages are one plain text first of all, and a list of video and
  # text only where that fails; else the other way round.
  plain: bool = False
  eos_tokens: Sequence[str] = ("<|im_end|>", "<|endoftext|>")
  pad_token: str = "<|endoftext|>"
  max_length: int | None = None  # L at most; None for no bound.
  # What the template may read, the special tokens.
  variables: Mapping[str, str] = dataclasses.field(default_factory=dict)


class Tokenizer:
  """Text to ids and back, with the chat template of one checkpoint.

  Attributes, beside those of `Options`: `video_token`, the placeholder of a
  clip, and `video_id`; `template`, the chat template's text; `eos_ids`, which
  end an answer; `pad_id`, which fills rows.
  """

  def __init__(
    self,
    tokenizer: tokenizers.Tokenizer,
    template: str,
    options: Options = Options(),
  ):
    """Checks that the tokenizer can write the template's prompts."""
    self.name = name = options.name
    self.style, self.max_length = options.style, options.max_length
    self.video_token = options.style.token
    self.template, self._tokenizer, self._options = template, tokenizer, options
    self._template = chat_template_lib.Template(template, name)
    self._form = None  # The form of messages that the template has taken.
    # Questions are asked about clips of many sizes.
    self._with_blocks = functools.lru_cache(65_536)(self._encode_blocks)
    for token in self.style.tokens:
      if tokenizer.token_to_id(token) is None:
        what = "video token" if token == self.video_token else "token"
        raise errors.UserError(
          f"{name}: the tokenizer has no {what} {token!r}; use the tokenizer of"
          " a video model's checkpoint"
        )
    self.video_id = tokenizer.token_to_id(self.video_token)
    ids = map(tokenizer.token_to_id, options.eos_tokens)
    self.eos_ids = tuple(dict.fromkeys(i for i in ids if i is not None))
    if not self.eos_ids:
      raise errors.UserError(
        f"{name}: the tokenizer knows none of the end tokens"
        f" {list(options.eos_tokens)}; name them in generation_config.json"
      )
    pad_id = tokenizer.token_to_id(options.pad_token)
    self.pad_id = self.eos_ids[-1] if pad_id is None else pad_id

  @classmethod
  def from_directory(cls, directory, template="processor") -> "Tokenizer":
    """Reads tokenizer.json, the chat template and the special tokens.

    The template "processor" is the processor's where there is one; "tokenizer"
    is the tokenizer's and gets plain texts, as in the paper's evaluation (it
    adds the default system turn).
    """
    told = f"template={template!r}: give 'processor' or 'tokenizer'"
    errors.check(template in ("processor", "tokenizer"), told)
    directory = os.fspath(directory)
    path = os.path.join(directory, "tokenizer.json")
    if not os.path.isfile(path):
      raise errors.UserError(
        f"{directory}: no tokenizer.json; give a Hugging Face checkpoint"
        " directory, or save the tokenizer there in its fast form"
      )
    chat_template_lib.check_size(path)
    try:
      tokenizer = tokenizers.Tokenizer.from_file(path)
    except Exception as error:  # The library raises a bare Exception.
      raise errors.UserError(
        f"{path}: not a tokenizer file ({error}); copy it again"
      ) from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return cls._from_files(tokenizer, directory, template)

  @classmethod
  def _from_files(cls, tokenizer, directory: str, template: str):

    def read(name, kind):
      path = os.path.join(directory, f"{name}.json")
      found = chat_template_lib.read_json(path)
      return schema.fit(found, kind, path, "copy it from the model's origin")

    own, config = read("tokenizer_config", _Special), read("config", _Config)
    generation = read("generation_config", _Generation)
    text, _ = chat_template_lib.read(directory, template)
    style = wording.STYLES.get(config.model_type, wording.LLAVA_ONEVISION)
    if token := read("processor_config", _Processor).video_token:
      plain = style.plain.replace(style.token, token)
      style = dataclasses.replace(style, token=token, plain=plain)
    special = {}
    for key, token in msgspec.structs.asdict(own).items():
      token = token.content if isinstance(token, _Token) else token
      special[key] = token or ""
    eos_ids = generation.eos_token_id
    eos_ids = eos_ids if isinstance(eos_ids, list) else [eos_ids]
    eos_tokens = [tokenizer.id_to_token(i) for i in eos_ids if i is not None]
    eos_tokens = [t for t in (*eos_tokens, special["eos_token"]) if t]
    options = Options(
      name=directory,
      style=style,
      plain=template == "tokenizer",
      eos_tokens=eos_tokens or Options.eos_tokens,
      pad_token=special["pad_token"] or Options.pad_token,
      max_length=(config.text_config or config).max_position_embeddings,
      variables=special,
    )
    try:
      result = cls(tokenizer, text, options)
    except UnicodeEncodeError as error:  # Half a surrogate pair.
      raise errors.UserError(
        f"{directory}: a special token is no text; copy it again"
      ) from error
    expected = config.video_token_index
    expected = config.video_token_id if expected is None else expected
    if expected not in (None, result.video_id):
      raise errors.UserError(
        f"{directory}: config.json gives the video token id {expected}, but"
        f" tokenizer.json gives {result.video_id}; take both from one"
        " checkpoint"
      )
    return result

  def __reduce__(self):
    options = dataclasses.replace(self._options, max_length=self.max_length)
    return Tokenizer, (self._tokenizer, self.template, options)

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

    The assistant header ends in a newline, to which no pre-tokenizer of the
    supported models joins a letter: the model generates the bare one.
    """
    ids = self.encode(letter)
    return ids[0] if len(ids) == 1 else -1

  def answer_id(self, question: question_lib.Question) -> int:
    """Returns the id of the right letter; -1 if the answer is no letter."""
    return self.letter_id(question.answer) if question.lettered else -1

  def render(self, text: str) -> str:
    """Returns the turn before tokenisation, with one video placeholder."""
    words = text.strip()  # A template may trim what it is given.

    def judge(rendered):
      count = rendered.count(self.video_token)
      what = ""
      if count != 1:
        what = f"renders {count} video placeholders instead of one"
      elif words not in rendered:
        what = "leaves the question out"
      elif self.style.block not in rendered:
        what = f"does not write a clip as {self.style.block!r}"
      return what, 1 + (count == 1) + (words in rendered)

    items = [{"type": "video"}, {"type": "text", "text": text}]
    contents = {"items": items, "plain": f"{self.style.plain}{text}"}
    if self._form:
      contents = {self._form: contents[self._form]}
    self._form, rendered = self._render_turn(text, contents, judge)
    return rendered

  def render_blind(self, text: str) -> str:
    """Returns the turn of a question without any clip, before tokenisation."""

    def judge(rendered):
      around = rendered.replace(text, "")
      shown = any(token in around for token in self.style.tokens)
      what = "does not write a question without a clip as it stands"
      return "" if text.strip() in rendered and not shown else what, -1

    contents = {"items": [{"type": "text", "text": text}], "plain": text}
    return self._render_turn(text, contents, judge)[1]

  def _render_turn(self, text: str, contents, judge) -> tuple[str, str]:
    """Returns (form, turn) of the first content that nothing is wrong with.

    `judge` says of a turn what is wrong, "" for nothing, and how near it comes,
    where 0 is a template that fails.
    """
    if self.video_token in text:
      raise errors.UserError(
        f"the question {text[:40]!r} contains {self.video_token!r}, which"
        " stands for the clip; remove it from the text"
      )
    faults = []
    # A tokenizer's own template may take one form only.
    order = ("plain", "items") if self._options.plain else ("items", "plain")
    for form in [form for form in order if form in contents]:
      turn = {"role": "user", "content": contents[form]}
      try:
        rendered = self.render_messages([turn])
      except errors.UserError as error:
        faults.append((0, error))
        continue
      what, near = judge(rendered)
      if not what:
        return form, rendered
      fault = f"{self.name}: the chat template {what}; {_MEND}"
      faults.append((near, errors.UserError(fault)))
    # What came closest tells the most.
    raise max(faults, key=lambda fault: fault[0])[1]

  def render_messages(
    self, messages: Sequence[dict], add_generation_prompt: bool = True
  ) -> str:
    """Returns the text of any conversation; see `chat_template.Template`."""
    variables = {"add_generation_prompt": add_generation_prompt}
    try:
      return self._template.render(
        messages, **variables, **self._options.variables
      )
    except chat_template_lib.FAULTS as error:
      raise errors.UserError(
        f"{self.name}: the chat template fails on a question"
        f" ({errors.one_line(error)[:200]}); {_MEND}"
      ) from error

  def encode_prompt(
    self, text: str, num_video_tokens: int, clip: str = ""
  ) -> Prompt:
    """Returns the ids of a question about a clip of N tokens.

    `clip` stands for the style's block, and splits them among its placeholders.
    """
    ids, starts = self._with_blocks(text, clip)
    each, rest = divmod(num_video_tokens, len(starts))
    if rest:
      raise ValueError(f"{num_video_tokens} tokens in {len(starts)} blocks")
    mend = "use fewer frames or shorten the question"
    length = len(ids) - len(starts) + num_video_tokens
    self._check(f"prompt {text[:40]!r}", length, mend)
    counts = np.ones(len(ids), int)
    counts[starts] = each
    first = np.cumsum(counts)[starts] - each
    rows = (first[:, None] + np.arange(each)).ravel()
    return Prompt(np.repeat(ids, counts), rows.astype(np.int32))

  def _encode_blocks(self, text: str, clip: str):
    """Returns the ids of a prompt, and the rows of one token a block."""
    rendered = self.render(text)
    if clip:
      rendered = rendered.replace(self.style.block, clip, 1)
    ids = self.encode(rendered)
    count, wanted = ids.count(self.video_id), clip.count(self.video_token) or 1
    if count != wanted:
      raise errors.UserError(
        f"{self.name}: the rendered prompt holds {count} video tokens"
        f" instead of {wanted}; the tokenizer must keep"
        f" {self.video_token!r} as a single special token"
      )
    ids = np.array(ids, np.int32)
    starts = np.flatnonzero(ids == self.video_id)
    newline = np.full(self.style.newline_tokens, self.video_id, np.int32)
    return np.insert(ids, starts[-1] + 1, newline), starts

  def encode_blind(self, text: str) -> np.ndarray:
    """Returns int32[L], the ids of a question that is asked without a clip."""
    ids = np.array(self.encode(self.render_blind(text)), np.int32)
    self._check(f"question {text[:40]!r}", len(ids), "shorten it")
    return ids

  def _check(self, what: str, length: int, mend: str) -> None:
    if self.max_length and length > self.max_length:
      raise errors.UserError(
        f"the {what} has {length} tokens, but the model takes"
        f" {self.max_length}; {mend}"
      )

  def pad(
    self, prompts: Sequence[Prompt], length: int, num_video_tokens: int = 0
  ) -> PaddedPrompts:
    """Returns the prompts right-padded to `length` (the bucket).

    N is `num_video_tokens`, or of the prompt with most for 0.
    """
    num_video = num_video_tokens or max(len(p.video_rows) for p in prompts)
    ids = np.full((len(prompts), length), self.pad_id, np.int32)
    video_rows = np.full((len(prompts), num_video), length, np.int32)
    for row, prompt in enumerate(prompts):
      if prompt.length > length:
        raise errors.UserError(
          f"a prompt of {prompt.length} tokens does not fit into the bucket of"
          f" {length}; raise the bucket to at least {prompt.length}"
        )
      ids[row, : prompt.length] = prompt.ids
      video_rows[row, : len(prompt.video_rows)] = prompt.video_rows
    lengths = np.array([prompt.length for prompt in prompts], np.int32)
    return PaddedPrompts(ids, lengths, video_rows)
