"""Qwen3-VL's vision tower: a learned table of positions, features of layers.

Axes: T time slices, H W token grid of a slice, N = T·H·W video tokens, each
merged from merge_size² neighbouring patches, P patches (in the order of
`qwen2_5_vl_vision`), D width of the tower, S layers whose features go to the
decoder beside those of the last one ("DeepStack").
Papers: https://arxiv.org/abs/2511.21631, https://arxiv.org/abs/2406.04334
(DeepStack).
"""

import dataclasses
import functools
import math

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from cacovid_jax.models import (
  hf_config,
  qwen2,
  qwen2_5_vl_vision,
  siglip,
  video_llm,
)
from cacovid_jax.models import layers as layers_lib

# Not in any config.json: the released code has it fixed.
_EPSILON = 1e-6
_FIXED = dict(
  model_type="qwen3_vl",
  in_channels=qwen2_5_vl_vision.CHANNELS,
  hidden_act="gelu_pytorch_tanh",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionConfig(qwen2_5_vl_vision.PatchConfig):
  """Sizes of a tower; features behind `deep_layers` go to the decoder, too."""

  patch_size: int = hf_config.key(default=16, kind=hf_config.PIXELS)
  # Entries of the table of positions, a square.
  num_positions: int = hf_config.key("num_position_embeddings", 48 * 48)
  deep_layers: tuple[int, ...]  # S numbers, rising.

  @classmethod
  def small(cls, out_hidden_size):
    """The tower of the models of 2 and 4 billion parameters."""
    sizes = dict(hidden_size=1024, intermediate_size=4096, num_layers=24)
    sizes |= dict(num_heads=16, deep_layers=(5, 11, 17))
    return cls(**sizes, out_hidden_size=out_hidden_size)

  @classmethod
  def large(cls, out_hidden_size):
    """The tower of the models of 8 and 32 billion parameters."""
    sizes = dict(hidden_size=1152, intermediate_size=4304, num_layers=27)
    sizes |= dict(num_heads=16, deep_layers=(8, 16, 24))
    return cls(**sizes, out_hidden_size=out_hidden_size)

  @classmethod
  def tiny(cls):
    """CPU-sized, for tests."""
    sizes = dict(hidden_size=32, intermediate_size=44, num_layers=3)
    sizes |= dict(num_heads=2, deep_layers=(0, 1), patch_size=4)
    return cls(**sizes, out_hidden_size=32, num_positions=25)

  @classmethod
  def from_hf(cls, config):
    """Reads the `vision_config` section of a config.json."""
    name = "deepstack_visual_indexes"
    deep_layers = qwen2_5_vl_vision.layer_numbers(config, name)
    hf_config.check(
      deep_layers and deep_layers == sorted(set(deep_layers)),
      f"vision_config.{name} is {deep_layers}; give numbers of layers, rising",
    )
    found = cls._read(config, _FIXED, deep_layers=tuple(deep_layers))
    count = found.num_positions
    told = f"vision_config.num_position_embeddings {count} is no square"
    hf_config.check(found.table_side**2 == count, told)
    return found

  def to_hf(self):
    """Returns the `vision_config` section, for 4.x and 5.x readers."""
    own = {"deepstack_visual_indexes": list(self.deep_layers)}
    return super().to_hf() | _FIXED | own

  @property
  def table_side(self):
    """Entries along one side of the table of positions."""
    return math.isqrt(self.num_positions)

  @property
  def mlp_width(self):
    """Values of a patch that the MLP holds at a time."""
    return self.intermediate_size

  def flops(self, grid, out_width):
    """Returns the operations from patches to features of `out_width` values.

    Those of the S other layers are among them.
    """
    D = self.hidden_size  # noqa: N806
    patches, joined = self.num_patches(grid), D * self.patches_per_token
    per_layer = 4 * D * D + 2 * D * self.intermediate_size
    per_layer += 2 * D * (patches // grid[0])  # Patches see their slice.
    total = patches * (self.patch_values * D + self.num_layers * per_layer)
    merged = math.prod(grid) * joined * (joined + out_width)
    return 2 * (total + (1 + len(self.deep_layers)) * merged)


class _Part(qwen2.Part):
  @nn.nowrap
  def layer_norm(self, name):
    return siglip.LayerNorm(_EPSILON, self.dtype, name=name)


class Block(_Part):
  """Attention inside the slice and an MLP, both behind a LayerNorm."""

  @nn.compact
  def __call__(self, x, signals, is_last, cos, sin, layout):
    """Returns (float[P, D], signals) of x float[P, D].

    Arguments as of `qwen2_5_vl_vision.Block`.
    """
    cfg, rotate = self.config, qwen2_5_vl_vision.rotate
    dense = functools.partial(self.dense, use_bias=True)
    h = dense(3 * cfg.hidden_size, "qkv")(self.layer_norm("norm1")(x))
    # All queries, then all keys, then all values.
    h = h.reshape(-1, 3, cfg.num_heads, cfg.head_dim)
    q, k, v = rotate(h[:, 0], cos, sin), rotate(h[:, 1], cos, sin), h[:, 2]
    h = qwen2_5_vl_vision.attend(q, k, v, layout.slices, self.backend)
    x = x + dense(cfg.hidden_size, "proj")(h.reshape(x.shape))
    found = functools.partial(qwen2_5_vl_vision.received, q, k, layout.slices)
    signals = video_llm.observe(signals, is_last, found, k)
    h = dense(cfg.intermediate_size, "fc1")(self.layer_norm("norm2")(x))
    h = nn.gelu(h, approximate=True)
    return x + dense(cfg.hidden_size, "fc2")(h), signals


class Merger(_Part):
  """Joins the patches of each token and maps them to the decoder's width.

  Behind a norm of each patch or, `joined`, of all of a token at once.
  """

  joined: bool = False

  @nn.compact
  def __call__(self, x):
    """Returns float[N, out_hidden_size] of x float[P, D]."""
    cfg, norm = self.config, self.layer_norm("norm")
    width = cfg.hidden_size * cfg.patches_per_token
    whole = (-1, width)
    x = norm(x.reshape(whole)) if self.joined else norm(x).reshape(whole)
    x = self.dense(width, "linear_1", use_bias=True)(x)
    x = nn.gelu(x, approximate=False)
    return self.dense(cfg.out_hidden_size, "linear_2", use_bias=True)(x)


class Tower(_Part):
  """Patch embedding, positions, blocks (a stack) and 1 + S mergers."""

  @nn.compact
  def __call__(self, patches, layout, signals=()):
    """Returns (features float[N, out_hidden_size], out) of one video.

    Arguments as of `qwen2_5_vl_vision.Tower`. `out` has "deep", features
    float[S, N, out_hidden_size] of `deep_layers`, beside what that one's has.
    """
    cfg = self.config
    qwen2_5_vl_vision.check_patches(patches, layout)
    embed = self.dense(cfg.hidden_size, "patch_embed", use_bias=True)
    x = embed(patches.astype(self.dtype))
    out = {"patch_embed": x}
    init, shape = nn.initializers.normal(0.02), (cfg.num_positions, x.shape[1])
    table = self.param("pos_embed", init, shape).astype(jnp.float32)
    index, weight = layout.places
    # Added up in float32, whatever the table's dtype, and rounded once.
    place = sum(table[index[i]] * weight[i, :, None] for i in range(4))
    x = x + place.astype(self.dtype)
    turned = qwen2_5_vl_vision.rotary(
      layout.coordinates, cfg.head_dim, cfg.rope_theta
    )
    signals = video_llm.no_signals(signals, x.shape[:1], cfg.head_dim)
    number, count = np.arange(cfg.num_layers), len(cfg.deep_layers)
    slots = np.full(cfg.num_layers, count)
    slots[list(cfg.deep_layers)] = np.arange(count)

    def block(layer, carry, kind):
      (x, signals, kept), (slot, is_last) = carry, kind
      x, signals = layer(x, signals, is_last, *turned, layout)
      # S is no slot: other layers keep nothing.
      return (x, signals, kept.at[slot].set(x, mode="drop")), None

    start = x, signals, jnp.zeros((count, *x.shape), x.dtype)
    blocks = Block(cfg, self.dtype, self.backend, name="blocks")
    kinds = slots, number == cfg.num_layers - 1
    (x, signals, kept), _ = layers_lib.apply(
      block, blocks, start, kinds, self.remat
    )
    out["vision_tower_output"] = x
    own = cfg, self.dtype
    deep = [
      Merger(*own, joined=True, name=f"deep_{i}")(kept[i]) for i in range(count)
    ]
    inside = functools.partial(qwen2_5_vl_vision.inside, layout=layout)
    out["deep"] = jnp.stack([inside(one) for one in deep])
    out |= qwen2_5_vl_vision.pooled(signals, layout, cfg.patches_per_token)
    return inside(Merger(*own, name="merger")(x)), out
