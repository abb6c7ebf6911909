"""Where the patches of one video stand, told to Qwen2.5-VL's tower as arrays.

Axes: T time slices, H W token grid of a slice, N = T·H·W video tokens, P
patches, S segments of an attention (windows or slices), R patches of a segment;
see `qwen2_5_vl_vision`.
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


class Layout(NamedTuple):
  """What the tower must know of ONE video's grid, as arrays.

  Padded to `Sizes`, which a compiled program is for. Patches behind the valid
  ones see nothing and are seen by none.
  """

  coordinates: Any  # int32[2, P] row and column of each patch in its slice.
  windows: Segments
  slices: Segments
  num_tokens: Any  # int32[], N without padding.


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
      windows = slices * math.prod(_windows(height, width, config))
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
      * math.prod(_windows(height, width, config))
      for height in range(1, bucket.frame_tokens + 1)
      for width in range(1, bucket.frame_tokens // height + 1)
    )
    return cls(bucket.tokens, num_windows, bucket.frames, bucket.frame_tokens)


def _windows(height, width, config):
  """Returns how many windows a slice has, (down, across)."""
  side = config.window_side
  return -(-height // side), -(-width // side)


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

  token = np.arange(exact.num_tokens)
  slice_of = token // (height * width)
  row, column = token // width % height, token % width
  # Windows of a slice are numbered row by row; those at the far edges are
  # smaller. None reaches from one slice into the next.
  down, across = _windows(height, width, config)
  window_of = (slice_of * down + row // side) * across + column // side

  inside = np.stack(np.divmod(np.arange(config.patches_per_token), merge))
  coordinates = np.stack([row, column])[..., None] * merge + inside[:, None]
  coordinates = coordinates.reshape(2, -1)
  num_patches = sizes.num_tokens * config.patches_per_token
  extra = num_patches - coordinates.shape[1]

  def segments(of, number, tokens):
    return _segments(of, number, tokens, num_patches, config.patches_per_token)

  return Layout(
    coordinates=np.pad(coordinates, [(0, 0), (0, extra)]).astype(np.int32),
    windows=segments(window_of, sizes.num_windows, side**2),
    slices=segments(slice_of, sizes.num_slices, sizes.tokens_per_slice),
    num_tokens=np.int32(exact.num_tokens),
  )


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
