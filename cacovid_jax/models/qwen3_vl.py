"""Qwen3-VL (dense) for video: prompt, positions, decoder, and its tower.

Time is text: each temporal patch stands behind its seconds, in a place of its
own. Axes: T temporal patches, H W token grid of one, N = T·H·W video tokens, L
prompt tokens, D width. Positions have three rows: time, row and column.
Paper: https://arxiv.org/abs/2511.21631.
"""

import dataclasses
import math

import numpy as np

from cacovid_jax import errors
from cacovid_jax.models import (
  hf_config,
  placement,
  qwen2,
  qwen2_5_vl,
  qwen3_vl_processor,
  qwen3_vl_vision,
)

HEAD = "lm_head.weight"  # Source name of the output table.
POST_NORM = ""  # Every norm of the checkpoint is read.
# Hidden, inner, layers, heads: of the released decoders, by billions of
# parameters; all have 8 kv heads of 128 values.
SIZES = {
  "2b": (2048, 6144, 28, 16),
  "4b": (2560, 9728, 36, 32),
  "8b": (4096, 12288, 36, 32),
  "32b": (5120, 25600, 64, 64),
}
_SMALL = ("2b", "4b")  # A smaller tower, and one table of embeddings.
_VOCABULARY, _THETA = 151936, 5e6
_SECTIONS = (24, 20, 20)
# Of a prompt whose clip is not known yet: as long as times usually get.
_LATE_SECONDS = 9999.9


@dataclasses.dataclass(frozen=True, kw_only=True)
class Qwen3VLConfig(qwen2_5_vl.QwenVLConfig):
  """Vision tower, decoder and token ids."""

  vision: qwen3_vl_vision.VisionConfig

  @classmethod
  def released(cls, size):
    """The config of a released size: "2b", "4b", "8b" or "32b"."""
    width, inner, depth, heads = SIZES[size]
    small = size in _SMALL
    make = qwen3_vl_vision.VisionConfig
    text = qwen2.Qwen2Config(
      vocab_size=_VOCABULARY, hidden_size=width, intermediate_size=inner,
      num_layers=depth, num_heads=heads, num_kv_heads=8, head_dim=128,
      max_positions=262144, rope_theta=_THETA, rope_sections=_SECTIONS,
      tie_embeddings=small,
    )  # fmt: skip
    return cls._of((make.small if small else make.large)(width), _qwen3(text))

  @classmethod
  def tiny(cls):
    """CPU-sized, for tests; heads are wider together than the model."""
    changes = dict(head_dim=16, rope_sections=(4, 2, 2), tie_embeddings=True)
    text = dataclasses.replace(qwen2.Qwen2Config.tiny(), **changes)
    vision = qwen3_vl_vision.VisionConfig.tiny()
    return cls._of(vision, _qwen3(text), (60, 61, 58, 59))

  @classmethod
  def from_hf(cls, config):
    """Reads a config.json of 4.57 or 5.x."""
    hf_config.require(config, model_type="qwen3_vl")
    text = hf_config.section(config, "text_config")
    hf_config.require(text, "text_config.", attention_bias=False)
    tied = hf_config.switch(config, "tie_word_embeddings")
    text = qwen2.Qwen2Config.from_hf(
      text, tied, model_type="qwen3_vl_text",
      num_sections=qwen2_5_vl.POSITION_ROWS,
    )  # fmt: skip
    vision = hf_config.section(config, "vision_config")
    found = cls(
      vision=qwen3_vl_vision.VisionConfig.from_hf(vision),
      text=_qwen3(text),
      **hf_config.numbers(cls, config),
    )
    return found._checked("text_config.")

  def to_hf(self):
    """Returns the config.json in the hub's form, which 5.x reads, too."""
    rotary = {
      "rope_type": "default",
      "mrope_section": list(self.text.rope_sections),
      "mrope_interleaved": True,
    }
    text = self.text.to_hf() | {
      "model_type": "qwen3_vl_text",
      "attention_bias": False,
      "rope_scaling": rotary,
    }
    return {
      "architectures": ["Qwen3VLForConditionalGeneration"],
      "model_type": "qwen3_vl",
      "text_config": text,
      "vision_config": self.vision.to_hf(),
      "tie_word_embeddings": self.text.tie_embeddings,
      **hf_config.described(self),
    }


def _qwen3(text):
  """Returns a decoder's config with what is Qwen3's whatever its size."""
  changes = dict(attention_bias=False, qk_norm=True, rope_interleaved=True)
  return dataclasses.replace(text, **changes)


def position_ids(ids, grid, *, video_token_id):
  """Returns (positions int32[3, L], next position) of ONE prompt, on the host.

  Of ids int[L] without padding and the (T, H, W) of their video, None without
  one. Text counts on in all rows alike. A token of a temporal patch that begins
  at a position has (0, its row, its column) added to it; behind the patch, text
  goes on at its longer side.
  """
  ids = np.asarray(ids)
  is_video = ids == video_token_id
  slices, height, width = (0, 1, 1) if grid is None else map(int, grid)
  seen = np.cumsum(is_video) - is_video
  patch, place = np.divmod(seen, height * width)
  whole = is_video | (place == 0)
  if is_video.sum() != slices * height * width or not whole.all():
    raise errors.UserError(
      f"the prompt holds {is_video.sum()} video tokens, the video {slices}"
      f" temporal patches of {height * width}; expand one placeholder a"
      " temporal patch to its grid, without text inside"
    )
  start = np.cumsum(~is_video) - ~is_video + patch * max(height, width)
  row, column = np.divmod(place, width)
  rows = [0 * row, row * is_video, column * is_video]
  positions = (start + np.stack(rows)).astype(np.int32)
  return positions, int(positions.max(initial=-1)) + 1


def _written(grid, times) -> list[str]:
  """Returns the text of each temporal patch's time, in seconds."""
  times = (_LATE_SECONDS,) * grid[0] if times is None else times
  if len(times) != grid[0]:
    raise ValueError(f"{len(times)} times of {grid[0]} temporal patches")
  return [f"<{time:.1f} seconds>" for time in times]


@dataclasses.dataclass(frozen=True)
class Qwen3VLModel(qwen2_5_vl.QwenVLModel):
  """Qwen3-VL as a `VideoLLM`."""

  config: Qwen3VLConfig

  # Whether the marks around the placeholder of a clip stay around all of its
  # temporal patches, as of transformers 5.10, or go, as in 4.57.
  outer_vision_tags: bool = False

  tower = qwen3_vl_vision.Tower
  processor_class = qwen3_vl_processor.Qwen3VLProcessor

  @property
  def told(self):
    kept = self.outer_vision_tags
    release = "transformers 5.10 and later" if kept else "transformers 4.57"
    return {"outer_vision_tags": kept, "prompt_rule": release}

  def with_outer_vision_tags(self, stay):
    return dataclasses.replace(self, outer_vision_tags=stay)

  @property
  def num_deep(self):
    return len(self.config.vision.deep_layers)

  def tower_inputs(self, inputs, bucket=None):
    # Times are for the prompt: they would be arguments of the program.
    inputs = inputs._replace(second_per_grid_t=1.0)
    return super().tower_inputs(inputs, bucket)

  def positions(self, ids, video):
    """Returns (int32[3, L], next position) of ONE prompt."""
    grid = None if video is None else video.grid
    token = self.config.video_token_id
    return position_ids(ids, grid, video_token_id=token)

  def encode_prompt(self, tokenizer, text, grid, second_per_grid_t=None):
    """See `VideoLLM.encode_prompt`."""
    times = _written(grid, second_per_grid_t)
    start, end = tokenizer.style.around
    clip = f"{start}{tokenizer.video_token}{end}"
    clip = "".join(f"{time}{clip}" for time in times)
    if self.outer_vision_tags:
      clip = f"{start}{clip}{end}"
    prompt = tokenizer.encode_prompt(text, math.prod(grid), clip)
    errors.check(
      self.config.image_token_id not in prompt.ids,
      f"the question {text[:40]!r} holds an image's placeholder; one video and"
      " text are implemented: remove it",
    )
    return prompt

  def frame_rows(self, tokenizer, prompt, grid, second_per_grid_t=None):
    """See `VideoLLM.frame_rows`; the text are the time and the two marks."""
    time = tokenizer.encode(_written(grid, second_per_grid_t)[0])
    mark = prompt.video_rows[0] - 1
    start = mark - len(time)
    errors.check(
      prompt.ids[start:mark].tolist() == time,
      f"{tokenizer.name}: the tokenizer joins the first time of a clip to the"
      " text before it, and neither can go alone; leave out"
      " evals.empty_frames=drop",
    )
    ends = prompt.video_rows.reshape(grid[0], -1)[:, -1] + 2
    row = np.arange(prompt.length)
    frames = np.searchsorted(ends, row, side="right")
    inside = (start <= row) & (row < ends[-1])
    return np.where(inside, frames, -1).astype(np.int32)


CONFIG, MODEL = Qwen3VLConfig, Qwen3VLModel


def weight_table(config):
  """Returns the `placement.rows` of the weights, by the hub's names."""
  hub, vision = "model.visual", config.vision
  start = {"patch_embed.proj": "conv3d_dense patch_embed", "pos_embed": "table"}
  block = dict(norm1="norm", norm2="norm")
  block |= dict.fromkeys(["attn.qkv", "attn.proj"], "dense")
  block |= {f"mlp.linear_fc{i}": f"dense fc{i}" for i in (1, 2)}
  merger = dict(norm="norm")
  merger |= {f"linear_fc{i}": f"dense linear_{i}" for i in (1, 2)}
  mergers = {"merger": "merger"} | {
    f"deepstack_merger_list.{i}": f"deep_{i}"
    for i in range(len(vision.deep_layers))
  }
  stack = f"{hub}.blocks.{{}}", "visual/blocks", vision.num_layers
  rows = placement.rows(hub, "visual", **start)
  rows |= placement.rows(*stack, **block)
  for theirs, ours in mergers.items():
    rows |= placement.rows(f"{hub}.{theirs}", f"visual/{ours}", **merger)
  return rows | qwen2.decoder_rows(config.text, "model.language_model", HEAD)


def hub_name(name):
  """Returns the hub's name of a tensor, which all releases write."""
  return name
