"""Which frames of a clip were shown, and what their pixels are."""

import dataclasses
import functools
import hashlib
import json
import os

import av
from av import library_versions

from cacovid_jax import files
from cacovid_jax.data import video

# Not part of what must be the same; lines of earlier versions lack these.
_uncompared = functools.partial(dataclasses.field, compare=False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FrameRecord:
  """The frames of one clip, or why it has none."""

  video: str  # Path of the clip, relative to the media root.
  content: str = ""  # blake2b of the file; "" if nothing needs it.
  num_frames: int = 0  # In the clip, which the frame rule counts.
  duration: float = 0.0  # Seconds.
  size: tuple[int, int] = (0, 0)  # (h, w) of its frames, upright, in pixels.
  indices: tuple[int, ...] = ()  # Of the frames that are shown.
  frame_hash: str = ""  # Of their pixels, see `video.Clip`.
  # See `video.Clip`.
  replaced: int = _uncompared(default=0)
  damaged: int = _uncompared(default=0)
  lost: int = _uncompared(default=0)
  fault: str = ""  # Why the clip cannot be used; all else is empty then.

  def __post_init__(self):
    # As JSON gives them.
    object.__setattr__(self, "size", tuple(self.size))
    object.__setattr__(self, "indices", tuple(self.indices))

  @classmethod
  def of(cls, name: str, clip, content: str = "") -> "FrameRecord":
    """Returns the record of a decoded `video.Clip`."""
    return cls(
      video=name,
      content=content,
      num_frames=int(clip.num_frames),
      duration=float(clip.duration),
      size=clip.size,
      indices=clip.indices.tolist(),
      frame_hash=clip.frame_hash,
      **{name: getattr(clip, name) for name in video.DAMAGE},
    )

  @property
  def damage(self) -> dict[str, int]:
    """Those of `video.DAMAGE` that are not 0."""
    counts = {name: getattr(self, name) for name in video.DAMAGE}
    return {name: count for name, count in counts.items() if count}

  @property
  def index_hash(self) -> str:
    """Digest of which frames of how many are shown; "" without any."""
    if self.fault:
      return ""
    text = json.dumps([self.num_frames, list(self.indices)])
    return hashlib.sha256(text.encode()).hexdigest()


def hash_file(path: str | os.PathLike) -> str:
  """Returns the blake2b of a clip's file, as records have it."""
  return files.blake2b(path, 16)


def decoder() -> str:
  """Returns the versions of PyAV and of the FFmpeg libraries it decodes with.

  Frames of one file may differ between them in the last bit.
  """
  parts = [
    f"{name} {'.'.join(map(str, library_versions[name]))}"
    for name in ("libavcodec", "libavformat", "libswscale")
  ]
  return f"PyAV {av.__version__} ({', '.join(parts)})"
