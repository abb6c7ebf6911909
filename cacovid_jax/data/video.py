"""Frames of video files, decoded by PyAV, with every fault named.

The requested frames are found through a table of time stamps that demuxing
gives without decoding; the decoder seeks only where a keyframe lies between two
requested frames. Containers without usable stamps are decoded in sequence.
Paths, protocols, formats and sizes are checked before anything is decoded,
since a clip of a public data set is an untrusted file.
"""

import dataclasses
import functools
import io
import os
import re
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import av
import numpy as np

from cacovid_jax import errors
from cacovid_jax.data import frames as frames_lib

# Playlists, image sequences and network formats stay out: a playlist renamed
# .mp4 would otherwise open other files.
_DEMUXERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,flv,asf,ogg"
# PyAV 19 always replaces bytes of tags that are no text; before, it must be
# asked to.
_OPEN_OPTIONS = (
  {"metadata_errors": "replace"}
  if int(av.__version__.split(".")[0]) < 19
  else {}
)
# Part of a clip's length by which stamps may differ from an even spacing, or
# from the length that the header gives.
_SLACK = 0.05
_URL = re.compile(r"^[A-Za-z][A-Za-z0-9+.,\-]*:")


class VideoError(errors.UserError):
  """A clip that cannot be used.

  Attributes:
    path: the file.
    reason: "missing", "empty", "not_a_file", "unreadable", "no_video_stream",
      "no_frames", "bad_shape", "too_large", "too_long", "too_short", "timeout"
      or "unsafe".
  """

  def __init__(self, path, reason: str, detail: str = "", mend: str = ""):
    self.path, self.reason = os.fspath(path), reason
    self.detail, self.mend = detail, mend
    message = f"{self.path}: {reason.replace('_', ' ')}"
    if detail:
      message += f" ({' '.join(detail.split())})"
    super().__init__(f"{message}; {mend or _MENDS[reason]}")

  def __reduce__(self):
    return VideoError, (self.path, self.reason, self.detail, self.mend)


_MENDS = {
  "missing": "download the clip or correct the media root",
  "empty": "download the clip again",
  "not_a_file": "give the path of a video file",
  "unreadable": "download the clip again or convert it to H.264 mp4",
  "no_video_stream": "give a file that holds pictures, not only sound",
  "no_frames": "download the clip again",
  "bad_shape": "crop or scale the clip, or leave it out",
  "too_large": "scale the clip down or raise the limit",
  "too_long": "cut the clip or raise the limit",
  "too_short": "leave the clip out: the frame rule takes no frame of it",
  "timeout": "convert the clip to H.264 mp4 or raise the limit",
  "unsafe": "give a path below the media root, without links that leave it",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
  """What a clip may be before it is refused.

  Attributes:
    max_bytes: size of the file.
    max_pixels: pixels of one frame.
    max_seconds: duration.
    max_frames: frames in the stream.
    timeout_s: wall-clock seconds for opening and decoding one clip.
  """

  max_bytes: int = 16 * 2**30
  max_pixels: int = 8192 * 4320
  max_seconds: float = 24 * 3600.0
  max_frames: int = 10_000_000
  timeout_s: float | None = 300.0


@dataclasses.dataclass(frozen=True)
class Probe:
  """What a clip holds.

  Attributes:
    num_frames: frames that are shown.
    width: pixels, as stored; a rotated clip is shown with its sides swapped.
    height: likewise.
    duration: seconds.
    fps: frames a second, on average.
    codec: name of the compression.
    container: name of the file format.
    warnings: what makes the frames less than they seem, one line each.
  """

  num_frames: int
  width: int
  height: int
  duration: float
  fps: float
  codec: str
  container: str
  warnings: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, eq=False)
class Clip:
  """Decoded frames uint8[T,h,w,3] and where they came from.

  Attributes:
    frames: the pictures, upright.
    indices: the requested frame numbers, int64[T].
    num_frames: frames in the clip, as counted for the frame rule.
    duration: seconds.
    clamped: requested frames that a damaged tail did not yield; the last
      frame that could be decoded stands in for them.
    warnings: what makes the frames less than they seem, one line each.
  """

  frames: np.ndarray
  indices: np.ndarray
  num_frames: int
  duration: float
  clamped: int
  warnings: tuple[str, ...] = ()


def unsafe(relative: str) -> str | None:
  """Returns why a media path must not be used, None if it may be."""
  parts = relative.replace("\\", "/").split("/")
  if not relative:
    return "the path is empty"
  if "\0" in relative:
    return "the path holds a NUL character"
  if os.path.isabs(relative) or parts[0] == "":
    return "the path is absolute"
  if ".." in parts:
    return "the path climbs with .."
  if _URL.match(relative):
    return "URLs and drive letters are refused"
  return None


def safe_path(root, relative: str) -> str:
  """Returns the path of `relative` below `root`, or raises `VideoError`.

  Absolute paths, "..", URLs and links that leave the root are refused: rows of
  a data set must not read other files of the machine.
  """
  relative = os.fspath(relative)
  reason = unsafe(relative)
  if reason:
    raise VideoError(relative.replace("\0", "\\0"), "unsafe", reason)
  base = os.path.realpath(root)
  path = os.path.realpath(os.path.join(base, relative))
  if os.path.commonpath([base, path]) != base:
    raise VideoError(relative, "unsafe", "it leads out of the media root")
  return path


def probe(path, limits: Limits | None = None) -> Probe:
  """Returns what the clip holds, without decoding where stamps allow it."""
  with _Reader(path, limits or Limits()) as reader:
    return reader.probe()


def frame_size(path, limits: Limits | None = None) -> tuple[int, int]:
  """Returns (h, w) of the first frame, upright; nothing else is decoded."""
  with _Reader(path, limits or Limits()) as reader:
    return reader.frame_size()


def read_frames(path, indices, limits: Limits | None = None) -> np.ndarray:
  """Returns uint8[T,h,w,3], the frames at int[T] `indices` (any order)."""
  wanted = np.asarray(indices, np.int64)
  return decode(path, lambda num_frames, duration: wanted, limits=limits).frames


def decode(
  path,
  sampler: Callable[[int, float], Sequence[int]],
  *,
  size: int | None = None,
  resize: Callable[[np.ndarray], np.ndarray] | None = None,
  limits: Limits | None = None,
) -> Clip:
  """Decodes the frames that a rule picks.

  Args:
    path: a local file, or the bytes of an encoded clip.
    sampler: maps (number of frames, seconds) to frame indices.
    size: S, to resize every frame to S x S at once, so that few frames of the
      clip's own size are in memory; None keeps the size.
    resize: in place of `size`, what is done to each upright frame
      uint8[h,w,3]; all results must have one shape. A `frames.ShapeError` of
      it becomes the clip's.
    limits: caps; the defaults if None.

  Returns:
    The clip; `VideoError` if it cannot be used.
  """
  if size is not None:
    resize = functools.partial(frames_lib.resize_frame, size=size)
  with _Reader(path, limits or Limits()) as reader:
    return reader.decode(sampler, resize)


class _Length(NamedTuple):
  """How long a clip is; `table` is None if stamps cannot be used."""

  table: tuple[list[int], np.ndarray] | None
  num_frames: int
  seconds: float
  warnings: tuple[str, ...]


class _NoTableError(Exception):
  """The container's stamps cannot be used; decode in sequence."""


class _Reader:
  """One open clip."""

  def __init__(self, path, limits: Limits):
    self._data = bytes(path) if isinstance(path, (bytes, bytearray)) else None
    self.path = "embedded clip" if self._data is not None else os.fspath(path)
    self.limits = limits
    self._deadline = (
      None if limits.timeout_s is None else time.monotonic() + limits.timeout_s
    )
    self._check_file()
    self._container, self._tail = None, 0.0
    self._open()

  def __enter__(self):
    return self

  def __exit__(self, *unused):
    self._container.close()

  def _fail(self, reason: str, detail: str = "") -> VideoError:
    return VideoError(self.path, reason, detail)

  def _check_file(self):
    if self._data is not None:
      if not self._data:
        raise self._fail("empty")
      if len(self._data) > self.limits.max_bytes:
        raise self._fail("too_large", f"{len(self._data)} bytes")
      return
    if "\0" in self.path:
      raise VideoError(self.path.replace("\0", "\\0"), "unsafe")
    try:
      status = os.stat(self.path)
    except FileNotFoundError:
      raise self._fail("missing") from None
    except OSError as error:
      raise self._fail("unreadable", error.strerror or str(error)) from None
    if not stat.S_ISREG(status.st_mode):
      raise self._fail("not_a_file")  # A pipe would block for ever.
    if status.st_size == 0:
      raise self._fail("empty")
    if status.st_size > self.limits.max_bytes:
      raise self._fail("too_large", f"{status.st_size} bytes")

  def _open(self):
    if self._container is not None:
      self._container.close()
    # The prefix pins the protocol whatever the name looks like.
    source = (
      "file:" + self.path if self._data is None else io.BytesIO(self._data)
    )
    try:
      self._container = av.open(
        source,
        container_options={
          "protocol_whitelist": "file",
          "format_whitelist": _DEMUXERS,
        },
        timeout=self._left(),
        **_OPEN_OPTIONS,
      )
    except (av.error.FFmpegError, OSError, ValueError) as error:
      self._tick()
      raise self._fail("unreadable", _text(error)) from None
    try:
      # Cover pictures of music files are video streams of one picture.
      videos = [
        stream
        for stream in self._container.streams.video
        if not _is_cover(stream)
      ]
      if not videos:
        raise self._fail("no_video_stream")
      self._stream = videos[0]
      context = self._stream.codec_context
      if context is None:
        raise self._fail("unreadable", "unknown codec")
      if context.width * context.height > self.limits.max_pixels:
        raise self._fail("too_large", f"{context.width} x {context.height}")
      self._stream.thread_type = "AUTO"
      duration = self._container_seconds()
      if duration > self.limits.max_seconds:
        raise self._fail("too_long", f"{duration:.0f} s")
    except BaseException:
      self._container.close()
      raise

  def _left(self) -> float | None:
    if self._deadline is None:
      return None
    return max(0.001, self._deadline - time.monotonic())

  def _tick(self):
    if self._deadline is not None and time.monotonic() > self._deadline:
      raise self._fail("timeout", f"above {self.limits.timeout_s} s")

  def _container_seconds(self) -> float:
    stream = self._stream
    if stream.duration and stream.time_base:
      return float(stream.duration * stream.time_base)
    if self._container.duration:
      return self._container.duration / av.time_base
    return 0.0

  def _packets(self):
    """Demuxes the video stream; a damaged container ends early."""
    packets = self._container.demux(self._stream)
    while True:
      self._tick()
      try:
        packet = next(packets)
      except (StopIteration, EOFError):
        return
      except (av.error.FFmpegError, ValueError):
        self._tick()
        return
      yield packet

  def _pictures(self) -> Iterator[av.VideoFrame]:
    """Decodes from the current position; skips packets that are damaged."""
    for packet in self._packets():
      try:
        pictures = packet.decode()
      except EOFError:
        return
      except (av.error.FFmpegError, ValueError):
        continue
      yield from pictures

  def _table(self) -> tuple[list[int], np.ndarray]:
    """Returns the shown frames' time stamps and those of keyframes.

    Packets that an edit list discards are never shown: counting them would
    shift every index.
    """
    stamps, keys, seen, last = [], [], 0, None
    for packet in self._packets():
      if packet.size == 0:  # The flush packet at the end.
        continue
      seen += 1
      if seen > self.limits.max_frames:
        raise self._fail("too_long", f"above {self.limits.max_frames} frames")
      if packet.pts is None:
        raise _NoTableError
      if packet.is_keyframe:
        keys.append(packet.pts)
      if not packet.is_discard:
        stamps.append(packet.pts)
        if last is None or packet.pts > last.pts:
          last = packet
    stamps.sort()
    keys.sort()
    if not stamps or not keys or len(set(stamps)) != len(stamps):
      raise _NoTableError
    # How long the last picture is shown; 0 if the container does not tell.
    self._tail = float((last.duration or 0) * (self._stream.time_base or 0))
    return stamps, np.array(keys)

  def _count(self) -> int:
    """Counts the frames that decode, for files without usable stamps."""
    self._open()
    count = 0
    for _ in self._pictures():
      count += 1
      if count > self.limits.max_frames:
        raise self._fail("too_long", f"above {self.limits.max_frames} frames")
    return count

  def _length(self) -> _Length:
    """Counts the frames and the seconds, from stamps if there are any."""
    try:
      table = self._table()
      num_frames = len(table[0])
    except _NoTableError:
      table = None
      num_frames = self._count()
    if num_frames == 0:
      raise self._fail("no_frames")
    rate = self._stream.average_rate
    seconds = num_frames / float(rate) if rate else self._container_seconds()
    warnings = []
    if table is not None and num_frames > 1:
      seconds, warnings = self._timing(table[0], seconds)
    if seconds > self.limits.max_seconds:
      raise self._fail("too_long", f"{seconds:.0f} s")
    return _Length(table, num_frames, seconds, tuple(warnings))

  def _timing(self, stamps, seconds: float) -> tuple[float, list[str]]:
    """Returns the clip's seconds, and what is odd about its stamps."""
    times = np.array([stamp - stamps[0] for stamp in stamps], np.float64)
    times *= float(self._stream.time_base or 0)
    span, warnings = times[-1], []
    shown = span + (self._tail or span / (len(times) - 1))
    if not 0 < shown <= self.limits.max_seconds:  # A damaged stamp.
      return seconds, warnings
    if abs(shown - seconds) > _SLACK * shown:
      # Matroska's header tells the rate that the writer had in mind.
      warnings.append(
        f"the header gives {seconds:.2f} s, the time stamps {shown:.2f} s,"
        " which are taken"
      )
      seconds = shown
    late = np.abs(times - np.linspace(0, span, len(times))).max()
    if late > _SLACK * span:
      warnings.append(
        f"the frame rate varies: frames lie up to {late:.2f} s off an even"
        " spacing, and are picked by number, as in the reference"
      )
    return seconds, warnings

  def probe(self) -> Probe:
    """See the function of this name."""
    length = self._length()
    context = self._stream.codec_context
    fps = self._stream.average_rate
    if length.seconds and (fps is None or length.warnings):
      fps = length.num_frames / length.seconds
    return Probe(
      length.num_frames,
      context.width,
      context.height,
      length.seconds,
      float(fps or 0),
      context.name,
      self._container.format.name,
      length.warnings,
    )

  def frame_size(self) -> tuple[int, int]:
    """See the function of this name."""
    for picture in self._pictures():
      # The stored size may lie on its side.
      return self._upright(picture, None).shape[:2]
    raise self._fail("no_frames", "no picture could be decoded")

  def decode(self, sampler, resize) -> Clip:
    """See the function of this name."""
    table, num_frames, seconds, warnings = self._length()
    indices = np.asarray(sampler(num_frames, seconds), np.int64)
    if indices.size == 0:
      raise self._fail("too_short", f"{num_frames} frames, {seconds:.2f} s")
    if indices.min() < 0 or indices.max() >= num_frames:
      raise errors.UserError(
        f"{self.path}: frame indices {indices.min()}..{indices.max()} lie"
        f" outside the clip's {num_frames} frames; correct the frame rule"
      )
    order = np.unique(indices)  # Ascending, without repetition.
    pictures = None
    if table is not None:
      try:
        pictures = self._by_stamp(table, order, resize)
      except _NoTableError:
        pictures = None
    if pictures is None:
      pictures = self._in_sequence(order, resize)
    if not pictures:
      raise self._fail("no_frames", "no picture could be decoded")
    clamped = int((indices > order[len(pictures) - 1]).sum())
    if clamped:
      warnings += (
        f"{clamped} of {len(indices)} frames cannot be decoded; the last one"
        " before them stands in",
      )
    places = np.searchsorted(order, indices).clip(max=len(pictures) - 1)
    shape = pictures[0].shape
    pictures = [_fit(picture, shape) for picture in pictures]
    return Clip(
      np.stack([pictures[place] for place in places]),
      indices,
      num_frames,
      seconds,
      clamped,
      warnings,
    )

  def _by_stamp(self, table, order, resize) -> list[np.ndarray]:
    """Returns the frames of ascending indices; fewer if the tail is damaged."""
    stamps, keys = table
    found, pictures, current = [], None, None
    for index in order:
      wanted = stamps[index]
      key = int(keys[max(0, np.searchsorted(keys, wanted, side="right") - 1)])
      landed = False
      if current is None or key > current:
        try:
          self._container.seek(key, stream=self._stream, backward=True)
        except av.error.FFmpegError:
          raise _NoTableError from None
        self._stream.codec_context.flush_buffers()
        pictures, landed = self._pictures(), True
      for picture in pictures:
        current = picture.pts
        if current is None or (landed and current > wanted and wanted != key):
          # The seek went beyond the frame: the index of the file is wrong.
          raise _NoTableError
        landed = False
        if current >= wanted:
          found.append(self._upright(picture, resize))
          break
      else:
        return found
    return found

  def _in_sequence(self, order, resize) -> list[np.ndarray]:
    """Returns the same, by counting the frames from the start."""
    self._open()
    found = []
    wanted = iter(order.tolist())
    index = next(wanted)
    for count, picture in enumerate(self._pictures()):
      if count < index:
        continue
      found.append(self._upright(picture, resize))
      index = next(wanted, None)
      if index is None:
        break
    return found

  def _upright(self, picture, resize) -> np.ndarray:
    """Returns uint8[h,w,3] with the display rotation applied."""
    if picture.width * picture.height > self.limits.max_pixels:
      raise self._fail("too_large", f"{picture.width} x {picture.height}")
    try:
      image = picture.to_ndarray(format="rgb24")
    except av.error.BlockingIOError as error:
      # Nothing is wrong with the clip: it must not count as unreadable.
      raise errors.UserError(
        f"{self.path}: the system has no thread left to convert a frame with;"
        " run fewer processes at once"
      ) from error
    image = _turned(image, picture)
    try:
      return resize(image) if resize else image
    except frames_lib.ShapeError as error:
      raise VideoError(
        self.path, "bad_shape", error.detail, error.mend
      ) from error


def _turned(image: np.ndarray, picture: av.VideoFrame) -> np.ndarray:
  """Returns the pixels [h,w,3] as a player shows them.

  The display matrix (a b; c d) sends (x, y) to (a x + c y, b x + d y): quarter
  turns, mirrored or not. PyAV's angle alone would turn a mirrored picture
  upside down.
  """
  # By name: PyAV 19 walks through the kinds and no longer through the data.
  matrix = picture.side_data.get("DISPLAYMATRIX")
  if matrix is None:
    return image
  a, b, _, c, d = np.frombuffer(bytes(matrix), np.int32)[:5].tolist()
  if abs(b) + abs(c) > abs(a) + abs(d):
    image, rows, columns = image.swapaxes(0, 1), b, c
  else:
    rows, columns = d, a
  image = image[:: -1 if rows < 0 else 1, :: -1 if columns < 0 else 1]
  return np.ascontiguousarray(image)


def _fit(image: np.ndarray, shape) -> np.ndarray:
  """Brings a frame of a stream that changes its size to the first one's."""
  if image.shape == shape:
    return image
  picture = av.VideoFrame.from_ndarray(image, format="rgb24")
  return picture.reformat(width=shape[1], height=shape[0]).to_ndarray()


def _is_cover(stream) -> bool:
  disposition = getattr(stream, "disposition", None)
  return bool(disposition and "attached_pic" in str(disposition))


def _text(error) -> str:
  return getattr(error, "strerror", None) or str(error)
