"""Files are replaced whole or not at all; locks; hashes."""

import hashlib
import json
import math

import pytest

from cacovid_jax import errors, files


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


def test_a_lock_refuses_with_the_remedy_of_the_command(tmp_path):
  path = tmp_path / "file"
  with open(path, "ab") as held, open(path, "ab") as other:
    files.lock(held, path)
    with pytest.raises(errors.UserError, match="wait for it, or stop$"):
      files.lock(other, path, hint="or stop")
  with open(path, "ab") as free:
    files.lock(free, path)
    files.append(free, b"line\n")
  assert path.read_bytes() == b"line\n"
