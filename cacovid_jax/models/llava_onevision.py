"""LLaVA-OneVision for video: tower, projector, pooling, newline, decoder.

Axes: T frames, H W token grid of a frame after pooling, N = T·H·W video
tokens, L prompt tokens, D width, B batch, V vocabulary, P position rows (1).
Paper: https://arxiv.org/abs/2408.03326.
"""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from cacovid_jax.models import (
  hf_config,
  placement,
  processors,
  products,
  qwen2,
  siglip,
  video_llm,
)

HEAD = "language_model.lm_head.weight"  # Source name of the output table.
# The norm behind SigLIP's last block is in every checkpoint and in no
# computation.
POST_NORM = "vision_tower.vision_model.post_layernorm."
_FIXED = dict(
  model_type="llava_onevision",
  projector_hidden_act="gelu",
  vision_feature_layer=-1,
  vision_feature_select_strategy="full",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlavaOnevisionConfig:
  """Vision tower, decoder, and the token ids that stand for pictures."""

  vision: siglip.SiglipConfig
  text: qwen2.Qwen2Config
  image_token_id: int = hf_config.key("image_token_index")
  video_token_id: int = hf_config.key("video_token_index")
  projector_bias: bool = True

  @classmethod
  def llava_onevision_0_5b(cls):
    return cls._released(qwen2.Qwen2Config.qwen2_0_5b())

  @classmethod
  def llava_onevision_7b(cls):
    return cls._released(qwen2.Qwen2Config.qwen2_7b())

  @classmethod
  def _released(cls, text):
    vision = siglip.SiglipConfig.so400m()
    ids = dict(image_token_id=151646, video_token_id=151647)
    return cls(vision=vision, text=text, **ids)

  @classmethod
  def tiny(cls):
    """7 x 7 patches of a frame pooled to 4 x 4; CPU-sized, for tests."""
    vision, text = siglip.SiglipConfig.tiny(), qwen2.Qwen2Config.tiny()
    return cls(vision=vision, text=text, image_token_id=60, video_token_id=61)

  @classmethod
  def from_hf(cls, config):
    """Reads a config.json, as transformers 4.x or 5.x writes it."""
    hf_config.require(config, **_FIXED)
    text = hf_config.section(config, "text_config")
    vision = hf_config.section(config, "vision_config")
    tied = hf_config.switch(config, "tie_word_embeddings")
    return cls(
      vision=siglip.SiglipConfig.from_hf(vision),
      text=qwen2.Qwen2Config.from_hf(text, tied),
      **hf_config.numbers(cls, config),
      projector_bias=hf_config.switch(
        config, "multimodal_projector_bias", True
      ),
    )

  def to_hf(self):
    """Returns the config.json that transformers reads."""
    size = self.vision.image_size
    described = {
      "architectures": ["LlavaOnevisionForConditionalGeneration"],
      "vision_config": self.vision.to_hf(),
      "text_config": self.text.to_hf(),
      "multimodal_projector_bias": self.projector_bias,
      "vision_aspect_ratio": "anyres_max_9",
      # Tilings of single pictures; videos never use them.
      "image_grid_pinpoints": [
        [size * rows, size * columns] for rows in (1, 2) for columns in (1, 2)
      ],
      "tie_word_embeddings": self.text.tie_embeddings,
    }
    return hf_config.described(self) | _FIXED | described

  @property
  def pooled_side(self):
    """Tokens along one side of a frame after pooling."""
    return -(-self.vision.side // 2)


def pooling_taps(size):
  """Returns (low, high int[ceil(size / 2)], weight float32 of high).

  Of bilinear halving with half-pixel centres, without a low-pass filter, which
  is what the released models learned with: the two places each output reads.
  """
  out_size = -(-size // 2)
  source = (np.arange(out_size) + 0.5) * (size / out_size) - 0.5
  source = np.maximum(source, 0.0)
  low = np.minimum(np.floor(source).astype(int), size - 1)
  high = np.minimum(low + 1, size - 1)
  return low, high, (source - low).astype(np.float32)


def pool(x):
  """Returns float[F, ceil(side / 2)**2, D] of x float[F, side**2, D].

  Computed in float32 and rounded once to x's dtype.
  """
  frames, patches, width = x.shape
  side = round(patches**0.5)
  low, high, weight = pooling_taps(side)
  x_out = x.reshape(frames, side, side, width)
  for axis in (1, 2):
    shape = [1, 1, 1, 1]
    shape[axis] = len(weight)
    share = weight.reshape(shape)
    low_rows, high_rows = (
      jnp.take(x_out, places, axis=axis).astype(jnp.float32)
      for places in (low, high)
    )
    x_out = low_rows * (1 - share) + high_rows * share
  return x_out.reshape(frames, -1, width).astype(x.dtype)


class Projector(nn.Module):
  """Two linear maps with the exact GELU between, into the decoder's width."""

  width: int
  use_bias: bool = True
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x):
    options = dict(use_bias=self.use_bias, dtype=self.dtype)
    x = nn.Dense(self.width, name="linear_1", **options)(x)
    x = nn.gelu(x, approximate=False)
    return nn.Dense(self.width, name="linear_2", **options)(x)


class LlavaOnevision(qwen2.Part):
  """The modules of LLaVA-OneVision; `LlavaOnevisionModel` runs them."""

  float8_tower: bool = False  # See `models.products`.

  def setup(self):
    cfg, width = self.config, self.config.text.hidden_size
    kwargs = dict(dtype=self.dtype, backend=self.backend, remat=self.remat)
    self.vision_tower = siglip.SiglipTower(
      cfg.vision, float8=self.float8_tower, **kwargs
    )
    self.projector = Projector(width, cfg.projector_bias, self.dtype)
    init = nn.initializers.normal(width**-0.5)
    self.image_newline = self.param("image_newline", init, (width,))
    self.language_model = qwen2.Qwen2(cfg.text, **kwargs)

  def encode_video(self, pixels, signals=()):
    """Returns (features float[N, D], out) of pixels float[T, h, w, 3].

    `out` also holds the wanted `signals`, of the token grid.
    """
    hidden, tower = self.vision_tower(pixels, signals)
    projected = self.projector(hidden)
    pooled = pool(projected)
    out = {
      "vision_embeddings": tower["embeddings"],
      "vision_tower_output": hidden,
      "projected_features": projected,
      "pooled_features": pooled,
    }
    for name in signals:
      signal = tower[name].reshape(*hidden.shape[:2], -1)
      out[name] = pool(signal).reshape(-1, *tower[name].shape[2:])
    return pooled.reshape(-1, pooled.shape[-1]), out

  def __call__(self, pixels):
    """Touches every parameter; only initialisation calls it."""
    features, _ = self.encode_video(pixels)
    x = jnp.concatenate([features, self.image_newline[None]])
    positions = jnp.arange(x.shape[0])[None, None]
    hidden, _ = self.language_model(x[None], positions)
    return self.language_model.logits(hidden)


@dataclasses.dataclass(frozen=True)
class LlavaOnevisionModel(video_llm.VideoLLM):
  """LLaVA-OneVision as a `VideoLLM`."""

  config: LlavaOnevisionConfig
  float8_tower: bool = False  # See `models.products`.

  num_newlines = 1

  @property
  def module(self):
    options = self.dtype, self.backend, self.remat, self.float8_tower
    return LlavaOnevision(self.config, *options)

  @property
  def told(self):
    return {"float8_tower": True} if self.float8_tower else {}

  @property
  def precision(self):
    return super().precision + " float8 tower" * self.float8_tower

  def with_float8_tower(self, wanted):
    if wanted:
      products.check_float8()
    return dataclasses.replace(self, float8_tower=wanted)

  @property
  def processor(self):
    size, side = self.config.vision.image_size, self.config.pooled_side
    own = processors.LlavaOnevisionProcessor
    return own(image_size=size, frame_side=side)

  def read_processor(self, directory):
    side, own = self.config.pooled_side, processors.LlavaOnevisionProcessor
    return own.from_files(directory, frame_side=side)

  def tower_inputs(self, inputs, bucket=None):
    if bucket is None:
      return inputs
    missing = bucket.frames - len(inputs.values)
    room = [(0, missing), *[(0, 0)] * (inputs.values.ndim - 1)]
    return inputs._replace(values=np.pad(inputs.values, room))

  def positions(self, ids, video=None):
    """Returns (int32[1, L], next position) of ONE prompt: rows count on."""
    del video  # Time and place are not in the positions.
    return np.arange(len(ids), dtype=np.int32)[None], len(ids)

  def init(self, rng):
    size = self.config.vision.image_size
    return self.module.init(rng, jnp.zeros((1, size, size, 3)))["params"]

  def encode_stages(self, params, inputs, signals=()):
    """See `VideoLLM.encode_stages`; the newline is no part of the features.

    Signals are of the tower's last layer and pooled as the features are;
    "vision_attention" is a mean over queries.
    """
    given = (inputs.values, signals)
    return self.module.apply({"params": params}, *given, method="encode_video")

  def embed_prompt(self, params, ids, features, video_rows):
    """See `VideoLLM.embed_prompt`; behind the video's last row is the newline.

    That is a row of text: every pruned prompt has it, too.
    """
    x = super().embed_prompt(params, ids, features, video_rows)
    last = jnp.where(video_rows < len(ids), video_rows, -1).max()
    newline = params["image_newline"].astype(x.dtype)
    return x.at[last + 1].set(newline, mode="drop")


CONFIG, MODEL = LlavaOnevisionConfig, LlavaOnevisionModel


def weight_table(config):
  """Returns the `placement.rows` of the weights, by the hub's names (4.x)."""
  tower, ours = "vision_tower.vision_model", "vision_tower"
  dense = "dense" if config.projector_bias else "linear"
  projector = dict(linear_1=dense, linear_2=dense)
  embeddings = dict(patch_embedding="patches", position_embedding="table")
  names = [f"self_attn.{x}_proj" for x in ("q", "k", "v", "out")]
  layer = dict(layer_norm1="norm", layer_norm2="norm")
  layer |= dict.fromkeys([*names, "mlp.fc1", "mlp.fc2"], "dense")
  stack = f"{tower}.encoder.layers.{{}}", f"{ours}/layers"
  return (
    {"image_newline": ("image_newline", "same", None)}
    | placement.rows("multi_modal_projector", "projector", **projector)
    | placement.rows(f"{tower}.embeddings", ours, **embeddings)
    | placement.rows(*stack, config.vision.num_layers, **layer)
    | qwen2.decoder_rows(config.text, "language_model.model", HEAD)
  )


def hub_name(name):
  """Returns the hub's (4.x) name of a tensor in any of the known spellings."""
  stems = ("language_model", "vision_tower", "multi_modal_projector")
  if name.startswith(tuple(f"model.{x}" for x in (*stems, "image_newline"))):
    name = name.removeprefix("model.")
  head, _, rest = name.partition(".")
  if head == "lm_head":
    return f"language_model.{name}"
  if head == "vision_tower" and not rest.startswith("vision_model."):
    return f"vision_tower.vision_model.{rest}"
  if head == "language_model" and not rest.startswith(("model.", "lm_head.")):
    return f"language_model.model.{rest}"
  return name
