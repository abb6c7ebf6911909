"""SigLIP vision tower, up to the features that LLaVA-OneVision reads.

Axes: F frames, P patches of a frame (row-major), D width of the tower.
Paper: https://arxiv.org/abs/2303.15343.
"""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from cacovid_jax.models import attention, hf_config, products, qwen2, video_llm
from cacovid_jax.models import layers as layers_lib

_FIXED = dict(
  model_type="siglip_vision_model",
  num_channels=3,
  hidden_act="gelu_pytorch_tanh",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SiglipConfig:
  """Sizes of a tower; patches that do not fit the image whole are cut off."""

  hidden_size: int = hf_config.key()
  intermediate_size: int = hf_config.key()
  num_layers: int = hf_config.key("num_hidden_layers", kind=hf_config.LAYERS)
  num_heads: int = hf_config.key("num_attention_heads")
  image_size: int = hf_config.key(kind=hf_config.PIXELS)
  patch_size: int = hf_config.key(kind=hf_config.PIXELS)
  layer_norm_eps: float = hf_config.key(default=1e-6, optional=True)

  @classmethod
  def so400m(cls):
    """The 26 layers of SigLIP so400m that the released models kept."""
    sizes = dict(hidden_size=1152, intermediate_size=4304, num_layers=26)
    return cls(**sizes, num_heads=16, image_size=384, patch_size=14)

  @classmethod
  def tiny(cls):
    sizes = dict(hidden_size=32, intermediate_size=52, num_layers=2)
    return cls(**sizes, num_heads=4, image_size=30, patch_size=4)

  @classmethod
  def from_hf(cls, config):
    """Reads the `vision_config` section of a config.json."""
    where = "vision_config."
    hf_config.require(config, where, **_FIXED)
    found = cls(**hf_config.numbers(cls, config, where))
    hf_config.check(
      found.side,
      f"{where}image_size {found.image_size} is below patch_size"
      f" {found.patch_size}",
    )
    hf_config.check(
      found.hidden_size % found.num_heads == 0,
      f"{where}hidden_size {found.hidden_size} is no multiple of"
      f" num_attention_heads {found.num_heads}",
    )
    return found

  def to_hf(self):
    """Returns the `vision_config` section of a config.json."""
    described = hf_config.described(self) | _FIXED
    return described | {"vision_use_head": False}

  @property
  def side(self):
    """Patches along one side of a frame."""
    return self.image_size // self.patch_size

  @property
  def head_dim(self):
    return self.hidden_size // self.num_heads

  @property
  def kernel_shape(self):
    """Sizes of the patch convolution's kernel behind its outputs."""
    return 3, self.patch_size, self.patch_size

  @property
  def mlp_width(self):
    """Values of a patch that the MLP holds at a time."""
    return self.intermediate_size

  def num_patches(self, grid):
    return grid[0] * self.side**2

  def input_shape(self, grid):
    """Returns the shape of what the tower takes of a video."""
    return grid[0], self.image_size, self.image_size, 3

  def flops(self, grid, out_width):
    """Returns the operations from pixels to features of `out_width` values.

    LLaVA-OneVision's projector is among them, its pooling is not.
    """
    patches, D = self.num_patches(grid), self.hidden_size  # noqa: N806
    per_layer = 4 * D * D + 2 * D * self.intermediate_size
    per_layer += 2 * D * self.side**2  # Patches see their frame.
    total = 3 * self.patch_size**2 * D + self.num_layers * per_layer
    return 2 * patches * (total + D * out_width + out_width * out_width)


class LayerNorm(nn.Module):
  """LayerNorm in float32 throughout, rounded to `dtype` once at the end."""

  epsilon: float
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x):
    scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
    bias = self.param("bias", nn.initializers.zeros, x.shape[-1:])
    x = x.astype(jnp.float32)
    mean = x.mean(axis=-1, keepdims=True)
    # Two passes: E[x^2] - E[x]^2 cancels when the mean is large.
    variance = jnp.square(x - mean).mean(axis=-1, keepdims=True)
    if self.dtype == jnp.float32:
      x = (x - mean) / jnp.sqrt(variance + self.epsilon)
    else:  # A division of each value is a fifth of the time on a GPU.
      x = (x - mean) * jax.lax.rsqrt(variance + self.epsilon)
    x = x * scale.astype(jnp.float32) + bias.astype(jnp.float32)
    return x.astype(self.dtype)


class SiglipLayer(qwen2.Part):
  """Pre-norm transformer block, bidirectional."""

  float8: bool = False  # Whether products are in 8 bits, see `products`.

  @nn.nowrap
  def dense(self, size, name, use_bias):
    options = dict(use_bias=use_bias, dtype=self.dtype, name=name)
    product = products.float8_dot_general if self.float8 else None
    return nn.Dense(size, dot_general=product, **options)

  @nn.compact
  def __call__(self, x, signals, is_last):
    """Returns (float[F, P, D], signals) of x float[F, P, D].

    `signals` and `is_last` are as of `video_llm.observe`, float32[F, P, ...].
    """
    cfg = self.config
    dense = functools.partial(self.dense, use_bias=True)
    heads = (*x.shape[:2], cfg.num_heads, cfg.head_dim)
    h = LayerNorm(cfg.layer_norm_eps, self.dtype, name="layer_norm1")(x)
    widths = [cfg.hidden_size] * 3
    qkv = layers_lib.products(self, "qkv_proj", widths, h, True)
    q, k, v = (x.reshape(heads) for x in qkv)
    h = attention.attention(q, k, v, backend=self.backend).reshape(x.shape)
    x = x + dense(cfg.hidden_size, "out_proj")(h)

    def received():  # A mean over queries: a frame's attention adds up to 1.
      return attention.attention_received(q, k) / x.shape[1]

    signals = video_llm.observe(signals, is_last, received, k)
    h = LayerNorm(cfg.layer_norm_eps, self.dtype, name="layer_norm2")(x)
    h = dense(cfg.intermediate_size, "fc1")(h)
    # The tower was trained with the tanh form; the projector with the exact.
    h = nn.gelu(h, approximate=True)
    return x + dense(cfg.hidden_size, "fc2")(h), signals


class SiglipTower(qwen2.Part):
  """Patches, a learned position table and the blocks.

  Without `post_layernorm`: LLaVA-OneVision reads what comes *before* it.
  """

  float8: bool = False  # Of the blocks, see `SiglipLayer`.

  @nn.compact
  def __call__(self, pixels, signals=()):
    """Returns (hidden float[F, P, D], out) of normalised float[F, h, w, 3].

    `out` holds the wanted `video_llm.SIGNALS` of the last layer, [F, P] first.
    """
    cfg = self.config
    frames, side, size = pixels.shape[0], cfg.side, cfg.patch_size
    # A valid convolution with stride = kernel is a product over cut patches.
    x = pixels[:, : side * size, : side * size].astype(self.dtype)
    x = x.reshape(frames, side, size, side, size, x.shape[-1])
    x = x.transpose(0, 1, 3, 2, 4, 5).reshape(frames, side * side, -1)
    x = self.dense(cfg.hidden_size, "patch_embedding", use_bias=True)(x)
    init = nn.initializers.normal(cfg.hidden_size**-0.5)
    table = self.param("position_embedding", init, x.shape[1:])
    x = x + table.astype(self.dtype)
    out = {"embeddings": x}
    signals = video_llm.no_signals(signals, x.shape[:2], cfg.head_dim)

    def block(layer, carry, kind):
      return layer(*carry, *kind), None

    layers = SiglipLayer(
      cfg, self.dtype, self.backend, float8=self.float8, name="layers"
    )
    is_last = np.arange(cfg.num_layers) == cfg.num_layers - 1
    (x, signals), _ = layers_lib.apply(
      block, layers, (x, signals), (is_last,), self.remat
    )
    return x, out | signals
