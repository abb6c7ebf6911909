"""LLaVA-OneVision for video: tower, projector, pooling, newline, decoder.

Axes: T frames, H W token grid of a frame after pooling, N = T·H·W video
tokens, L prompt tokens, D width, B batch, V vocabulary, P position rows (1).
Paper: https://arxiv.org/abs/2408.03326.
"""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from cacovid_jax.models import (
  hf_config,
  language,
  qwen2,
  siglip,
  vision_signals,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlavaOnevisionConfig:
  """Vision tower, decoder, and the token ids that stand for pictures."""

  vision: siglip.SiglipConfig
  text: qwen2.Qwen2Config
  image_token_id: int
  video_token_id: int
  projector_bias: bool = True

  @classmethod
  def llava_onevision_0_5b(cls):
    return cls(
      vision=siglip.SiglipConfig.so400m(),
      text=qwen2.Qwen2Config.qwen2_0_5b(),
      image_token_id=151646,
      video_token_id=151647,
    )

  @classmethod
  def llava_onevision_7b(cls):
    return cls(
      vision=siglip.SiglipConfig.so400m(),
      text=qwen2.Qwen2Config.qwen2_7b(),
      image_token_id=151646,
      video_token_id=151647,
    )

  @classmethod
  def tiny(cls):
    """7 x 7 patches of a frame pooled to 4 x 4; CPU-sized, for tests."""
    return cls(
      vision=siglip.SiglipConfig.tiny(),
      text=qwen2.Qwen2Config.tiny(),
      image_token_id=60,
      video_token_id=61,
    )

  @classmethod
  def from_hf(cls, config):
    """Reads a config.json, as transformers 4.x or 5.x writes it."""
    hf_config.require(config, "model_type", ["llava_onevision"])
    hf_config.require(config, "projector_hidden_act", ["gelu"])
    hf_config.require(config, "vision_feature_layer", [-1])
    hf_config.require(config, "vision_feature_select_strategy", ["full"])
    text = hf_config.section(config, "text_config")
    return cls(
      vision=siglip.SiglipConfig.from_hf(
        hf_config.section(config, "vision_config")
      ),
      text=qwen2.Qwen2Config.from_hf(
        text, tie_embeddings=config.get("tie_word_embeddings", False)
      ),
      image_token_id=hf_config.number(config, "image_token_index"),
      video_token_id=hf_config.number(config, "video_token_index"),
      projector_bias=bool(config.get("multimodal_projector_bias", True)),
    )

  def to_hf(self):
    """Returns the config.json that transformers reads."""
    size = self.vision.image_size
    return {
      "architectures": ["LlavaOnevisionForConditionalGeneration"],
      "model_type": "llava_onevision",
      "vision_config": self.vision.to_hf(),
      "text_config": self.text.to_hf(),
      "image_token_index": self.image_token_id,
      "video_token_index": self.video_token_id,
      "multimodal_projector_bias": self.projector_bias,
      "projector_hidden_act": "gelu",
      "vision_feature_layer": -1,
      "vision_feature_select_strategy": "full",
      "vision_aspect_ratio": "anyres_max_9",
      # Tilings of single pictures; videos never use them.
      "image_grid_pinpoints": [
        [size * rows, size * columns] for rows in (1, 2) for columns in (1, 2)
      ],
      "tie_word_embeddings": self.text.tie_embeddings,
    }

  @property
  def pooled_side(self):
    """Tokens along one side of a frame after pooling."""
    return -(-self.vision.side // 2)


def pooling_matrix(size):
  """Returns float32[ceil(size / 2), size], bilinear with half-pixel centres.

  Rows are plain interpolation weights: no low-pass filter, which is what the
  released models were trained with.
  """
  out_size = -(-size // 2)
  source = (np.arange(out_size) + 0.5) * (size / out_size) - 0.5
  source = np.maximum(source, 0.0)
  low = np.minimum(np.floor(source).astype(int), size - 1)
  high = np.minimum(low + 1, size - 1)
  matrix = np.zeros((out_size, size))
  rows = np.arange(out_size)
  matrix[rows, low] += 1.0 - (source - low)
  matrix[rows, high] += source - low
  return matrix.astype(np.float32)


def pool(x):
  """Returns float[F, ceil(side / 2)**2, D] of x float[F, side**2, D].

  Computed in float32 and rounded once to x's dtype.
  """
  frames, patches, width = x.shape
  side = round(patches**0.5)
  matrix = pooling_matrix(side)
  pooled = jnp.einsum(
    "ph,fhwd,qw->fpqd",
    matrix,
    x.astype(jnp.float32).reshape(frames, side, side, width),
    matrix,
  )
  return pooled.reshape(frames, -1, width).astype(x.dtype)


class Projector(nn.Module):
  """Two linear maps with the exact GELU between, into the decoder's width."""

  width: int
  use_bias: bool = True
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x):
    dense = functools.partial(
      nn.Dense, self.width, use_bias=self.use_bias, dtype=self.dtype
    )
    x = nn.gelu(dense(name="linear_1")(x), approximate=False)
    return dense(name="linear_2")(x)


class LlavaOnevision(nn.Module):
  """The modules of LLaVA-OneVision; `LlavaOnevisionModel` runs them."""

  config: LlavaOnevisionConfig
  dtype: jnp.dtype = jnp.float32
  backend: str = "auto"
  remat: bool = False

  def setup(self):
    cfg = self.config
    kwargs = dict(dtype=self.dtype, backend=self.backend, remat=self.remat)
    self.vision_tower = siglip.SiglipTower(cfg.vision, **kwargs)
    self.projector = Projector(
      cfg.text.hidden_size, cfg.projector_bias, self.dtype
    )
    self.image_newline = self.param(
      "image_newline",
      nn.initializers.normal(cfg.text.hidden_size**-0.5),
      (cfg.text.hidden_size,),
    )
    self.language_model = qwen2.Qwen2(cfg.text, **kwargs)

  def encode_video(self, pixels, want=()):
    """Returns (features float[N, D], out) of pixels float[T, h, w, 3].

    `out` also holds the `vision_signals` in `want`, of the token grid.
    """
    hidden, tower = self.vision_tower(pixels, want)
    projected = self.projector(hidden)
    pooled = pool(projected)
    out = {
      "vision_embeddings": tower["embeddings"],
      "vision_tower_output": hidden,
      "projected_features": projected,
      "pooled_features": pooled,
    }
    for name in want:
      signal = tower[name].reshape(*hidden.shape[:2], -1)
      out[name] = pool(signal).reshape(-1, *tower[name].shape[2:])
    return pooled.reshape(-1, pooled.shape[-1]), out

  def video_block(self, features):
    """Returns float[N + 1, D]: the features and the newline behind them."""
    newline = self.image_newline.astype(features.dtype)[None]
    return jnp.concatenate([features, newline])

  def embed_prompt(self, ids, features, video_start):
    """Returns float[L, D]; see `LlavaOnevisionModel.embed_prompt`."""
    block = self.video_block(features.astype(self.dtype))
    return jax.lax.dynamic_update_slice(
      self.language_model.embed(ids), block, (video_start, 0)
    )

  def __call__(self, pixels, ids):
    """Touches every parameter; only initialisation calls it."""
    features, _ = self.encode_video(pixels)
    x = self.embed_prompt(ids, features, 0)
    positions = jnp.arange(x.shape[0])[None, None]
    hidden, _ = self.language_model(x[None], positions)
    return self.language_model.logits(hidden)


@dataclasses.dataclass(frozen=True)
class LlavaOnevisionModel(language.LanguageModel):
  """Pure functions of (params, arrays): what the rest of the library calls."""

  config: LlavaOnevisionConfig

  @property
  def module(self):
    return LlavaOnevision(self.config, self.dtype, self.backend, self.remat)

  def grid(self, num_frames):
    """Returns (T, H, W) of a video of `num_frames` frames."""
    return (num_frames, self.config.pooled_side, self.config.pooled_side)

  def positions(self, ids, *, grid=None, seconds_per_slice=None):
    """Returns (int32[1, L], next position) of ONE prompt: rows count on."""
    del grid, seconds_per_slice  # Time and place are not in the positions.
    return np.arange(len(ids), dtype=np.int32)[None], len(ids)

  def init(self, rng):
    """Returns random float32 parameters."""
    size, side = self.config.vision.image_size, self.config.pooled_side
    pixels = jnp.zeros((1, size, size, 3))
    ids = jnp.zeros(side * side + 1, jnp.int32)
    return self.module.init(rng, pixels, ids)["params"]

  def encode_video(self, params, pixels):
    """Returns features float[N, D] of one video, without the newline.

    Args:
      params: the model's parameters.
      pixels: float32[T, h, w, 3], normalised.
    """
    return self._apply(params, pixels, method="encode_video")[0]

  def encode_video_with(self, params, pixels, *, want):
    """Returns (features, signals) of one video, features of `encode_video`.

    Args:
      params: the model's parameters.
      pixels: float32[T, h, w, 3], normalised.
      want: static, names of `vision_signals`. Of the tower's last layer and
        pooled as the features are, "vision_attention" float32[N] is the
        attention that a place receives from its frame, mean over heads and
        queries; "vision_keys" float32[N, H] are the keys averaged over heads.
    """
    want = vision_signals.check(want)
    features, out = self._apply(
      params, pixels, want=want, method="encode_video"
    )
    return features, {name: out[name] for name in want}

  def vision_signal_shapes(self, num_video):
    """Returns the shape of each of `vision_signals` for N video tokens."""
    vision = self.config.vision
    return vision_signals.shapes(
      num_video, vision.hidden_size // vision.num_heads
    )

  def embed_prompt(self, params, ids, features, video_start):
    """Returns one prompt's embeddings float[L, D].

    Args:
      params: the model's parameters.
      ids: int32[L]; the ids under the video are ignored, and rows behind the
        prompt may be padding.
      features: float[N, D] of the video.
      video_start: int32[] row of the first video token; the newline follows
        the last one, so video_start + N + 1 <= L.
    """
    return self._apply(
      params, ids, features, video_start, method="embed_prompt"
    )

  def _apply(self, params, *args, **kwargs):
    return self.module.apply({"params": params}, *args, **kwargs)
