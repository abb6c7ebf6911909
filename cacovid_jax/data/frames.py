"""Which frames of a clip are shown to the model, and how they are resized.

Two rules exist, as the paper's evaluator and trainer differ. Letters: T frames,
h w pixels of a decoded frame, S pixels of a side after resizing.
"""

import dataclasses

import numpy as np
from PIL import Image

from cacovid_jax import errors

EVAL_RULE = "eval_linspace"
TRAIN_RULE = "train_linspace_1fps"
BICUBIC = int(Image.Resampling.BICUBIC)


class ShapeError(errors.UserError):
  """Frames have sides that cannot be used; whose they are is not known here.

  Attributes:
    detail: what is wrong.
    mend: what to do.
  """

  def __init__(self, detail: str, mend: str):
    self.detail, self.mend = detail, mend
    super().__init__(f"{detail}; {mend}")

  def __reduce__(self):
    return ShapeError, (self.detail, self.mend)


def eval_linspace(num_frames: int, num_samples: int) -> np.ndarray:
  """Returns int64[num_samples] equally spaced indices, truncated.

  The evaluator's rule: always `num_samples`; indices repeat in clips that are
  shorter than that.

  Args:
    num_frames: frames in the clip, at least 1.
    num_samples: T, frames wanted.
  """
  return np.linspace(0, num_frames - 1, num_samples, dtype=np.int64)


def train_linspace_1fps(
  num_frames: int,
  duration: float,
  max_samples: int = 32,
  fps: float = 1.0,
) -> np.ndarray:
  """Returns int64[n] equally spaced indices, rounded half to even.

  The trainer's rule: n = min(max_samples, num_frames, whole seconds · fps), so
  a clip below one second gives none and its row has to be skipped.

  Args:
    num_frames: frames in the clip.
    duration: seconds.
    max_samples: most frames that are wanted.
    fps: frames a second before `max_samples` binds.
  """
  num_samples = max(0, min(max_samples, num_frames, int(duration * fps)))
  spaced = np.linspace(0, num_frames - 1, num_samples)
  return np.array([round(x) for x in spaced.tolist()], dtype=np.int64)


@dataclasses.dataclass(frozen=True)
class FrameRule:
  """Which T frames of a clip are shown; T is static.

  Attributes:
    num_frames: T.
    name: `frames.EVAL_RULE`, or `frames.TRAIN_RULE` for the public trainer's.
      Where that takes fewer than T frames (clips below T seconds), T frames
      are spaced over the clip instead, rounded as it rounds, since compiled
      programs have one T. Where it takes none, the clip is refused.
    fps: frames a second of the trainer's rule.
  """

  num_frames: int
  name: str = EVAL_RULE
  fps: float = 1.0

  def __post_init__(self):
    if self.name not in (EVAL_RULE, TRAIN_RULE):
      raise errors.UserError(
        f"frame rule {self.name!r}: give {EVAL_RULE!r} or {TRAIN_RULE!r}"
      )

  def __call__(self, num_frames: int, duration: float) -> np.ndarray:
    """Returns int64[T] indices, none if the clip is too short."""
    if self.name == EVAL_RULE:
      return eval_linspace(num_frames, self.num_frames)
    indices = train_linspace_1fps(
      num_frames, duration, self.num_frames, self.fps
    )
    if 0 < len(indices) < self.num_frames:
      spaced = np.linspace(0, num_frames - 1, self.num_frames)
      indices = np.array([round(x) for x in spaced.tolist()], np.int64)
    return indices


def sampled_fps(num_samples: int, duration: float) -> float | None:
  """Returns frames a second of F samples; None if the seconds are unknown."""
  return num_samples / duration if duration > 0 else None


def resize_frame(
  frame: np.ndarray,
  size: int | tuple[int, int],
  resample: int = BICUBIC,
) -> np.ndarray:
  """Returns uint8[S,S,3], or uint8[h',w',3], of the frame uint8[h,w,3].

  PIL on bytes is what the reference processors agree with best. The width goes
  first, rounded to bytes before the height: torchvision and Pillow up to 12 do
  the same, while Pillow 13 turns the order round where that costs less, which
  changes bright and dark edges by up to 25 levels.

  Args:
    frame: the pixels.
    size: S, or (h', w'). The aspect ratio is not kept: LLaVA-OneVision squeezes
      a video frame into one square tile.
    resample: PIL's number of the filter.
  """
  height, width = (size, size) if isinstance(size, int) else size
  if frame.shape[:2] == (height, width):
    return frame
  image = Image.fromarray(frame)
  if resample == Image.Resampling.NEAREST:  # It has no passes.
    return np.asarray(image.resize((width, height), resample))
  image = image.resize((width, image.height), resample)
  return np.asarray(image.resize((width, height), resample))


def resize(
  frames: np.ndarray, size: int, resample: int = BICUBIC
) -> np.ndarray:
  """Returns uint8[T,S,S,3] of frames uint8[T,h,w,3]."""
  if frames.shape[1:3] == (size, size):
    return frames
  return np.stack([resize_frame(frame, size, resample) for frame in frames])
