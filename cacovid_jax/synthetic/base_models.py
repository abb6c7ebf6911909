"""The families that the small base model comes in: what differs in training.

LLaVA-OneVision sees each sampled frame of a scene once. Qwen3-VL sees twice as
many frames as a scene has sampled ones, at twice the pixels a side, so that a
temporal patch is one of these; its prompts tell the seconds, which depend on a
clip's length.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from cacovid_jax import errors
from cacovid_jax.data import frames as frames_lib
from cacovid_jax.models import (
  llava_onevision,
  processors,
  qwen2,
  qwen2_5_vl_layout,
  qwen3_vl,
  qwen3_vl_processor,
  siglip,
)
from cacovid_jax.synthetic import build, packed, packing, tiny_checkpoints
from cacovid_jax.synthetic import tokenizer as tokenizer_training

_TIMES = 200  # Copies of each text that tells a time, in a corpus.
# Of Qwen3-VL: frames of a temporal patch, and how much larger a side is.
_JOINED, _ZOOM = 2, 2


class Family(NamedTuple):
  """What a base model of a config takes, one of `FAMILIES`."""

  # (config, pack, directory) writes the tokenizer's and the processor's files.
  write_files: Callable[..., None]
  # (config, tokenizer) -> the `VideoLLM`.
  model: Callable[..., Any]
  # (model, stage) -> what `PackedPrompts.arrange` is.
  arrange: Callable[..., Any]
  # (stage) -> (times of frames, seconds) of each length of clips, as of
  # `PackingConfig.times` and `TowerInputs`.
  lengths: Callable[..., tuple[tuple[Any, Any], ...]]
  separator: str  # As of `PackingConfig`.


def of(config) -> Family:
  """Returns the family of a pretraining config, its sizes checked."""
  name = config.get("family", "llava_onevision")
  errors.check(
    name in FAMILIES, f"config.family={name}: use {' or '.join(FAMILIES)}"
  )
  return FAMILIES[name]


def model_of(config, tokenizer):
  """Returns the model that a config describes, with the tokenizer's ids."""
  return of(config).model(config, tokenizer)


def prompts_of(family: Family, model, tokenizer, pack) -> packed.PackedPrompts:
  """Returns what reads the batches of a `PackingConfig`."""
  stage = pack.stage
  seconds = [told for _, told in family.lengths(stage)] or [None]
  heads = packed.heads_of(model, tokenizer, stage.grid, seconds)
  return packed.PackedPrompts(model, heads, family.arrange(model, stage))


def _computed(config):
  """Returns the options of every `VideoLLM`."""
  return jnp.dtype(config.dtype), config.attention, config.remat


def _llava_onevision(config, tokenizer):
  shape = llava_onevision.LlavaOnevisionConfig(
    vision=siglip.SiglipConfig(**config.vision),
    text=qwen2.Qwen2Config(
      vocab_size=config.vocab_size, tie_embeddings=True, **config.text
    ),
    image_token_id=tokenizer.token_id("<image>"),
    video_token_id=tokenizer.token_id("<video>"),
  )
  return llava_onevision.LlavaOnevisionModel(shape, *_computed(config))


def _write_llava_onevision(config, pack, directory):
  errors.check(
    config.vision.image_size == pack.stage.image_size,
    f"config.vision.image_size {config.vision.image_size}: clips of"
    f" {', '.join(pack.variants)} are of {pack.stage.image_size} pixels",
  )
  tokenizer_training.train(
    packing.corpus(variants=pack.variants),
    config.vocab_size,
    directory,
    image_size=config.vision.image_size,
    patch_size=config.vision.patch_size,
    max_length=config.text.max_positions,
    num_frames=pack.stage.num_frames,
  )


def _qwen3_vl(config, tokenizer):
  shape, width = qwen3_vl.Qwen3VLConfig.tiny(), config.text.hidden_size
  sizes = {"vision": dict(config.vision), "text": dict(config.text)}
  sizes["vision"]["out_hidden_size"] = width
  sizes["text"]["vocab_size"] = config.vocab_size
  parts = {
    name: dataclasses.replace(getattr(shape, name), **found)
    for name, found in sizes.items()
  }
  marks = tiny_checkpoints.QWEN_MARKS.items()
  ids = {name: tokenizer.token_id(mark) for name, mark in marks}
  shape = dataclasses.replace(shape, **parts, **ids)
  return qwen3_vl.Qwen3VLModel(shape, *_computed(config))


def _write_qwen3_vl(config, pack, directory):
  stage = pack.stage
  # Clips have one size, whatever is said of the pixels of others.
  pixels = _JOINED * stage.num_frames * (_ZOOM * stage.image_size) ** 2
  processor = qwen3_vl_processor.Qwen3VLProcessor(
    patch_size=config.vision.patch_size, min_pixels=pixels, max_pixels=pixels
  )
  texts = packing.corpus(variants=pack.variants)
  for _, seconds in _lengths_of_qwen3_vl(stage):
    texts += [f"<{told:.1f} seconds>" for told in seconds] * _TIMES
  tiny_checkpoints.write_qwen3_vl(
    directory, processor, texts, config.vocab_size
  )


def _lengths_of_qwen3_vl(stage):
  """Returns those of evaluations, of which every clip is `build.DURATIONS`."""
  found = []
  for length in build.DURATIONS.values():
    index = frames_lib.eval_linspace(length, _JOINED * stage.num_frames)
    seconds = (index / build.FRAMES_PER_SECOND).reshape(-1, _JOINED).mean(1)
    times = index * (stage.num_frames - 1) / (length - 1)
    found.append((tuple(times.tolist()), tuple(seconds.tolist())))
  return tuple(found)


def _as_patches(model, stage):
  vision, side = model.config.vision, _ZOOM * stage.image_size

  def arrange(frames):
    shape = (len(frames), side, side, 3)
    frames = jax.image.resize(frames, shape, "cubic", antialias=False)
    patches = qwen2_5_vl_layout.patchify(
      frames, patch=vision.patch_size, merge=vision.merge_size,
      temporal_patch=vision.temporal_patch_size,
    )  # fmt: skip
    return processors.TowerInputs(patches, stage.grid)

  return arrange


FAMILIES = {
  "llava_onevision": Family(
    _write_llava_onevision,
    _llava_onevision,
    lambda model, stage: lambda x: processors.TowerInputs(x, stage.grid),
    lambda stage: (),
    separator="\n",
  ),
  "qwen3_vl": Family(
    _write_qwen3_vl, _qwen3_vl, _as_patches, _lengths_of_qwen3_vl, separator=""
  ),
}
