"""What is wrong with data is one line with the file, the key and the need."""

import json
import os

import msgspec
import pytest

from cacovid_jax import errors, schema


class _Inner(msgspec.Struct):
  rate: schema.Positive
  names: list[str] = []


class _Outer(msgspec.Struct):
  size: schema.Count
  inner: _Inner | None = None
  kind: schema.one_of("a", "b") = "a"


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("", "not readable as JSON"),
    ("{", "not readable as JSON"),
    (b"\xff\xfe\x00", "not readable as JSON"),
    ('{"size": NaN}', "NaN is no number"),
    ('{"size": -Infinity}', "-Infinity is no number"),
    ("[" * 100_000, "not readable as JSON"),
    ('{"a":' * 100_000, "not readable as JSON"),
    ("9" * 5000, "not readable as JSON"),
    ("[]", r"it is \[\]; it must be an object"),
    ("null", "it is None; it must be an object"),
    ("{}", "it lacks size"),
    ('{"size": null}', "size is None; it must be a whole number$"),
    ('{"size": "1"}', "size is '1'; it must be a whole number$"),
    ('{"size": true}', "size is True; it must be a whole number$"),
    ('{"size": 1.5}', "size is 1.5; it must be a whole number$"),
    ('{"size": 0}', "size is 0; it must be a whole number at least 1"),
    ('{"size": 1e400}', "size is inf; it must be"),
    (f'{{"size": {10**30}}}', r"size is 1000\d+\.*\d*; it must be"),
    ('{"size": 1, "inner": 3}', "inner is 3; it must be an object or null"),
    ('{"size": 1, "inner": {}}', "inner lacks rate"),
    ('{"size": 1, "inner": {"rate": 1e400}}', "inner.rate is inf; it must"),
    ('{"size": 1, "inner": {"rate": 0}}', "inner.rate is 0; .* above 0"),
    (
      '{"size": 1, "inner": {"rate": 1, "names": ["x", 2]}}',
      r"inner.names\[1\] is 2; it must be a text",
    ),
    ('{"size": 1, "kind": "c"}', "kind is 'c'"),
  ],
)
def test_bad_json_is_one_line(tmp_path, text, message):
  path = tmp_path / "x.json"
  path.write_bytes(text if isinstance(text, bytes) else text.encode())
  with pytest.raises(errors.UserError, match=message) as caught:
    schema.read(path, _Outer, mend="")
  assert str(caught.value).startswith(f"{path}: ")
  assert len(str(caught.value)) < 300 + len(str(path))
  assert "\n" not in str(caught.value)


def test_good_json_is_what_its_type_says(tmp_path):
  path = tmp_path / "x.json"
  path.write_text('{"size": 2, "inner": {"rate": 1}, "more": [1]}')
  found = schema.read(path, _Outer)
  assert (found.size, found.inner.rate) == (2, 1.0)
  path.write_text('{"size": 1}\n{"size": 2}\n')
  assert [x.size for x in schema.lines(path, _Outer)] == [1, 2]


def test_a_line_and_a_missing_file_are_named(tmp_path):
  path = tmp_path / "x.jsonl"
  with pytest.raises(errors.UserError, match="x.jsonl is missing; find it"):
    schema.read(path, dict, "find it")
  with pytest.raises(errors.UserError, match="x.jsonl: .*; find it"):
    list(schema.lines(path, dict, "find it"))
  with pytest.raises(errors.UserError, match="not readable"):
    schema.read(tmp_path)
  path.write_text('{"size": 1}\n{"size": 0}\n')
  with pytest.raises(errors.UserError, match="x.jsonl line 2: size is 0; it"):
    list(schema.lines(path, _Outer))
  path.write_text(json.dumps("x" * 100))
  with pytest.raises(errors.UserError, match="102 bytes, above 100; cut it"):
    schema.read(path, str, "cut it", most_bytes=100)


def test_what_is_no_file_is_not_waited_for(tmp_path):
  os.mkfifo(tmp_path / "pipe.json")
  for path in (tmp_path, tmp_path / "pipe.json", "/dev/zero"):
    for read in (schema.read, lambda path: list(schema.lines(path))):
      with pytest.raises(errors.UserError, match=f"{path}: not readable"):
        read(path)


@pytest.mark.parametrize(
  ("kind", "value", "needs"),
  [
    (schema.Text, "a\0b", "a text without NUL"),
    (schema.Text, 3, "a text"),
    (schema.Share, 0, "a number above 0 and at most 1"),
    (schema.Share, float("nan"), "a number above 0 and at most 1"),
    (schema.Fraction, -0.1, "a number at least 0 and at most 1"),
    (schema.Positive | None, -1, "a number above 0 .* or null"),
    (schema.Size, -1, "a whole number at least 0 and at most 2147483647"),
    (schema.one_of("x", "y"), "z", "one of x, y"),
    (schema.one_of("x", "y"), ["x"], "one of x, y"),
    (tuple[str, ...], "text", "a list"),
    (str, b"a", "a text"),
  ],
)
def test_ranges_and_choices_are_told_in_words(kind, value, needs):
  with pytest.raises(errors.UserError, match=f"^key is .*must be {needs}"):
    schema.fit(value, kind, key="key")
