"""Frames of a clip -> what a vision tower takes, one class per model.

Letters: F frames, h w pixels of a frame, S pixels of a square tile's side; T H
W the token grid, P patches, C = 3 channels, t p m frames, pixels and patches a
side of a patch, a patch, a token.
"""

import abc
import dataclasses
import math
from typing import Any, ClassVar, NamedTuple

import numpy as np
from PIL import Image

from cacovid_jax import errors
from cacovid_jax.data import frames as frames_lib
from cacovid_jax.models import processor_files, qwen2_5_vl_layout

# Statistics of CLIP's images, which Qwen2.5-VL's tower was trained with.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
# What the paper's scripts allow a frame: tokens, and pixels of 28 x 28 tokens.
PAPER_TOKENS = (128, 256)
PAPER_MIN_PIXELS, PAPER_MAX_PIXELS = (28 * 28 * x for x in PAPER_TOKENS)

_MAX_ASPECT = 200
_MAX_SIDE = 8192


class TowerInputs(NamedTuple):
  """ONE clip for the tower; a pytree."""

  # float32[F, S, S, C] pixels or float32[P, C*t*p*p] patches, or their bytes,
  # uint8, which `VideoLLM.encode` looks up in `table`.
  values: Any
  grid: tuple[int, int, int]  # (T, H, W) of the video's tokens.
  # Seconds between temporal patches; of a model that writes the time as text,
  # the middles of all T of them.
  second_per_grid_t: float | tuple[float, ...] = 1.0
  layout: Any = None  # Of the grid, see `VideoLLM.tower_inputs`.
  table: Any = None  # float32[256, C], what the tower takes for each byte.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Processor(abc.ABC):
  """What a checkpoint does to frames before its vision tower."""

  mean: tuple[float, float, float]  # Of each channel, of pixels from 0 to 1.
  std: tuple[float, float, float]  # Standard deviation of each channel.
  resample: int = frames_lib.BICUBIC  # PIL's filter; 3 is bicubic.

  one_grid: ClassVar[bool]  # Whether clips of as many frames have one grid.
  needs_statistics: ClassVar[bool] = False  # Whether files must tell them.
  tells_time: ClassVar[bool] = False  # Whether prompts hold a clip's seconds.
  # Whether a file about images will do where there is none about videos.
  reads_images: ClassVar[bool] = True
  # What files of earlier runs call the class, and its fields there.
  _on_disk: ClassVar[str]

  def __post_init__(self):
    mean, std = tuple(self.mean), tuple(self.std)
    errors.check(
      all(map(math.isfinite, mean + std)) and min(std) > 0,
      f"mean={mean} and std={std}: give finite numbers, the deviations above 0",
    )
    text = "give the number of a filter of PIL (3 is bicubic)"
    known = self.resample in list(Image.Resampling)
    errors.check(known, f"resample={self.resample}: {text}")

  @classmethod
  def from_files(cls, directory, **known) -> "Processor":
    """Reads a Hugging Face checkpoint directory; `known` are other fields."""

    def find(entry):
      common = processor_files.statistics(entry, cls.needs_statistics)
      return cls._sizes_of(entry) | common

    return processor_files.read(
      directory, find, lambda fields: cls(**fields, **known), cls.reads_images
    )

  @classmethod
  @abc.abstractmethod
  def _sizes_of(cls, entry) -> dict[str, int]:
    """Returns the other fields that a file's JSON tells."""

  def with_bounds(self, min_pixels=0, max_pixels=0):
    """Returns the processor with other bounds on a frame, 0 for its own."""
    errors.check(
      not min_pixels and not max_pixels,
      "min_pixels and max_pixels are for models whose grids differ; this one"
      " has frames of one size: leave them out",
    )
    return self

  def with_paper_bounds(self, min_pixels=0, max_pixels=0):
    """Returns the processor with the paper's bounds, or those given."""
    return self.with_bounds(min_pixels, max_pixels)

  @property
  def described(self) -> dict[str, Any]:
    """What pixels depend on, as the keys of feature caches have it."""
    return {name: getattr(self, name) for name in self._on_disk.split()[1:]}

  @property
  def identity(self) -> str:
    """The same in one line, as answer logs have it."""
    parts = [f"{name}={value!r}" for name, value in self.described.items()]
    return f"{self._on_disk.split()[0]}({', '.join(parts)})"

  @abc.abstractmethod
  def frame_size(self, height, width, num_frames) -> tuple[int, int]:
    """Returns (height, width) of F frames after resizing, or a ShapeError."""

  @abc.abstractmethod
  def resized_grid(self, num_frames, height, width) -> tuple[int, int, int]:
    """Returns (T, H, W) of F frames of h x w pixels after resizing."""

  def grid(self, num_frames, height, width) -> tuple[int, int, int]:
    """Returns (T, H, W) of F frames of h x w pixels, without any pixels."""
    size = self.frame_size(height, width, num_frames)
    return self.resized_grid(num_frames, *size)

  def fixed_grid(self, num_frames: int) -> tuple[int, int, int] | None:
    """Returns the one grid of all clips of F frames, None if they differ."""
    return self.grid(num_frames, 1, 1) if self.one_grid else None

  def grid_of(self, rule: frames_lib.FrameRule) -> tuple[int, int, int] | None:
    """Returns the one grid of all clips at a rule, None if they differ."""
    return self.fixed_grid(rule.num_frames) if rule.fills else None

  @abc.abstractmethod
  def patch_tokens(self, num_frames: int) -> tuple[int, int]:
    """Returns the fewest and the most tokens of a temporal patch of F frames.

    Frames that are very long and narrow may lie beyond them.
    """

  def resize_frame(
    self, frame: np.ndarray, num_frames: int, above: int = 0
  ) -> np.ndarray:
    """Returns uint8[h',w',3], one of F frames uint8[h,w,3], resized.

    One with a side of `above` pixels or fewer is a ShapeError.
    """
    frames_lib.check_side(*frame.shape[:2], above)
    size = self.frame_size(*frame.shape[:2], num_frames)
    return frames_lib.resize_frame(frame, size, self.resample)

  def __call__(
    self, frames, *, fps=None, times=None, resized=False, as_bytes=False
  ) -> TowerInputs:
    """Returns what the tower takes of one clip, uint8[F,h,w,3], upright.

    `fps` is that of these frames (see `frames.sampled_fps`), not of the clip;
    `times` float[F] are their own seconds, evenly apart if not given; `resized`
    says that `resize_frame` was applied while they were decoded. `as_bytes`
    leaves values uint8, to be normalised on the device.
    """
    if frames.ndim != 4 or frames.shape[-1] != 3 or not len(frames):
      raise ValueError(f"frames of shape {frames.shape} are not [F,h,w,3]")
    known = fps is None or 0 < fps < math.inf
    errors.check(known, f"{fps} frames a second: give a positive number")
    if times is None and fps is not None:
      times = np.arange(len(frames)) / fps
    if not resized:
      count = len(frames)
      frames = np.stack([self.resize_frame(frame, count) for frame in frames])
    grid = self.resized_grid(*frames.shape[:3])
    values, table = self._values(frames), self._table()
    seconds = self._seconds(fps, times)
    if as_bytes:
      return TowerInputs(values, grid, seconds, table=table)
    # Values of a channel lie together.
    parts = values.reshape(len(values), *values.shape[1:-1], 3, -1)
    found = np.empty(parts.shape, np.float32)
    for channel in range(3):
      found[..., channel, :] = table[parts[..., channel, :], channel]
    return TowerInputs(found.reshape(values.shape), grid, seconds)

  def _seconds(self, fps: float | None, times):
    """Returns `second_per_grid_t`; 1.0 if not known, as in the reference."""
    del fps, times  # Not in most models' positions.
    return 1.0

  @abc.abstractmethod
  def _values(self, frames):
    """Returns uint8 `TowerInputs.values` of resized frames."""

  def _table(self):
    """Returns float32[256, C], (x / 255 - mean) / std of each byte x."""
    pixels = np.arange(256, dtype=np.float32)[:, None] / np.float32(255)
    mean, std = np.array(self.mean, np.float32), np.array(self.std, np.float32)
    return (pixels - mean) / std


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlavaOnevisionProcessor(Processor):
  """Frames squeezed into one square tile."""

  image_size: int = 384  # S.
  frame_side: int = 14  # H = W, tokens of a frame's side.
  mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
  std: tuple[float, float, float] = (0.5, 0.5, 0.5)

  one_grid = True
  temporal_patch_size = 1
  # Class defaults of the library are wrong for the released checkpoints: CLIP's
  # statistics instead of SigLIP's.
  needs_statistics = True
  _on_disk = "Preprocessing image_size mean std resample"

  def __post_init__(self):
    text = f"image_size={self.image_size}: give pixels, at most {_MAX_SIDE}"
    errors.check(1 <= self.image_size <= _MAX_SIDE, text)
    super().__post_init__()

  @classmethod
  def _sizes_of(cls, entry):
    size = 384 if entry.size is None else entry.size
    if isinstance(size, dict):
      side = size.get("height")
      told = f"size {size} is no square tile of height and width"
      errors.check(side is not None and side == size.get("width"), told)
      size = side
    return {"image_size": size}

  def frame_size(self, height, width, num_frames):
    return self.image_size, self.image_size

  def patch_tokens(self, num_frames):
    return (self.frame_side**2,) * 2

  def resized_grid(self, num_frames, height, width):
    return num_frames, self.frame_side, self.frame_side

  def _values(self, frames):
    return frames


@dataclasses.dataclass(frozen=True, kw_only=True)
class PatchProcessor(Processor):
  """Frames that keep their aspect ratio, cut into patches.

  Sides are multiples of a merged token's, so that the grid differs from clip to
  clip.
  """

  patch_size: int  # p, pixels.
  temporal_patch_size: int = 2  # t, frames.
  merge_size: int = 2  # m, patches.
  min_pixels: int
  max_pixels: int

  one_grid = False
  # Fields of the same name in a processor's file.
  _told = "patch_size", "temporal_patch_size", "merge_size"

  def __post_init__(self):
    for name in ("patch_size", "temporal_patch_size", "merge_size"):
      size = getattr(self, name)
      errors.check(size >= 1, f"{name}={size}: give a positive number")
    errors.check(
      0 < self.min_pixels <= self.max_pixels,
      f"min_pixels={self.min_pixels} and max_pixels={self.max_pixels}: give"
      " positive numbers, the smaller one first",
    )
    super().__post_init__()

  @classmethod
  def _sizes_of(cls, entry):
    size = entry.size or {}
    told = f"size is {size}; it must be an object of the least and most pixels"
    errors.check(isinstance(size, dict), told)
    values = {name: getattr(entry, name) for name in cls._told}
    for name, edge in (("min", "shortest_edge"), ("max", "longest_edge")):
      name = f"{name}_pixels"
      values[name] = getattr(entry, name) or size.get(edge) or size.get(name)
    return {k: v for k, v in values.items() if v is not None}

  def with_bounds(self, min_pixels=0, max_pixels=0):
    """See `Processor`; the released checkpoints' own are made for images."""
    given = {"min_pixels": min_pixels, "max_pixels": max_pixels}
    return dataclasses.replace(self, **{k: v for k, v in given.items() if v})

  @property
  def factor(self) -> int:
    """Pixels of a merged token's side."""
    return self.patch_size * self.merge_size

  def resized_grid(self, num_frames, height, width):
    if height % self.factor or width % self.factor:
      raise ValueError(
        f"{height} x {width} pixels do not split into {self.factor}s"
      )
    patches = -(-num_frames // self.temporal_patch_size)
    return patches, height // self.factor, width // self.factor

  def _values(self, frames):
    return qwen2_5_vl_layout.patchify(
      frames, patch=self.patch_size, merge=self.merge_size,
      temporal_patch=self.temporal_patch_size,
    )  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Qwen2_5VLProcessor(PatchProcessor):  # noqa: N801 (the model's own name)
  """Bounds on each frame. https://arxiv.org/abs/2502.13923, section 2.1."""

  patch_size: int = 14
  min_pixels: int = 128 * 28 * 28  # Least pixels of a resized frame.
  max_pixels: int = 768 * 28 * 28  # Most pixels of a resized frame.
  mean: tuple[float, float, float] = CLIP_MEAN
  std: tuple[float, float, float] = CLIP_STD
  # Tokens that set the pixels of a whole clip: its frames share 90 % of them
  # evenly. None bounds each frame by itself, as releases of the reference below
  # 5.22 do.
  max_video_tokens: int | None = None

  _on_disk = (
    "ProcessorConfig patch_size temporal_patch_size merge_size min_pixels"
    " max_pixels mean std resample max_video_tokens"
  )

  @classmethod
  def tiny(cls):
    """For tests: patches of 4 pixels, at most 24 tokens a temporal patch."""
    return cls(patch_size=4, min_pixels=4 * 8 * 8, max_pixels=24 * 8 * 8)

  @classmethod
  def _sizes_of(cls, entry):
    values = super()._sizes_of(entry)
    if entry.cap_pixels_per_frame:
      values["max_video_tokens"] = entry.max_video_tokens or 128_000
    return values

  def with_paper_bounds(self, min_pixels=0, max_pixels=0):
    """See `Processor`; in tokens: a model of other patches gets as many."""
    least, most = (count * self.factor**2 for count in PAPER_TOKENS)
    return self.with_bounds(min_pixels or least, max_pixels or most)

  def frame_size(self, height, width, num_frames):
    bounds = dict(min_pixels=self.min_pixels)
    bounds |= dict(max_pixels=self._max_pixels(num_frames))
    return smart_resize(height, width, factor=self.factor, **bounds)

  def _max_pixels(self, num_frames: int) -> int:
    """Returns the most pixels of each of F frames."""
    if self.max_video_tokens is None:
      return self.max_pixels
    total = int(self.max_video_tokens * self.factor**2 * 0.9)
    share = total * self.temporal_patch_size // num_frames
    return max(min(self.max_pixels, share), int(self.min_pixels * 1.05))

  def patch_tokens(self, num_frames):
    least = -(-self.min_pixels // self.factor**2)
    most = self._max_pixels(num_frames) // self.factor**2
    return least, max(most, least)

  def _seconds(self, fps, times):
    return 1.0 if fps is None else self.temporal_patch_size / fps


def smart_resize(
  height, width, *, factor=28, min_pixels, max_pixels, frames=(1, 1)
):
  """Returns the (height, width) that a frame of as many pixels is resized to.

  Both are multiples of `factor`, the pixels of a merged token's side, close to
  the frame's aspect ratio; the pixels of as many of `frames` lie between the
  limits, as far as they can: of the first number where sides are scaled, of the
  second to be compared. `frames.ShapeError` where no such size suits the frame.
  """
  frame, sides = f"a frame of {width} x {height} pixels", (height, width)
  if min(sides) < 1:
    raise frames_lib.ShapeError(f"{frame} holds nothing", "leave the clip out")
  if max(sides) > _MAX_ASPECT * min(sides):
    raise frames_lib.ShapeError(
      f"{frame} is longer than {_MAX_ASPECT} times its width", "crop the clip"
    )
  # Python's round, half to even, as in the reference.
  counts = [round(side / factor) for side in sides]
  scaled, held = frames
  pixels = held * math.prod(counts) * factor**2
  if pixels > max_pixels:
    scale = math.sqrt(scaled * height * width / max_pixels)
    counts = [max(1, math.floor(side / scale / factor)) for side in sides]
  elif pixels < min_pixels:
    scale = math.sqrt(min_pixels / (scaled * height * width))
    counts = [math.ceil(side * scale / factor) for side in sides]
  return counts[0] * factor, counts[1] * factor
