"""Where the patches of one video stand, told to a tower as arrays.

Qwen2.5-VL's has windows; Qwen3-VL's has a learned table of positions instead.

Axes: T time slices, H W token grid of a slice, N = T·H·W video tokens, P
patches, S segments of an attention (windows or slices), R patches of a segment;
see `qwen2_5_vl_vision` and `qwen3_vl_vision`.
Paper: https://arxiv.org/abs/2502.13923 (section 2.1.1).
"""

import functools
import math
from typing import Any, NamedTuple

import numpy as np


class Segments(NamedTuple):
  """Patches that attend to each other, one segment per row, right padded."""

  rows: Any  # int32[S, R] patches of each segment; 0 behind its end.
  lengths: Any  # int32[S] patches in it; 1 for a segment that does not exist.
  place: Any  # int32[P] where each patch is in `rows`, flattened.


class Places(NamedTuple):
  """Where each patch lies in a learned table, between four of its entries."""

  index: Any  # int32[4, P].
  weight: Any  # float32[4, P], sums of 1.


class Layout(NamedTuple):
  """What the tower must know of ONE video's grid, as arrays.

  Padded to `Sizes`, which a compiled program is for. Patches behind the valid
  ones see nothing and are seen by none.
  """

  coordinates: Any  # int32[2, P] row and column of each patch in its slice.
  windows: Segments | None  # None of a tower without any.
  slices: Segments
  num_tokens: Any  # int32[], N without padding.
  places: Places | None = None  # None of a tower without a table.


class Sizes(NamedTuple):
  """Static sizes of a `Layout`."""

  num_tokens: int
  num_windows: int
  num_slices: int
  tokens_per_slice: int

  @classmethod
  def of(cls, grids, config):
    """Returns the smallest sizes that hold each of the grids (T, H, W)."""
    found = []
    for grid in grids:
      slices, height, width = map(int, grid)
      if min(slices, height, width) < 1:
        raise ValueError(f"grid {tuple(grid)} holds no token")
      windows = slices * _num_windows(height, width, config)
      area = height * width
      found.append((slices * area, windows, slices, area))
    if not found:
      raise ValueError("sizes of no grid at all")
    return cls(*map(max, zip(*found, strict=True)))

  @classmethod
  def of_bucket(cls, bucket, config):
    """Returns sizes that hold every grid of a `token_grid.GridBucket`."""
    # Long and narrow slices have the most windows, one token wide each.
    num_windows = max(
      min(bucket.frames, bucket.tokens // (height * width))
      * _num_windows(height, width, config)
      for height in range(1, bucket.frame_tokens + 1)
      for width in range(1, bucket.frame_tokens // height + 1)
    )
    return cls(bucket.tokens, num_windows, bucket.frames, bucket.frame_tokens)


def _windows(height, width, config):
  """Returns how many windows a slice has, (down, across)."""
  side = config.window_side
  return -(-height // side), -(-width // side)


def _num_windows(height, width, config):
  """Returns how many windows a slice has, 0 of a tower without any."""
  if config.window_side is None:
    return 0
  return math.prod(_windows(height, width, config))


@functools.lru_cache(maxsize=32)
def layout(grid, config, sizes=None):
  """Returns the `Layout` of one video's grid (T, H, W), padded to `Sizes`.

  Remembered: many videos have one grid. Nobody writes into its NumPy arrays.
  """
  exact = Sizes.of([grid], config)
  sizes = sizes or exact
  each = zip(Sizes._fields, sizes, exact, strict=True)
  short = [f"{name} {room} of {own}" for name, room, own in each if room < own]
  if short:
    raise ValueError(f"no room for grid {tuple(grid)}: {', '.join(short)}")
  _, height, width = map(int, grid)
  merge, side = config.merge_size, config.window_side
  table_side = config.table_side

  token = np.arange(exact.num_tokens)
  slice_of = token // (height * width)
  row, column = token // width % height, token % width

  inside = np.stack(np.divmod(np.arange(config.patches_per_token), merge))
  coordinates = np.stack([row, column])[..., None] * merge + inside[:, None]
  coordinates = coordinates.reshape(2, -1).astype(np.int32)
  num_patches = sizes.num_tokens * config.patches_per_token
  extra = num_patches - coordinates.shape[1]

  def segments(of, number, tokens):
    return _segments(of, number, tokens, num_patches, config.patches_per_token)

  def padded(x):
    return np.pad(x, [(0, 0), (0, extra)])

  windows = places = None
  if side is not None:
    # Windows of a slice are numbered row by row; those at the far edges are
    # smaller. None reaches from one slice into the next.
    down, across = _windows(height, width, config)
    window_of = (slice_of * down + row // side) * across + column // side
    windows = segments(window_of, sizes.num_windows, side**2)
  if table_side is not None:
    frame = np.array([height, width]) * merge
    places = Places(*map(padded, interpolate(coordinates, frame, table_side)))
  return Layout(
    coordinates=padded(coordinates),
    windows=windows,
    slices=segments(slice_of, sizes.num_slices, sizes.tokens_per_slice),
    num_tokens=np.int32(exact.num_tokens),
    places=places,
  )


def interpolate(coordinates, frame, side):
  """Returns the `Places` of int[2, P] in a table of side x side entries.

  Bilinear; the corners of a frame of int[2] patches are those of the table.
  """
  exact = coordinates * ((side - 1) / np.maximum(frame - 1, 1))[:, None]
  low = np.minimum(np.floor(exact).astype(np.int32), side - 1)
  high = np.minimum(low + 1, side - 1)
  part = exact - low
  rows, columns = ([(low[i], 1 - part[i]), (high[i], part[i])] for i in (0, 1))
  corners = [(row, column) for row in rows for column in columns]
  index = [row * side + column for (row, _), (column, _) in corners]
  weight = [by_row * by_column for (_, by_row), (_, by_column) in corners]
  return Places(np.stack(index), np.stack(weight).astype(np.float32))


def _segments(segment_of, num_segments, tokens, num_patches, size):
  """Returns `Segments` of up to `tokens` tokens from each token's segment."""
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
  return Segments(
    rows=rows.reshape(num_segments, -1),
    lengths=np.maximum(counts * size, 1).astype(np.int32),
    place=np.pad(place, (0, num_patches - len(place))).astype(np.int32),
  )


def patchify(frames, *, patch, temporal_patch, merge):
  """Returns [P, C*t*p*p] patches of F frames [F,h,w,C], any dtype.

  Of p x p pixels of t frames, m x m of which are a token of an H x W grid.

  Rows run over temporal patches, then over tokens row by row, then over the
  m x m patches of a token. Columns are (channel, frame, row, column), as in the
  weight of the tower's convolution. Where F is no multiple of t, the last frame
  is repeated.
  """
  if missing := -len(frames) % temporal_patch:
    frames = np.concatenate([frames, np.repeat(frames[-1:], missing, axis=0)])
  F, h, w, C = frames.shape
  side = patch * merge
  if h % side or w % side:
    raise ValueError(f"{w} x {h} pixels are no multiples of {side}")
  T, H, W = F // temporal_patch, h // side, w // side
  split = frames.reshape(
    T, temporal_patch, H, merge, patch, W, merge, patch, C
  )  # [T, t, H, m, p, W, m, p, C]
  split = split.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7)
  return split.reshape(T * H * W * merge**2, -1)  # [T,H,W,m,m, C,t,p,p]
