"""Clips of every kind that files come in, and whether their frames are right.

A kind is a codec with its options, a container, a change to the packets and a
size; `kinds` has all that go together. Clips are written by the encoders and
muxers of the FFmpeg inside PyAV. The truth is a plain decode of the whole
stream in one thread, which shares nothing with `data.video`.
"""

import contextlib
import functools
import hashlib
import itertools
import os
import pathlib
import struct
import tempfile
from collections.abc import Iterator
from typing import NamedTuple

import av
import numpy as np

from cacovid_jax import errors
from cacovid_jax.data import video

FRAMES, GROUP = 40, 10  # Pictures of a clip, and between key frames.
SIZE = (80, 64)  # Width and height.
SIZES = ((16, 16), (50, 38), (33, 17))  # Tried of each codec.


class Kind(NamedTuple):
  """What a clip is; `change` is a key of `CHANGES` or `EDITS`, or empty."""

  codec: str
  container: str
  change: str = ""
  size: tuple[int, int] = SIZE

  @property
  def name(self) -> str:
    """Names the clip's file, but for its ending."""
    size = "x".join(map(str, self.size))
    return "-".join(filter(None, (self.codec, self.change, size)))


def _x264(text):
  text = f"keyint={GROUP}:{text}"
  return "libx264", {"preset": "fast", "x264-params": text}


def _x265(text):
  text = f"keyint={GROUP}:min-keyint={GROUP}:scenecut=0:{text}"
  text = f"log-level=none:pools=none:frame-threads=1:ctu=16:{text}"
  return "libx265", {"preset": "ultrafast", "x265-params": text}


def _plain(name, **options):
  return name, {"g": str(GROUP)} | options


_FIXED = f"b-adapt=0:min-keyint={GROUP}:scenecut=0"
CODECS = {
  "h264": _x264("bframes=0"),
  "h264_b": _x264("bframes=2"),
  "h264_pyramid": _x264(f"bframes=3:b-pyramid=normal:{_FIXED}"),
  "h264_open": _x264(f"bframes=3:open-gop=1:{_FIXED}"),
  "h264_refresh": _x264("bframes=2:intra-refresh=1"),
  "h264_fields": _x264("bframes=2:tff=1"),
  "h264_unmixed": _x264("bframes=2:fake-interlaced=1"),
  "hevc": _x265("bframes=0"),
  "hevc_b": _x265("bframes=3:open-gop=0"),
  "hevc_open": _x265("bframes=3:b-adapt=0:open-gop=1"),
  "hevc_radl": _x265("bframes=3:b-adapt=0:open-gop=0:radl=2"),
  "hevc_fields": _x265("bframes=3:interlace=tff"),
  "mpeg4": _plain("mpeg4"),
  "mpeg4_b": _plain("mpeg4", bf="2"),
  "mpeg2": _plain("mpeg2video"),
  "mpeg2_b": _plain("mpeg2video", bf="2"),
  "mpeg2_closed": _plain(
    "mpeg2video", bf="2", flags="+cgop", sc_threshold="1000000000"
  ),
  "mpeg2_fields": _plain("mpeg2video", bf="2", flags="+ildct+ilme"),
  "mpeg1": _plain("mpeg1video", bf="2"),
  "mjpeg": ("mjpeg", {"strict": "unofficial"}),
  # Packets of alternate references hold no picture.
  "vp8": _plain("libvpx", **{"auto-alt-ref": "1", "lag-in-frames": "16"}),
  "vp9": _plain("libvpx-vp9", **{"cpu-used": "8", "auto-alt-ref": "1"}),
  "av1": _plain("libsvtav1", preset="12"),
  "wmv2": _plain("wmv2"),
  "msmpeg4": _plain("msmpeg4"),
  "flv1": _plain("flv"),
  "prores": ("prores_ks", {}),
  "ffv1": _plain("ffv1"),
}
_PIXELS = {"mjpeg": "yuvj420p", "prores": "yuv422p10le"}

# Name -> (how the file's name ends, options of the muxer).
CONTAINERS = {
  name: (name, {})
  for name in ("mp4", "mov", "3gp", "mkv", "webm", "avi", "ts", "m2ts", "mpg",
               "flv", "asf", "ogg")
} | {
  "mp4_pieces": ("mp4", {"movflags": "frag_keyframe+empty_moov"}),
  "mp4_no_edits": ("mp4", {"use_editlist": "0"}),
  "mp4_early": ("mp4", {"movflags": "negative_cts_offsets+faststart"}),
  "mkv_live": ("mkv", {"live": "1"}),  # Without an index.
}  # fmt: skip
_MP4 = ("mp4", "mp4_pieces", "mp4_no_edits", "mp4_early")
_MKV, _TS = ("mkv", "mkv_live"), ("ts", "m2ts", "mpg")
_SOUND = dict.fromkeys((".mp4", ".mov", ".3gp", ".flv"), "aac")
_SOUND |= dict.fromkeys((".webm", ".ogg"), "libopus")
# First part of a codec's name -> containers that are tried.
_HELD_BY = {
  "h264": (*_MP4, "mov", "3gp", *_MKV, "avi", *_TS, "flv", "asf"),
  "hevc": (*_MP4, "mov", *_MKV, *_TS, "flv"),
  "mpeg4": (*_MP4, "mov", "3gp", *_MKV, "avi", "ts", "m2ts", "asf"),
  "mpeg2": (*_MP4, "mov", *_MKV, "avi", *_TS, "asf"),
  "mpeg1": ("mp4", "mkv", "avi", *_TS),
  "mjpeg": ("mp4", "mov", *_MKV, "avi", "asf"),
  "vp8": ("webm", *_MKV, "avi", "ogg"),
  "vp9": (*_MP4, "webm", *_MKV),
  "av1": (*_MP4, "webm", *_MKV, "flv"),
  "wmv2": ("asf", "avi"),
  "msmpeg4": ("avi", "asf", "mkv"),
  "flv1": ("flv",),
  "prores": ("mov", "mkv"),
  "ffv1": ("mkv", "avi"),
}


def moved(packet, ticks):
  """Returns a packet's stamps, moved by `ticks` or by a function of each."""
  by = ticks if callable(ticks) else lambda unused: ticks
  times = packet.pts, packet.dts
  return tuple(None if time is None else time + by(time) for time in times)


# Functions of a packet's number, the packet and the ticks of a frame, that
# return its stamps, or nothing to leave it out.
CHANGES = {
  "decoding_order": lambda n, packet, ticks: (packet.dts, packet.dts),
  "unstamped": lambda n, packet, ticks: (None, packet.dts),
  "first_left_out": lambda n, packet, ticks: moved(packet, 0) if n > 2 else (),
  # By an edit list, or at negative times.
  "hidden": lambda n, packet, ticks: moved(packet, -4 * ticks),
  "late": lambda n, packet, ticks: moved(packet, 100 * ticks),
  "repeated": lambda n, packet, ticks: (
    packet.dts if n % 7 == 3 else packet.pts, packet.dts
  ),
  # In an open group, between a key frame and what is shown before it.
  "jumping": lambda n, packet, ticks: moved(packet, 200 * ticks * (n >= 20)),
  "varying": lambda n, packet, ticks: moved(
    packet, lambda time: max(0, time // (7 * ticks)) * 3 * ticks
  ),
  # Nothing is predicted from these.
  "dropped": lambda n, packet, ticks: (
    () if packet.is_disposable and n % 4 == 0 else moved(packet, 0)
  ),
  # The file behind itself: stamps begin again in the middle.
  "twice": None,
  # Beside silence, a packet of it after each picture.
  "sound": lambda n, packet, ticks: moved(packet, 0),
}  # fmt: skip
# Edit lists: of each entry the first picture, or -1 to show nothing, how many
# pictures last as long, and the rate.
EDITS = {
  "edited_middle": ((-1, 5, 1), (13, 20, 1)),
  "edited_parts": ((3, 12, 1), (-1, 4, 1), (22, 18, 1)),
  "edited_back": ((GROUP, 30, 1), (0, GROUP, 1)),
  "edited_again": ((0, 20, 1), (5, 20, 1), (5, 20, 1)),
  "edited_rates": ((0, 15, 2), (20, 5, 0), (25, 30, 0.5)),
}
# Other muxers give up or abort without stamps.
_ONLY_IN = dict.fromkeys(EDITS, ("mp4", "mov", "3gp"))
_ONLY_IN |= {"twice": _TS, "unstamped": ("avi", "asf", "flv", "mpg")}


def kinds() -> tuple[Kind, ...]:
  """Returns all kinds, in an order that does not change."""
  found = []
  for codec in CODECS:
    held_by = _HELD_BY[codec.partition("_")[0]]
    for container, change in itertools.product(held_by, ("", *CHANGES, *EDITS)):
      if container in _ONLY_IN.get(change, held_by):
        found.append(Kind(codec, container, change))
    # At odd sizes, x265 writes beyond its memory.
    sizes = SIZES[:-1] if codec.startswith("hevc") else SIZES
    found += [Kind(codec, held_by[0], size=size) for size in sizes]
  return tuple(found)


def make(folder, kind: Kind) -> pathlib.Path | None:
  """Writes a clip below a folder; None if FFmpeg has no such clip.

  The clip without a change stays there for the changes to come.
  """
  suffix, options = CONTAINERS[kind.container]
  folder = pathlib.Path(folder, kind.container)
  folder.mkdir(parents=True, exist_ok=True)
  path = folder / f"{kind.name}.{suffix}"
  source = folder / f"{kind._replace(change='').name}.{suffix}"
  try:
    if not source.exists():
      codec, odd = CODECS[kind.codec], kind.size[0] % 2
      pixels = "yuv444p" if odd and codec[0][:4] == "libx" else "yuv420p"
      pixels = _PIXELS.get(kind.codec, pixels)
      pictures = (moving(number, *kind.size) for number in range(FRAMES))
      encode(source, codec, pictures, kind.size, pixels, options)
    if kind.change == "twice":
      path.write_bytes(2 * source.read_bytes())
    elif kind.change in EDITS:
      path.write_bytes(edited(source.read_bytes(), EDITS[kind.change]))
    elif kind.change:
      if kind.change == "hidden":
        options = options | {"avoid_negative_ts": "disabled"}
      change, silence = CHANGES[kind.change], kind.change == "sound"
      copy(path, source, change, options, silence=silence)
  except (av.error.FFmpegError, ValueError):
    path.unlink(missing_ok=True)
    return None
  return path


def moving(number: int, width: int, height: int) -> np.ndarray:
  """Returns a picture that is best predicted from its neighbours."""
  row, column = 2 * number % 60, 3 * number % 60
  image = _texture()[row : row + height, column : column + width].copy()
  image[:8] = 5 * number % 256
  return image


@functools.cache
def _texture() -> np.ndarray:
  noise = np.random.default_rng(0).integers(0, 255, (24, 24, 3), np.uint8)
  return noise.repeat(6, 0).repeat(6, 1)


@contextlib.contextmanager
def written(path) -> Iterator[pathlib.Path]:
  """Gives a name with the same ending, whose file is renamed in the end."""
  path = pathlib.Path(path)
  with tempfile.TemporaryDirectory(dir=path.parent) as folder:
    yield pathlib.Path(folder, path.name)
    os.replace(pathlib.Path(folder, path.name), path)


def encode(path, codec, pictures, size, pixels="yuv420p", options=()):
  """Writes a clip of 25 pictures uint8[h,w,3] a second, scaled to `size`.

  `codec` is as in `CODECS`, `size` (width, height); `options` are the muxer's.
  """
  name, encoding = codec
  try:
    with (
      written(path) as partial,
      av.open(str(partial), "w", container_options=dict(options)) as out,
    ):
      stream = out.add_stream(name, rate=25, options=dict(encoding))
      stream.width, stream.height = size
      stream.pix_fmt = pixels
      # Threads of libvpx wait for each other for minutes on a busy machine.
      stream.codec_context.thread_count = 1
      for image in pictures:
        frame = av.VideoFrame.from_ndarray(image, format="rgb24")
        out.mux(stream.encode(frame.reformat(*size, pixels)))
      out.mux(stream.encode())
  finally:
    # The encoder of AV1 makes root's process one of real time, which would
    # leave all others without a processor.
    if hasattr(os, "sched_setscheduler"):
      os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


def copy(path, source, change, options=(), *, silence=False) -> pathlib.Path:
  """Copies a clip with a function as in `CHANGES`.

  `options` are the muxer's; `silence` adds a track of sound.
  """
  with av.open(str(source)) as given:
    old = given.streams.video[0]
    ticks = round(1 / ((old.average_rate or 25) * old.time_base))
    with av.open(str(path), "w", container_options=dict(options)) as out:
      new = out.add_stream_from_template(old, opaque=True)
      name = _SOUND.get(os.path.splitext(path)[1], "mp2")
      sound = out.add_stream(name, rate=48_000) if silence else None
      packets = (packet for packet in given.demux(old) if packet.size)
      for number, packet in enumerate(packets):
        if times := change(number, packet, ticks):
          (packet.pts, packet.dts), packet.stream = times, new
          out.mux(packet)
        if sound:
          out.mux(_silence(sound, number))
  return path


def edited(data: bytes, edits) -> bytes:
  """Returns a clip as `make` writes with another edit list, as in `EDITS`."""
  place = data.index(b"elst") - 4
  (first,) = struct.unpack(">I", data[place + 20 : place + 24])
  new = struct.pack(">I4sII", 16 + 12 * len(edits), b"elst", 0, len(edits))
  for start, count, rate in edits:
    # A picture lasts 40 ticks of the list, and 512 of the stream.
    start = -1 if start < 0 else first + 512 * start
    new += struct.pack(">IiI", 40 * count, start, int(rate * 2**16))
  data = bytearray(data[:place] + new + data[place + 28 :])
  for name in (b"moov", b"trak", b"edts"):
    at = data.rindex(name, 0, place) - 4
    size = int.from_bytes(data[at : at + 4]) + len(new) - 28
    data[at : at + 4] = size.to_bytes(4)
  return bytes(data)


def _silence(stream, number: int):
  """Returns packets of a 25th of a second."""
  count = 48_000 // 25
  frame = av.AudioFrame.from_ndarray(
    np.zeros((1, 2 * count), np.int16), format="s16", layout="stereo"
  )
  frame.sample_rate, frame.pts = 48_000, number * count
  return stream.encode(frame)


def truth(path) -> Iterator[np.ndarray]:
  """Yields the pictures uint8[h,w,3] of the whole stream, as they come."""
  # One for all: each of them has a thread per processor.
  converter = av.video.reformatter.VideoReformatter()
  with av.open(str(path)) as container:
    stream = container.streams.video[0]
    stream.thread_type, stream.codec_context.thread_count = "NONE", 1
    for packet in container.demux(stream):
      try:
        pictures = packet.decode()
      except av.error.FFmpegError:
        continue
      for picture in pictures:
        image = converter.reformat(picture, format="rgb24").to_ndarray()
        yield np.rot90(image, picture.rotation // 90)


def _digest(image: np.ndarray) -> np.ndarray:
  """Returns uint8[32], since all pictures of a long clip are too many."""
  digest = hashlib.sha256(np.ascontiguousarray(image).data).digest()
  return np.frombuffer(digest, np.uint8)


def faults(path) -> list[str]:
  """Returns what `data.video` reads otherwise than the truth, a line each.

  Frames are asked for far apart, side by side and alone. What FFmpeg does not
  read, `data.video` must refuse.
  """
  expected, found = [], []
  with contextlib.suppress(av.error.FFmpegError, IndexError):
    expected = [_digest(image).tobytes() for image in truth(path)]
  count = len(expected)
  alone = {1, GROUP - 1, GROUP, GROUP + 1, 2 * GROUP + 1, count - 1}
  rules = [np.linspace(0, max(0, count - 1), 8).astype(int), np.arange(count)]
  for rule in [*rules, *([n] for n in sorted(alone) if 0 <= n < count)]:
    try:
      clip = video.decode(path, lambda n, s, rule=rule: rule, resize=_digest)
    except errors.UserError as error:
      found += [errors.one_line(error)] if count else []
      continue
    if clip.num_frames != count:
      found.append(f"{clip.num_frames} frames instead of {count}")
    if clip.replaced or clip.damaged or clip.lost:
      found.append(f"counted as damaged: {clip.warnings}")
    found += [
      f"frame {number} is another one"
      for number, frame in zip(rule, clip.frames, strict=True)
      if [frame.tobytes()] != expected[number : number + 1]
    ]
  return found
