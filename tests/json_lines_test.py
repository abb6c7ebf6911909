"""Damage of a log is found wherever it is, and costs its own line alone."""

import io
import json
import logging

import numpy as np
import pytest

from cacovid_jax import errors, files, json_lines
from tests import disks

RECORDS = [
  {"question": "a", "text": "é \n", "score": 0.5},
  {"question": "b", "kept": [1, 2], "text": ""},
  {"question": "c", "more": {"y": None, "x": True}},
]


def crc32(data):
  """Returns the CRC-32 of bytes, bit by bit as IEEE 802.3 has it."""
  value = 0xFFFFFFFF
  for byte in data:
    value ^= byte
    for _ in range(8):
      value = value >> 1 ^ (0xEDB88320 if value & 1 else 0)
  return value ^ 0xFFFFFFFF


def values(data, **options):
  lines = json_lines.parse(data, lambda record: record, **options)
  return [line.value for line in lines]


def test_a_line_is_an_object_that_ends_with_the_sum_of_the_rest():
  for record in RECORDS:
    line = json_lines.encode(record)
    body = json.dumps(record, sort_keys=True)[:-1]
    end = f', "crc": "{crc32(body.encode()):08x}"}}\n'
    assert line.decode() == body + end
    assert json.loads(line) == record | {"crc": end[10:18]}
  assert json_lines.encode({"loss": 0.5, "step": 1}) == (
    b'{"loss": 0.5, "step": 1, "crc": "51c6b7ff"}\n'
  )


def test_every_change_of_one_byte_is_found(tmp_path):
  """The line itself is lost, and at most the next one; never changed."""
  lines = list(map(json_lines.encode, RECORDS))
  data, numbers = b"".join(lines), []
  for number, line in enumerate(lines):
    numbers += [number] * len(line)
  rng = np.random.default_rng(0)
  for place, number in enumerate(numbers):
    bits = [1 << bit for bit in range(8)]
    for change in {*bits, *rng.integers(1, 256, 8).tolist()}:
      damaged = bytearray(data)
      damaged[place] ^= change
      found = values(bytes(damaged))
      others = [r for i, r in enumerate(RECORDS) if i != number]
      ends = place + 1 == len(data) or numbers[place + 1] != number
      lost = others[number : number + 1] if ends else []
      assert [value for value in found if value] == [
        record for record in others if record not in lost
      ], (place, change)
      assert None in found
      # In a file of this one line, too: not taken for one without a sum.
      start = numbers.index(number)
      alone = bytes(damaged[start : start + len(lines[number])])
      assert set(map(str, values(alone))) == {"None"}


def test_lines_of_earlier_versions_are_read(caplog, tmp_path):
  path = tmp_path / "log.jsonl"
  plain = [json.dumps(record).encode() + b"\n" for record in RECORDS[:2]]
  path.write_bytes(b"".join(plain))
  json_lines.append(path, RECORDS[2:])
  with caplog.at_level(logging.WARNING):
    assert json_lines.look(path, dict, "") == RECORDS
    assert json_lines.look(path, dict, "") == RECORDS
  [told] = caplog.messages  # Once, however often it is read.
  assert str(path) in told and "2 lines have no checksum" in told
  # A string of eight letters at the end is no checksum.
  assert values(b'{"a": 1, "abc": "12345678"}\n') == [
    {"a": 1, "abc": "12345678"}
  ]


@pytest.mark.parametrize(
  "bad",
  [
    b"\xdd\xff\n",
    b"\n\xff\xfe{\x00}\x00\n",
    b"[1]\n",
    b"null\n",
    b'{"question": "x"\n',
    b"\0" * 4096 + b"\n",
    b"[" * 100_000 + b"\n",
    b'{"other": 1}\n',
    b'{"question": ["x"]}\n',
  ],
)
def test_damaged_lines_are_set_aside_and_no_other(tmp_path, caplog, bad):
  path, aside = tmp_path / "log", tmp_path / "log.damaged"
  lines = list(map(json_lines.encode, RECORDS))
  data = lines[0] + bad + lines[1] + lines[2] + lines[2][:9]
  path.write_bytes(data)

  def read(record):
    return {record["question"]: record}

  found = json_lines.parse(data, read)
  with caplog.at_level(logging.WARNING):
    kept = json_lines.keep(path, found, "they come again")
  assert kept == [{r["question"]: r} for r in RECORDS]
  assert path.read_bytes() == b"".join(lines)
  assert aside.read_bytes() == bad.lstrip(b"\n") + lines[2][:9] + b"\n"
  [told] = caplog.messages
  assert "2 lines damaged or cut off" in told and str(aside) in told
  assert told.endswith("they come again") and "\n" not in told
  # What is set aside later stands behind.
  path.write_bytes(b"more\n")
  json_lines.keep(path, json_lines.parse(b"more\n", read), "")
  assert aside.read_bytes().endswith(lines[2][:9] + b"\nmore\n")


def test_a_line_that_another_process_is_writing_is_none(tmp_path, caplog):
  lines = list(map(json_lines.encode, RECORDS))
  data = lines[0] + lines[1][:-1]
  assert values(data) == [RECORDS[0], None]
  assert values(data, shared=True) == RECORDS[:1]
  (tmp_path / "log").write_bytes(data)
  assert json_lines.look(tmp_path / "log", dict, "") == RECORDS[:1]
  assert not caplog.messages
  assert json_lines.look(tmp_path / "none", dict, "") == []


def test_a_full_disk_leaves_whole_lines_alone(tmp_path):
  path = tmp_path / "log"
  json_lines.append(path, RECORDS)
  before = path.read_bytes()
  # Room for a line and a half.
  with disks.no_file_above(len(before) + 90):
    with pytest.raises(errors.UserError, match="File too large; free some"):
      json_lines.append(path, RECORDS)
  assert path.read_bytes() == before
  json_lines.append(path, RECORDS)
  assert values(path.read_bytes()) == RECORDS * 2


def test_a_disk_that_fails_as_it_is_synced_leaves_whole_lines(
  tmp_path, monkeypatch
):
  path = tmp_path / "log"
  json_lines.append(path, RECORDS)
  with monkeypatch.context() as patch:
    disks.fail(patch, files.os, "fsync")
    with pytest.raises(errors.UserError, match="No space left on device"):
      json_lines.append(path, RECORDS)
  assert values(path.read_bytes()) == RECORDS
  assert list(io.BytesIO(path.read_bytes())) == [
    *map(json_lines.encode, RECORDS)
  ]
