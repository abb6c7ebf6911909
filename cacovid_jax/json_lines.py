"""JSON lines with a checksum each: logs that grow, and survive damage.

A line is an object that ends with the CRC-32 of all bytes before:

  {"loss": 0.5, "step": 1, "crc": "51c6b7ff"}

A change of one byte, wherever it is, is found for certain. A damaged line says
nothing about those behind it: it is set aside, into `FILE.damaged`, and its
content made again. Lines of earlier versions have no checksum and are read.
"""

import functools
import io
import json
import os
import pathlib
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec
from absl import logging

from cacovid_jax import files

_SHAPE = b', "crc": "........"}\n'
_FAULTS = (
  ValueError, KeyError, TypeError, AttributeError, RecursionError,
  msgspec.ValidationError,
)  # fmt: skip


class Line(NamedTuple):
  """A line of a file."""

  data: bytes  # As it stands there, with its end.
  value: Any  # What was made of it; None if it is damaged.
  summed: bool  # Whether it has a checksum, right or wrong.


def encode(record: Mapping[str, Any]) -> bytes:
  """Returns the line of an object that is not empty, with sorted keys."""
  body = json.dumps(record, sort_keys=True).encode()[:-1]
  return body + _end(body)


def append(path, records: Iterable[Mapping[str, Any]]) -> None:
  """Writes lines of objects behind a file, all or none of them."""
  files.append(path, b"".join(map(encode, records)))


def parse(
  data: bytes, read: Callable[[dict[str, Any]], Any], *, shared: bool = False
) -> list[Line]:
  """Returns the lines of a file's content.

  Args:
    data: of the file.
    read: makes the value of a line from its object, without the checksum; a
      ValueError, KeyError, TypeError, AttributeError or ValidationError of it
      means that the line is damaged. So is a last line that has no end.
    shared: whether another process may be writing: then such a line is none.
  """
  lines = [line for line in io.BytesIO(data) if line.strip()]
  if shared and lines and not lines[-1].endswith(b"\n"):
    lines.pop()
  return [_parse(line, read) for line in lines]


def keep(path, lines: Sequence[Line], then: str) -> list[Any]:
  """Returns the values of a file's sound lines; sets the others aside.

  `lines` are all of the file, which nobody else writes to meanwhile; `then`
  says what becomes of the content of damaged ones.
  """
  sound = [line for line in lines if line.value is not None]
  damaged = [line.data for line in lines if line.value is None]
  if damaged:
    set_aside(path, b"".join(damaged), len(damaged), then)
    files.write(path, b"".join(line.data for line in sound))
  tell_plain(path, lines)
  return [line.value for line in sound]


def look(path, read, then: str) -> list[Any]:
  """Returns the values of a file's sound lines; says how many are damaged.

  Nothing is written: the file is another process's. None is there without it.
  """
  try:
    data = pathlib.Path(path).read_bytes()
  except FileNotFoundError:
    return []
  lines = parse(data, read, shared=True)
  tell(path, lines, then)
  return [line.value for line in lines if line.value is not None]


def tell(path, lines: Iterable[Line], then: str) -> None:
  """Says which lines of a file, left as it is, are damaged or have no sum."""
  if count := sum(line.value is None for line in lines):
    logging.warning("%s: %d damaged lines; %s", path, count, then)
  tell_plain(path, lines)


def set_aside(path, data: bytes, count: int, then: str) -> None:
  """Keeps damaged content of a file in `FILE.damaged`, and says so."""
  aside = f"{path}.damaged"
  end = b"" if data.endswith(b"\n") else b"\n"
  files.append(aside, data + end)
  logging.warning(
    "%s: %d lines damaged or cut off, kept in %s; %s", path, count, aside, then
  )


def tell_plain(path, lines: Iterable[Line]) -> None:
  """Says once of a file that sound lines of it have no checksum."""
  plain = (line for line in lines if not line.summed)
  if count := sum(line.value is not None for line in plain):
    _tell_plain(os.path.abspath(path), count)


@functools.cache
def _tell_plain(path, count) -> None:
  told = "have no checksum, as earlier versions wrote them; taken as they are"
  logging.warning("%s: %d lines %s", path, count, told)


def _parse(line: bytes, read) -> Line:
  body, end = line[: -len(_SHAPE)], line[-len(_SHAPE) :]
  right = end == _end(body)
  summed = right or resembles(end, _SHAPE)
  if line.endswith(b"\n") and right == summed:
    try:
      record = json.loads((body + b"}" if right else line).decode())
      if not isinstance(record, dict):
        raise TypeError("no object")
      return Line(line, read(record), summed)
    except _FAULTS:
      pass
  return Line(line, None, summed)


def _end(body: bytes) -> bytes:
  return b', "crc": "%08x"}\n' % zlib.crc32(body)


def resembles(data: bytes, shape: bytes) -> bool:
  """Returns whether bytes differ in one place at most; "." stands for any."""
  pairs = zip(data, shape, strict=False)
  differing = sum(a != b for a, b in pairs if b != ord("."))
  return len(data) == len(shape) and differing < 2
