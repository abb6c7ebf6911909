import av
import numpy as np
import pytest

from cacovid_jax.data import clip_index

from . import clips

KEY, HIDDEN, DAMAGED = 1, 2, 2
# Stamp, decoding time, flags: I P B B in a closed group, then B pictures that
# are shown before the key frame which they follow.
PACKETS = np.array([
  (0, -10, KEY), (30, 0, 0), (10, 10, 0), (20, 20, 0),
  (60, 30, KEY), (40, 40, 0), (50, 50, 0), (70, 60, 0),
])  # fmt: skip


def _of(packets, by_stamp=False, delayed=True):
  return clip_index.ClipIndex.of_packets(
    np.insert(packets, 2, 100 + np.arange(len(packets)), 1),
    by_stamp=by_stamp,
    delayed=delayed,
  )


def test_pictures_are_numbered_by_their_stamps():
  index = _of(PACKETS)
  assert index.sound and index.num_frames == 8 and index.lost == 0
  assert index.stamps.tolist() == list(range(0, 80, 10))
  assert index.keys.tolist() == [0, 6]
  assert index.landings.tolist() == [[-10, 0, 100], [30, 60, 104]]
  assert _of(PACKETS, by_stamp=True).landings[:, 0].tolist() == [0, 60]


def test_pictures_that_an_edit_list_hides_have_no_number():
  packets = PACKETS.copy()
  packets[[0, 2], 2] += HIDDEN
  index = _of(packets)
  assert index.sound and index.stamps.tolist() == list(range(20, 80, 10))
  # The first one is reached from the hidden key frame.
  assert index.keys.tolist() == [0, 4]


def _changed(rows, column, values):
  packets = PACKETS.copy()
  packets[rows, column] = values
  return packets


@pytest.mark.parametrize(
  "packets, num_frames",
  [
    (_changed(0, 2, 0), 2),  # Begins between key frames.
    (PACKETS[4:], 2),  # Begins with an open group.
    (_changed(range(8), 0, PACKETS[:, 1]), 8),  # Stamps in decoding order.
    (_changed(range(4, 8), 1, PACKETS[:4, 1]), 8),  # The clock starts again.
    (_changed(3, 0, 10), 0),  # Stamps are repeated.
    (_changed(3, 0, clip_index.NO_STAMP), 0),
    (_changed(range(8), 2, 0), 0),  # No key frame.
  ],
)  # fmt: skip
def test_packets_that_cannot_be_relied_on(packets, num_frames):
  index = _of(packets)
  assert not index.sound and index.num_frames == num_frames


def test_stamps_in_decoding_order_are_right_without_reordering():
  packets = _changed(range(8), 0, PACKETS[:, 1])
  assert _of(packets, delayed=False).sound


def test_pictures_keep_their_numbers_behind_lost_ones():
  stamps = [0, 10, 40, 50, 60, 70]
  flags = [KEY, 0, 0, 0, KEY, DAMAGED]
  index = _of(PACKETS).decoded(np.stack([stamps, flags], 1), faults=3)
  assert (index.num_frames, index.lost, index.sound) == (8, 2, False)
  assert index.numbers.tolist() == [0, 1, 4, 5, 6, 7]
  assert index.damaged.tolist() == [False, False, True, True, False, True]
  # In place of 2 and 3 stands the last one before them.
  assert index.places(np.array([0, 2, 3, 4, 7])).tolist() == [0, 1, 1, 2, 5]


def test_without_faults_pictures_are_numbered_as_they_come():
  pictures = np.array([(0, KEY), (10, 0), (40, 0), (50, 0)])
  index = _of(PACKETS).decoded(pictures, faults=0)
  assert (index.num_frames, index.lost) == (4, 0)
  assert index.numbers.tolist() == [0, 1, 2, 3]
  assert index.stamps.tolist() == [0, 10, 40, 50]
  none = np.array([(clip_index.NO_STAMP, KEY), (10, 0)])
  index = clip_index.ClipIndex().decoded(none, faults=1)
  assert (index.num_frames, index.lost, len(index.stamps)) == (2, 1, 0)


@pytest.mark.parametrize("suffix", ["mp4", "ts"])
@pytest.mark.parametrize(
  "text, pixels",
  [
    ("bframes=0", "yuv420p"),
    ("cabac=0:8x8dct=0:bframes=0", "yuv420p"),
    ("bframes=2", "yuv444p"),
    ("bframes=2", "yuv420p10le"),
  ],
)
def test_parameters_tell_whether_fields_are_coded(
  tmp_path, suffix, text, pixels
):
  for more, expected in (("", False), (":tff=1", True)):
    path = tmp_path / f"{expected}.{suffix}"
    options = {"x264-params": text + more, "preset": "fast"}
    clips.write(path, 4, pix_fmt=pixels, **options)
    with av.open(str(path)) as container:
      data = container.streams.video[0].codec_context.extradata
    assert clip_index.may_have_fields(data) is expected
    # The flag is not there, or the set is one of several.
    for damaged in (b"", data[:1], data[:9], data[:5] + b"\xe2" + data[6:8]):
      assert clip_index.may_have_fields(damaged)


def _parameters(bits: str, profile=77) -> bytes:
  bits += "0" * (-len(bits) % 8)
  data = bytes(int(bits[place:][:8], 2) for place in range(0, len(bits), 8))
  return b"\0\0\1\x67" + bytes([profile, 0, 30]) + data


@pytest.mark.parametrize(
  "middle, known",
  [
    ("1 00100", True),  # Order 0, and how many bits of it there are.
    ("011", True),
    ("010 0 1 011 011 1 00101", False),  # Order 1, with a cycle of two.
  ],
)
def test_parameters_of_each_order_of_pictures(middle, known):
  for flag in "01":
    # Numbers of the set and of bits, order, references, gaps, sides, flag.
    bits = f"1 1 {middle} 010 0 011 00111 {flag} 1111".replace(" ", "")
    expected = not (known and flag == "1")
    assert clip_index.may_have_fields(_parameters(bits)) == expected


def test_parameters_of_colours():
  for colours in ("00100 0", "010", "00100 1"):
    for scales in "01":
      bits = f"1 {colours} 1 1 0 {scales} 1 011 010 0 011 00111 1 0000 1111"
      found = clip_index.may_have_fields(
        _parameters(bits.replace(" ", ""), 244)
      )
      assert found == (scales == "1")


def test_streams_that_may_have_fields_need_even_stamps():
  packets = PACKETS.copy()
  packets[:, 0] *= 2
  of = clip_index.ClipIndex.of_packets
  rows = np.insert(packets, 2, 100 + np.arange(len(packets)), 1)
  for even in (False, True):
    assert of(rows, by_stamp=False, delayed=True, even=even).sound
    rows[-1, 0] += 1 - 2 * even  # Of 20 ticks, one more or less.
  rows[-1, 0] -= 10
  assert not of(rows, by_stamp=False, delayed=True, even=True).sound
  assert of(rows, by_stamp=False, delayed=True, even=False).sound
