"""Which frames of a clip are shown to the model, and their pixels.

Two rules exist, as the paper's evaluator and trainer differ. Letters: T frames,
h w pixels of a decoded frame, S pixels of a side after resizing.
"""

import dataclasses
import json
import math
import os

import numpy as np
from PIL import Image

from cacovid_jax import errors

EVAL_RULE = "eval_linspace"
TRAIN_RULE = "train_linspace_1fps"
BICUBIC = int(Image.Resampling.BICUBIC)

_MAX_FILE_BYTES = 2**20
_MAX_SIDE = 8192
# Steps of the reference processors: key -> (what we do, when it is not given).
_STEPS = {
  "do_resize": (True, True),
  "do_rescale": (True, True),
  "do_normalize": (True, True),
  "do_center_crop": (False, False),
}


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


def normalise(frames: np.ndarray, mean, std, axis: int = -1) -> np.ndarray:
  """Returns float32 (x / 255 - mean) / std of uint8, channels along `axis`."""
  shape = [1] * frames.ndim
  shape[axis] = -1
  mean = np.asarray(mean, np.float32).reshape(shape)
  std = np.asarray(std, np.float32).reshape(shape)
  pixels = frames.astype(np.float32)
  pixels /= np.float32(255)  # In place: clips are large.
  pixels -= mean
  pixels /= std
  return pixels


def to_pixels(
  frames: np.ndarray,
  image_size: int,
  mean=(0.5, 0.5, 0.5),
  std=(0.5, 0.5, 0.5),
  resample: int = BICUBIC,
) -> np.ndarray:
  """Returns float32[T,S,S,3] pixels for the vision tower, of uint8[T,h,w,3]."""
  return normalise(resize(frames, image_size, resample), mean, std)


def read_processor(directory) -> tuple[dict, str]:
  """Returns the JSON of a checkpoint's video processor, and its path.

  Files are tried in the reference's order: the video part that transformers 5
  stores in processor_config.json, then the two files of earlier releases.
  """
  for name, key in (
    ("processor_config.json", "video_processor"),
    ("video_preprocessor_config.json", None),
    ("preprocessor_config.json", None),
  ):
    path = os.path.join(directory, name)
    if not os.path.isfile(path):
      continue
    try:
      if os.path.getsize(path) > _MAX_FILE_BYTES:
        raise ValueError(f"above {_MAX_FILE_BYTES} bytes")
      with open(path, encoding="utf-8") as f:
        entry = json.load(f)
      if not isinstance(entry, dict):
        raise ValueError("no JSON object")
    except (OSError, ValueError, RecursionError) as error:
      raise unusable(path, error) from error
    entry = entry.get(key) if key else entry
    if isinstance(entry, dict):
      return entry, path
  raise errors.UserError(
    f"{directory}: no preprocessor_config.json or"
    " video_preprocessor_config.json; copy it from the checkpoint's origin"
  )


def unusable(path, error) -> errors.UserError:
  """Returns the error for a processor file that cannot be used."""
  return errors.UserError(
    f"{path}: not a usable processor file ({error}); copy it again from the"
    " checkpoint's origin"
  )


def check_steps(entry: dict, path) -> None:
  """Refuses a processor file that asks for steps other than ours.

  Silence about a step would give other pixels than the reference's.
  """
  for name, (ours, default) in _STEPS.items():
    value = entry.get(name)
    if bool(default if value is None else value) != ours:
      raise errors.UserError(
        f"{path}: {name}={value} is not supported; set it to"
        f" {json.dumps(ours)}, or use the checkpoint's original file"
      )
  factor = entry.get("rescale_factor")
  if factor is not None and not math.isclose(factor, 1 / 255, rel_tol=1e-6):
    raise errors.UserError(
      f"{path}: rescale_factor={factor} is not supported; pixels are divided"
      " by 255"
    )


def check_statistics(mean, std, resample: int) -> None:
  """Refuses numbers that pixels cannot be normalised or resized by."""
  if not all(math.isfinite(x) for x in (*mean, *std)) or min(std) <= 0:
    raise errors.UserError(
      f"mean={tuple(mean)} and std={tuple(std)}: give finite numbers, the"
      " deviations above 0"
    )
  if resample not in {int(method) for method in Image.Resampling}:
    raise errors.UserError(
      f"resample={resample}: give the number of a filter of PIL (3 is bicubic)"
    )


@dataclasses.dataclass(frozen=True)
class Preprocessing:
  """What a LLaVA-OneVision checkpoint does to frames before its vision tower.

  Attributes:
    image_size: S.
    mean: of each channel, of pixels between 0 and 1.
    std: likewise.
    resample: PIL's number of the filter; 3 is bicubic.
  """

  image_size: int = 384
  mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
  std: tuple[float, float, float] = (0.5, 0.5, 0.5)
  resample: int = BICUBIC

  def __post_init__(self):
    if not 1 <= self.image_size <= _MAX_SIDE:
      raise errors.UserError(
        f"image_size={self.image_size}: give pixels, at most {_MAX_SIDE}"
      )
    check_statistics(self.mean, self.std, self.resample)

  @classmethod
  def from_directory(cls, directory) -> "Preprocessing":
    """Reads the processor's JSON of a Hugging Face checkpoint directory.

    Class defaults of the library are wrong for the released checkpoints
    (CLIP statistics instead of SigLIP's), so the files are the authority and
    have to state them.
    """
    entry, path = read_processor(directory)
    try:
      check_steps(entry, path)
      size = entry.get("size", 384)
      resample = entry.get("resample")
      values = (
        _square(size),
        triple(entry["image_mean"]),
        triple(entry["image_std"]),
        BICUBIC if resample is None else int(resample),
      )
    except KeyError as error:
      raise unusable(path, f"no {error}") from error
    except (ValueError, TypeError, AttributeError, OverflowError) as error:
      raise unusable(path, error) from error
    try:
      return cls(*values)
    except errors.UserError as error:
      raise errors.UserError(f"{path}: {error}") from error

  def __call__(self, frames: np.ndarray) -> np.ndarray:
    """Returns float32[T,S,S,3] of uint8[T,h,w,3]."""
    return to_pixels(
      frames, self.image_size, self.mean, self.std, self.resample
    )


def _square(size) -> int:
  """Returns the side of the tile that a processor's `size` asks for."""
  if not isinstance(size, dict):
    return int(size)
  if "height" not in size or size["height"] != size.get("width"):
    raise ValueError(f"size {size} is no square tile of height and width")
  return int(size["height"])


def triple(values) -> tuple[float, float, float]:
  """Returns three numbers, one a channel."""
  first, second, third = (float(value) for value in values)
  return first, second, third
