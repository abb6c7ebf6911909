"""Features on disk: what goes in comes out, or nothing does."""

import concurrent.futures
import errno
import hashlib
import os

import numpy as np
import pytest

from cacovid_jax import errors
from cacovid_jax.data import feature_cache


def test_an_entry_comes_back_bit_for_bit(tmp_path):
  cache = feature_cache.FeatureCache(tmp_path)
  rng = np.random.default_rng(0)
  arrays = {
    name: rng.normal(size=shape).astype(np.float32)
    for name, shape in (("a", ()), ("b", (3,)), ("c", (0,)), ("d", (2, 3, 4)))
  }
  facts = {"grid": [2, 3, 4], "words": "a line\nand more", "number": 0.1}
  assert cache.get("abcd") is None and cache.facts("abcd") is None
  cache.put("abcd", arrays, facts)
  found = cache.get("abcd")
  assert found.facts == cache.facts("abcd") == facts
  assert list(found.arrays) == list(arrays)
  for name, value in arrays.items():
    np.testing.assert_array_equal(found.arrays[name], value)
    assert found.arrays[name].shape == value.shape
    assert found.arrays[name].flags.writeable
  # In another order and type in memory, the same on disk.
  cache.put("turned", {"d": arrays["d"].astype(np.float64).T})
  np.testing.assert_array_equal(cache.get("turned").arrays["d"], arrays["d"].T)


def test_any_flipped_bit_or_lost_byte_makes_an_entry_absent(tmp_path):
  cache = feature_cache.FeatureCache(tmp_path)
  cache.put("abcd", {"a": np.arange(6, dtype=np.float32)}, {"fact": 1})
  path = cache.path("abcd")
  with open(path, "rb") as f:
    data = f.read()
  damaged = [data[:-1], data[:10], b""]
  for place in range(len(data)):
    flipped = bytearray(data)
    flipped[place] ^= 1 << place % 8
    damaged.append(bytes(flipped))
  for content in damaged:
    with open(path, "wb") as f:
      f.write(content)
    assert cache.get("abcd") is None
    assert cache.get("abcd") is None  # It is gone, and that is no fault.


@pytest.mark.parametrize(
  "body",
  [b"no line", b"[]\n", b'{"shapes": {"a": [9]}, "facts": {}}\n1234', b"{}\n"],
)
def test_an_entry_of_another_kind_is_absent(tmp_path, body):
  cache = feature_cache.FeatureCache(tmp_path)
  cache.put("abcd", {"a": np.zeros(2, np.float32)})
  with open(cache.path("abcd"), "wb") as f:
    f.write(body + hashlib.sha256(body).digest())
  assert cache.get("abcd") is None


def test_the_name_depends_on_every_part():
  name = feature_cache.key(content="a", rule={"name": "x", "num_frames": 8})
  assert name == feature_cache.key(
    rule={"num_frames": 8, "name": "x"}, content="a"
  )
  assert name != feature_cache.key(
    content="b", rule={"name": "x", "num_frames": 8}
  )
  assert name != feature_cache.key(
    content="a", rule={"name": "x", "num_frames": 9}
  )


def test_many_writers_share_a_folder(tmp_path):
  value = np.arange(1000, dtype=np.float32)

  def work(worker):
    cache = feature_cache.FeatureCache(tmp_path)
    for i in range(20):
      got = cache.get(f"key{i % 5}")
      if got is None:
        cache.put(f"key{i % 5}", {"a": value + i % 5})
      else:
        np.testing.assert_array_equal(got.arrays["a"], value + i % 5)
    return worker

  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    assert list(pool.map(work, range(8))) == list(range(8))
  assert len(list(tmp_path.glob("*/*"))) == 5  # Nothing left aside.


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, monkeypatch):
  cache = feature_cache.FeatureCache(tmp_path)

  def full(descriptor):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  monkeypatch.setattr(feature_cache.os, "fsync", full)
  with pytest.raises(errors.UserError) as error:
    cache.put("abcd", {"a": np.zeros(3)})
  assert str(tmp_path) in str(error.value)
  assert "No space left on device; free some space" in str(error.value)
  assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(errors.UserError, match="cannot write .*Not a directory"):
    feature_cache.FeatureCache(tmp_path / "file" / "cache")
