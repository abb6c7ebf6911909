"""Frames of a clip as patches for the vision tower of Qwen2.5-VL.

Frames keep their aspect ratio, in sides that are multiples of a merged token's,
so that the grid differs from clip to clip. Letters: F frames, h w pixels of a
frame; T H W the token grid after merging, P = T (m H) (m W) patches, C = 3
channels, t p m frames, pixels and patches a side of a patch, a patch, a token.
Paper: https://arxiv.org/abs/2502.13923, section 2.1.
"""

import dataclasses
import math

import numpy as np

from cacovid_jax import errors
from cacovid_jax.data import frames as frames_lib

# Statistics of CLIP's images, which the tower was trained with.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
# What the paper's scripts allow a frame, in tokens and in pixels of 28 x 28
# tokens.
PAPER_TOKENS = (128, 256)
PAPER_MIN_PIXELS = 128 * 28 * 28
PAPER_MAX_PIXELS = 256 * 28 * 28

_MAX_ASPECT = 200


def smart_resize(
  height: int,
  width: int,
  *,
  factor: int = 28,
  min_pixels: int,
  max_pixels: int,
) -> tuple[int, int]:
  """Returns the (height, width) that a frame is resized to.

  Both are multiples of `factor`, close to the frame's aspect ratio; their
  product lies between the limits, as far as multiples can.

  Args:
    height: h, pixels.
    width: w, pixels.
    factor: pixels of a merged token's side.
    min_pixels: a smaller frame is enlarged.
    max_pixels: a larger frame is reduced.

  Raises:
    ShapeError: no such size suits the frame.
  """
  if min(height, width) < 1:
    raise frames_lib.ShapeError(
      f"a frame of {width} x {height} pixels holds nothing",
      "leave the clip out",
    )
  if max(height, width) > _MAX_ASPECT * min(height, width):
    raise frames_lib.ShapeError(
      f"a frame of {width} x {height} pixels is longer than {_MAX_ASPECT} times"
      " its width",
      "crop the clip",
    )
  # Python's round, half to even, as in the reference.
  rows, columns = round(height / factor), round(width / factor)
  if rows * columns * factor**2 > max_pixels:
    scale = math.sqrt(height * width / max_pixels)
    rows = max(1, math.floor(height / scale / factor))
    columns = max(1, math.floor(width / scale / factor))
  elif rows * columns * factor**2 < min_pixels:
    scale = math.sqrt(min_pixels / (height * width))
    rows = math.ceil(height * scale / factor)
    columns = math.ceil(width * scale / factor)
  return rows * factor, columns * factor


def patchify(
  frames: np.ndarray, *, patch: int, temporal_patch: int, merge: int
) -> np.ndarray:
  """Returns [P, C*t*p*p] patches of frames [F,h,w,C], any dtype.

  Rows run over slices, then over tokens row by row, then over the m x m patches
  of a token. Columns are (channel, frame, row, column), as in the weight of the
  tower's convolution. Where F is no multiple of t, the last frame is repeated.

  Args:
    frames: h and w multiples of p m.
    patch: p.
    temporal_patch: t.
    merge: m.
  """
  missing = -len(frames) % temporal_patch
  if missing:
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


def sampled_fps(num_samples: int, duration: float) -> float | None:
  """Returns frames a second of F samples; None if the seconds are unknown."""
  return num_samples / duration if duration > 0 else None


@dataclasses.dataclass(frozen=True, eq=False)
class Patches:
  """One clip for the tower.

  Attributes:
    patches: float32[P, C*t*p*p].
    grid: (T, H, W), tokens after merging.
    merge: m.
    seconds_per_slice: time between two rows of the grid's first axis, which
      M-RoPE turns into positions.
  """

  patches: np.ndarray
  grid: tuple[int, int, int]
  merge: int
  seconds_per_slice: float

  @property
  def num_tokens(self) -> int:
    """N, the video tokens in the prompt."""
    return math.prod(self.grid)

  @property
  def grid_thw(self) -> tuple[int, int, int]:
    """The grid in patches, as the reference's `video_grid_thw` tells it."""
    T, H, W = self.grid
    return T, H * self.merge, W * self.merge


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProcessorConfig:
  """What a Qwen2.5-VL checkpoint does to frames before its vision tower.

  Attributes:
    patch_size: p, pixels.
    temporal_patch_size: t, frames.
    merge_size: m, patches.
    min_pixels: least pixels of a resized frame.
    max_pixels: most pixels of a resized frame.
    mean: of each channel, of pixels between 0 and 1.
    std: likewise.
    resample: PIL's number of the filter; 3 is bicubic.
    max_video_tokens: tokens that set the pixels of a whole clip: its frames
      share 90 % of them evenly. None bounds each frame by itself, as releases
      of the reference below 5.22 do.
  """

  patch_size: int = 14
  temporal_patch_size: int = 2
  merge_size: int = 2
  min_pixels: int = 128 * 28 * 28
  max_pixels: int = 768 * 28 * 28
  mean: tuple[float, float, float] = CLIP_MEAN
  std: tuple[float, float, float] = CLIP_STD
  resample: int = frames_lib.BICUBIC
  max_video_tokens: int | None = None

  def __post_init__(self):
    for name in ("patch_size", "temporal_patch_size", "merge_size"):
      if getattr(self, name) < 1:
        raise errors.UserError(
          f"{name}={getattr(self, name)}: give a positive number"
        )
    if not 0 < self.min_pixels <= self.max_pixels:
      raise errors.UserError(
        f"min_pixels={self.min_pixels} and max_pixels={self.max_pixels}: give"
        " positive numbers, the smaller one first"
      )
    frames_lib.check_statistics(self.mean, self.std, self.resample)

  @classmethod
  def tiny(cls) -> "ProcessorConfig":
    """For tests: patches of 4 pixels, at most 24 tokens a slice."""
    return cls(patch_size=4, min_pixels=4 * 8 * 8, max_pixels=24 * 8 * 8)

  @classmethod
  def from_files(
    cls,
    directory,
    *,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
  ) -> "ProcessorConfig":
    """Reads the processor's JSON of a Hugging Face checkpoint directory.

    Args:
      directory: a checkpoint of Qwen2.5-VL.
      min_pixels: replaces the file's value, which in the released checkpoints
        is made for images (`PAPER_MIN_PIXELS` is the paper's).
      max_pixels: likewise.
    """
    entry, path = frames_lib.read_processor(directory)
    try:
      frames_lib.check_steps(entry, path)
      size = entry.get("size") or {}
      values = {
        "min_pixels": entry.get("min_pixels")
        or size.get("shortest_edge")
        or size.get("min_pixels"),
        "max_pixels": entry.get("max_pixels")
        or size.get("longest_edge")
        or size.get("max_pixels"),
        "resample": entry.get("resample"),
      }
      for name in ("patch_size", "temporal_patch_size", "merge_size"):
        values[name] = entry.get(name)
      if entry.get("cap_pixels_per_frame"):
        values["max_video_tokens"] = entry.get("max_video_tokens", 128_000)
      values = {k: int(v) for k, v in values.items() if v is not None}
      for name in ("mean", "std"):
        if entry.get(f"image_{name}") is not None:
          values[name] = frames_lib.triple(entry[f"image_{name}"])
    except (ValueError, TypeError, AttributeError, OverflowError) as error:
      raise frames_lib.unusable(path, error) from error
    given = {"min_pixels": min_pixels, "max_pixels": max_pixels}
    values.update({k: v for k, v in given.items() if v is not None})
    try:
      return cls(**values)
    except errors.UserError as error:
      raise errors.UserError(f"{path}: {error}") from error

  @classmethod
  def with_paper_bounds(
    cls, directory, *, min_pixels: int = 0, max_pixels: int = 0
  ) -> "ProcessorConfig":
    """Reads the processor's JSON, with the paper's bounds on a frame.

    Those of released files are made for images. The paper's are taken in
    tokens, so that a model of other patches gets as many of them.

    Args:
      directory: a checkpoint of Qwen2.5-VL.
      min_pixels: another bound than the paper's; 0 for the paper's.
      max_pixels: likewise.
    """
    found = cls.from_files(directory)
    least, most = (count * found.factor**2 for count in PAPER_TOKENS)
    return dataclasses.replace(
      found,
      min_pixels=min_pixels or least,
      max_pixels=max_pixels or most,
    )

  @property
  def factor(self) -> int:
    """Pixels of a merged token's side."""
    return self.patch_size * self.merge_size

  def frame_size(
    self, height: int, width: int, num_frames: int
  ) -> tuple[int, int]:
    """Returns the (height, width) of each of F frames after resizing."""
    return smart_resize(
      height,
      width,
      factor=self.factor,
      min_pixels=self.min_pixels,
      max_pixels=self._max_pixels(num_frames),
    )

  def _max_pixels(self, num_frames: int) -> int:
    """Returns the most pixels of each of F frames."""
    if self.max_video_tokens is None:
      return self.max_pixels
    total = int(self.max_video_tokens * self.factor**2 * 0.9)
    share = total * self.temporal_patch_size // num_frames
    return max(min(self.max_pixels, share), int(self.min_pixels * 1.05))

  def slice_tokens(self, num_frames: int) -> tuple[int, int]:
    """Returns the fewest and the most tokens of a slice of F frames.

    Frames that are very long and narrow may lie beyond them.
    """
    least = -(-self.min_pixels // self.factor**2)
    most = self._max_pixels(num_frames) // self.factor**2
    return least, max(most, least)

  def grid(
    self, height: int, width: int, num_frames: int
  ) -> tuple[int, int, int]:
    """Returns (T, H, W) of F frames of h x w pixels, without any pixels."""
    height, width = self.frame_size(height, width, num_frames)
    return (
      -(-num_frames // self.temporal_patch_size),
      height // self.factor,
      width // self.factor,
    )

  def seconds_per_slice(self, fps: float | None) -> float:
    """Returns the time between slices of frames sampled `fps` times a second.

    A slice counts one second if that is not known, as in the reference.
    """
    return 1.0 if fps is None else self.temporal_patch_size / fps

  def resize_frame(self, frame: np.ndarray, num_frames: int) -> np.ndarray:
    """Returns uint8[h',w',3], one of F frames uint8[h,w,3], resized.

    Given to the decoder (`functools.partial(config.resize_frame,
    num_frames=F)`), it spares the memory of large frames.
    """
    height, width = self.frame_size(*frame.shape[:2], num_frames)
    return frames_lib.resize_frame(frame, (height, width), self.resample)

  def __call__(
    self,
    frames: np.ndarray,
    *,
    fps: float | None = None,
    resized: bool = False,
  ) -> Patches:
    """Returns the patches of one clip.

    Args:
      frames: uint8[F,h,w,3], upright.
      fps: of these frames (see `sampled_fps`), not of the clip; a slice counts
        one second if None, as in the reference.
      resized: whether the decoder has applied `resize_frame`.
    """
    if frames.ndim != 4 or frames.shape[-1] != 3 or not len(frames):
      raise ValueError(f"frames of shape {frames.shape} are not [F,h,w,3]")
    if fps is not None and not 0 < fps < math.inf:
      raise errors.UserError(f"{fps} frames a second: give a positive number")
    num_frames = len(frames)
    if not resized:
      frames = np.stack(
        [self.resize_frame(frame, num_frames) for frame in frames]
      )
    _, height, width, _ = frames.shape
    grid = (
      -(-num_frames // self.temporal_patch_size),
      height // self.factor,
      width // self.factor,
    )
    # Bytes are moved before they become floats: a quarter of the memory.
    patches = patchify(
      frames,
      patch=self.patch_size,
      temporal_patch=self.temporal_patch_size,
      merge=self.merge_size,
    )
    pixels = frames_lib.normalise(
      patches.reshape(len(patches), 3, -1), self.mean, self.std, axis=1
    )
    return Patches(
      pixels.reshape(patches.shape),
      grid,
      self.merge_size,
      self.seconds_per_slice(fps),
    )
