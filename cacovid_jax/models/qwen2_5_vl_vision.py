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
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from cacovid_jax import errors
from cacovid_jax.models import attention, hf_config, qwen2, rope, video_llm

# Not in any config.json: the released code has it fixed.
_RMS_NORM_EPS = 1e-6
_CHANNELS = 3
# Our sizes -> keys of the `vision_config` section.
_KEYS = dict(
  hidden_size="hidden_size",
  intermediate_size="intermediate_size",
  num_layers="depth",
  num_heads="num_heads",
  out_hidden_size="out_hidden_size",
  patch_size="patch_size",
  temporal_patch_size="temporal_patch_size",
  merge_size="spatial_merge_size",
  window_size="window_size",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionConfig:
  """Sizes of a tower; lengths in pixels, `full_layers` see a whole slice."""

  hidden_size: int
  intermediate_size: int
  num_layers: int
  num_heads: int
  out_hidden_size: int
  full_layers: tuple[int, ...]
  patch_size: int = 14
  temporal_patch_size: int = 2
  merge_size: int = 2
  window_size: int = 112
  rope_theta: float = 1e4

  @classmethod
  def qwen2_5_vl(cls, out_hidden_size):
    """The tower of every released size; the decoder's width differs."""
    return cls(
      hidden_size=1280,
      intermediate_size=3420,
      num_layers=32,
      num_heads=16,
      out_hidden_size=out_hidden_size,
      full_layers=(7, 15, 23, 31),
    )

  @classmethod
  def tiny(cls):
    """Windows of 2 x 2 tokens; CPU-sized, for tests."""
    return cls(
      hidden_size=32,
      intermediate_size=44,
      num_layers=3,
      num_heads=2,
      out_hidden_size=32,
      full_layers=(1,),
      patch_size=4,
      window_size=16,
    )

  @classmethod
  def from_hf(cls, config):
    """Reads the `vision_config` section of a config.json."""
    where = "vision_config."
    hf_config.require(
      config,
      where,
      model_type=["qwen2_5_vl", "qwen2_5_vl_vision"],
      hidden_act=["silu"],
      in_channels=[_CHANNELS],  # transformers 5.x,
      in_chans=[_CHANNELS],  # and 4.x.
    )
    rotary = config.get("rope_parameters") or {}
    hf_config.require(
      rotary, f"{where}rope_parameters.", rope_type=["axial", "default"]
    )
    full_layers = config.get("fullatt_block_indexes")
    depth = hf_config.number(config, "depth", where=where)
    if not isinstance(full_layers, list) or not all(
      isinstance(layer, int) and 0 <= layer < depth for layer in full_layers
    ):
      raise errors.UserError(
        f"config.json: {where}fullatt_block_indexes is {full_layers!r}; give a"
        f" list of layer numbers below depth {depth}"
      )
    found = cls(
      **hf_config.sizes(config, _KEYS, where),
      full_layers=tuple(sorted(full_layers)),
      rope_theta=hf_config.number(
        rotary, "rope_theta", float, default=1e4, where=where
      ),
    )
    token = found.patch_size * found.merge_size
    if found.window_size < token:
      raise errors.UserError(
        f"config.json: {where}window_size {found.window_size} is below one"
        f" token of {token} pixels"
      )
    # Rows and columns turn a quarter of a head's values each, in pairs.
    if found.hidden_size % (4 * found.num_heads):
      raise errors.UserError(
        f"config.json: {where}hidden_size {found.hidden_size} does not split"
        f" into num_heads {found.num_heads} of a multiple of 4"
      )
    return found

  def to_hf(self):
    """Returns the `vision_config` section, for 4.x and 5.x readers."""
    return hf_config.described(self, _KEYS) | {
      "model_type": "qwen2_5_vl",
      "in_chans": _CHANNELS,
      "in_channels": _CHANNELS,
      "hidden_act": "silu",
      "spatial_patch_size": self.patch_size,
      "fullatt_block_indexes": list(self.full_layers),
      "rope_parameters": {"rope_type": "axial", "rope_theta": self.rope_theta},
    }

  @property
  def head_dim(self):
    return self.hidden_size // self.num_heads

  @property
  def patch_values(self):
    """Values of one patch: channels x time x rows x columns."""
    return _CHANNELS * self.temporal_patch_size * self.patch_size**2

  @property
  def patches_per_token(self):
    return self.merge_size**2

  @property
  def window_side(self):
    """Tokens along one side of a window."""
    return self.window_size // self.merge_size // self.patch_size

  @property
  def mlp_width(self):
    """Values of a patch that the MLP holds at a time: both halves."""
    return 2 * self.intermediate_size

  def num_patches(self, grid):
    """Returns P of a video's token grid (T, H, W)."""
    return math.prod(grid) * self.patches_per_token

  def input_shape(self, grid):
    """Returns the shape of what the tower takes of a video."""
    return self.num_patches(grid), self.patch_values

  def flops(self, grid, out_width):
    """Returns the operations from one video's patches to its features.

    Args:
      grid: (T, H, W) of its tokens.
      out_width: of the features.
    """
    sizes, D = Sizes.of([grid], self), self.hidden_size  # noqa: N806
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


class Segments(NamedTuple):
  """Patches that attend to each other, one segment per row, right padded."""

  rows: Any  # int32[S, R] patches of each segment; 0 behind its end.
  lengths: Any  # int32[S] patches in it; 1 for a segment that does not exist.
  place: Any  # int32[P] where each patch is in `rows`, flattened.


class Layout(NamedTuple):
  """What the tower must know of ONE video's grid, as arrays.

  Padded to `Sizes`, so that a compiled program takes every grid they hold.
  Patches behind the valid ones see nothing and are seen by none.
  """

  coordinates: Any  # int32[2, P] row and column of each patch in its slice.
  windows: Segments
  slices: Segments
  num_tokens: Any  # int32[], N without padding.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
  """Static sizes of a `Layout`."""

  num_tokens: int
  num_windows: int
  num_slices: int
  tokens_per_slice: int

  @classmethod
  def of(cls, grids, config):
    """Returns the smallest sizes that hold each of the grids (T, H, W)."""
    side = config.window_side
    found = []
    for slices, height, width in map(_checked_grid, grids):
      windows = slices * -(-height // side) * -(-width // side)
      per_slice = height * width
      found.append((slices * per_slice, windows, slices, per_slice))
    if not found:
      raise ValueError("sizes of no grid at all")
    names = [field.name for field in dataclasses.fields(cls)]
    largest = (max(column) for column in zip(*found, strict=True))
    return cls(**dict(zip(names, largest, strict=True)))

  @classmethod
  def of_bucket(cls, config, *, num_slices, tokens_per_slice, num_tokens):
    """Returns sizes that hold every grid within the three limits.

    Args:
      config: `VisionConfig`.
      num_slices: largest T.
      tokens_per_slice: largest H·W, of whatever shape.
      num_tokens: largest N.
    """
    side = config.window_side
    # Long and narrow slices have the most windows, one token wide each.
    num_windows = max(
      min(num_slices, num_tokens // (height * width))
      * -(-height // side)
      * -(-width // side)
      for height in range(1, tokens_per_slice + 1)
      for width in range(1, tokens_per_slice // height + 1)
    )
    return cls(
      num_tokens=num_tokens,
      num_windows=num_windows,
      num_slices=num_slices,
      tokens_per_slice=tokens_per_slice,
    )


@functools.lru_cache(maxsize=32)
def layout(grid, config, sizes=None):
  """Returns the `Layout` of one video, NumPy arrays made on the host.

  Remembered: many videos have one grid. Nobody writes into the arrays.

  Args:
    grid: (T, H, W) of its tokens, after merging.
    config: `VisionConfig`.
    sizes: `Sizes` to pad to; None for none.
  """
  exact = Sizes.of([grid], config)
  sizes = sizes or exact
  short = [
    f"{name} {getattr(sizes, name)} of {needed}"
    for name, needed in dataclasses.asdict(exact).items()
    if getattr(sizes, name) < needed
  ]
  if short:
    raise ValueError(f"no room for grid {tuple(grid)}: {', '.join(short)}")
  _, height, width = map(int, grid)
  merge, side = config.merge_size, config.window_side

  token = np.arange(exact.num_tokens)
  slice_of = token // (height * width)
  row, column = token // width % height, token % width
  # Windows of a slice are numbered row by row; those at the far edges are
  # smaller. None reaches from one slice into the next.
  across, down = -(-width // side), -(-height // side)
  window_of = (slice_of * down + row // side) * across + column // side

  inside = np.arange(config.patches_per_token)
  coordinates = np.stack(
    [
      (row[:, None] * merge + inside // merge).ravel(),
      (column[:, None] * merge + inside % merge).ravel(),
    ]
  )
  num_patches = sizes.num_tokens * config.patches_per_token
  extra = num_patches - coordinates.shape[1]
  return Layout(
    coordinates=np.pad(coordinates, [(0, 0), (0, extra)]).astype(np.int32),
    windows=_segments(
      window_of, sizes.num_windows, side**2, num_patches, config
    ),
    slices=_segments(
      slice_of, sizes.num_slices, sizes.tokens_per_slice, num_patches, config
    ),
    num_tokens=np.int32(exact.num_tokens),
  )


def _segments(segment_of, num_segments, tokens, num_patches, config):
  """Returns `Segments` of up to `tokens` tokens from each token's segment."""
  size = config.patches_per_token
  counts = np.bincount(segment_of, minlength=num_segments)
  # Stable: the tokens of a segment stay in the order of the slice.
  order = np.argsort(segment_of, kind="stable")
  starts = np.cumsum(counts) - counts
  slot = np.arange(len(order)) - starts[segment_of[order]]
  place = np.zeros(len(order), np.int64)
  place[order] = segment_of[order] * tokens + slot
  place = (place[:, None] * size + np.arange(size)).ravel()
  rows = np.zeros(num_segments * tokens * size, np.int32)
  rows[place] = np.arange(len(place))
  extra = num_patches - len(place)
  return Segments(
    rows=rows.reshape(num_segments, -1),
    lengths=np.maximum(counts * size, 1).astype(np.int32),
    place=np.pad(place, (0, extra)).astype(np.int32),
  )


def _checked_grid(grid):
  slices, height, width = map(int, grid)
  if min(slices, height, width) < 1:
    raise ValueError(f"grid {tuple(grid)} holds no token")
  return slices, height, width


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

  Args:
    q: float[P, N, H], turned.
    k: float[P, N, H], turned.
    segments: `Segments`; patches in none of them get a number without meaning.
  """
  got = attention.attention_received(
    jnp.take(q, segments.rows, axis=0),
    jnp.take(k, segments.rows, axis=0),
    segments.lengths,
  )
  return jnp.take(got.reshape(-1), segments.place)


def attend(q, k, v, segments, backend="auto"):
  """Returns float[P, N, H]: bidirectional attention inside the segments."""

  def gather(x):
    return jnp.take(x, segments.rows, axis=0)  # [S, R, N, H]

  out = attention.attention(
    gather(q), gather(k), gather(v), lengths=segments.lengths, backend=backend
  )
  return jnp.take(out.reshape(-1, *q.shape[1:]), segments.place, axis=0)


class Block(nn.Module):
  """Attention and a gated MLP with biases, both behind an RMSNorm."""

  config: VisionConfig
  dtype: jnp.dtype = jnp.float32
  backend: str = "auto"

  @nn.compact
  def __call__(self, x, signals, is_full, is_last, cos, sin, layout):
    """Returns (float[P, D], signals).

    Args:
      x: float[P, D].
      signals: dict of the wanted `video_llm.SIGNALS`, float32[P, ...].
      is_full: bool[], True to see the whole slice, False the window.
      is_last: bool[], True for the layer whose signals are to be returned.
      cos: float32[P, H] of `rotary`.
      sin: float32[P, H].
      layout: `Layout`.
    """
    cfg = self.config

    def dense(size, name):
      return nn.Dense(size, dtype=self.dtype, name=name)

    def norm(name):
      return qwen2.RMSNorm(_RMS_NORM_EPS, self.dtype, name=name)

    h = dense(3 * cfg.hidden_size, "qkv")(norm("norm1")(x))
    # All queries, then all keys, then all values.
    h = h.reshape(-1, 3, cfg.num_heads, cfg.head_dim)
    q, k, v = rotate(h[:, 0], cos, sin), rotate(h[:, 1], cos, sin), h[:, 2]
    # A branch and not two kinds of layers: the layers stay one scan.
    h = jax.lax.cond(
      is_full,
      lambda: attend(q, k, v, layout.slices, self.backend),
      lambda: attend(q, k, v, layout.windows, self.backend),
    )
    x = x + dense(cfg.hidden_size, "proj")(h.reshape(x.shape))

    def observe():
      last_is_full = cfg.num_layers - 1 in cfg.full_layers
      segments = layout.slices if last_is_full else layout.windows
      found = {
        "vision_attention": lambda: received(q, k, segments),
        "vision_keys": lambda: k.astype(jnp.float32).mean(axis=1),
      }
      return {name: found[name]() for name in signals}

    if signals:
      # A branch and not an output of each layer: only one layer pays.
      signals = jax.lax.cond(is_last, observe, lambda: signals)

    h = norm("norm2")(x)
    gate = nn.silu(dense(cfg.intermediate_size, "gate_proj")(h))
    up = dense(cfg.intermediate_size, "up_proj")(h)
    return x + dense(cfg.hidden_size, "down_proj")(gate * up), signals


class Merger(nn.Module):
  """Joins the patches of each token and maps them to the decoder's width."""

  config: VisionConfig
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x):
    """Returns float[N, out_hidden_size] of x float[P, D]."""
    cfg = self.config
    width = cfg.hidden_size * cfg.patches_per_token
    x = qwen2.RMSNorm(_RMS_NORM_EPS, self.dtype, name="ln_q")(x)
    x = x.reshape(-1, width)
    x = nn.Dense(width, dtype=self.dtype, name="linear_1")(x)
    x = nn.gelu(x, approximate=False)
    return nn.Dense(cfg.out_hidden_size, dtype=self.dtype, name="linear_2")(x)


class Tower(nn.Module):
  """Patch embedding, blocks (parameters stacked by depth) and merger."""

  config: VisionConfig
  dtype: jnp.dtype = jnp.float32
  backend: str = "auto"
  remat: bool = False

  @nn.compact
  def __call__(self, patches, layout, signals=()):
    """Returns (features float[N, out_hidden_size], out) of one video.

    Tokens stay in the order of the grid. Features of padding are zero.

    Args:
      patches: float[P, patch_values], normalised.
      layout: `Layout` for P patches.
      signals: of `video_llm.SIGNALS`; `out` then holds, of the last layer and
        averaged over the patches of a token, "vision_attention" float32[N], a
        sum over queries, and "vision_keys" float32[N, H], turned. Zero for
        padding.
    """
    cfg = self.config
    if len(patches) != layout.coordinates.shape[1]:
      raise ValueError(
        f"{len(patches)} patches for a layout of {layout.coordinates.shape[1]}"
      )
    x = nn.Dense(
      cfg.hidden_size, use_bias=False, dtype=self.dtype, name="patch_embed"
    )(patches.astype(self.dtype))
    out = {"patch_embed": x}
    cos, sin = rotary(layout.coordinates, cfg.head_dim, cfg.rope_theta)

    shapes = video_llm.signal_shapes(len(x), cfg.head_dim)
    signals = {name: jnp.zeros(shapes[name], jnp.float32) for name in signals}

    def block(layer, carry, kind):
      return layer(*carry, *kind, cos, sin, layout), None

    if self.remat:
      block = nn.remat(block, prevent_cse=False)
    scan = nn.scan(
      block,
      variable_axes={"params": 0},
      split_rngs={"params": True},
      length=cfg.num_layers,
    )
    number = np.arange(cfg.num_layers)
    is_full = jnp.asarray(np.isin(number, cfg.full_layers))
    is_last = jnp.asarray(number == cfg.num_layers - 1)
    blocks = Block(cfg, self.dtype, self.backend, name="blocks")
    (x, signals), _ = scan(blocks, (x, signals), (is_full, is_last))
    out["vision_tower_output"] = x
    features = Merger(cfg, self.dtype, name="merger")(x)
    valid = jnp.arange(len(features)) < layout.num_tokens

    def tokens(signal):  # [P, ...] -> [N, ...]
      groups = signal.reshape(-1, cfg.patches_per_token, *signal.shape[1:])
      inside = valid.reshape(-1, *[1] * (signal.ndim - 1))
      return jnp.where(inside, groups.mean(axis=1), 0)

    out |= {name: tokens(signal) for name, signal in signals.items()}
    return jnp.where(valid[:, None], features, 0), out
