"""Frames against a decode of the whole stream, pictures numbered as they come.

`cases/` holds clips that were read wrongly once: some of them are from other
writers than FFmpeg, or need a length that is slow to encode.
"""

import pathlib

import numpy as np
import pytest

from cacovid_jax.data import video

from . import clips

CASES = pathlib.Path(__file__).parent / "cases"
FRAMES = 40
_NOISE = np.random.default_rng(0).integers(0, 255, (24, 24, 3), np.uint8)
_TEXTURE = _NOISE.repeat(6, 0).repeat(6, 1)


def _moving(number: int, width: int, height: int) -> np.ndarray:
  """Returns a picture that is best predicted from its neighbours."""
  row, column = 2 * number % 60, 3 * number % 60
  image = _TEXTURE[row : row + height, column : column + width].copy()
  image[:8] = 5 * number % 256
  return image


def _decoding_order(number, packet, ticks):
  packet.pts = packet.dts


def _first_left_out(number, packet, ticks):
  return number >= 3


def _hidden(number, packet, ticks):
  packet.pts -= 4 * ticks
  packet.dts -= 4 * ticks


def _repeated(number, packet, ticks):
  if number % 7 == 3:
    packet.pts = packet.dts


def _jumping(number, packet, ticks):
  if (
    number >= 20
  ):  # In an open group, between a key frame and what precedes it.
    packet.pts += 200 * ticks
    packet.dts += 200 * ticks


def _x264(text):
  return "libx264", {"preset": "fast", "x264-params": f"keyint=10:{text}"}


def _x265(text):
  text = f"log-level=none:keyint=10:min-keyint=10:scenecut=0:{text}"
  return "libx265", {"preset": "ultrafast", "x265-params": text}


CODECS = {
  "h264": _x264("bframes=0"),
  "h264_b": _x264("bframes=2"),
  "h264_open": _x264("bframes=3:b-adapt=0:open-gop=1:min-keyint=10:scenecut=0"),
  "h264_refresh": _x264("bframes=2:intra-refresh=1"),
  "hevc_b": _x265("bframes=3:open-gop=0"),
  "hevc_open": _x265("bframes=3:b-adapt=0:open-gop=1"),
  "mpeg4": ("mpeg4", {"g": "10"}),
  "mpeg4_b": ("mpeg4", {"g": "10", "bf": "2"}),
  "mpeg2_b": ("mpeg2video", {"g": "10", "bf": "2"}),
  "mpeg2_closed": (
    "mpeg2video",
    {"g": "10", "bf": "2", "flags": "+cgop", "sc_threshold": "1000000000"},
  ),
  "vp9": ("libvpx-vp9", {"g": "10", "cpu-used": "8", "auto-alt-ref": "1"}),
  # Packets of alternate references hold no picture.
  "vp8": ("libvpx", {"g": "10", "auto-alt-ref": "1", "lag-in-frames": "16"}),
  "mjpeg": ("mjpeg", {"strict": "unofficial"}),
}
# Name of the codec, container, what is done to the packets, and whether frames
# are reached by seeking.
MATRIX = [
  ("h264", "mp4", None, True),
  ("h264", "avi", None, True),
  ("h264", "flv", None, True),
  ("h264_b", "mp4", None, True),
  ("h264_b", "mov", None, True),
  ("h264_b", "mkv", None, True),
  ("h264_b", "ts", None, True),
  ("h264_b", "flv", None, True),
  ("h264_b", "avi", None, False),
  ("h264_b", "mpg", None, None),
  ("h264_open", "mp4", None, True),
  ("h264_open", "ts", None, True),
  ("h264_open", "mkv", None, True),
  ("h264_refresh", "ts", None, None),
  ("h264_refresh", "mkv", None, None),
  ("h264_b", "mp4", _decoding_order, False),
  ("h264_open", "mp4", _decoding_order, False),
  ("h264_b", "mp4", _hidden, True),
  ("h264_open", "mp4", _hidden, True),
  ("h264_b", "mp4", _first_left_out, False),
  ("h264_open", "ts", _first_left_out, False),
  ("h264_b", "mkv", _first_left_out, False),
  ("h264", "ts", "twice", False),
  ("h264_open", "ts", "twice", False),
  ("mpeg2_b", "mpg", "twice", False),
  ("h264_b", "mkv", _repeated, False),
  ("h264_open", "mkv", _jumping, None),
  ("h264_open", "mp4", _jumping, None),
  ("h264", "asf", None, None),
  ("hevc_b", "mp4", None, True),
  ("hevc_open", "mp4", None, True),
  ("hevc_open", "ts", None, True),
  ("hevc_open", "ts", _first_left_out, False),
  ("hevc_open", "mkv", None, True),
  ("mpeg4", "avi", None, None),
  ("mpeg4_b", "mp4", None, True),
  ("mpeg4_b", "avi", None, None),
  ("mpeg2_b", "mpg", None, None),
  ("mpeg2_b", "ts", None, None),
  ("mpeg2_closed", "mpg", None, None),
  ("mpeg2_b", "mpg", _first_left_out, False),
  ("vp9", "webm", None, True),
  ("vp9", "webm", _first_left_out, False),
  ("vp8", "webm", None, False),
  ("vp8", "webm", _first_left_out, False),
  ("mjpeg", "mov", None, True),
]


@pytest.fixture
def decodes(monkeypatch):
  """Returns a list with an entry for each decode of a whole clip."""
  whole, seen = video._Reader.whole, []

  def count(self, index):
    seen.append(self.path)
    return whole(self, index)

  monkeypatch.setattr(video._Reader, "whole", count)
  return seen


def _check(path, expected):
  """Compares frames that lie apart, side by side and alone."""
  count = len(expected)
  apart = np.linspace(0, count - 1, 8).astype(int)
  rules = [
    apart,
    range(min(count, FRAMES)),
    *([n] for n in (1, 9, 10, 11, 19, 21)),
  ]
  for rule in rules:
    clip = video.decode(path, lambda n, s, rule=rule: rule)
    assert clip.num_frames == count
    assert (clip.replaced, clip.damaged, clip.lost) == (0, 0, 0)
    for index, frame in zip(rule, clip.frames, strict=True):
      np.testing.assert_array_equal(frame, expected[index], f"frame {index}")


@pytest.mark.parametrize(
  "codec, container, change, seeks",
  MATRIX,
  ids=lambda x: getattr(x, "__name__", None),
)
def test_frames_equal_those_of_the_whole_decode(
  tmp_path, decodes, codec, container, change, seeks
):
  path = tmp_path / f"whole.{container}"
  name, options = CODECS[codec]
  clips.write(
    path,
    FRAMES,
    width=80,
    height=64,
    rate=25,
    codec=name,
    show=_moving,
    pix_fmt="yuvj420p" if name == "mjpeg" else "yuv420p",
    **options,
  )
  if change == "twice":  # The stamps begin again in the middle.
    path.write_bytes(2 * path.read_bytes())
  elif change:
    edit = {"avoid_negative_ts": "disabled"} if change is _hidden else {}
    path = clips.copy(tmp_path / f"copy.{container}", path, change, **edit)
  expected = clips.decode_all(path)
  assert len(expected) >= FRAMES // 2
  _check(path, expected)
  if seeks is not None:
    assert seeks == (not decodes)


@pytest.mark.parametrize(
  "name, count, shown",
  [
    ("ts_first_gop.ts", 500, [0, 71, 142, 213, 285, 356, 427, 499]),
    ("ts_short_gop.ts", 30, [0, 4, 8, 12, 16, 20, 24, 29]),
    ("mpeg_ps.mpg", 80, [0, 11, 22, 33, 45, 56, 67, 79]),
    ("mp4_no_ctts.mp4", 250, [0, 35, 71, 106, 142, 177, 213, 249]),
    ("avi_b_frames.avi", 250, [0, 35, 71, 106, 142, 177, 213, 249]),
    ("ts_starts_mid_gop.ts", 48, [0, 6, 13, 20, 26, 33, 40, 47]),
  ],
)
def test_clips_that_were_read_wrongly(name, count, shown):
  expected = clips.decode_all(CASES / name)
  assert len(expected) == count == video.probe(CASES / name).num_frames
  clip = video.decode(CASES / name, lambda n, s: np.linspace(0, n - 1, 8))
  assert clip.indices.tolist() == shown
  np.testing.assert_array_equal(clip.frames, [expected[n] for n in shown])
  for number in shown[1], shown[-2]:
    (frame,) = video.read_frames(CASES / name, [number])
    np.testing.assert_array_equal(frame, expected[number])


def test_damage_inside_a_clip_is_counted_and_told():
  # Of 80 pictures, 20 to 68 lose their data or what they are predicted from.
  path = CASES / "middle_zeroed.mp4"
  clip = video.decode(path, lambda n, s: np.linspace(0, n - 1, 16))
  assert clip.num_frames == 80 and clip.lost == 40
  # Asked for are 0, 5, 10, 15, then ten of those, then 73 and 79.
  assert clip.replaced + clip.damaged == 10
  assert clip.warnings == (
    "40 of 80 pictures cannot be decoded",
    f"{clip.damaged} of 16 frames show damage or follow some",
    f"{clip.replaced} of 16 frames cannot be decoded; the last one before them"
    " stands in",
  )
  expected = clips.decode_all(path)
  assert len(expected) == 40
  for place, number in ((0, 0), (1, 5), (2, 10), (3, 15), (14, 33), (15, 39)):
    np.testing.assert_array_equal(clip.frames[place], expected[number])
