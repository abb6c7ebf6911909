"""Which pictures a clip shows: from its packets, or from decoding all of it."""

import re
from typing import NamedTuple

import numpy as np

NO_STAMP = -(2**62)  # Of packets and pictures without a time.
_EMPTY = np.zeros(0, np.int64)
# Bits of Exp-Golomb's code of a number: behind the first 1 as many as before.
_CODE = f"(?:{'|'.join('0' * n + '1' + '.' * n for n in range(20))})"
# What profiles of H.264 tell of colours, unless they have one kind of them; 3
# of them has one bit more.
_COLOURS = f"(?:00100.|(?!00100){_CODE}){_CODE}{_CODE}.0"
_PLAIN_PROFILES = (b"\x42", b"\x4d", b"\x58")


class ClipIndex(NamedTuple):
  """Which pictures a clip shows, and how they are reached."""

  num_frames: int = 0  # N, pictures that are shown.
  # int64[N], their time stamps, ascending; empty if they tell no order.
  stamps: np.ndarray = _EMPTY
  # int64[K], number of the first picture shown from each key frame on.
  keys: np.ndarray = _EMPTY
  # int64[K, 3], of each key frame the time to seek to, stamp, byte in the file.
  landings: np.ndarray = _EMPTY
  # Whether packets alone tell the pictures, so that seeking may be tried; if
  # not, the clip is decoded in sequence.
  sound: bool = False
  numbers: np.ndarray = _EMPTY  # int64[P], of pictures that decode, ascending.
  damaged: np.ndarray = _EMPTY  # bool[P], shows damage or follows some.
  lost: int = 0  # Pictures that do not decode.

  @classmethod
  def of_packets(
    cls, packets: np.ndarray, *, by_stamp: bool, delayed: bool, even=False
  ) -> "ClipIndex":
    """Returns what packets tell of streams of one picture a packet.

    Packets that an edit list hides, and those that need a key frame before the
    stream's first one, are never shown: counting them would shift every index.

    Args:
      packets: int64[n, 4]: stamp, decoding time, byte in the file, 1 for a key
        frame + 2 for a hidden one.
      by_stamp: whether the container seeks by stamps, not by decoding times.
      delayed: whether the decoder reorders pictures. Stamps in decoding order
        are then no stamps of the pictures.
      even: whether stamps must be evenly spaced to be relied on.
    """
    stamps, times, places, flags = packets.T
    keys = np.flatnonzero(flags & 1)
    if not keys.size or (stamps == NO_STAMP).any():
      return cls()
    visible = flags & 2 == 0
    shown = np.sort(stamps[visible & (stamps >= stamps[keys[0]])])
    spaces = np.diff(shown)
    if not shown.size or (spaces == 0).any():
      return cls()
    target = stamps if by_stamp else times
    later, known = keys[keys > 0], times[times != NO_STAMP]
    sound = (
      keys[0] == 0
      and shown.size == visible.sum()
      and (np.diff(known) > 0).all()
      and (np.maximum.accumulate(stamps)[later - 1] < stamps[later]).all()
      and (not delayed or (np.diff(stamps) < 0).any())
      and (not even or spaces.max(initial=0) < 1.5 * spaces.min(initial=2**60))
    )
    return cls(
      num_frames=shown.size,
      stamps=shown,
      keys=np.searchsorted(shown, stamps[keys]),
      landings=np.stack([target, stamps, places], axis=1)[keys],
      sound=bool(sound),
      numbers=np.arange(shown.size),
      damaged=np.zeros(shown.size, bool),
    )

  def decoded(
    self, pictures: np.ndarray, faults: int, early: int = 0
  ) -> "ClipIndex":
    """Returns the index of a clip that was decoded as a whole.

    Pictures, int64[P, 2] of stamp and 1 for a key frame + 2 for a damaged one,
    are numbered as they come out. Where some are lost to damage, their stamps
    tell which. Of the decoder's `faults`, damaged pictures included, `early`
    ones came before the first picture: unless stamps tell more, the clip begins
    between key frames, and nothing is lost.
    """
    stamps, flags = pictures.T
    corrupt, place = flags & 2 > 0, np.arange(len(stamps))
    numbers, shown = place, np.sort(stamps)
    lost = max(0, faults - early - corrupt.sum())
    if shown[0] == NO_STAMP or (np.diff(shown) == 0).any():
      shown = _EMPTY
    in_order = np.array_equal(shown, stamps)
    if faults and in_order and np.isin(stamps, self.stamps).all():
      numbers, shown = np.searchsorted(self.stamps, stamps), self.stamps
      lost = len(shown) - len(stamps)
    broken = corrupt | (np.diff(numbers, prepend=-1) > 1)
    whole = (flags & 1 > 0) & ~corrupt
    last_broken, last_whole = (
      np.maximum.accumulate(np.where(mark, place, -1))
      for mark in (broken, whole)
    )
    return ClipIndex(
      num_frames=len(shown) or len(numbers),
      stamps=shown,
      numbers=numbers,
      damaged=last_broken > last_whole,
      lost=int(lost),
    )

  def places(self, wanted: np.ndarray) -> np.ndarray:
    """Returns the place of each picture, or of the last before a lost one."""
    places = np.searchsorted(self.numbers, wanted, side="right") - 1
    return places.clip(min=0)


def may_have_fields(extradata: bytes | None) -> bool:
  """Tells whether a picture of H.264 may lie in two packets, one per field.

  Television mixes such pictures with others. Only a sequence's parameters rule
  it out (ITU-T H.264, 7.3.2.1.1), which lie in a container's header (ISO/IEC
  14496-15, 5.3.3.1.2) or behind start codes.
  """
  data = extradata or b""
  units = re.split(rb"\0\0\x01(?=[\x27\x47\x67])", data)[1:]
  if data[:1] == b"\1":
    units = [data[8:]] if len(data) > 8 and data[5] & 31 == 1 else []
  return not (units and all(map(_whole_frames, units)))


def _whole_frames(unit: bytes) -> bool:
  """Tells of a sequence parameter set whether `frame_mbs_only_flag` is 1.

  Lists of scales and orders of type 1, which are rare, are not looked through.
  """
  colours = "" if unit[1:2] in _PLAIN_PROFILES else _COLOURS
  data = unit[4:].replace(b"\0\0\3", b"\0\0")[:100]
  # Set, colours, bits of a number, type of order, references, gaps, sides.
  words = _CODE, colours, _CODE, f"(1{_CODE}|011)", _CODE, ".", 2 * _CODE, "1"
  bits = "".join(f"{byte:08b}" for byte in data)
  return re.match("".join(words), bits) is not None
