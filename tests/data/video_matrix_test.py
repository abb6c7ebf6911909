"""Frames against a decode of the whole stream, pictures numbered as they come.

`cases/` holds clips that were read wrongly once: some of them are from other
writers than FFmpeg, or need a length that is slow to encode.
"""

import dataclasses
import pathlib

import numpy as np
import pytest

from cacovid_jax.data import video
from experiments import clip_matrix

from . import clips, field_coded

CASES = pathlib.Path(__file__).parent / "cases"
# Name of the codec, container, what is done to the packets, and whether frames
# are reached by seeking.
MATRIX = [
  ("h264", "mp4", "", True),
  ("h264", "avi", "", True),
  ("h264", "flv", "", True),
  ("h264_b", "mp4", "", True),
  ("h264_b", "mov", "", True),
  ("h264_b", "mkv", "", True),
  ("h264_b", "ts", "", True),
  ("h264_b", "flv", "", True),
  ("h264_b", "avi", "", False),
  ("h264_b", "mpg", "", None),
  ("h264_open", "mp4", "", True),
  ("h264_open", "ts", "", True),
  ("h264_open", "mkv", "", True),
  ("h264_refresh", "ts", "", None),
  ("h264_refresh", "mkv", "", None),
  ("h264_b", "mp4", "decoding_order", False),
  ("h264_open", "mp4", "decoding_order", False),
  ("h264_b", "mp4", "hidden", True),
  ("h264_open", "mp4", "hidden", True),
  ("h264_b", "mp4", "first_left_out", False),
  ("h264_open", "ts", "first_left_out", False),
  ("h264_b", "mkv", "first_left_out", False),
  ("h264", "ts", "twice", False),
  ("h264_open", "ts", "twice", False),
  ("mpeg2_b", "mpg", "twice", False),
  ("h264_b", "mkv", "repeated", False),
  ("h264_open", "mkv", "jumping", None),
  ("h264_open", "mp4", "jumping", None),
  ("h264", "asf", "", None),
  ("hevc_b", "mp4", "", True),
  ("hevc_open", "mp4", "", True),
  ("hevc_open", "ts", "", True),
  ("hevc_open", "ts", "first_left_out", False),
  ("hevc_open", "mkv", "", True),
  ("mpeg4", "avi", "", None),
  ("mpeg4_b", "mp4", "", True),
  ("mpeg4_b", "avi", "", None),
  ("mpeg2_b", "mpg", "", None),
  ("mpeg2_b", "ts", "", None),
  ("mpeg2_closed", "mpg", "", None),
  ("mpeg2_b", "mpg", "first_left_out", False),
  ("vp9", "webm", "", True),
  ("vp9", "webm", "first_left_out", False),
  ("vp8", "webm", "", False),
  ("vp8", "webm", "first_left_out", False),
  ("mjpeg", "mov", "", True),
  ("h264_pyramid", "mp4_pieces", "", None),
  ("h264_fields", "mp4_early", "hidden", True),
  ("h264_unmixed", "ts", "", True),
  ("hevc_fields", "mkv", "", True),
  ("h264_open", "m2ts", "sound", None),
  ("h264_b", "mkv_live", "dropped", None),
  ("hevc_radl", "mp4_no_edits", "varying", None),
  ("mpeg2_fields", "mpg", "sound", None),
  ("av1", "webm", "late", None),
  ("wmv2", "asf", "", False),
  ("h264_b", "mp4", "edited_middle", True),
  ("h264_b", "mp4", "edited_parts", False),
  ("h264_open", "mov", "edited_back", None),
  ("hevc_open", "mp4", "edited_again", False),
  ("mpeg4_b", "mp4", "edited_rates", False),
  ("mjpeg", "mov", "edited_rates", True),
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


@pytest.mark.parametrize("codec, container, change, seeks", MATRIX)
def test_frames_equal_those_of_the_whole_decode(
  tmp_path, decodes, codec, container, change, seeks
):
  kind = clip_matrix.Kind(codec, container, change)
  path = clip_matrix.make(tmp_path, kind)
  assert len(clips.decode_all(path)) >= clip_matrix.FRAMES // 2
  assert clip_matrix.faults(path) == []
  if seeks is not None:
    assert seeks == (not decodes)


PATTERNS = {"all": "f" * 40, "late": "p" * 12 + "f" + "p" * 20 + "f" * 7}


@pytest.mark.parametrize("reordered", [False, True])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("container", ["ts", "mp4", "mkv", "flv"])
def test_two_packets_may_hold_the_fields_of_one_picture(
  tmp_path, decodes, container, pattern, reordered
):
  path, kinds = tmp_path / f"clip.{container}", PATTERNS[pattern]
  field_coded.write(path, kinds, reordered=reordered)
  assert len(clips.decode_all(path)) == len(kinds)
  assert clip_matrix.faults(path) == [] and decodes


def test_fields_of_one_packet_are_sought(tmp_path, decodes):
  path = field_coded.write(tmp_path / "a.mp4", PATTERNS["late"], joined=True)
  assert clip_matrix.faults(path) == [] and not decodes


@pytest.mark.parametrize("name", clip_matrix.EDITS)
def test_edit_lists_do_what_they_say(tmp_path, name):
  """Of pictures that need no others, FFmpeg shows those of the entries.

  Nothing, behind the first entry, is the beginning to it.
  """
  kind = clip_matrix.Kind("mjpeg", "mp4")
  plain = clips.decode_all(clip_matrix.make(tmp_path, kind))
  path = clip_matrix.make(tmp_path, kind._replace(change=name))
  edits = clip_matrix.EDITS[name]
  parts = [(max(0, start), count) for start, count, _ in edits]
  parts = parts[1:] if edits[0][0] < 0 else parts
  shown = [n for start, count in parts for n in range(40)[start:][:count]]
  np.testing.assert_array_equal(
    clips.decode_all(path), [plain[number] for number in shown]
  )


def test_the_long_matrix_has_every_kind():
  """It is run by the soak."""
  found = clip_matrix.kinds()
  assert len(found) == len(set(found)) > 200
  assert {kind.codec for kind in found} == {*clip_matrix.CODECS}
  assert {kind.container for kind in found} == {*clip_matrix.CONTAINERS}
  changes = {"", *clip_matrix.CHANGES, *clip_matrix.EDITS}
  assert {kind.change for kind in found} == changes


def test_a_wrong_frame_and_a_kind_that_no_encoder_has_are_told(
  tmp_path, monkeypatch
):
  kind = clip_matrix.Kind("h264", "mp4")
  path = clip_matrix.make(tmp_path, kind)
  decode = video.decode

  def one_off(path, rule, **options):
    def later(n, s):
      return np.minimum(n - 1, np.add(rule(n, s), 1))

    clip = decode(path, later, **options)
    return dataclasses.replace(clip, num_frames=clip.num_frames + 1)

  monkeypatch.setattr(video, "decode", one_off)
  found = clip_matrix.faults(path)
  assert "41 frames instead of 40" in found
  assert "frame 9 is another one" in found and "\n" not in "".join(found)
  assert clip_matrix.make(tmp_path, kind._replace(container="webm")) is None


def test_clips_of_others_may_be_long_turned_or_none(tmp_path):
  # More pictures than there may be threads to convert each by itself.
  path = clips.write(tmp_path / "long.mp4", 700, size=16, width=32)
  assert clip_matrix.faults(path) == []
  turned = clips.write_rotated(tmp_path / "turned.mp4", path)
  assert clip_matrix.faults(turned) == []
  assert next(clip_matrix.truth(turned)).shape == (32, 16, 3)
  clips.write_sound(tmp_path / "sound.mp4")
  (tmp_path / "text.mp4").write_text("no clip")
  for name in ("sound", "text", "absent"):
    assert clip_matrix.faults(tmp_path / f"{name}.mp4") == []


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


def test_streams_that_damage_makes_appear():
  """A fuzzed clip: packets name streams that its header does not have."""
  path = CASES / "flv_other_streams.flv"
  clip = video.decode(path, lambda n, s: np.arange(8) * n // 8)
  assert (clip.replaced, clip.lost) == (1, 3)
