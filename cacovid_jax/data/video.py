"""Frames of video files, decoded by PyAV, with every fault named.

A frame's number is its place in a decode of the whole stream. Demuxing gives an
index without decoding; the decoder seeks where a key frame lies between two
requested frames, and the stamp of every picture behind the landing is verified.
Where the index or a landing cannot be relied on, the clip is decoded in
sequence: once to number its pictures, once more to take them.
Paths, protocols, formats and sizes are checked before anything is decoded,
since a clip of a public data set is an untrusted file.
"""

import array
import dataclasses
import functools
import hashlib
import io
import itertools
import os
import re
import stat
import time
from collections.abc import Callable, Iterator, Sequence

import av
import numpy as np

from cacovid_jax import errors
from cacovid_jax.data import clip_index
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
# Packets of which each holds one picture. Those of VP8 may hold none.
_ONE_PICTURE = {"h264", "hevc", "av1", "vp9", "mpeg2video", "mpeg4", "mjpeg"}
# Bytes that say "as before" in MPEG-4, where no picture comes out.
_EMPTY_VOP = 16
# Pictures that are decoded to see whether stamps are theirs.
_PROBED = 8
_SEEK_TO_PTS = 0x4000000  # AVFMT_SEEK_TO_PTS of FFmpeg.
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
    replaced: requested frames that cannot be decoded; the last one before them
      stands in.
    damaged: other requested frames that show damage, or follow some.
    lost: pictures of the clip that cannot be decoded, as far as was seen.
    warnings: what makes the frames less than they seem, one line each.
    size: (h, w) of the frames before they were resized.
    frame_hash: sha256 of the shape (T,h,w,3) of the frames before they were
      resized and of their pixels, in rising order of number; "" unless it was
      asked for.
  """

  frames: np.ndarray
  indices: np.ndarray
  num_frames: int
  duration: float
  replaced: int = 0
  damaged: int = 0
  lost: int = 0
  warnings: tuple[str, ...] = ()
  size: tuple[int, int] = (0, 0)
  frame_hash: str = ""


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
  hashed: bool = False,
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
    hashed: whether `Clip.frame_hash` is wanted.

  Returns:
    The clip; `VideoError` if it cannot be used.
  """
  if size is not None:
    resize = functools.partial(frames_lib.resize_frame, size=size)
  with _Reader(path, limits or Limits()) as reader:
    return reader.decode(sampler, resize, hashed)


class _UnverifiedError(Exception):
  """Seeking does not give the pictures that the index tells."""


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
      size = len(self._data)
    else:
      size = self._file_size()
    if size == 0:
      raise self._fail("empty")
    if size > self.limits.max_bytes:
      raise self._fail("too_large", f"{size} bytes")

  def _file_size(self) -> int:
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
    return status.st_size

  def _open(self, thread_type: str = "AUTO"):
    self._faults = 0
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
      self._stream.thread_type = thread_type
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
      # An empty packet ends the decoder's work: only the last one, without a
      # time, means that.
      if packet.size or packet.dts is None:
        yield packet

  def _decode(self, packet) -> list[av.VideoFrame]:
    """Decodes a packet; one that is damaged is counted and skipped."""
    try:
      pictures = packet.decode()
    except EOFError:
      return []
    except (av.error.FFmpegError, ValueError):
      self._faults += 1
      return []
    self._faults += sum(picture.is_corrupt for picture in pictures)
    return pictures

  def _pictures(self) -> Iterator[av.VideoFrame]:
    """Decodes from the current position."""
    for packet in self._packets():
      yield from self._decode(packet)

  def _check_count(self, count: int):
    if count > self.limits.max_frames:
      raise self._fail("too_long", f"above {self.limits.max_frames} frames")

  def _index(self) -> clip_index.ClipIndex:
    """Returns what packets tell, or the whole decode if that is not sure."""
    rows, first = array.array("q"), []
    least, last = 2**31, None
    for count, packet in enumerate(self._packets()):
      if len(first) < _PROBED:
        first += [picture.pts for picture in self._decode(packet)]
      if packet.size == 0:
        continue
      self._check_count(count + 1)
      least = min(least, packet.size)
      flags = packet.is_keyframe + 2 * packet.is_discard
      rows.extend(
        (_stamp(packet.pts), _stamp(packet.dts), packet.pos or 0, flags)
      )
      if last is None or _stamp(packet.pts) > _stamp(last.pts):
        last = packet
    if last is None:
      raise self._fail("no_frames")
    # How long the last picture is shown; 0 if the container does not tell.
    self._tail = float((last.duration or 0) * (self._stream.time_base or 0))
    index = clip_index.ClipIndex()
    context, container = self._stream.codec_context, self._container.format
    codec = context.codec.canonical_name
    if codec in _ONE_PICTURE and (codec != "mpeg4" or least > _EMPTY_VOP):
      index = clip_index.ClipIndex.of_packets(
        np.array(rows, np.int64).reshape(-1, 4),
        by_stamp=bool(container.flags & _SEEK_TO_PTS)
        or "matroska" in container.name,
        delayed=context.has_b_frames,
      )
    probed = first == index.stamps[: len(first)].tolist()
    if index.sound and first and probed and not self._faults:
      return index
    return self._whole(index)

  def _whole(self, index: clip_index.ClipIndex) -> clip_index.ClipIndex:
    """Decodes all that there is, in one thread, as the truth."""
    self._open("NONE")
    rows, early = array.array("q"), 0
    for count, picture in enumerate(self._pictures(), start=1):
      self._check_count(count)
      if count == 1:
        early = self._faults
      flags = picture.key_frame + 2 * picture.is_corrupt
      rows.extend((_stamp(picture.pts), flags))
    if not rows:
      raise self._fail("no_frames", "no picture could be decoded")
    pictures = np.array(rows, np.int64).reshape(-1, 2)
    return index.decoded(pictures, self._faults, early)

  def _timing(self, index: clip_index.ClipIndex) -> tuple[float, list[str]]:
    """Returns the clip's seconds and what is odd about it."""
    rate, warnings = self._stream.average_rate, []
    seconds = self._container_seconds()
    if rate:
      seconds = index.num_frames / float(rate)
    times = index.stamps - index.stamps[:1]
    times = times * float(self._stream.time_base or 0)
    span = np.ptp(times) if len(times) > 1 else 0
    shown = span + (self._tail or span / max(1, len(times) - 1))
    if 0 < span and shown <= self.limits.max_seconds:  # Else a damaged stamp.
      if abs(shown - seconds) > _SLACK * shown:
        # Matroska's header tells the rate that the writer had in mind.
        warnings.append(
          f"the header gives {seconds:.2f} s, the time stamps {shown:.2f} s,"
          " which are taken"
        )
        seconds = float(shown)
      late = np.abs(times - np.linspace(0, span, len(times))).max()
      if late > _SLACK * span:
        warnings.append(
          f"the frame rate varies: frames lie up to {late:.2f} s off an even"
          " spacing, and are picked by number, as in the reference"
        )
    if seconds > self.limits.max_seconds:
      raise self._fail("too_long", f"{seconds:.0f} s")
    if index.lost:
      warnings.append(
        f"{index.lost} of {index.num_frames} pictures cannot be decoded"
      )
    return seconds, warnings

  def probe(self) -> Probe:
    """See the function of this name."""
    index = self._index()
    seconds, warnings = self._timing(index)
    context = self._stream.codec_context
    fps = self._stream.average_rate
    if seconds and (fps is None or warnings):
      fps = index.num_frames / seconds
    return Probe(
      index.num_frames,
      context.width,
      context.height,
      seconds,
      float(fps or 0),
      context.name,
      self._container.format.name,
      tuple(warnings),
    )

  def frame_size(self) -> tuple[int, int]:
    """See the function of this name."""
    for picture in self._pictures():
      # The stored size may lie on its side.
      return self._upright(picture).shape[:2]
    raise self._fail("no_frames", "no picture could be decoded")

  def decode(self, sampler, resize, hashed) -> Clip:
    """See the function of this name."""
    index = self._index()
    try:
      return self._clip(index, sampler, resize, hashed)
    except _UnverifiedError:
      return self._clip(self._whole(index), sampler, resize, hashed)

  def _clip(self, index: clip_index.ClipIndex, sampler, resize, hashed) -> Clip:
    """Reads the frames that the rule takes of the pictures of an index."""
    seconds, warnings = self._timing(index)
    count = index.num_frames
    indices = np.asarray(sampler(count, seconds), np.int64)
    if indices.size == 0:
      raise self._fail("too_short", f"{count} frames, {seconds:.2f} s")
    if indices.min() < 0 or indices.max() >= count:
      raise errors.UserError(
        f"{self.path}: frame indices {indices.min()}..{indices.max()} lie"
        f" outside the clip's {count} frames; correct the frame rule"
      )
    places = index.places(indices)
    # Ascending, without repetition.
    order, inverse, repeats = np.unique(
      places, return_inverse=True, return_counts=True
    )
    read = self._by_seeking if index.sound else self._in_sequence
    pictures, size, digest = [], None, None
    for picture, count_shown in zip(read(index, order), repeats, strict=True):
      image = self._upright(picture)
      if size is None:
        size = image.shape
        digest = hashlib.sha256(str((len(indices), *size)).encode())
      image = _fit(image, size)
      for _ in range(count_shown if hashed else 0):
        digest.update(np.ascontiguousarray(image).data)
      pictures.append(self._resized(image, resize))
    replaced = index.numbers[places] != indices
    damaged = int((index.damaged[places] & ~replaced).sum())
    replaced = int(replaced.sum())
    if damaged:
      warnings.append(
        f"{damaged} of {len(indices)} frames show damage or follow some"
      )
    if replaced:
      warnings.append(
        f"{replaced} of {len(indices)} frames cannot be decoded; the last one"
        " before them stands in"
      )
    return Clip(
      np.stack([pictures[place] for place in inverse]),
      indices,
      count,
      seconds,
      replaced=replaced,
      damaged=damaged,
      lost=index.lost,
      warnings=tuple(warnings),
      size=size[:2],
      frame_hash=digest.hexdigest() if hashed else "",
    )

  def _by_seeking(
    self, index: clip_index.ClipIndex, order
  ) -> Iterator[av.VideoFrame]:
    """Yields the pictures of ascending numbers; seeks to what lies ahead."""
    group, number = None, -1
    for wanted in order.tolist():
      key = int(np.searchsorted(index.keys, wanted, side="right")) - 1
      if group is None or index.keys[key] > number:
        group, number = self._from_key(index, key), index.keys[key] - 1
      yield next(itertools.islice(group, wanted - number - 1, None))
      number = wanted

  def _from_key(
    self, index: clip_index.ClipIndex, key: int
  ) -> Iterator[av.VideoFrame]:
    """Yields the pictures from a key frame on, the stamp of each verified.

    What comes out before it belongs to an earlier key frame, or cannot be told
    to be whole. The place of the key frame in the file is verified too, since
    some containers give other stamps after a seek, and that the next picture
    is the right one: those that need what lies before the landing are missing.
    """
    target, landing, place = index.landings[key].tolist()
    try:
      self._container.seek(target, stream=self._stream, backward=True)
    except av.error.FFmpegError:
      raise _UnverifiedError from None
    self._stream.codec_context.flush_buffers()
    stamps = iter(index.stamps[index.keys[key] :].tolist())
    expected, verified = next(stamps), None
    for packet in self._packets():
      if (packet.pts == landing) != (packet.pos == place):
        raise _UnverifiedError
      for picture in self._decode(packet):
        stamp = _stamp(picture.pts)
        if not verified and clip_index.NO_STAMP < stamp < expected:
          continue
        if stamp != expected or self._faults:
          raise _UnverifiedError
        if verified:
          yield verified
        expected, verified = next(stamps, None), picture
    if expected is not None:
      raise _UnverifiedError
    yield verified

  def _in_sequence(
    self, index: clip_index.ClipIndex, order
  ) -> Iterator[av.VideoFrame]:
    """Yields the pictures at ascending places of the whole decode."""
    self._open("NONE")
    places = iter(order.tolist())
    wanted = next(places)
    for place, picture in enumerate(self._pictures()):
      if place == wanted:
        yield picture
        wanted = next(places, None)
        if wanted is None:
          return
    raise self._fail("unreadable", "it does not decode alike twice")

  def _upright(self, picture) -> np.ndarray:
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
    return _turned(image, picture)

  def _resized(self, image: np.ndarray, resize) -> np.ndarray:
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


def _stamp(value: int | None) -> int:
  return clip_index.NO_STAMP if value is None else value


def _is_cover(stream) -> bool:
  disposition = getattr(stream, "disposition", None)
  return bool(disposition and "attached_pic" in str(disposition))


def _text(error) -> str:
  return getattr(error, "strerror", None) or str(error)
