"""Tiny checkpoints of random weights, complete with tokenizer and processor.

For the `:debug` forms of configs whose real weights do not travel with the
code: the same files, formats and code paths, in seconds on a CPU. Answers of
such a model mean nothing.
"""

import dataclasses
import json
import os

import jax

from cacovid_jax import errors
from cacovid_jax.data import tokenizer as tokenizer_lib
from cacovid_jax.models import (
  checkpoints,
  llava_onevision,
  processors,
  qwen2_5_vl,
  siglip,
)
from cacovid_jax.synthetic import tokenizer as tokenizer_training

FAMILIES = ("llava_onevision", "qwen2_5_vl")

_VOCABULARY = 320
_TEXTS = (
  "What colour is the square? A. red B. green C. blue D. yellow",
  "Please provide only the single option letter (e.g., A, B, C, D, etc.).",
)
_QWEN_TOKENS = (
  "<|endoftext|>",
  "<|im_start|>",
  "<|im_end|>",
  "<|vision_start|>",
  "<|vision_end|>",
  "<|image_pad|>",
  "<|video_pad|>",
)
# Items in the order given, a clip between its two marks; a plain string is
# taken as it is.
_QWEN_TEMPLATE = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for item in message['content'] -%}
{%- if item['type'] == 'video' -%}
{{- '<|vision_start|><|video_pad|><|vision_end|>' -}}
{%- else -%}
{{- item['text'] -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""
# Of the tokenizer, as Qwen2's: plain strings only, and a default system turn.
_TOKENIZER_TEMPLATE = """\
{%- if messages[0]['role'] != 'system' -%}
{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] -}}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""


def write(directory, family: str, seed: int = 0) -> None:
  """Writes a checkpoint directory, float32.

  Args:
    directory: made if it does not exist; one that holds files is refused.
    family: one of `FAMILIES`.
    seed: of the weights.
  """
  if family not in FAMILIES:
    raise errors.UserError(
      f"no tiny checkpoint of {family!r}; there are {', '.join(FAMILIES)}"
    )
  directory = os.fspath(directory)
  os.makedirs(directory, exist_ok=True)
  if os.listdir(directory):
    # They might be weights that took hours to download.
    raise errors.UserError(f"{directory} is not empty; name another folder")
  # Tells the tokenizer how prompts hold a clip.
  _write_json(directory, "config.json", {"model_type": family})
  if family == "qwen2_5_vl":
    model = _qwen2_5_vl(directory)
  else:
    model = _llava_onevision(directory)
  tokenizer = tokenizer_lib.Tokenizer.from_directory(directory)
  checkpoints.save(
    directory,
    model.config,
    jax.jit(model.init)(jax.random.key(seed)),
    eos_ids=tokenizer.eos_ids,
    pad_id=tokenizer.pad_id,
  )


def _llava_onevision(directory):
  """Writes all but config and weights; returns the model."""
  base = llava_onevision.LlavaOnevisionConfig.tiny()
  vision = dataclasses.replace(siglip.SiglipConfig.tiny(), image_size=28)
  tokenizer = tokenizer_training.train(
    _TEXTS,
    _VOCABULARY,
    directory,
    image_size=vision.image_size,
    patch_size=vision.patch_size,
  )
  name = "tokenizer_config.json"
  described = checkpoints.read_json(os.path.join(directory, name))
  described["chat_template"] = _TOKENIZER_TEMPLATE
  _write_json(directory, name, described)
  config = dataclasses.replace(
    base,
    vision=vision,
    text=_text(base.text, tokenizer),
    image_token_id=tokenizer.token_to_id("<image>"),
    video_token_id=tokenizer.token_to_id("<video>"),
  )
  return llava_onevision.LlavaOnevisionModel(config)


def _qwen2_5_vl(directory):
  """Writes all but config and weights; returns the model."""
  base = qwen2_5_vl.Qwen2_5VLConfig.tiny()
  tokenizer = tokenizer_training.learn(_TEXTS, _VOCABULARY, _QWEN_TOKENS)
  tokenizer.save(os.path.join(directory, "tokenizer.json"))
  vision = base.vision
  processor = processors.Qwen2_5VLProcessor.tiny()
  files = {
    "tokenizer_config.json": {
      "tokenizer_class": "PreTrainedTokenizerFast",
      "eos_token": "<|im_end|>",
      "pad_token": "<|endoftext|>",
      # One text for both, as in the released files.
      "chat_template": _QWEN_TEMPLATE,
    },
    "chat_template.json": {"chat_template": _QWEN_TEMPLATE},
    "preprocessor_config.json": {
      "patch_size": vision.patch_size,
      "temporal_patch_size": vision.temporal_patch_size,
      "merge_size": vision.merge_size,
      "min_pixels": processor.min_pixels,
      "max_pixels": processor.max_pixels,
      "image_mean": list(processor.mean),
      "image_std": list(processor.std),
    },
  }
  for name, entry in files.items():
    _write_json(directory, name, entry)
  config = dataclasses.replace(
    base,
    text=_text(base.text, tokenizer),
    image_token_id=tokenizer.token_to_id("<|image_pad|>"),
    video_token_id=tokenizer.token_to_id("<|video_pad|>"),
    vision_start_token_id=tokenizer.token_to_id("<|vision_start|>"),
    vision_end_token_id=tokenizer.token_to_id("<|vision_end|>"),
  )
  return qwen2_5_vl.Qwen2_5VLModel(config)


def _text(base, tokenizer):
  """Returns a decoder with the tokenizer's ids and room for long prompts."""
  size = tokenizer.get_vocab_size(with_added_tokens=True)
  return dataclasses.replace(base, vocab_size=size, max_positions=8192)


def _write_json(directory, name, entry) -> None:
  with open(os.path.join(directory, name), "w", encoding="utf-8") as f:
    f.write(json.dumps(entry, indent=2, sort_keys=True) + "\n")
