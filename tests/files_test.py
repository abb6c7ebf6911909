"""Files are replaced whole or not at all; locks; hashes."""

import concurrent.futures
import errno
import hashlib
import json
import logging
import math
import os
import socket
import subprocess
import sys

import pytest

from cacovid_jax import errors, files
from tests import disks


@pytest.mark.parametrize(
  "content, data",
  [
    ("é\n", b"\xc3\xa9\n"),
    (b"\0\1", b"\0\1"),
    ((piece for piece in (b"a", b"bc")), b"abc"),
  ],
)
def test_text_bytes_and_pieces_are_written(tmp_path, content, data):
  path = tmp_path / "file"
  path.write_text("old")
  files.write(path, content)
  assert path.read_bytes() == data
  assert files.sha256(path) == hashlib.sha256(data).hexdigest()
  assert list(tmp_path.iterdir()) == [path]


def test_an_error_leaves_the_old_file_and_no_other(tmp_path):
  path = tmp_path / "file"
  path.write_text("old")

  def pieces():
    yield b"new"
    raise OSError("no space left")

  with pytest.raises(OSError, match="no space"):
    files.write(path, pieces())
  assert path.read_text() == "old"
  assert list(tmp_path.iterdir()) == [path]


def test_json_has_sorted_keys_and_no_nan(tmp_path):
  path = tmp_path / "file.json"
  files.write_json(path, {"b": 1, "a": [0.5]})
  text = path.read_text()
  assert json.loads(text) == {"a": [0.5], "b": 1}
  assert text.index('"a"') < text.index('"b"') and text.endswith("}\n")
  with pytest.raises(ValueError):
    files.write_json(path, math.nan)
  assert path.read_text() == text


def test_two_writers_of_one_file_have_partial_files_of_their_own(tmp_path):
  path = tmp_path / "file"
  with files.replacing(path) as first, files.replacing(path) as second:
    assert first != second
    first.write_text("first")
    second.write_text("second")
  # The outer one is renamed last.
  assert path.read_text() == "first"
  assert list(tmp_path.iterdir()) == [path]


_HOLD = """
import sys
from cacovid_jax import files
with files.claim(sys.argv[1]):
  print("held", flush=True)
  sys.stdin.read()
"""


def test_a_second_process_is_told_who_is_there(tmp_path):
  path, lock = tmp_path / "new" / "train", tmp_path / "new" / "train.lock"
  holder = subprocess.Popen(
    [sys.executable, "-c", _HOLD, str(path)],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
  )
  assert holder.stdout.readline() == "held\n"
  with pytest.raises(errors.UserError) as error:
    with files.claim(path, "trainer", what="W", hint="or stop"):
      pytest.fail("two at a time")
  assert str(error.value) == (
    f"another trainer is writing to W (process {holder.pid} on"
    f" {socket.gethostname()}); wait for it, or stop"
  )
  # What a killed process leaves means nothing.
  holder.kill()
  holder.communicate()
  assert str(holder.pid) in lock.read_text()
  with files.claim(path):
    assert str(os.getpid()) in lock.read_text()
    with pytest.raises(errors.UserError, match=f"is writing to {path} "):
      with files.claim(path):
        pytest.fail("two at a time")
  assert list(path.parent.iterdir()) == []


def test_who_waits_gets_the_lock_that_others_see(tmp_path):
  """Each removes the file it held, which another may have opened before."""
  path, inside, most = tmp_path / "log", [], []

  def work(number):
    for _ in range(50):
      with files.claim(path, wait=True):
        inside.append(number)
        most.append(len(inside))
        inside.remove(number)
    return number

  with concurrent.futures.ThreadPoolExecutor(4) as pool:
    assert list(pool.map(work, range(4))) == [0, 1, 2, 3]
  assert most == [1] * 200
  assert list(tmp_path.iterdir()) == []


def test_a_file_system_without_locks_is_told_once(
  tmp_path, monkeypatch, caplog
):
  disks.fail(monkeypatch, files.fcntl, "flock", errno.ENOLCK)
  with caplog.at_level(logging.WARNING):
    for name in "aab":
      with files.claim(tmp_path / name):
        pass
  [told] = caplog.messages
  assert str(tmp_path) in told and "has no locks (No locks available)" in told


def test_lines_are_appended_whole_or_not_at_all(tmp_path):
  path = tmp_path / "file"
  files.append(path, b"one\n")
  with disks.no_file_above(6):
    with pytest.raises(errors.UserError) as error:
      files.append(path, b"two\n")
  assert str(error.value) == (
    f"cannot write {path}: File too large; free some space and go on: what was"
    " written before is still there"
  )
  files.append(path, b"two\n")
  assert path.read_bytes() == b"one\ntwo\n"


@pytest.mark.parametrize(
  "number, mend",
  [
    (errno.ENOSPC, "free some space"),
    (errno.EDQUOT, "free some space"),
    (errno.EROFS, "choose another place"),
    (errno.EACCES, "choose another place"),
  ],
)
def test_what_a_disk_refuses_is_one_line(tmp_path, monkeypatch, number, mend):
  path = tmp_path / "file"
  path.write_text("old")
  with monkeypatch.context() as patch:
    disks.fail(patch, files.os, "fsync", number)
    with pytest.raises(errors.UserError) as error:
      files.write(path, "new")
  told = str(error.value)
  assert told.startswith(f"cannot write {path}: {os.strerror(number)}; ")
  assert mend in told and "\n" not in told
  assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_full_disk_leaves_the_old_file(tmp_path):
  path = tmp_path / "file"
  path.write_text("old")
  with disks.no_file_above(100):
    with pytest.raises(errors.UserError, match="File too large"):
      files.write(path, (b"x" * 30 for _ in range(9)))
  assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_an_error_about_another_file_is_not_the_disks(tmp_path):
  def pieces():
    yield (tmp_path / "source").read_bytes()

  with pytest.raises(FileNotFoundError, match="source"):
    files.write(tmp_path / "file", pieces())


@pytest.mark.parametrize("place", ["file/x/out.html", "file/out.html"])
def test_folders_that_cannot_be_made_are_one_line(tmp_path, place):
  (tmp_path / "file").write_text("")
  with pytest.raises(errors.UserError, match="file is no folder; give another"):
    files.check_writable(tmp_path / place, "--out")
  for write in (files.write, files.write_json):
    with pytest.raises(
      errors.UserError, match="cannot write .*Not a directory"
    ):
      write(tmp_path / place, "")
  with pytest.raises(errors.UserError, match="cannot write"):
    files.make_folder((tmp_path / place).parent)
  with pytest.raises(errors.UserError, match="cannot write"):
    with files.claim(tmp_path / place):
      pass


def test_a_place_to_write_to_is_tried(tmp_path, monkeypatch):
  with pytest.raises(errors.UserError, match="is a folder; give --out a file"):
    files.check_writable(tmp_path, "--out")
  path = tmp_path / "new" / "out.html"
  assert files.check_writable(str(path), "--out") == path
  assert list(path.parent.iterdir()) == []
  disks.fail(monkeypatch, os, "open", errno.EROFS)  # As `touch` calls it.
  with pytest.raises(errors.UserError, match=f"cannot write {path}: Read-only"):
    files.check_writable(path, "--out")
