"""Checkpoints of random weights: tiny ones, or of released sizes.

`write_tiny` is for the `:debug` forms of configs whose real weights do not
travel with the code. `write_complete` writes a directory of a released model's
sizes that every command takes, `write_random` its weights alone.
"""

import dataclasses
import functools
import math
import os

import jax
import ml_dtypes
import numpy as np

from cacovid_jax import errors, files
from cacovid_jax.data import tokenizer as tokenizer_lib
from cacovid_jax.models import (
  checkpoints,
  llava_onevision,
  processors,
  qwen2_5_vl,
  qwen3_vl,
  qwen3_vl_processor,
  safetensors_io,
  siglip,
)
from cacovid_jax.synthetic import tokenizer as tokenizer_training

FAMILIES = ("llava_onevision", "qwen2_5_vl", "qwen3_vl")

_VOCABULARY = 320
_TEXTS = (
  "What colour is the square? A. red B. green C. blue D. yellow",
  "Please provide only the single option letter (e.g., A, B, C, D, etc.).",
)
_QWEN_TOKENS = (
  *tokenizer_training.CHAT_TOKENS,
  "<|vision_start|>",
  "<|vision_end|>",
  "<|image_pad|>",
  "<|video_pad|>",
)
# Items in the order given, a clip between its two marks; a plain string is
# taken as it is.
_QWEN_CONTENT = """\
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
"""
_QWEN_TEMPLATE = (
  tokenizer_training.TURN + _QWEN_CONTENT + tokenizer_training.END
)
# Of the tokenizer, as Qwen2's: plain strings only, and a default system turn.
_TOKENIZER_TEMPLATE = (
  """\
{%- if messages[0]['role'] != 'system' -%}
{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] -}}
"""
  + tokenizer_training.END
)

_SHARD_BYTES = 4 * 10**9
# Last linear maps of the branches of decoders and towers.
_INTO_RESIDUAL = (
  "o_proj",
  "down_proj",
  "out_proj",
  "fc2",
  "proj",
  "linear_fc2",
)
# Of the released models; in a smaller vocabulary, its last ids.
_EOS_ID, _PAD_ID = 151645, 151643


def write_tiny(directory, family: str) -> None:
  """Writes a float32 checkpoint of a family; a folder with files is refused."""
  errors.check_known("tiny checkpoint of", family, FAMILIES)
  base, processor = _tiny(family)
  text = dataclasses.replace(
    base.text, vocab_size=_VOCABULARY, max_positions=8192
  )
  base = dataclasses.replace(base, text=text)
  config, ending = _write_files(directory, base, processor)
  model = checkpoints.make_model(config)
  params = jax.jit(model.init)(jax.random.key(0))
  checkpoints.save(directory, config, params, **ending)


def _tiny(family):
  """Returns (config, processor), None of one whose files do not tell it."""
  if family == "qwen2_5_vl":
    processor = processors.Qwen2_5VLProcessor.tiny()
    return qwen2_5_vl.Qwen2_5VLConfig.tiny(), processor
  if family == "qwen3_vl":
    processor = qwen3_vl_processor.Qwen3VLProcessor.tiny()
    return qwen3_vl.Qwen3VLConfig.tiny(), processor
  vision = dataclasses.replace(siglip.SiglipConfig.tiny(), image_size=28)
  base = llava_onevision.LlavaOnevisionConfig.tiny()
  return dataclasses.replace(base, vision=vision), None


def write_complete(directory, config, seed=0) -> None:
  """Writes `write_random` with a tokenizer and a processor's files.

  A folder with files is refused. The tokenizer is that of `write_tiny`: it
  knows bytes and a few merges, so that texts are several times as long as in
  the released one. Ids of special tokens are its own, every size is kept.
  """
  family = config.to_hf()["model_type"]
  config, ending = _write_files(directory, config, _RELEASED.get(family))
  write_random(directory, config, seed, ending)


def _write_files(directory, config, processor):
  """Writes all but config and weights into an empty folder.

  Returns (the config with the tokenizer's ids, how answers end).
  """
  directory = os.fspath(directory)
  files.make_folder(directory)
  if os.listdir(directory):
    # They might be weights that took hours to download.
    raise errors.UserError(f"{directory} is not empty; name another folder")
  family = config.to_hf()["model_type"]
  _name_family(directory, family)
  if processor is None:
    config = _llava_onevision(directory, config)
  else:
    config = _qwen(directory, config, _DESCRIBED[family](processor))
  tokenizer = tokenizer_lib.Tokenizer.from_directory(directory)
  return config, {"eos_ids": tokenizer.eos_ids, "pad_id": tokenizer.pad_id}


def _name_family(directory, family):
  """Tells the tokenizer how prompts hold a clip, where no config.json does."""
  path = os.path.join(directory, "config.json")
  if not os.path.exists(path):
    files.write_json(path, {"model_type": family})


def _llava_onevision(directory, config):
  """Writes a family's files; returns the config with the tokenizer's ids."""
  vision = config.vision
  sizes = {"image_size": vision.image_size, "patch_size": vision.patch_size}
  tokenizer = tokenizer_training.train(_TEXTS, _VOCABULARY, directory, **sizes)
  path = os.path.join(directory, "tokenizer_config.json")
  described = checkpoints.read_json(path)
  described["chat_template"] = _TOKENIZER_TEMPLATE
  files.write_json(path, described)
  marks = {"image_token_id": "<image>", "video_token_id": "<video>"}
  return _with_ids(config, tokenizer, **marks)


def _patches(processor):
  """Returns what the file of a processor of patches says in any case."""
  return {
    "patch_size": processor.patch_size,
    "temporal_patch_size": processor.temporal_patch_size,
    "merge_size": processor.merge_size,
    "image_mean": list(processor.mean),
    "image_std": list(processor.std),
  }


def _qwen2_5_vl(processor):
  """Returns {name: content} of a processor's file."""
  entry = _patches(processor) | {
    "min_pixels": processor.min_pixels,
    "max_pixels": processor.max_pixels,
  }
  return {"preprocessor_config.json": entry}


def _qwen3_vl(processor):
  """Returns {name: content} of a processor's file."""
  entry = _patches(processor) | {
    "size": {
      "shortest_edge": processor.min_pixels,
      "longest_edge": processor.max_pixels,
    },
    "cap_pixels_per_frame": processor.cap_pixels_per_frame,
    "max_video_tokens": processor.max_video_tokens,
  }
  return {"video_preprocessor_config.json": entry}


_DESCRIBED = {"qwen2_5_vl": _qwen2_5_vl, "qwen3_vl": _qwen3_vl}
# With the limits of the released models' own files.
_RELEASED = {
  "qwen2_5_vl": processors.Qwen2_5VLProcessor(
    min_pixels=4 * 28 * 28, max_pixels=16384 * 28 * 28
  ),
  "qwen3_vl": qwen3_vl_processor.Qwen3VLProcessor(
    min_pixels=4096, max_pixels=25_165_824
  ),
}


# Of the config, and their tokens.
QWEN_MARKS = {
  "image_token_id": "<|image_pad|>",
  "video_token_id": "<|video_pad|>",
  "vision_start_token_id": "<|vision_start|>",
  "vision_end_token_id": "<|vision_end|>",
}


def write_qwen3_vl(directory, processor, texts, vocabulary: int) -> None:
  """Writes a tokenizer of texts and the files of a `Qwen3VLProcessor`."""
  files.make_folder(directory)
  _name_family(directory, "qwen3_vl")
  _write_qwen(directory, _qwen3_vl(processor), texts, vocabulary)


def _qwen(directory, config, described):
  """Writes all files; returns the config with the tokenizer's ids."""
  tokenizer = _write_qwen(directory, described, _TEXTS, _VOCABULARY)
  return _with_ids(config, tokenizer, **QWEN_MARKS)


def _write_qwen(directory, described, texts, vocabulary):
  """Writes a tokenizer, its template and {name: JSON}; returns the first."""
  tokenizer = tokenizer_training.learn(texts, vocabulary, _QWEN_TOKENS)
  path = os.path.join(directory, "tokenizer.json")
  files.write(path, tokenizer.to_str(pretty=True))
  described = described | {
    "tokenizer_config.json": {
      "tokenizer_class": "PreTrainedTokenizerFast",
      "eos_token": "<|im_end|>",
      "pad_token": "<|endoftext|>",
      # One text for both, as in the released files.
      "chat_template": _QWEN_TEMPLATE,
    },
    "chat_template.json": {"chat_template": _QWEN_TEMPLATE},
  }
  for name, entry in described.items():
    files.write_json(os.path.join(directory, name), entry)
  return tokenizer


def _with_ids(config, tokenizer, **tokens: str):
  """Returns a config with a tokenizer's ids; a small vocabulary is its own."""
  text, size = config.text, tokenizer.get_vocab_size(with_added_tokens=True)
  if text.vocab_size == _VOCABULARY:
    text = dataclasses.replace(text, vocab_size=size)
  ids = {name: tokenizer.token_to_id(token) for name, token in tokens.items()}
  return dataclasses.replace(config, text=text, **ids)


def write_random(directory, config, seed=0, ending=None):
  """Writes a bfloat16 checkpoint of random weights, one tensor at a time.

  Values have any sign and sizes between 2^-7 and 2^-5, so that no layer fades
  or grows out of range at a width of some thousands. As in a trained model,
  what a residual stream holds is not lost among what its layers add: text
  embeddings and scales of norms lie between 1/2 and 1, video features come out
  as large, and projections back into a stream are 16 times smaller (with equal
  sizes, bfloat16 moves logits by as much as the best two of 152 000 are apart).
  Earlier weights in the folder are replaced. `ending` is how answers end, as
  in `checkpoints.write_config`; None is the released models' ids.
  """
  rng = np.random.default_rng(seed)
  dtype = np.dtype(ml_dtypes.bfloat16)

  def make(shape, kept, exponent):
    bits = np.frombuffer(rng.bytes(2 * math.prod(shape)), np.uint16)
    return ((bits & kept) | exponent).view(dtype).reshape(shape)

  tensors = {
    name: (dtype, shape, functools.partial(make, shape, *_bits(name)))
    for name, shape in checkpoints.source_shapes(config).items()
  }
  for name, array in checkpoints.unused_tensors(config).items():
    make_given = functools.partial(np.asarray, array, dtype)
    tensors[name] = (dtype, array.shape, make_given)
  last = config.text.vocab_size - 1
  eos_id, pad_id = min(_EOS_ID, last), min(_PAD_ID, last - 1)
  ending = ending or {"eos_ids": [eos_id, pad_id], "pad_id": pad_id}
  files.make_folder(directory)
  checkpoints.write_config(directory, config, **ending, dtype=dtype)
  safetensors_io.write_directory(directory, tensors, _SHARD_BYTES)


def _bits(name):
  """Returns (bits that are left as drawn, bits that are set) of a bfloat16.

  All or all but one bit of the exponent are set: no infinities.
  """
  module = name.rpartition(".weight")[0]
  last = module.rpartition(".")[2]
  if "norm" in last or last == "ln_q":
    return 0x007F, 0x3F00  # [1/2, 1).
  if last == "embed_tokens":
    return 0x807F, 0x3F00  # +-[1/2, 1).
  merged = "merger" in module and last in ("2", "linear_fc2")
  if last == "linear_2" or merged:
    return 0x807F, 0x3E80  # +-[2^-2, 2^-1).
  if last in _INTO_RESIDUAL and not module.endswith("patch_embed.proj"):
    return 0x807F, 0x3A00  # +-[2^-11, 2^-10).
  return 0x80FF, 0x3C00  # +-[2^-7, 2^-5).
