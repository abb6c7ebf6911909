"""One token grid: (T, H, W) of a video as data inside static sizes.

A compiled program needs static shapes; a bucket gives them. Tokens stay packed:
row i of N_max is token i of the video, in order of time and space, and the rows
behind its N are padding. A grid that fills its bucket is not data: programs
have no trace of a mask.

Axes: T frames, A = H*W tokens of a frame, N = T*A video tokens; T_max, A_max,
N_max those of the bucket.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cacovid_jax import errors
from cacovid_jax.data import frames as frames_lib


@dataclasses.dataclass(frozen=True)
class GridBucket:
  """Sizes that a program is compiled for; hashable."""

  frames: int  # T_max.
  frame_tokens: int  # A_max.
  # N_max; 0 stands for T_max * A_max, all that could ever be needed. The rules
  # that look at frames one by one work on T_max * A_max rows all the same, so
  # several buckets near that product beat one wide one.
  tokens: int = 0

  def __post_init__(self):
    if not self.tokens:
      object.__setattr__(self, "tokens", self.frames * self.frame_tokens)
    sides = (self.frames, self.frame_tokens)
    if min(sides) < 1 or not max(sides) <= self.tokens <= math.prod(sides):
      raise errors.UserError(
        f"{self} cannot be filled; frames and frame_tokens must be at least 1, "
        "tokens between the larger of them and their product"
      )

  def holds(self, grid):
    """Returns True if a video of grid (T, H, W) fits."""
    num_frames, height, width = grid
    area = height * width
    fits = num_frames <= self.frames and area <= self.frame_tokens
    return fits and num_frames * area <= self.tokens


def pick(grid, buckets):
  """Returns the smallest bucket that holds a grid (T, H, W), or a UserError.

  The fewest rows win, then the fewest rows frame by frame, then the first.
  """
  grid = check(grid)
  fits = [bucket for bucket in buckets if bucket.holds(grid)]
  if not fits:
    num_frames, height, width = grid
    area = height * width
    form = "{0.frames} frames of {0.frame_tokens} ({0.tokens} in all)"
    listed = ", ".join(map(form.format, buckets))
    raise errors.UserError(
      f"no bucket holds a video of {num_frames} x {height} x {width} tokens "
      f"(T x H x W); buckets: {listed or 'none'}; add "
      f"GridBucket({num_frames}, {area}, {num_frames * area}) or a larger one, "
      "or sample fewer frames or fewer pixels"
    )
  return min(fits, key=_size)


def make_buckets(sizes, processor, rule, *, strict=True):
  """Returns the GridBuckets of videos at a `frames.FrameRule`, smallest first.

  `sizes` are config.data.buckets, (temporal patches, tokens of one[, tokens])
  each; those for fewer frames than any clip shows are refused if `strict`, or
  else left out. Without any, one for the largest temporal patches that the
  `processors.Processor` allows, and one half way (in proportion) from the
  smallest: limits of 128 and 256 tokens give buckets of 181 and 256. Where T or
  what a frame may take differs much, see `_lengths`.
  """
  num_frames, fewest = rule.num_frames, rule.fewest
  patches, least = (
    -(-count // processor.temporal_patch_size) for count in (num_frames, fewest)
  )
  sizes = [tuple(size) for size in sizes]
  if not sizes and _differ(processor, rule):
    sizes = _lengths(processor, fewest, num_frames)
  elif not sizes:
    areas = processor.patch_tokens(num_frames)
    areas = int(math.prod(areas) ** 0.5), areas[1]
    sizes = [(patches, area) for area in areas]
  try:
    found = {GridBucket(*map(int, size)) for size in sizes}
  except (TypeError, ValueError) as error:
    raise errors.UserError(
      f"config.data.buckets={tuple(sizes)}: give (temporal patches, tokens of"
      " one) or (temporal patches, tokens of one, tokens) for each"
    ) from error
  short = {bucket for bucket in found if bucket.frames < least}
  if all(bucket.frames < patches for bucket in found):
    short = found  # Clips of all frames would fit none.
  if short and strict:
    raise errors.UserError(
      f"config.data.buckets: {min(short, key=_size)} has fewer temporal patches"
      f" than the {patches} of {num_frames} frames; no clip would use it"
    )
  if short == found:
    return make_buckets((), processor, rule)
  return sorted(found - short, key=_size)


def _differ(processor, rule) -> bool:
  """Returns whether one length of buckets would not do for a rule's clips."""
  if rule.fills:
    return False
  tokens = processor.patch_tokens
  varies = rule.name == frames_lib.RATE_RULE
  return varies or tokens(rule.fewest) != tokens(rule.num_frames)


def _lengths(processor, fewest: int, most: int):
  """Yields (frames, frame tokens, tokens) of buckets, each for clips that are
  up to twice as long as those of the one before."""
  size = processor.temporal_patch_size
  start = min(max(fewest, size), most)
  while start <= most:
    end = min(2 * start, most)
    counts = range(start, end + 1)
    areas = [processor.patch_tokens(count)[1] for count in counts]
    tokens = [
      -(-n // size) * area for n, area in zip(counts, areas, strict=True)
    ]
    yield -(-end // size), max(areas), max(tokens)
    start = end + 1


def _size(bucket):
  """Returns what buckets are ordered by: rows, then rows frame by frame."""
  return bucket.tokens, bucket.frames * bucket.frame_tokens


def check(grid):
  """Returns grid as three ints; raises UserError if a side is empty."""
  grid = tuple(map(int, grid))
  told = f"grid {grid}: give (T, H, W), every side at least 1"
  errors.check(len(grid) == 3 and min(grid) >= 1, told)
  return grid


@dataclasses.dataclass(frozen=True)
class TokenGrid:
  """The grid of ONE video inside a bucket: a pytree, its bucket static.

  A full grid has no leaves; it is as static as its bucket.
  """

  num_frames: Any  # T, int32[]; a Python int in a full grid,
  height: Any  # as is H,
  width: Any  # and W.
  bucket: GridBucket

  @classmethod
  def of(cls, grid, bucket=None):
    """Returns the TokenGrid of a (T, H, W), or the TokenGrid given.

    Full without a bucket, else data in it, ready for the device. An empty side
    or a grid that does not fit is a UserError.
    """
    if isinstance(grid, cls):
      return grid
    grid = check(grid)
    if bucket is None:
      num_frames, height, width = grid
      return cls(*grid, GridBucket(num_frames, height * width))
    pick(grid, [bucket])
    return cls(*map(np.int32, grid), bucket)

  @property
  def shape(self):
    """(T, H, W)."""
    return self.num_frames, self.height, self.width

  @property
  def frame_tokens(self):
    """A, int32[]."""
    return self.height * self.width

  @property
  def num_tokens(self):
    """N, int32[]."""
    return self.num_frames * self.frame_tokens

  @property
  def full(self):
    """True if the grid is static and leaves no padding."""
    return all(isinstance(size, int) for size in self.shape) and (
      (self.num_frames, self.frame_tokens, self.num_tokens)
      == dataclasses.astuple(self.bucket)
    )

  @property
  def valid_frames(self):
    """bool[T_max], True for the video's own frames."""
    return np.arange(self.bucket.frames) < self.num_frames

  @property
  def valid_tokens(self):
    """bool[N_max], True for the video's own tokens."""
    return np.arange(self.bucket.tokens) < self.num_tokens

  @property
  def valid_frame_tokens(self):
    """bool[A_max], True for the places that the video's frames have."""
    return np.arange(self.bucket.frame_tokens) < self.frame_tokens

  def by_frame(self, x, value=0):
    """Returns x [N_max, ...] as [T_max, A_max, ...], `value` as padding."""
    shape = (self.bucket.frames, self.bucket.frame_tokens)
    if self.full:
      return x.reshape(*shape, *x.shape[1:])
    valid = self.valid_frames[:, None] & self.valid_frame_tokens
    rows = np.arange(shape[0])[:, None] * self.frame_tokens
    rows = rows + np.arange(shape[1])  # [T_max, A_max]
    rows = jnp.where(valid, rows, x.shape[0])
    return jnp.asarray(x).at[rows].get(mode="fill", fill_value=value)

  def packed(self, x, value=0):
    """Returns x [T_max, A_max, ...] as [N_max, ...], `value` as padding."""
    x = x.reshape(-1, *x.shape[2:])
    if self.full:
      return x
    rows = np.arange(self.bucket.tokens)
    place = rows // self.frame_tokens * self.bucket.frame_tokens
    place = place + rows % self.frame_tokens
    place = jnp.where(self.valid_tokens, place, x.shape[0])
    return jnp.asarray(x).at[place].get(mode="fill", fill_value=value)

  def frame_means(self, x):
    """Returns float32[T_max, ...], means over frames of x float[N_max, ...].

    Without influence of padding, whose frames have zero.
    """
    x = x.astype(jnp.float32)
    if self.full:
      return self.by_frame(x).mean(axis=1)
    # A product instead of a sum by frame numbers: those are not reproducible
    # on a GPU. A zero weight would let a NaN of the padding through.
    rows = x.reshape(x.shape[0], -1)
    rows = jnp.where(self.valid_tokens[:, None], rows, 0.0)
    frame = np.arange(self.bucket.tokens) // self.frame_tokens
    own = frame == np.arange(self.bucket.frames)[:, None]  # [T_max, N_max]
    sums = jnp.matmul(own.astype(jnp.float32), rows, precision="highest")
    means = sums / jnp.float32(self.frame_tokens)
    return means.reshape(self.bucket.frames, *x.shape[1:])

  def frame_changes(self, x):
    """Returns float32[T_max, D], how much frames of x float[N_max, D] change.

    Means over a frame's tokens of the distance to the same place of the frame
    before, channel by channel; zero for the first, and anything in padding.
    """
    change = jnp.abs(jnp.diff(self.by_frame(x.astype(jnp.float32)), axis=0))
    means = change.sum(axis=1) / jnp.float32(self.frame_tokens)
    return jnp.pad(means, ((1, 0), (0, 0)))


def _flatten(grid):
  leaves, static = ((), grid.shape) if grid.full else (grid.shape, None)
  return leaves, (static, grid.bucket)


def _unflatten(static, leaves):
  return TokenGrid(*(static[0] or leaves), static[1])


jax.tree_util.register_pytree_node(TokenGrid, _flatten, _unflatten)


def first(mask, count: int):
  """Returns int32[count], where `mask` bool[n] is True, ascending; n behind.

  The first `count` of more. A sort: `jnp.nonzero` is two prefix sums and a
  scatter, which XLA takes ten times as long to compile for a CPU.
  """
  size = mask.shape[0]
  place = jnp.where(mask, jnp.arange(size, dtype=jnp.int32), size)
  place = jnp.pad(place, (0, max(count - size, 0)), constant_values=size)
  return jnp.sort(place)[:count]


def fill(x, valid, value):
  """Returns x where valid, else value; x itself if all is known to be."""
  if isinstance(valid, np.ndarray) and valid.all():
    return x
  return jnp.where(valid, x, value)
