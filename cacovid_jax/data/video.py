"""Frames of video files by their numbers, decoded by PyAV.

A frame's number is its place in a decode of the whole stream. Demuxing gives an
index without decoding; the decoder seeks where a key frame lies between two
requested frames, and the stamp of every picture behind the landing is verified.
Where the index or a landing cannot be relied on, the clip is decoded in
sequence: once to number its pictures, once more to take them.
"""

import array
import dataclasses
import hashlib
import itertools
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence

import av
import numpy as np

from cacovid_jax import errors
from cacovid_jax.data import clip_index, video_stream
from cacovid_jax.data import frames as frames_lib

VideoError = video_stream.VideoError
Limits = video_stream.Limits

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
_NO_PICTURE = "no picture could be decoded"
# What is counted of damage, as fields of `Clip`, in words.
DAMAGE = {
  "lost": "pictures cannot be decoded",
  "damaged": "frames show damage or follow some",
  "replaced": "frames cannot be decoded; the last one before them stands in",
}
_URL = re.compile(r"^[A-Za-z][A-Za-z0-9+.,\-]*:")


@dataclasses.dataclass(frozen=True)
class Probe:
  """What a clip holds; `warnings` is as of `Clip`."""

  num_frames: int
  duration: float  # Seconds.
  warnings: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, eq=False)
class Clip:
  """Decoded frames and where they came from."""

  frames: np.ndarray  # uint8[T,h,w,3], upright.
  indices: np.ndarray  # int64[T], the requested frame numbers.
  num_frames: int  # In the clip, as counted for the frame rule.
  duration: float  # Seconds.
  # Requested frames that cannot be decoded; the last one before them stands in.
  replaced: int = 0
  damaged: int = 0  # Other requested frames that show damage, or follow some.
  lost: int = 0  # Pictures that cannot be decoded, as far as was seen.
  # What makes the frames less than they seem, one line each.
  warnings: tuple[str, ...] = ()
  size: tuple[int, int] = (0, 0)  # (h, w) of the frames before resizing.
  # sha256 of their shape (T,h,w,3) and pixels before resizing, in rising order
  # of number; "" unless it was asked for.
  frame_hash: str = ""


def unsafe(relative: str) -> str | None:
  """Returns why a media path must not be used, None if it may be."""
  parts = relative.replace("\\", "/").split("/")
  faults = {
    "the path is empty": not relative,
    "the path holds a NUL character": "\0" in relative,
    "the path is absolute": os.path.isabs(relative) or parts[0] == "",
    "the path climbs with ..": ".." in parts,
    "URLs and drive letters are refused": _URL.match(relative),
  }
  return next((fault for fault, found in faults.items() if found), None)


def safe_path(root, relative: str) -> str:
  """Returns the path of `relative` below `root`, or raises `VideoError`.

  Absolute paths, "..", URLs and links that leave the root are refused: rows of
  a data set must not read other files of the machine.
  """
  relative = os.fspath(relative)
  if reason := unsafe(relative):
    raise VideoError(relative.replace("\0", "\\0"), "unsafe", reason)
  base = os.path.realpath(root)
  path = os.path.realpath(os.path.join(base, relative))
  if os.path.commonpath([base, path]) != base:
    raise VideoError(relative, "unsafe", "it leads out of the media root")
  return path


def told(counts: Mapping[str, int]) -> str:
  """Returns those of `DAMAGE` that are not 0 in words; "" without any."""
  return ", ".join(
    f"{counts[name]} {what}"
    for name, what in DAMAGE.items()
    if counts.get(name)
  )


def bad_shape(path, error: frames_lib.ShapeError) -> VideoError:
  """Returns the error of a clip whose frames have that shape."""
  return VideoError(path, "bad_shape", error.detail, error.mend)


def probe(path, limits: Limits | None = None) -> Probe:
  """Returns what the clip holds, without decoding where stamps allow it."""
  with _Reader(path, limits) as reader:
    index = reader.index()
    seconds, warnings = reader.timing(index)
    return Probe(index.num_frames, seconds, tuple(warnings))


def frame_size(path, limits: Limits | None = None) -> tuple[int, int]:
  """Returns (h, w) of the first frame, upright; nothing else is decoded."""
  with _Reader(path, limits) as reader:
    for picture in reader.pictures():
      # The stored size may lie on its side.
      return reader.upright(picture).shape[:2]
    raise reader.fail("no_frames", _NO_PICTURE)


def read_frames(path, indices, limits: Limits | None = None) -> np.ndarray:
  """Returns uint8[T,h,w,3], the frames at int[T] `indices` (any order)."""
  wanted = np.asarray(indices, np.int64)
  return decode(path, lambda num_frames, duration: wanted, limits=limits).frames


def decode(
  path,
  sampler: Callable[[int, float], Sequence[int]],
  *,
  resize: Callable[[np.ndarray], np.ndarray] | None = None,
  limits: Limits | None = None,
  hashed: bool = False,
) -> Clip:
  """Decodes the frames that a rule picks; `VideoError` of an unfit clip.

  Args:
    path: a local file, or the bytes of an encoded clip.
    sampler: maps (number of frames, seconds) to frame indices.
    resize: what is done to each upright frame uint8[h,w,3] at once, so that few
      frames of the clip's own size are in memory; all results must have one
      shape. A `frames.ShapeError` of it becomes the clip's.
    limits: caps; the defaults if None.
    hashed: whether `Clip.frame_hash` is wanted.
  """
  with _Reader(path, limits) as reader:
    index = reader.index()
    try:
      return reader.clip(index, sampler, resize, hashed)
    except _UnverifiedError:
      return reader.clip(reader.whole(index), sampler, resize, hashed)


class _UnverifiedError(Exception):
  """Seeking does not give the pictures that the index tells."""


class _Reader(video_stream.VideoStream):
  """One open clip."""

  def __init__(self, path, limits: Limits | None):
    super().__init__(path, limits)
    # One for all pictures: each of them has a thread per processor.
    self._converter = av.video.reformatter.VideoReformatter()

  def index(self) -> clip_index.ClipIndex:
    """Returns what packets tell, or the whole decode if that is not sure."""
    rows, first = array.array("q"), []
    least, last = 2**31, None
    for count, packet in enumerate(self.packets()):
      if len(first) < _PROBED:
        first += [picture.pts for picture in self.decode(packet)]
      if packet.size == 0:
        continue
      self.check_count(count + 1)
      least = min(least, packet.size)
      flags = packet.is_keyframe + 2 * packet.is_discard
      times = _stamp(packet.pts), _stamp(packet.dts)
      rows.extend((*times, packet.pos or 0, flags))
      if last is None or times[0] > _stamp(last.pts):
        last = packet
    if last is None:
      raise self.fail("no_frames")
    # How long the last picture is shown; 0 if the container does not tell.
    self._tail = float((last.duration or 0) * (self.stream.time_base or 0))
    index = clip_index.ClipIndex()
    context, container = self.stream.codec_context, self.container.format
    codec = context.codec.canonical_name
    if codec in _ONE_PICTURE and (codec != "mpeg4" or least > _EMPTY_VOP):
      by_stamp = container.flags & _SEEK_TO_PTS or "matroska" in container.name
      index = clip_index.ClipIndex.of_packets(
        np.array(rows, np.int64).reshape(-1, 4),
        by_stamp=bool(by_stamp),
        delayed=context.has_b_frames,
        even=codec == "h264" and clip_index.may_have_fields(context.extradata),
      )
    probed = first == index.stamps[: len(first)].tolist()
    if index.sound and first and probed and not self.faults:
      return index
    return self.whole(index)

  def whole(self, index: clip_index.ClipIndex) -> clip_index.ClipIndex:
    """Decodes all that there is, in one thread, as the truth."""
    self.open("NONE")
    rows, early = array.array("q"), 0
    for count, picture in enumerate(self.pictures(), start=1):
      self.check_count(count)
      if count == 1:
        early = self.faults
      flags = picture.key_frame + 2 * picture.is_corrupt
      rows.extend((_stamp(picture.pts), flags))
    if not rows:
      raise self.fail("no_frames", _NO_PICTURE)
    pictures = np.array(rows, np.int64).reshape(-1, 2)
    return index.decoded(pictures, self.faults, early)

  def timing(self, index: clip_index.ClipIndex) -> tuple[float, list[str]]:
    """Returns the clip's seconds and what is odd about it."""
    seconds, warnings = self.seconds, []
    if rate := self.stream.average_rate:
      seconds = index.num_frames / float(rate)
    times = index.stamps - index.stamps[:1]
    times = times * float(self.stream.time_base or 0)
    span = np.ptp(times) if len(times) > 1 else 0
    shown = span + (self._tail or span / max(1, len(times) - 1))
    if 0 < span and shown <= self.limits.max_seconds:  # Else a damaged stamp.
      if abs(shown - seconds) > _SLACK * shown:
        # Matroska's header tells the rate that the writer had in mind.
        given = f"the header gives {seconds:.2f} s, the time stamps {shown:.2f}"
        warnings.append(f"{given} s, which are taken")
        seconds = float(shown)
      late = np.abs(times - np.linspace(0, span, len(times))).max()
      if late > _SLACK * span:
        warnings.append(
          f"the frame rate varies: frames lie up to {late:.2f} s off an even"
          " spacing, and are picked by number, as in the reference"
        )
    if seconds > self.limits.max_seconds:
      raise self.fail("too_long", f"{seconds:.0f} s")
    if index.lost:
      warnings.append(f"{index.lost} of {index.num_frames} {DAMAGE['lost']}")
    return seconds, warnings

  def clip(self, index: clip_index.ClipIndex, sampler, resize, hashed) -> Clip:
    """Reads the frames that the rule takes of the pictures of an index."""
    count, (seconds, warnings) = index.num_frames, self.timing(index)
    indices = np.asarray(sampler(count, seconds), np.int64)
    if indices.size == 0:
      raise self.fail("too_short", f"{count} frames, {seconds:.2f} s")
    if indices.min() < 0 or indices.max() >= count:
      raise errors.UserError(
        f"{self.path}: frame indices {indices.min()}..{indices.max()} lie"
        f" outside the clip's {count} frames; correct the frame rule"
      )
    places = index.places(indices)
    # Ascending, without repetition.
    order, inverse = np.unique(places, return_inverse=True)
    repeats = np.bincount(inverse).tolist()
    read = self._by_seeking if index.sound else self._in_sequence
    shown = zip(read(index, order.tolist()), repeats, strict=True)
    pictures, size, digest = [], None, None
    for picture, times in shown:
      image = self.upright(picture)
      if size is None:
        size = image.shape
        digest = hashlib.sha256(str((len(indices), *size)).encode())
      if image.shape != size:  # The stream changes it.
        image = av.VideoFrame.from_ndarray(image, format="rgb24")
        image = image.reformat(width=size[1], height=size[0]).to_ndarray()
      for _ in range(times if hashed else 0):
        digest.update(np.ascontiguousarray(image).data)
      try:
        pictures.append(resize(image) if resize else image)
      except frames_lib.ShapeError as error:
        raise bad_shape(self.path, error) from error
    bad = index.numbers[places] != indices
    replaced, damaged = bad.sum(), (index.damaged[places] & ~bad).sum()
    for part, name in ((damaged, "damaged"), (replaced, "replaced")):
      if part:
        warnings.append(f"{part} of {len(indices)} {DAMAGE[name]}")
    return Clip(
      np.stack([pictures[place] for place in inverse]),
      indices,
      count,
      seconds,
      replaced=int(replaced),
      damaged=int(damaged),
      lost=index.lost,
      warnings=tuple(warnings),
      size=size[:2],
      frame_hash=digest.hexdigest() if hashed else "",
    )

  def _by_seeking(self, index, order: list[int]) -> Iterator[av.VideoFrame]:
    """Yields the pictures of ascending numbers; seeks to what lies ahead."""
    group, number = None, -1
    for wanted in order:
      key = int(np.searchsorted(index.keys, wanted, side="right")) - 1
      if group is None or index.keys[key] > number:
        group, number = self._from_key(index, key), index.keys[key] - 1
      yield next(itertools.islice(group, wanted - number - 1, None))
      number = wanted

  def _from_key(self, index, key: int) -> Iterator[av.VideoFrame]:
    """Yields the pictures from a key frame on, the stamp of each verified.

    What comes out before it belongs to an earlier key frame, or cannot be told
    to be whole. The place of the key frame in the file is verified too, since
    some containers give other stamps after a seek, and that the next picture
    is the right one: those that need what lies before the landing are missing.
    """
    target, landing, place = index.landings[key].tolist()
    try:
      self.container.seek(target, stream=self.stream, backward=True)
    except av.error.FFmpegError:
      raise _UnverifiedError from None
    self.stream.codec_context.flush_buffers()
    stamps = iter(index.stamps[index.keys[key] :].tolist())
    expected, verified = next(stamps), None
    for packet in self.packets():
      if (packet.pts == landing) != (packet.pos == place):
        raise _UnverifiedError
      for picture in self.decode(packet):
        stamp = _stamp(picture.pts)
        if not verified and clip_index.NO_STAMP < stamp < expected:
          continue
        if stamp != expected or self.faults:
          raise _UnverifiedError
        if verified:
          yield verified
        expected, verified = next(stamps, None), picture
    if expected is not None:
      raise _UnverifiedError
    yield verified

  def _in_sequence(self, index, order: list[int]) -> Iterator[av.VideoFrame]:
    """Yields the pictures at ascending places of the whole decode."""
    del index
    self.open("NONE")
    wanted = set(order)
    for place, picture in enumerate(self.pictures()):
      if place in wanted:
        yield picture
      if place == order[-1]:
        return
    raise self.fail("unreadable", "it does not decode alike twice")

  def upright(self, picture) -> np.ndarray:
    """Returns uint8[h,w,3] with the display rotation applied."""
    self.check_size(picture)
    try:
      image = self._converter.reformat(picture, format="rgb24").to_ndarray()
    except av.error.BlockingIOError as error:
      # Nothing is wrong with the clip: it must not count as unreadable.
      raise errors.UserError(
        f"{self.path}: the system has no thread left to convert a frame with;"
        " run fewer processes at once"
      ) from error
    except av.error.FFmpegError as error:
      raise self.fail("unreadable", f"a picture: {error.strerror}") from error
    # By name: PyAV 19 walks through the kinds and no longer through the data.
    if (matrix := picture.side_data.get("DISPLAYMATRIX")) is None:
      return image
    return frames_lib.turned(image, np.frombuffer(bytes(matrix), np.int32))


def _stamp(value: int | None) -> int:
  return clip_index.NO_STAMP if value is None else value
