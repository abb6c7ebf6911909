"""One open video file, every fault named: what is checked before decoding.

Paths, protocols, formats and sizes are checked before anything is decoded,
since a clip of a public data set is an untrusted file.
"""

import contextlib
import dataclasses
import errno
import io
import math
import os
import stat
import time
from collections.abc import Iterator

import av

from cacovid_jax import errors

# Pixels of a frame above which few of them fit into memory.
LARGE = 4096 * 2304
# Playlists, image sequences and network formats stay out: a playlist renamed
# .mp4 would otherwise open other files.
_DEMUXERS = (
  "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,flv,asf,ogg,gif"
)
# PyAV 19 always replaces bytes of tags that are no text; before, it must be
# asked to.
_OLD = int(av.__version__.split(".")[0]) < 19
_OPEN_OPTIONS = {"metadata_errors": "replace"} if _OLD else {}
_MENDS = {
  "missing": "download the clip or correct the media root",
  "empty": "download the clip again",
  "not_a_file": "give the path of a video file",
  "unreadable": "download the clip again or convert it to H.264 mp4",
  "no_video_stream": "give a file that holds pictures, not only sound",
  "no_frames": "download the clip again",
  "bad_shape": "crop or scale the clip, or leave it out",
  "too_large": "scale the clip down or raise the limit",
  "too_many_bytes": "cut or scale the clip, or raise the limit",
  "too_damaged": "download the clip again or raise config.data.max_replaced",
  "too_long": "cut the clip or raise the limit",
  "too_short": "leave the clip out: the frame rule takes no frame of it",
  "timeout": "convert the clip to H.264 mp4 or raise the limit",
  "crashed": "convert the clip to H.264 mp4 or leave it out",
  "too_much_memory": "scale the clip down or raise the limit",
  "unsafe": "give a path below the media root, without links that leave it",
}


class VideoError(errors.UserError):
  """A clip that cannot be used; `mend` stands in for that of `_MENDS`."""

  def __init__(self, path, reason: str, detail: str = "", mend: str = ""):
    self.path, self.reason = os.fspath(path), reason
    self.detail, self.mend = detail, mend
    message = f"{self.path}: {reason.replace('_', ' ')}"
    if detail:
      message += f" ({' '.join(detail.split())})"
    super().__init__(
      f"{message}; {mend or _MENDS.get(reason, 'leave the clip out')}"
    )

  def __reduce__(self):
    return VideoError, (self.path, self.reason, self.detail, self.mend)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
  """What a clip may be before it is refused."""

  max_bytes: int = 16 * 2**30
  max_pixels: int = 8192 * 4320  # Of one frame.
  max_seconds: float = 24 * 3600.0
  max_frames: int = 10_000_000
  max_pixels_decoded: int = 2**46  # Of all frames: 9 hours of 8K at 60.
  # Wall-clock seconds for opening and decoding one clip.
  timeout_s: float | None = 300.0
  # Bytes that a decoding process may hold, see `decode_workers`.
  max_memory: int = 2 * 2**30


class VideoStream:
  """The pictures of one file, or of the bytes of one; a context manager.

  `container` is PyAV's, `stream` the one of its streams that is decoded;
  `faults` counts errors of the decoder since `open`, and damaged pictures.
  """

  def __init__(self, path, limits: Limits | None):
    self._data = bytes(path) if isinstance(path, (bytes, bytearray)) else None
    self.path = "embedded clip" if self._data is not None else os.fspath(path)
    self.limits = limits = limits or Limits()
    wait = math.inf if limits.timeout_s is None else limits.timeout_s
    self._deadline = time.monotonic() + wait
    size = self._file_size() if self._data is None else len(self._data)
    if size == 0:
      raise self.fail("empty")
    if size > limits.max_bytes:
      raise self.fail("too_many_bytes", f"{size}")
    self.container = None
    self.open()

  def __enter__(self):
    return self

  def __exit__(self, *unused):
    self.container.close()

  def fail(self, reason: str, detail: str = "") -> VideoError:
    """Returns an error of this clip."""
    return VideoError(self.path, reason, detail)

  def _file_size(self) -> int:
    if "\0" in self.path:
      raise VideoError(self.path.replace("\0", "\\0"), "unsafe")
    try:
      status = os.stat(self.path)
    except FileNotFoundError:
      raise self.fail("missing") from None
    except OSError as error:
      raise self.fail("unreadable", _text(error)) from None
    if not stat.S_ISREG(status.st_mode):
      raise self.fail("not_a_file")  # A pipe would block for ever.
    return status.st_size

  def open(self, thread_type: str = "AUTO") -> None:
    """Opens the clip, again if it is open, at its beginning."""
    self.faults = 0
    if self.container is not None:
      self.container.close()
    # The prefix pins the protocol whatever the name looks like.
    source, allowed = f"file:{self.path}", {"protocol_whitelist": "file"}
    if self._data is not None:
      source = io.BytesIO(self._data)
    left = max(0.001, self._deadline - time.monotonic())
    try:
      self.container = av.open(
        source,
        container_options=allowed | {"format_whitelist": _DEMUXERS},
        timeout=None if left == math.inf else left,
        **_OPEN_OPTIONS,
      )
    except (av.error.FFmpegError, OSError, ValueError) as error:
      self._tick()
      raise self._unopened(error) from None
    try:
      self._choose_stream()
      self.stream.thread_type = thread_type
      context = self.stream.codec_context
      if context.width * context.height > LARGE:
        context.thread_count = 2  # Each holds frames, at once or in a row.
      if self.seconds > self.limits.max_seconds:
        raise self.fail("too_long", f"{self.seconds:.0f} s")
    except BaseException:
      self.container.close()
      raise

  def _unopened(self, error: Exception) -> errors.UserError:
    """Returns why the file cannot be opened."""
    if getattr(error, "errno", None) in (errno.EMFILE, errno.ENFILE):
      told = f"{self.path}: {_text(error)}"
      return errors.UserError(
        f"{told}; raise the limit of open files (ulimit -n)"
      )
    head = self._data or b""
    if not head:
      with contextlib.suppress(OSError), open(self.path, "rb") as f:
        head = f.read(12)
    if head[:4] + head[8:12] != b"RIFFWEBP":
      return self.fail("unreadable", _text(error))
    mend = "convert it, as by `magick clip.webp clip.mp4`"
    detail = "WebP, which FFmpeg does not read in motion"
    return VideoError(self.path, "unreadable", detail, mend)

  def _choose_stream(self) -> None:
    for stream in self.container.streams.video:
      # Cover pictures of music files are video streams of one picture.
      if "attached_pic" not in str(getattr(stream, "disposition", None)):
        self.stream = stream
        break
    else:
      raise self.fail("no_video_stream")
    if self.stream.codec_context is None:
      raise self.fail("unreadable", "unknown codec")
    self.check_size(self.stream.codec_context)

  def check_size(self, picture) -> None:
    """Refuses a width and a height that are too much together."""
    if picture.width * picture.height > self.limits.max_pixels:
      raise self.fail("too_large", f"{picture.width} x {picture.height}")

  def check_count(self, count: int) -> None:
    """Refuses too many frames."""
    if count > self.limits.max_frames:
      raise self.fail("too_long", f"above {self.limits.max_frames} frames")
    context, most = self.stream.codec_context, self.limits.max_pixels_decoded
    if count * context.width * context.height > most:
      raise self.fail("too_long", f"above {most} pixels in all")

  @property
  def seconds(self) -> float:
    """Duration that the header gives; 0 if it gives none."""
    if self.stream.duration and self.stream.time_base:
      return float(self.stream.duration * self.stream.time_base)
    return (self.container.duration or 0) / av.time_base

  def _tick(self):
    if time.monotonic() > self._deadline:
      raise self.fail("timeout", f"above {self.limits.timeout_s} s")

  def packets(self) -> Iterator[av.Packet]:
    """Demuxes the video stream; a damaged container ends early."""
    packets = self.container.demux(self.stream)
    while True:
      self._tick()
      try:
        packet = next(packets)
      except (StopIteration, EOFError):
        return
      except MemoryError:
        raise self.fail("too_much_memory") from None
      except (av.error.FFmpegError, ValueError, IndexError):
        self._tick()  # Damage may change which streams there are.
        return
      # An empty packet ends the decoder's work: only the last one, without a
      # time, means that.
      if packet.size or packet.dts is None:
        yield packet

  def decode(self, packet: av.Packet) -> list[av.VideoFrame]:
    """Decodes a packet; one that is damaged is counted and skipped."""
    try:
      pictures = packet.decode()
    except EOFError:
      return []
    except MemoryError:  # FFmpeg's own as well: nothing is damaged.
      raise self.fail("too_much_memory") from None
    except (av.error.FFmpegError, ValueError):
      self.faults += 1
      return []
    self.faults += sum(picture.is_corrupt for picture in pictures)
    return pictures

  def pictures(self) -> Iterator[av.VideoFrame]:
    """Decodes from the current position."""
    for packet in self.packets():
      yield from self.decode(packet)


def _text(error: Exception) -> str:
  return getattr(error, "strerror", None) or str(error)
