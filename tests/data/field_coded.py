"""H.264 whose pictures are coded as frames or as two fields each (PAFF).

No encoder of FFmpeg writes it, while television does. Written here by hand: all
blocks hold their samples as they are, so that nothing needs to be predicted.
"""

import fractions
import io
import itertools
import re

import av

SIDE = 32  # Pixels.


def _bits(value: int, count: int) -> str:
  return f"{value:0{count}b}"


def _code(value: int) -> str:
  """Returns Exp-Golomb's code of a number that is not negative."""
  text = f"{value + 1:b}"
  return "0" * (len(text) - 1) + text


def _bytes(bits: str) -> bytes:
  bits += "0" * (-len(bits) % 8)
  return int(bits, 2).to_bytes(len(bits) // 8, "big")


def _unit(head: int, payload: bytes) -> bytes:
  # So that no start code shows up inside.
  payload = re.sub(rb"\0\0(?=[\0-\3])", b"\0\0\3", payload)
  return b"\0\0\0\1" + bytes([head]) + payload


def _parameters(delay: int) -> bytes:
  """Returns the sets of a stream that delays pictures by so many."""
  blocks = SIDE // 16
  sequence = (
    _bits(77, 8) + _bits(0, 8) + _bits(30, 8)  # Profile and level.
    + _code(0) + _code(0) + _code(0) + _code(4) + _code(2) + "0"
    + _code(blocks - 1) + _code(blocks // 2 - 1)
    + "0" + "0" + "1" + "0"  # Fields may be coded, blocks not mixed.
    # Units in a tick and ticks a second; the delay.
    + "1" + "0000" + "1" + _bits(1, 32) + _bits(50, 32) + "1" + "000"
    + "11" + 4 * _code(1) + _code(delay) + _code(2) + "1"
  )  # fmt: skip
  picture = 2 * _code(0) + "00" + 3 * _code(0) + "000" + 3 * "1" + "000" + "1"
  return _unit(0x67, _bytes(sequence)) + _unit(0x68, _bytes(picture))


def _slice(number, key, place, field) -> bytes:
  """Returns the unit of a frame (`field` None) or of its field 0 or 1.

  `number` is the picture's, `key` that of the last key frame, `place` counts
  from there in decoding order.
  """
  intra = number == key and not field  # The second field needs the first.
  head = _code(0) + _code(7 if intra else 5) + _code(0) + _bits(place % 16, 4)
  head += "0" if field is None else f"1{field}"
  head += "1" if intra else ""
  head += _bits(2 * (number - key) + bool(field), 8)
  head += "00" if intra else "000"
  data = head + "1"
  count = (SIDE // 16) ** 2 // (1 if field is None else 2)
  level = 16 + 5 * number + bool(field)
  for _ in range(count):
    data += _code(25) if intra else _code(0) + _code(30)
    data += "0" * (-len(data) % 8)
    data += _bits(level, 8) * 256 + _bits(128, 8) * 128
  return _unit(0x65 if intra else 0x41, _bytes(data + "1"))


def _units(kinds: str, reordered: bool):
  """Yields (number of the picture, its units) in decoding order."""
  order = list(range(len(kinds)))
  if reordered:
    for place in range(1, len(order) - 1, 2):
      if (place + 1) % 10:
        order[place : place + 2] = place + 1, place
  for place, number in enumerate(order):
    key = number // 10 * 10
    fields = (0, 1) if kinds[number] == "f" else (None,)
    found = [_slice(number, key, place - key, field) for field in fields]
    if number == key:
      found[0] = _parameters(int(reordered)) + found[0]
    yield number, found


def write(path, kinds: str, *, joined=False, reordered=False):
  """Writes a clip of 25 pictures a second, in groups of ten.

  `kinds` has "f" for a picture of two fields, any other letter for a frame.
  `joined` puts both fields into one packet. In `reordered` streams, pairs of
  pictures are decoded the other way round.
  """
  found = list(_units(kinds, reordered))
  raw = b"".join(itertools.chain.from_iterable(parts for _, parts in found))
  with (
    av.open(io.BytesIO(raw), format="h264") as given,
    av.open(str(path), "w") as out,
  ):
    stream = out.add_stream_from_template(given.streams.video[0], opaque=True)
    for place, (number, parts) in enumerate(found):
      for part, data in enumerate([b"".join(parts)] if joined else parts):
        packet = av.Packet(data)
        packet.stream, packet.time_base = stream, fractions.Fraction(1, 50)
        packet.pts = 2 * (number + reordered) + part
        packet.dts = 2 * place + part
        packet.is_keyframe = number % 10 == 0 and not part
        out.mux(packet)
  return path
