"""A small byte-level BPE tokenizer and its Hugging Face files.

For the embedded benchmark's base model: the same normaliser, pre-tokenizer and
special tokens as Qwen2's tokenizer, and a vocabulary trained on a given corpus.
"""

import os
import re

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from cacovid_jax import errors, files

CHAT_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
SPECIAL_TOKENS = (*CHAT_TOKENS, "<image>", "<video>")

# Qwen2's rule: contractions, words with one leading mark, single digits, runs
# of marks, line ends, spaces.
_PATTERN = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
  r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# A turn's start, and what comes behind its content.
TURN = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
"""
END = """\
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""
# Videos come before text, no system turn; a plain string is taken as it is.
_CONTENT = """\
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for item in message['content'] if item['type'] == 'image' -%}
{{- '<image>\\n' -}}
{%- endfor -%}
{%- for item in message['content'] if item['type'] == 'video' -%}
{{- '<video>\\n' -}}
{%- endfor -%}
{%- for item in message['content'] if item['type'] == 'text' -%}
{{- item['text'] -}}
{%- endfor -%}
{%- endif -%}
"""
CHAT_TEMPLATE = TURN + _CONTENT + END


def train(texts, vocab_size, directory, *, max_length=32_768, **sizes):
  """Trains a tokenizer; writes all but config and weights of LLaVA-OneVision's.

  Sizes are pixels of a frame's and a patch's side, which give the number of
  video tokens; `num_frames` of the clips that the model is made for is noted.
  Returns the tokenizer that `learn` makes.
  """
  tokenizer = learn(texts, vocab_size, SPECIAL_TOKENS)
  files.make_folder(directory)
  text = tokenizer.to_str(pretty=True)
  files.write(os.path.join(directory, "tokenizer.json"), text)
  entries = _tokenizer_files(tokenizer, max_length)
  entries |= _processor_files(**sizes)
  for name, entry in entries.items():
    files.write_json(os.path.join(directory, name), entry)
  files.write(os.path.join(directory, "chat_template.jinja"), CHAT_TEMPLATE)
  return tokenizer


def learn(texts, vocab_size, special_tokens) -> tokenizers.Tokenizer:
  """Returns a tokenizer of a corpus, in any order, of at most so many ids.

  Special tokens get the last of them, in their order; in the texts (of rendered
  prompts, say) they are left out of the merges.
  """
  needed = 256 + len(special_tokens)
  if vocab_size < needed:
    raise errors.UserError(
      f"vocab_size {vocab_size} is too small; give at least {needed}"
    )
  tokenizer = tokenizers.Tokenizer(models.BPE())
  tokenizer.normalizer = normalizers.NFC()
  tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Split(tokenizers.Regex(_PATTERN), "isolated"),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
  )
  tokenizer.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=vocab_size - len(special_tokens),
    initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    show_progress=False,
  )
  marks = re.compile("|".join(map(re.escape, special_tokens)))
  # Sorted, so that merges of equal count do not depend on the texts' order.
  tokenizer.train_from_iterator(
    sorted(marks.sub("\n", text) for text in texts), trainer
  )
  tokenizer.add_special_tokens(list(special_tokens))
  return tokenizer


def _tokenizer_files(tokenizer, max_length: int) -> dict[str, dict]:
  standard = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
  flags = ("lstrip", "normalized", "rstrip", "single_word")
  flags = {"special": True, **dict.fromkeys(flags, False)}
  added = {
    str(tokenizer.token_to_id(token)): {"content": token, **flags}
    for token in SPECIAL_TOKENS
  }
  config = {
    # This class reads tokenizer.json as it stands, in every release.
    "tokenizer_class": "PreTrainedTokenizerFast",
    "model_max_length": max_length,
    "clean_up_tokenization_spaces": False,
    "padding_side": "left",
    "added_tokens_decoder": added,
    "additional_special_tokens": ["<|im_start|>", "<image>", "<video>"],
    "chat_template": CHAT_TEMPLATE,
    **standard,
  }
  return {
    "tokenizer_config.json": config,
    "special_tokens_map.json": standard,
    "chat_template.json": {"chat_template": CHAT_TEMPLATE},
  }


def _processor_files(image_size=112, patch_size=8, num_frames=None):
  common = {"processor_class": "LlavaOnevisionProcessor"}
  pixels = {
    **common,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "resample": 3,
    "rescale_factor": 1 / 255,
    "size": {"height": image_size, "width": image_size},
  }
  image = {
    **pixels,
    "do_pad": True,
    "image_grid_pinpoints": [[image_size, image_size]],
    "image_processor_type": "LlavaOnevisionImageProcessor",
  }
  video = {**pixels, "video_processor_type": "LlavaOnevisionVideoProcessor"}
  if num_frames is not None:
    video["num_frames"] = num_frames
  processor = {
    **common,
    "image_token": "<image>",
    "video_token": "<video>",
    "num_image_tokens": (image_size // patch_size) ** 2,
    "vision_feature_select_strategy": "full",
  }
  return {
    "preprocessor_config.json": image,
    "video_preprocessor_config.json": video,
    "processor_config.json": processor,
  }
