"""Tokenizer and chat template of a checkpoint directory; prompts with a video.

A prompt is one user turn, video then text, and the header of the answer. The
single video placeholder of the rendered text becomes N + 1 ids in
LLaVA-OneVision, N video tokens and the image newline that ends the block, and N
ids between start and end tokens in Qwen2.5-VL.
"""

import dataclasses
import functools
import os
from collections.abc import Sequence

import numpy as np
import tokenizers

from cacovid_jax import errors
from cacovid_jax.data import chat_template as chat_template_lib
from cacovid_jax.data import question as question_lib

ANSWER_DIRECTLY = (
  "Answer with the option's letter from the given choices directly."
)
_NUMBER = " Please provide the numerical value (e.g., 42 or 3.14)."
# What the public trainer appends to a question, by problem type. Each begins
# with a space, as there.
HINTS = {
  question_lib.MULTIPLE_CHOICE: (
    " Please provide only the single option letter (e.g., A, B, C, D, etc.)."
  ),
  question_lib.NUMERICAL: _NUMBER,
  question_lib.OCR: (
    " Please transcribe text from the image/video clearly and provide your"
    " text answer."
  ),
  question_lib.FREE_FORM: " Please provide your text answer.",
  question_lib.REGRESSION: _NUMBER,
}

MAX_FILE_BYTES = 256 * 2**20


@dataclasses.dataclass(frozen=True)
class VideoStyle:
  """How a model's prompts hold a clip.

  Attributes:
    token: the placeholder, repeated once for each video token.
    plain: what stands for a clip before the question where the message is one
      plain text.
    newline_tokens: rows after the N video tokens that have the same id.
    around: tokens that have to stand before and after; positions are counted
      from them.
  """

  token: str
  plain: str
  newline_tokens: int
  around: tuple[str, ...] = ()

  @property
  def tokens(self) -> tuple[str, ...]:
    return (self.token, *self.around)

  @property
  def block(self) -> str:
    """What a rendered turn has to hold."""
    return self.token.join(self.around) if self.around else self.token


LLAVA_ONEVISION = VideoStyle("<video>", "<video>\n", 1)
QWEN2_5_VL = VideoStyle(
  "<|video_pad|>",
  "<|vision_start|><|video_pad|><|vision_end|>",
  0,
  ("<|vision_start|>", "<|vision_end|>"),
)
_STYLES = {"llava_onevision": LLAVA_ONEVISION, "qwen2_5_vl": QWEN2_5_VL}


def letter_options(options: Sequence[str], form: str = "{}. {}") -> list[str]:
  """Returns the options with their letters, "A. first", "B. second", ..."""
  if len(options) > len(question_lib.LETTERS):
    raise errors.UserError(
      f"{len(options)} options are more than there are letters; give at most"
      f" {len(question_lib.LETTERS)}"
    )
  return list(map(form.format, question_lib.LETTERS, options))


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
    + "\n".join([*lettered_options, "", ANSWER_DIRECTLY])
  )


@dataclasses.dataclass(frozen=True, eq=False)
class Prompt:
  """One tokenised prompt: int32[L] ids and int32[N] rows of video tokens."""

  ids: np.ndarray
  video_rows: np.ndarray

  @property
  def length(self) -> int:
    """L: text, N video tokens and, in LLaVA-OneVision, the newline."""
    return len(self.ids)


@dataclasses.dataclass(frozen=True, eq=False)
class PaddedPrompts:
  """Right-padded prompts.

  Attributes:
    ids: int32[B,L].
    length: int32[B].
    video_rows: int32[B,N], L behind those of a video of fewer tokens.
  """

  ids: np.ndarray
  length: np.ndarray
  video_rows: np.ndarray


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
    style: VideoStyle = LLAVA_ONEVISION,
    plain: bool = False,
    eos_tokens: Sequence[str] = ("<|im_end|>", "<|endoftext|>"),
    pad_token: str = "<|endoftext|>",
    max_length: int | None = None,
    variables: dict | None = None,
  ):
    """Checks that the tokenizer can write the template's prompts.

    Args:
      tokenizer: text to ids.
      template: the chat template's text.
      name: of the checkpoint, for errors.
      style: how prompts hold a clip.
      plain: whether messages are one plain text first of all, and a list of
        video and text only where that fails; else the other way round.
      eos_tokens: that end an answer.
      pad_token: that fills rows.
      max_length: L at most; None for no bound.
      variables: what the template may read, the special tokens.
    """
    self.name = name
    self.style = style
    self.max_length = max_length
    self._tokenizer = tokenizer
    self._template = chat_template_lib.Template(template, name)
    self._variables = variables or {}
    self._plain = plain
    self._form = None  # The form of messages that the template has taken.
    # Questions are asked about clips of many sizes.
    self._with_one_token = functools.lru_cache(65_536)(
      self._encode_with_one_token
    )
    for token in style.tokens:
      if tokenizer.token_to_id(token) is None:
        what = "video token" if token == style.token else "token"
        raise errors.UserError(
          f"{name}: the tokenizer has no {what} {token!r}; use the tokenizer of"
          " a video model's checkpoint"
        )
    self.video_id = tokenizer.token_to_id(style.token)
    ids = [tokenizer.token_to_id(token) for token in eos_tokens]
    self.eos_ids = tuple(dict.fromkeys(i for i in ids if i is not None))
    if not self.eos_ids:
      raise errors.UserError(
        f"{name}: the tokenizer knows none of the end tokens"
        f" {list(eos_tokens)}; name them in generation_config.json"
      )
    pad_id = tokenizer.token_to_id(pad_token) if pad_token else None
    self.pad_id = self.eos_ids[-1] if pad_id is None else pad_id

  @classmethod
  def from_directory(cls, directory, template="processor") -> "Tokenizer":
    """Reads tokenizer.json, the chat template and the special tokens.

    Args:
      directory: a Hugging Face checkpoint directory.
      template: "processor" takes the processor's chat template where there is
        one; "tokenizer" takes the tokenizer's and gives it plain texts, as
        the paper's evaluation does (it adds the default system turn).
    """
    if template not in ("processor", "tokenizer"):
      raise errors.UserError(
        f"template={template!r}: give 'processor' or 'tokenizer'"
      )
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
    read_json = chat_template_lib.read_json
    own = read_json(join("tokenizer_config.json"))
    config = read_json(join("config.json"))
    generation = read_json(join("generation_config.json"))
    processor = read_json(join("processor_config.json"))
    text, _ = chat_template_lib.read(directory, template)
    style = _STYLES.get(config.get("model_type"), LLAVA_ONEVISION)
    if token := processor.get("video_token"):
      plain = style.plain.replace(style.token, token)
      style = dataclasses.replace(style, token=token, plain=plain)
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
      style=style,
      plain=template == "tokenizer",
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
      self._template.text,
      dict(
        name=self.name,
        style=self.style,
        plain=self._plain,
        eos_tokens=[self._tokenizer.id_to_token(i) for i in self.eos_ids],
        pad_token=self._tokenizer.id_to_token(self.pad_id),
        max_length=self.max_length,
        variables=self._variables,
      ),
    )

  @property
  def video_token(self) -> str:
    """The placeholder of a clip."""
    return self.style.token

  @property
  def template(self) -> str:
    """The chat template's text."""
    return self._template.text

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

  def answer_id(self, question: question_lib.Question) -> int:
    """Returns the id of the right letter; -1 if the answer is no letter."""
    return self.letter_id(question.answer) if question.lettered else -1

  def render(self, text: str) -> str:
    """Returns the turn before tokenisation, with one video placeholder."""
    if self.video_token in text:
      raise errors.UserError(
        f"the question {text[:40]!r} contains {self.video_token!r}, which"
        " stands for the clip; remove it from the text"
      )
    contents = {
      "items": [{"type": "video"}, {"type": "text", "text": text}],
      "plain": f"{self.style.plain}{text}",
    }
    forms = ("plain", "items") if self._plain else ("items", "plain")
    words = text.strip()  # A template may trim what it is given.
    faults = []
    # A tokenizer's own template may take one form only.
    for form in (self._form,) if self._form else forms:
      try:
        message = {"role": "user", "content": contents[form]}
        rendered = self.render_messages([message])
      except errors.UserError as error:
        faults.append((0, error))
        continue
      count = rendered.count(self.video_token)
      if count != 1:
        what = f"renders {count} video placeholders instead of one"
      elif words not in rendered:
        what = "leaves the question out"
      elif self.style.block not in rendered:
        what = f"does not write a clip as {self.style.block!r}"
      else:
        self._form = form
        return rendered
      fault = errors.UserError(
        f"{self.name}: the chat template {what}; use the checkpoint's original"
        " template"
      )
      faults.append((1 + (count == 1) + (words in rendered), fault))
    # What came closest tells the most.
    raise max(faults, key=lambda fault: fault[0])[1]

  def render_blind(self, text: str) -> str:
    """Returns the turn of a question without any clip, before tokenisation."""
    forms = [[{"type": "text", "text": text}], text]
    words, fault = text.strip(), None
    for content in reversed(forms) if self._plain else forms:
      try:
        rendered = self.render_messages([{"role": "user", "content": content}])
      except errors.UserError as error:
        fault = fault or error
        continue
      if words in rendered and not any(
        token in rendered.replace(text, "") for token in self.style.tokens
      ):
        return rendered
    raise fault or errors.UserError(
      f"{self.name}: the chat template does not write a question without a"
      " clip as it stands; use the checkpoint's original template"
    )

  def render_messages(
    self, messages: Sequence[dict], add_generation_prompt: bool = True
  ) -> str:
    """Returns the text of any conversation, by the checkpoint's template.

    Args:
      messages: see `chat_templates.Template.render`.
      add_generation_prompt: whether the header of the answer follows.
    """
    try:
      return self._template.render(
        messages, add_generation_prompt=add_generation_prompt, **self._variables
      )
    except chat_template_lib.FAULTS as error:
      raise errors.UserError(
        f"{self.name}: the chat template fails on a question ({error}); use"
        " the checkpoint's original template"
      ) from error

  def encode_prompt(self, text: str, num_video_tokens: int) -> Prompt:
    """Returns the ids of a question about a clip of N tokens in one block."""
    ids, start = self._with_one_token(text)
    length = len(ids) - 1 + num_video_tokens
    if self.max_length and length > self.max_length:
      raise errors.UserError(
        f"the prompt {text[:40]!r} has {length} tokens, but the model takes"
        f" {self.max_length}; use fewer frames or shorten the question"
      )
    block = np.full(num_video_tokens, self.video_id, np.int32)
    ids = np.concatenate([ids[:start], block, ids[start + 1 :]])
    rows = np.arange(start, start + num_video_tokens, dtype=np.int32)
    return Prompt(ids, rows)

  def _encode_with_one_token(self, text: str) -> tuple[np.ndarray, int]:
    """Returns the ids of a prompt about one video token, and that one's row."""
    ids = self.encode(self.render(text))
    places = [i for i, token in enumerate(ids) if token == self.video_id]
    if len(places) != 1:
      raise errors.UserError(
        f"{self.name}: the rendered prompt holds {len(places)} video tokens"
        " instead of one; the tokenizer must keep"
        f" {self.video_token!r} as a single special token"
      )
    start = places[0]
    newline = np.full(self.style.newline_tokens, self.video_id, np.int32)
    return np.insert(np.array(ids, np.int32), start, newline), start

  def encode_blind(self, text: str) -> np.ndarray:
    """Returns int32[L], the ids of a question that is asked without a clip."""
    ids = np.array(self.encode(self.render_blind(text)), np.int32)
    if self.video_id in ids:
      raise errors.UserError(
        f"the question {text[:40]!r} contains {self.video_token!r}, which"
        " stands for the clip; remove it from the text"
      )
    if self.max_length and len(ids) > self.max_length:
      raise errors.UserError(
        f"the question {text[:40]!r} has {len(ids)} tokens, but the model takes"
        f" {self.max_length}; shorten it"
      )
    return ids

  def pad(
    self, prompts: Sequence[Prompt], length: int, num_video_tokens: int = 0
  ) -> PaddedPrompts:
    """Returns the prompts right-padded to `length` (the bucket).

    Args:
      prompts: of this tokenizer.
      length: L.
      num_video_tokens: N; 0 for that of the prompt with most.
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


def _rebuild(text: str, template: str, options: dict) -> Tokenizer:
  """Unpickles a `Tokenizer` in a worker process."""
  return Tokenizer(tokenizers.Tokenizer.from_str(text), template, **options)
