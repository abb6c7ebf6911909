"""Qwen2.5-VL's vision tower: windowed and per-slice attention, 2-D rotary.

Axes: T time slices, H W token grid of a slice, N = T·H·W video tokens, each
merged from M = merge_size² neighbouring patches, P = N·M patches (time, then
rows and columns of tokens, then the patches inside a token), D width of the
tower, S segments of an attention (windows or slices), R patches of a segment.
Paper: https://arxiv.org/abs/2502.13923 (section 2.1.1).
"""

import dataclasses
import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from cacovid_jax import schema
from cacovid_jax.models import (
  attention,
  hf_config,
  qwen2,
  qwen2_5_vl_layout,
  rope,
  video_llm,
)
from cacovid_jax.models import layers as layers_lib

# Not in any config.json: the released code has it fixed.
_RMS_NORM_EPS = 1e-6
CHANNELS = 3
_FIXED = dict(
  model_type="qwen2_5_vl",
  in_chans=CHANNELS,  # transformers 4.x,
  in_channels=CHANNELS,  # and 5.x.
  hidden_act="silu",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PatchConfig:
  """Sizes of a tower over patches of pixels, Qwen2.5-VL's or Qwen3-VL's."""

  hidden_size: int = hf_config.key()
  intermediate_size: int = hf_config.key()
  num_layers: int = hf_config.key("depth", kind=hf_config.LAYERS)
  num_heads: int = hf_config.key()
  out_hidden_size: int = hf_config.key()
  patch_size: int = hf_config.key(default=14, kind=hf_config.PIXELS)
  temporal_patch_size: int = hf_config.key(default=2, kind=hf_config.PIXELS)
  merge_size: int = hf_config.key(
    "spatial_merge_size", 2, kind=hf_config.PIXELS
  )
  rope_theta: float = 1e4

  window_side = None  # Tokens along one side of a window.
  table_side = None  # Entries along one side of a learned table of positions.

  @classmethod
  def _read(cls, config, fixed, **own):
    """Returns the config of a `vision_config` section and other fields.

    `fixed` are what the section must say, its `model_type` in 5.x apart.
    """
    where = "vision_config."
    kinds = (fixed["model_type"], f"{fixed['model_type']}_vision")
    hf_config.require(config, where, **fixed | {"model_type": kinds})
    rotary = config.get("rope_parameters") or {}
    schema.fit(rotary, dict, "config.json", key=f"{where}rope_parameters")
    hf_config.require(
      rotary, f"{where}rope_parameters.", rope_type=("axial", "default")
    )
    found = cls(
      **hf_config.numbers(cls, config, where),
      rope_theta=hf_config.number(rotary, "rope_theta", float, 1e4, where),
      **own,
    )
    # Rows and columns turn a quarter of a head's values each, in pairs.
    hf_config.check(
      found.hidden_size % (4 * found.num_heads) == 0,
      f"{where}hidden_size {found.hidden_size} does not split into num_heads"
      f" {found.num_heads} of a multiple of 4",
    )
    return found

  def to_hf(self):
    """Returns what the `vision_config` section says of these fields."""
    return hf_config.described(self) | {
      "rope_parameters": {"rope_type": "axial", "rope_theta": self.rope_theta},
    }  # fmt: skip

  @property
  def head_dim(self):
    return self.hidden_size // self.num_heads

  @property
  def kernel_shape(self):
    """Sizes of the patch convolution's kernel behind its outputs."""
    side = self.patch_size
    return CHANNELS, self.temporal_patch_size, side, side

  @property
  def patch_values(self):
    return math.prod(self.kernel_shape)

  @property
  def patches_per_token(self):
    return self.merge_size**2

  def num_patches(self, grid):
    return math.prod(grid) * self.patches_per_token

  def input_shape(self, grid):
    """Returns the shape of what the tower takes of a video."""
    return self.num_patches(grid), self.patch_values


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionConfig(PatchConfig):
  """Sizes of a tower; lengths in pixels, `full_layers` see a whole slice."""

  full_layers: tuple[int, ...]
  window_size: int = hf_config.key(default=112, kind=hf_config.PIXELS)

  @classmethod
  def qwen2_5_vl(cls, out_hidden_size):
    """The tower of every released size; the decoder's width differs."""
    sizes = dict(hidden_size=1280, intermediate_size=3420, num_layers=32)
    sizes |= dict(num_heads=16, full_layers=(7, 15, 23, 31))
    return cls(**sizes, out_hidden_size=out_hidden_size)

  @classmethod
  def tiny(cls):
    """Windows of 2 x 2 tokens; CPU-sized, for tests."""
    sizes = dict(hidden_size=32, intermediate_size=44, num_layers=3)
    sizes |= dict(num_heads=2, full_layers=(1,), patch_size=4, window_size=16)
    return cls(**sizes, out_hidden_size=32)

  @classmethod
  def from_hf(cls, config):
    """Reads the `vision_config` section of a config.json."""
    full_layers = layer_numbers(config, "fullatt_block_indexes")
    found = cls._read(config, _FIXED, full_layers=tuple(sorted(full_layers)))
    token = found.patch_size * found.merge_size
    hf_config.check(
      found.window_size >= token,
      f"vision_config.window_size {found.window_size} is below one token of"
      f" {token} pixels",
    )
    return found

  def to_hf(self):
    """Returns the `vision_config` section, for 4.x and 5.x readers."""
    return super().to_hf() | _FIXED | {
      "spatial_patch_size": self.patch_size,
      "fullatt_block_indexes": list(self.full_layers),
    }  # fmt: skip

  @property
  def window_side(self):
    """Tokens along one side of a window."""
    return self.window_size // self.merge_size // self.patch_size

  @property
  def mlp_width(self):
    """Values of a patch that the MLP holds at a time: both halves."""
    return 2 * self.intermediate_size

  def flops(self, grid, out_width):
    """Returns the operations from patches to features of `out_width` values."""
    sizes = qwen2_5_vl_layout.Sizes.of([grid], self)
    D = self.hidden_size  # noqa: N806
    patches, merge = self.num_patches(grid), self.patches_per_token
    per_layer = 4 * D * D + 3 * D * self.intermediate_size
    total = patches * (self.patch_values * D + self.num_layers * per_layer)
    # Smaller windows at the edges are padded to whole ones.
    window = (self.window_side**2 * merge) ** 2 * sizes.num_windows
    whole = (sizes.tokens_per_slice * merge) ** 2 * sizes.num_slices
    full = len(self.full_layers)
    total += 2 * D * (full * whole + (self.num_layers - full) * window)
    joined = D * merge
    return 2 * (total + sizes.num_tokens * joined * (joined + out_width))


def layer_numbers(config, name):
  """Returns a list of numbers of layers of a `vision_config` section."""
  where = "vision_config."
  depth = hf_config.number(config, "depth", hf_config.LAYERS, where=where)
  kind, key = list[schema.within(int, 0, depth - 1)], f"{where}{name}"
  return schema.fit(config.get(name), kind, "config.json", key=key)


def rotary(coordinates, head_dim, theta):
  """Returns (cos, sin), both float32[P, head_dim], of int32[2, P].

  The first half of the frequencies turns with the row, the other with the
  column; time has no part in it.
  """
  frequencies = head_dim // 4
  cos, sin = rope.angles(coordinates[None], head_dim // 2, theta)

  def join(x):  # float32[2, P, head_dim / 2], whose halves are equal.
    both = jnp.concatenate([x[0, :, :frequencies], x[1, :, :frequencies]], -1)
    return jnp.concatenate([both, both], axis=-1)

  return join(cos), join(sin)


def rotate(x, cos, sin):
  """Returns x float[P, N, H] turned in float32 and rounded once."""
  return rope.apply(x.astype(jnp.float32), cos, sin).astype(x.dtype)


def received(q, k, segments):
  """Returns float32[P]: attention that each patch gets within its segment.

  Of q, k float[P, N, H], turned. Without meaning for patches in no segment.
  """
  q, k = (jnp.take(x, segments.rows, axis=0) for x in (q, k))
  got = attention.attention_received(q, k, segments.lengths)
  return jnp.take(got.reshape(-1), segments.place)


def attend(q, k, v, segments, backend="auto"):
  """Returns float[P, N, H]: bidirectional attention inside the segments."""
  q, k, v = (jnp.take(x, segments.rows, axis=0) for x in (q, k, v))
  out = attention.attention(
    q, k, v, lengths=segments.lengths, backend=backend
  )  # [S, R, N, H]
  return jnp.take(out.reshape(-1, *q.shape[2:]), segments.place, axis=0)


def check_patches(patches, layout):
  """Refuses patches [P, ...] of another number than the layout has."""
  count = layout.coordinates.shape[1]
  if len(patches) != count:
    raise ValueError(f"{len(patches)} patches for a layout of {count}")


class Block(qwen2.Part):
  """Attention and a gated MLP with biases, both behind an RMSNorm."""

  @nn.compact
  def __call__(self, x, signals, is_full, is_last, cos, sin, layout):
    """Returns (float[P, D], signals) of x float[P, D].

    A layer sees the whole slice if `is_full`, bool[], else the window. cos and
    sin are of `rotary`, `signals` and `is_last` as of `video_llm.observe`.
    """
    cfg = self.config
    h = self.rms_norm("norm1", _RMS_NORM_EPS)(x)
    h = self.dense(3 * cfg.hidden_size, "qkv", use_bias=True)(h)
    # All queries, then all keys, then all values.
    h = h.reshape(-1, 3, cfg.num_heads, cfg.head_dim)
    q, k, v = rotate(h[:, 0], cos, sin), rotate(h[:, 1], cos, sin), h[:, 2]
    # A branch and not two kinds of layers: stacked ones stay one scan.
    see = functools.partial(attend, q, k, v, backend=self.backend)
    h = jax.lax.cond(
      is_full, lambda: see(layout.slices), lambda: see(layout.windows)
    )
    proj = self.dense(cfg.hidden_size, "proj", use_bias=True)
    x = x + proj(h.reshape(x.shape))

    last_is_full = cfg.num_layers - 1 in cfg.full_layers
    segments = layout.slices if last_is_full else layout.windows
    found = functools.partial(received, q, k, segments)
    signals = video_llm.observe(signals, is_last, found, k)
    h = self.rms_norm("norm2", _RMS_NORM_EPS)(x)
    return x + qwen2.gated_mlp(h, self, use_bias=True), signals


class Merger(qwen2.Part):
  """Joins the patches of each token and maps them to the decoder's width."""

  @nn.compact
  def __call__(self, x):
    """Returns float[N, out_hidden_size] of x float[P, D]."""
    cfg = self.config
    width = cfg.hidden_size * cfg.patches_per_token
    x = self.rms_norm("ln_q", _RMS_NORM_EPS)(x).reshape(-1, width)
    x = self.dense(width, "linear_1", use_bias=True)(x)
    x = nn.gelu(x, approximate=False)
    return self.dense(cfg.out_hidden_size, "linear_2", use_bias=True)(x)


class Tower(qwen2.Part):
  """Patch embedding, blocks (a stack of `models.layers`) and merger."""

  @nn.compact
  def __call__(self, patches, layout, signals=()):
    """Returns (features float[N, out_hidden_size], out) of one video.

    Of normalised patches float[P, patch_values] and their `Layout`. Tokens stay
    in the order of the grid; features of padding are zero. `out` also holds the
    wanted `signals`, see `QwenVLModel.encode_stages`.
    """
    cfg = self.config
    check_patches(patches, layout)
    embed = self.dense(cfg.hidden_size, "patch_embed", use_bias=False)
    x = embed(patches.astype(self.dtype))
    out = {"patch_embed": x}
    cos, sin = rotary(layout.coordinates, cfg.head_dim, cfg.rope_theta)
    signals = video_llm.no_signals(signals, x.shape[:1], cfg.head_dim)

    def block(layer, carry, kind):
      return layer(*carry, *kind, cos, sin, layout), None

    number = np.arange(cfg.num_layers)
    is_full = np.isin(number, cfg.full_layers)
    is_last = number == cfg.num_layers - 1
    blocks = Block(cfg, self.dtype, self.backend, name="blocks")
    (x, signals), _ = layers_lib.apply(
      block, blocks, (x, signals), (is_full, is_last), self.remat
    )
    out["vision_tower_output"] = x
    features = Merger(cfg, self.dtype, name="merger")(x)
    out |= pooled(signals, layout, cfg.patches_per_token)
    return inside(features, layout), out


def inside(x, layout):
  """Returns x [N, ...] with zeros behind the video's own tokens."""
  valid = jnp.arange(len(x)) < layout.num_tokens
  return jnp.where(valid.reshape(-1, *[1] * (x.ndim - 1)), x, 0)


def pooled(signals, layout, size):
  """Returns {name: [N, ...]}: means over the `size` patches of a token."""

  def tokens(signal):  # [P, ...]
    groups = signal.reshape(-1, size, *signal.shape[1:])
    return inside(groups.mean(axis=1), layout)

  return {name: tokens(signal) for name, signal in signals.items()}
