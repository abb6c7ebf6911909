"""Frames of a clip -> what Qwen3-VL's tower takes, bounded as a whole clip.

Letters: F frames, T temporal patches, h w pixels of a frame.
Paper: https://arxiv.org/abs/2511.21631.
"""

import dataclasses

import numpy as np

from cacovid_jax import errors
from cacovid_jax.data import frames as frames_lib
from cacovid_jax.models import processors

SIDE = 32  # Pixels of a merged token's, in the released checkpoints.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Qwen3VLProcessor(processors.PatchProcessor):
  """Frames that share the pixels of a clip, each pair with its time."""

  patch_size: int = 16
  min_pixels: int = 128 * SIDE**2  # Least pixels of all resized frames.
  max_pixels: int = 768 * SIDE**2  # Most pixels of all resized frames.
  mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
  std: tuple[float, float, float] = (0.5, 0.5, 0.5)
  # Whether no frame has more than an even share of the pixels, nor more than
  # those of `max_video_tokens`. Files of before 5.22 do not say: False.
  cap_pixels_per_frame: bool = False
  max_video_tokens: int = 768  # Tokens of a frame, where they are capped.

  tells_time = True
  reads_images = False
  _told = (
    *processors.PatchProcessor._told, "cap_pixels_per_frame", "max_video_tokens"
  )  # fmt: skip
  _on_disk = (
    "Qwen3VLProcessor patch_size temporal_patch_size merge_size min_pixels"
    " max_pixels mean std resample cap_pixels_per_frame max_video_tokens"
  )

  @classmethod
  def tiny(cls):
    """For tests: patches of 4 pixels, at most 24 tokens of each of 8."""
    most = 8 * 24 * 8 * 8
    return cls(patch_size=4, min_pixels=4 * 8 * 8, max_pixels=most)

  def with_paper_bounds(self, min_pixels=0, max_pixels=0):
    """See `processors.Processor`; at most the paper's tokens a frame.

    Clips that are given fewer pixels by the checkpoint's files keep those.
    """
    if min_pixels or max_pixels:
      return self.with_bounds(min_pixels, max_pixels)
    tokens = min(self.max_video_tokens, processors.PAPER_TOKENS[1])
    capped = dict(cap_pixels_per_frame=True, max_video_tokens=tokens)
    return dataclasses.replace(self, **capped)

  def frame_size(self, height, width, num_frames):
    if num_frames < self.temporal_patch_size:
      raise frames_lib.ShapeError(
        f"{num_frames} frame is less than a temporal patch of"
        f" {self.temporal_patch_size}",
        "show more frames",
      )
    if 0 < min(height, width) < self.factor:
      scale = self.factor / min(height, width)
      height, width = int(height * scale), int(width * scale)
    return processors.smart_resize(
      height, width, factor=self.factor, min_pixels=self.min_pixels,
      max_pixels=self._max_pixels(num_frames),
      frames=(num_frames, self._held(num_frames)),
    )  # fmt: skip

  def _held(self, num_frames: int) -> int:
    """Returns the frames that are held against a limit, rounded half to even.

    As in the reference, although half a temporal patch is padded to a whole.
    """
    size = self.temporal_patch_size
    return round(num_frames / size) * size

  def _max_pixels(self, num_frames: int) -> int:
    """Returns the most pixels of F frames together."""
    if not self.cap_pixels_per_frame:
      return self.max_pixels
    most = self.max_video_tokens * self.factor**2
    share = min(most, self.max_pixels // num_frames)
    return num_frames * max(share, int(self.min_pixels * 1.05))

  def patch_tokens(self, num_frames):
    # Clips of fewer are refused.
    num_frames = max(num_frames, self.temporal_patch_size)
    held, area = self._held(num_frames), self.factor**2
    least = -(-self.min_pixels // (max(num_frames, held) * area))
    most = self._max_pixels(num_frames) // (min(num_frames, held) * area)
    return least, max(most, least)

  def _seconds(self, fps, times):
    """Returns the seconds in the middle of each temporal patch, T of them."""
    errors.check(
      times is not None,
      "the clip's frames a second are not known, and Qwen3-VL's prompts tell"
      " the time of its frames; give fps",
    )
    size = self.temporal_patch_size
    times = np.asarray(times, np.float64)
    times = np.pad(times, (0, -len(times) % size), mode="edge")
    first, last = times[::size], times[size - 1 :: size]
    return tuple(((first + last) / 2).tolist())
