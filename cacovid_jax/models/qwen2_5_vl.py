"""Qwen2.5-VL for video: tower, prompt, positions in time and space, decoder.

Axes: T time slices, H W token grid of a slice, N = T·H·W video tokens, P rows
of patches before merging, L prompt tokens, D width, V vocabulary. Positions
have three rows: time, row and column.
Paper: https://arxiv.org/abs/2502.13923 (section 2.1.2 on positions).
"""

import dataclasses
import math
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np

from cacovid_jax import errors
from cacovid_jax.models import (
  hf_config,
  placement,
  processors,
  qwen2,
  qwen2_5_vl_layout,
  qwen2_5_vl_vision,
  video_llm,
)

POSITION_RULES = ("4.50", "v5")
HEAD = "lm_head.weight"  # Source name of the output table.
POST_NORM = ""  # Every norm of the checkpoint is read.
POSITION_ROWS = 3
# Of an image and a video token, and of the marks before and behind them.
RELEASED_IDS = (151655, 151656, 151652, 151653)


@dataclasses.dataclass(frozen=True, kw_only=True)
class QwenVLConfig:
  """Vision tower, decoder and token ids, of Qwen2.5-VL or Qwen3-VL."""

  vision: qwen2_5_vl_vision.PatchConfig
  text: qwen2.Qwen2Config
  image_token_id: int = hf_config.key()
  video_token_id: int = hf_config.key()
  vision_start_token_id: int = hf_config.key()
  vision_end_token_id: int = hf_config.key()

  @classmethod
  def _of(cls, vision, text, ids=RELEASED_IDS, **others):
    """Returns the config of a tower, a decoder, and ids in the fields' order.

    Those of the released checkpoints by default.
    """
    names = ("image", "video", "vision_start", "vision_end")
    ids = {f"{x}_token_id": id for x, id in zip(names, ids, strict=True)}
    return cls(vision=vision, text=text, **ids, **others)

  def _checked(self, where):
    """Returns itself; refuses features of another width than the decoder's."""
    out, width = self.vision.out_hidden_size, self.text.hidden_size
    hf_config.check(
      out == width,
      f"vision_config.out_hidden_size {out} is not {where}hidden_size {width}",
    )
    return self


@dataclasses.dataclass(frozen=True, kw_only=True)
class Qwen2_5VLConfig(QwenVLConfig):  # noqa: N801 (the model's own name)
  """A `QwenVLConfig`, and how fast time positions run."""

  tokens_per_second: int = 2

  @classmethod
  def qwen2_5_vl_3b(cls):
    return cls._released(qwen2.Qwen2Config.qwen2_5_3b())

  @classmethod
  def qwen2_5_vl_7b(cls):
    return cls._released(qwen2.Qwen2Config.qwen2_7b(vocab_size=152064))

  @classmethod
  def _released(cls, text):
    changes = dict(rope_sections=(16, 24, 24), max_positions=128000)
    vision = qwen2_5_vl_vision.VisionConfig.qwen2_5_vl(text.hidden_size)
    return cls._of(vision, dataclasses.replace(text, **changes))

  @classmethod
  def tiny(cls):
    """CPU-sized, for tests."""
    changes = dict(rope_sections=(1, 2, 1), tie_embeddings=True)
    text = dataclasses.replace(qwen2.Qwen2Config.tiny(), **changes)
    vision = qwen2_5_vl_vision.VisionConfig.tiny()
    return cls._of(vision, text, (60, 61, 58, 59))

  @classmethod
  def from_hf(cls, config):
    """Reads a config.json: flat, as on the hub, or with a text section."""
    hf_config.require(config, model_type="qwen2_5_vl")
    vision = hf_config.section(config, "vision_config")
    text, kind = config, dict(model_type="qwen2_5_vl", where="")
    if config.get("text_config") is not None:
      text = hf_config.section(config, "text_config")
      kind = dict(model_type="qwen2_5_vl_text", where="text_config.")
    tied = hf_config.switch(config, "tie_word_embeddings")
    found = cls(
      vision=qwen2_5_vl_vision.VisionConfig.from_hf(vision),
      text=qwen2.Qwen2Config.from_hf(
        text, tied, num_sections=POSITION_ROWS, **kind
      ),
      **hf_config.numbers(cls, config),
      tokens_per_second=hf_config.number(
        vision, "tokens_per_second", where="vision_config."
      ),
    )
    return found._checked(kind["where"])

  def to_hf(self):
    """Returns the config.json in the hub's flat form, which 5.x reads, too."""
    vision = self.vision.to_hf()
    return self.text.to_hf() | {
      "architectures": ["Qwen2_5_VLForConditionalGeneration"],
      "model_type": "qwen2_5_vl",
      "vision_config": vision | {"tokens_per_second": self.tokens_per_second},
      **hf_config.described(self),
    }


def position_ids(ids, video, *, config, rule="4.50"):
  """Returns (positions int32[3, L], next position) of ONE prompt, on the host.

  Of ids int[L] without padding and what has the `grid` (T, H, W) and the
  `second_per_grid_t` of their video, None without one. Text counts on in all
  rows alike. A video token that lies `k` temporal patches, `row` and `column`
  into its grid adds (floor(k · seconds · tokens_per_second), row, column) to
  the position where the video starts. Behind the video, text goes on behind its
  largest position by rule "4.50" (of transformers 4.50, which the released
  models were trained and evaluated with), behind the longer side of the grid,
  whatever the time, by rule "v5" (5.x).
  """
  if rule not in POSITION_RULES:
    raise ValueError(f"position rule {rule!r} is not one of {POSITION_RULES}")
  ids = np.asarray(ids)
  where = np.flatnonzero(ids == config.video_token_id)
  expected = 0 if video is None else math.prod(map(int, video.grid))
  together = len(where) == 0 or where[-1] - where[0] + 1 == len(where)
  if len(where) != expected or not together:
    raise errors.UserError(
      f"the prompt holds {len(where)} video tokens"
      f"{'' if together else ' in several places'}, the video {expected};"
      " expand one placeholder to the video's grid"
    )
  positions = np.broadcast_to(np.arange(len(ids)), (POSITION_ROWS, len(ids)))
  positions = positions.astype(np.int32)
  if len(where):
    seconds = np.float32(video.second_per_grid_t)
    if not (np.isfinite(seconds) and seconds > 0):
      raise errors.UserError(
        f"second_per_grid_t is {video.second_per_grid_t!r}; give a positive"
        " number of seconds"
      )
    own = np.indices(video.grid).reshape(POSITION_ROWS, -1)
    # float32 as in the reference, whose floor falls elsewhere in float64.
    step = seconds * np.float32(config.tokens_per_second)
    own[0] = np.floor(own[0].astype(np.float32) * step)
    taken = max(video.grid[1:]) if rule == "v5" else own.max() + 1
    start, end = where[0], where[-1] + 1
    positions[:, start:end] = start + own
    positions[:, end:] += taken - len(where)
  return positions, int(positions.max()) + 1 if len(ids) else 0


class QwenVL(qwen2.Part):
  """The modules of a model; `QwenVLModel` runs them."""

  tower: Any = None  # Class of the tower.

  def setup(self):
    cfg = self.config
    kwargs = dict(dtype=self.dtype, backend=self.backend, remat=self.remat)
    self.visual = self.tower(cfg.vision, **kwargs)
    self.language_model = qwen2.Qwen2(cfg.text, **kwargs)

  def encode_video(self, patches, layout, signals=()):
    return self.visual(patches, layout, signals)

  def __call__(self, patches, layout):
    """Touches every parameter; only initialisation calls it."""
    x, _ = self.visual(patches, layout)
    positions = jnp.zeros((1, POSITION_ROWS, len(x)), jnp.int32)
    hidden, _ = self.language_model(x[None], positions)
    return self.language_model.logits(hidden)


@dataclasses.dataclass(frozen=True)
class QwenVLModel(video_llm.VideoLLM):
  """What Qwen2.5-VL and Qwen3-VL have in common as a `VideoLLM`."""

  config: QwenVLConfig

  tower: ClassVar[Any]
  processor_class: ClassVar[type[processors.PatchProcessor]]

  @property
  def module(self):
    own = self.dtype, self.backend, self.remat
    return QwenVL(self.config, *own, tower=self.tower)

  @property
  def processor(self):
    names = ("patch_size", "temporal_patch_size", "merge_size")
    sizes = {name: getattr(self.config.vision, name) for name in names}
    return self.processor_class(**sizes)

  def read_processor(self, directory):
    return self.processor_class.from_files(directory)

  def layout(self, grid, sizes=None):
    """Returns the `qwen2_5_vl_layout.Layout` of a grid (T, H, W)."""
    grid = tuple(map(int, grid))
    return qwen2_5_vl_layout.layout(grid, self.config.vision, sizes)

  def tower_inputs(self, inputs, bucket=None):
    vision, values, sizes = self.config.vision, inputs.values, None
    errors.check(
      values.shape[-1] == vision.patch_values,
      f"patches have {values.shape[-1]} numbers, not {vision.patch_values}:"
      " patch sizes in the processor's file are to be those of config.json",
    )
    if bucket is not None:
      sizes = qwen2_5_vl_layout.Sizes.of_bucket(bucket, vision)
      rows = bucket.tokens * vision.patches_per_token
      values = np.pad(values, ((0, rows - len(values)), (0, 0)))
    layout = self.layout(inputs.grid, sizes)
    return inputs._replace(values=values, layout=layout)

  def init(self, rng):
    vision = self.config.vision
    patches = jnp.zeros((vision.patches_per_token, vision.patch_values))
    layout = self.layout((1, 1, 1))
    return self.module.init(rng, patches, layout)["params"]

  def encode_stages(self, params, inputs, signals=()):
    """See `VideoLLM.encode_stages`; features are zero behind the video's.

    Signals are of the tower's last layer, averaged over the patches of a token
    and zero behind the video's tokens; "vision_attention" is a sum over
    queries, "vision_keys" are turned by their place.
    """
    given = (inputs.values, inputs.layout, signals)
    return self.module.apply({"params": params}, *given, method="encode_video")


@dataclasses.dataclass(frozen=True)
class Qwen2_5VLModel(QwenVLModel):  # noqa: N801
  """Qwen2.5-VL as a `VideoLLM`."""

  config: Qwen2_5VLConfig

  tower = qwen2_5_vl_vision.Tower
  processor_class = processors.Qwen2_5VLProcessor

  def positions(self, ids, video):
    """Returns (int32[3, L], next position) of ONE prompt, by rule 4.50."""
    return position_ids(ids, video, config=self.config)


CONFIG, MODEL = Qwen2_5VLConfig, Qwen2_5VLModel


def weight_table(config):
  """Returns the `placement.rows` of the weights, by the hub's names."""
  names = [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
  block = dict(norm1="scale", norm2="scale")
  block |= dict.fromkeys(["attn.qkv", "attn.proj", *names], "dense")
  patches = {"patch_embed.proj": "conv3d patch_embed"}
  # The entries of a Sequential; number 1 is the activation.
  merger = {"mlp.0": "dense linear_1", "mlp.2": "dense linear_2"}
  stack = "visual.blocks.{}", "visual/blocks", config.vision.num_layers
  return (
    placement.rows("visual", "visual", **patches)
    | placement.rows(*stack, **block)
    | placement.rows("visual.merger", "visual/merger", ln_q="scale", **merger)
    | qwen2.decoder_rows(config.text, "model", HEAD)
  )


def hub_name(name):
  """Returns the hub's name of a tensor in any of the known spellings."""
  if name.startswith("model.visual."):
    return name.removeprefix("model.")
  if name.startswith("model.language_model."):
    return "model." + name.removeprefix("model.language_model.")
  return name
