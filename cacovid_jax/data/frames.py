"""Which frames of a clip are shown to the model, and their pixels.

Two rules exist, as the paper's evaluator and trainer differ. Letters: T frames,
h w pixels of a decoded frame, S pixels of a side after resizing.
"""

import dataclasses
import json
import os

import numpy as np
from PIL import Image

from cacovid_jax import errors

EVAL_RULE = "eval_linspace"
TRAIN_RULE = "train_linspace_1fps"


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


def resize_frame(frame: np.ndarray, size: int) -> np.ndarray:
  """Returns uint8[S,S,3]: the frame uint8[h,w,3] by PIL's bicubic filter.

  The aspect ratio is not kept: LLaVA-OneVision squeezes a video frame into
  one square tile. PIL is what the reference processors agree with best.
  """
  if frame.shape[:2] == (size, size):
    return frame
  image = Image.fromarray(frame).resize((size, size), Image.Resampling.BICUBIC)
  return np.asarray(image)


def resize(frames: np.ndarray, size: int) -> np.ndarray:
  """Returns uint8[T,S,S,3] of frames uint8[T,h,w,3]."""
  if frames.shape[1:3] == (size, size):
    return frames
  return np.stack([resize_frame(frame, size) for frame in frames])


def normalise(frames: np.ndarray, mean, std) -> np.ndarray:
  """Returns float32 (x / 255 - mean) / std of uint8[...,3]."""
  mean = np.asarray(mean, np.float32)
  std = np.asarray(std, np.float32)
  return (frames.astype(np.float32) / np.float32(255) - mean) / std


def to_pixels(
  frames: np.ndarray,
  image_size: int,
  mean=(0.5, 0.5, 0.5),
  std=(0.5, 0.5, 0.5),
) -> np.ndarray:
  """Returns float32[T,S,S,3] pixels for the vision tower, of uint8[T,h,w,3]."""
  return normalise(resize(frames, image_size), mean, std)


@dataclasses.dataclass(frozen=True)
class Preprocessing:
  """What a checkpoint does to frames before its vision tower."""

  image_size: int = 384
  mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
  std: tuple[float, float, float] = (0.5, 0.5, 0.5)

  @classmethod
  def from_directory(cls, directory) -> "Preprocessing":
    """Reads the processor's JSON of a Hugging Face checkpoint directory.

    Class defaults of the library are wrong for the released checkpoints
    (CLIP statistics instead of SigLIP's), so the files are the authority.
    """
    for name, key in (
      ("video_preprocessor_config.json", None),
      ("processor_config.json", "video_processor"),
      ("preprocessor_config.json", None),
    ):
      path = os.path.join(directory, name)
      if not os.path.isfile(path):
        continue
      try:
        with open(path, encoding="utf-8") as f:
          entry = json.load(f)
        entry = entry.get(key) if key else entry
        if not entry or "image_mean" not in entry:
          continue
        size = entry.get("size", 384)
        if isinstance(size, dict):
          size = size.get("height") or size.get("shortest_edge")
        return cls(
          int(size), _triple(entry["image_mean"]), _triple(entry["image_std"])
        )
      except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise errors.UserError(
          f"{path}: not a usable processor file ({error}); copy it again from"
          " the checkpoint's origin"
        ) from error
    raise errors.UserError(
      f"{directory}: no preprocessor_config.json with image_mean, image_std and"
      " size; copy it from the checkpoint's origin"
    )

  def __call__(self, frames: np.ndarray) -> np.ndarray:
    """Returns float32[T,S,S,3] of uint8[T,h,w,3]."""
    return to_pixels(frames, self.image_size, self.mean, self.std)


def _triple(values) -> tuple[float, float, float]:
  first, second, third = (float(value) for value in values)
  return first, second, third
