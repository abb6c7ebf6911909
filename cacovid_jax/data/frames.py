"""Which frames of a clip are shown to the model; how they are turned, resized.

The paper's evaluator and trainer differ, and a third rule is the trainer's,
filled up to T frames; Qwen3-VL's processor shows more frames of a longer clip.
Letters: T frames, h w pixels of a decoded frame, S pixels of a side after
resizing.
"""

import dataclasses
import fractions
import math

import numpy as np
from PIL import Image

from cacovid_jax import errors

EVAL_RULE = "eval_linspace"
TRAIN_RULE = "train_linspace_1fps"
PUBLIC_RULE = "public_linspace_1fps"
RATE_RULE = "eval_linspace_2fps"
RULES = (EVAL_RULE, TRAIN_RULE, PUBLIC_RULE, RATE_RULE)
FEWEST_FRAMES = 4  # That `linspace_at` takes of a clip that has them.
# Rules that show fewer frames of short clips: the fewest, of clips that have
# as many.
_FEWEST = {PUBLIC_RULE: 1, RATE_RULE: FEWEST_FRAMES}
BICUBIC = int(Image.Resampling.BICUBIC)


class ShapeError(errors.UserError):
  """Frames have sides that cannot be used; whose they are is not known here."""

  def __init__(self, detail: str, mend: str):
    self.detail, self.mend = detail, mend
    super().__init__(f"{detail}; {mend}")

  def __reduce__(self):
    return ShapeError, (self.detail, self.mend)


def eval_linspace(num_frames: int, num_samples: int) -> np.ndarray:
  """Returns int64[num_samples] equally spaced indices, truncated.

  The evaluator's rule: always `num_samples`; indices repeat in clips that are
  shorter than that.
  """
  return np.linspace(0, num_frames - 1, num_samples, dtype=np.int64)


def train_linspace_1fps(
  num_frames: int, duration: float, max_samples: int = 32, fps: float = 1.0
) -> np.ndarray:
  """Returns int64[n] equally spaced indices, rounded half to even.

  The trainer's rule: n = min(max_samples, num_frames, whole seconds · fps), so
  a clip below one second gives none and its row has to be skipped.
  """
  num_samples = max(0, min(max_samples, num_frames, int(duration * fps)))
  return np.rint(np.linspace(0, num_frames - 1, num_samples)).astype(np.int64)


def linspace_at(
  num_frames: int, source_fps: float, fps: float = 2.0, most: int = 768
) -> np.ndarray:
  """Returns int64[n] equally spaced indices, rounded half to even.

  Qwen3-VL's rule, of a clip's own frames a second: n = int(num_frames /
  source_fps · fps), at least `FEWEST_FRAMES`, at most `most`, and never more
  than there are.
  """
  errors.check(
    0 < source_fps < math.inf,
    f"a clip of {source_fps} frames a second; give its rate, or a fixed number"
    f" of frames by the rule {EVAL_RULE!r}",
  )
  wanted = int(num_frames / source_fps * fps)
  wanted = min(max(wanted, FEWEST_FRAMES), most, num_frames)
  return np.rint(np.linspace(0, num_frames - 1, wanted)).astype(np.int64)


def source_fps(num_frames: int, duration: float) -> float | None:
  """Returns a clip's frames a second; None if its seconds are unknown.

  Rates of video are whole numbers of frames in at most 1001 seconds: without
  that, the quotient's last bit turns halves of printed times up or down.
  """
  if not 0 < duration < math.inf:
    return None
  fps = num_frames / duration
  exact = float(fractions.Fraction(fps).limit_denominator(1001))
  return exact if math.isclose(exact, fps, rel_tol=1e-12) else fps


@dataclasses.dataclass(frozen=True)
class FrameRule:
  """Which frames of a clip are shown, at most T of them."""

  num_frames: int  # T.
  # `EVAL_RULE`, or `PUBLIC_RULE` for the public trainer's, which takes fewer
  # frames of clips below T seconds, and refuses a clip of which it takes none.
  # `TRAIN_RULE` spaces T over short clips instead, rounded as it rounds, so
  # that all clips share programs of one T without padding.
  name: str = EVAL_RULE
  fps: float = 1.0  # Of the trainer's rule.

  def __post_init__(self):
    if self.name not in RULES:
      known = " or ".join(map(repr, RULES))
      raise errors.UserError(f"frame rule {self.name!r}: give {known}")

  @property
  def fills(self) -> bool:
    """Whether every clip that is not refused shows all T frames."""
    return self.name not in _FEWEST

  @property
  def fewest(self) -> int:
    """Least T of clips that have as many frames and are not refused."""
    return min(_FEWEST.get(self.name, self.num_frames), self.num_frames)

  def __call__(self, num_frames: int, duration: float) -> np.ndarray:
    """Returns int64[T] indices, or fewer; none if the clip is too short,
    or if its seconds are to be known and are not."""
    if self.name == EVAL_RULE:
      return eval_linspace(num_frames, self.num_frames)
    if self.name == RATE_RULE:
      fps = source_fps(num_frames, duration)
      if fps is None:  # Of no known length.
        return np.zeros(0, np.int64)
      return linspace_at(num_frames, fps, most=self.num_frames)
    wanted = self.num_frames
    indices = train_linspace_1fps(num_frames, duration, wanted, self.fps)
    if self.fills and 0 < len(indices) < wanted:
      spaced = np.linspace(0, num_frames - 1, wanted)
      indices = np.rint(spaced).astype(np.int64)
    return indices


def sampled_fps(num_samples: int, duration: float) -> float | None:
  """Returns frames a second of F samples; None if the seconds are unknown."""
  return num_samples / duration if duration > 0 else None


def resize_frame(
  frame: np.ndarray, size: int | tuple[int, int], resample: int = BICUBIC
) -> np.ndarray:
  """Returns uint8[S,S,3], or uint8[h',w',3], of the frame uint8[h,w,3].

  PIL on bytes is what the reference processors agree with best. The width goes
  first, rounded to bytes before the height: torchvision and Pillow up to 12 do
  the same, while Pillow 13 turns the order round where that costs less, which
  changes bright and dark edges by up to 25 levels. The aspect ratio is lost:
  LLaVA-OneVision squeezes a frame into one square tile.
  """
  height, width = (size, size) if isinstance(size, int) else size
  if frame.shape[:2] == (height, width):
    return frame
  image = Image.fromarray(frame)
  if resample != Image.Resampling.NEAREST:  # It has no passes.
    image = image.resize((width, image.height), resample)
  return np.asarray(image.resize((width, height), resample))


def thumbnail(frame: np.ndarray, side: int) -> np.ndarray:
  """Returns uint8[h',w',3] of uint8[h,w,3], no side above `side` pixels."""
  image = Image.fromarray(frame)
  image.thumbnail((side, side))
  return np.asarray(image)


def check_side(height: int, width: int, above: int) -> None:
  """Refuses frames with a side of so many pixels or fewer."""
  if min(height, width) <= above:
    raise ShapeError(
      f"a frame of {width} x {height} pixels has a side of {above} or fewer",
      "leave the clip out",
    )


def turned(image: np.ndarray, matrix: np.ndarray) -> np.ndarray:
  """Returns the pixels [h,w,3] as a player shows them.

  The display matrix (a b .; c d .; ...) sends (x, y) to (a x + c y, b x + d y):
  quarter turns, mirrored or not. PyAV's angle alone would turn a mirrored
  picture upside down.
  """
  columns, b, _, c, rows = matrix[:5].tolist()
  if abs(b) + abs(c) > abs(columns) + abs(rows):
    image, rows, columns = image.swapaxes(0, 1), b, c
  image = image[:: -1 if rows < 0 else 1, :: -1 if columns < 0 else 1]
  return np.ascontiguousarray(image)
