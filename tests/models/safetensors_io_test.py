"""Safetensors files against the library that defines the format."""

import hashlib
import json
import os

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from cacovid_jax import errors
from cacovid_jax.models import safetensors_io
from tests.models import tensors as tensor_files

TENSORS = {
  "b": np.arange(12, dtype=np.float16).reshape(3, 4),
  "a": np.arange(7, dtype=np.float32),
  "half": np.arange(6).astype(ml_dtypes.bfloat16).reshape(2, 3),
  "scalar": np.array(3, np.int32),
  "none": np.zeros((0, 4), np.float32),
}


def assert_same(found, expected):
  assert found.keys() == expected.keys()
  for name, array in expected.items():
    assert found[name].dtype == array.dtype, name
    np.testing.assert_array_equal(found[name], array, err_msg=name)


def lazily(tensors):
  return {
    name: (array.dtype, array.shape, lambda array=array: array)
    for name, array in tensors.items()
  }


def test_the_library_reads_what_we_write(tmp_path):
  path = str(tmp_path / "x.safetensors")
  safetensors_io.write_safetensors(path, TENSORS)
  assert_same(safetensors.numpy.load_file(path), TENSORS)
  with safetensors.safe_open(path, framework="np") as file:
    assert file.metadata() == {"format": "pt"}
  for tensor in safetensors_io.list_tensors(path):
    assert tensor.offset % 2 == 0, tensor.name
  assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def test_we_read_what_the_library_writes(tmp_path):
  path = str(tmp_path / "x.safetensors")
  safetensors.numpy.save_file(TENSORS, path, metadata={"format": "pt"})
  assert_same(
    {t.name: t.view() for t in safetensors_io.list_tensors(path)}, TENSORS
  )


def test_rows_are_read_alone(tmp_path):
  path = str(tmp_path / "x.safetensors")
  safetensors.numpy.save_file(TENSORS, path)
  tensors = {t.name: t for t in safetensors_io.list_tensors(path)}
  np.testing.assert_array_equal(tensors["b"].read_rows(1, 3), TENSORS["b"][1:3])
  np.testing.assert_array_equal(tensors["scalar"].read_rows(0, 1), 3)
  offsets = [t.offset for t in safetensors_io.list_tensors(path)]
  assert offsets == sorted(offsets)


def test_a_view_stays_whole_when_its_file_is_replaced(tmp_path):
  path = str(tmp_path / "x.safetensors")
  safetensors_io.write_safetensors(path, {"a": np.ones(4, np.float32)})
  [tensor] = safetensors_io.list_tensors(path)
  view = tensor.view()
  safetensors_io.write_safetensors(path, {"a": np.zeros(2, np.float32)})
  np.testing.assert_array_equal(view, np.ones(4))
  with pytest.raises(ValueError, match="read-only"):
    view[0] = 2


def test_shards_hold_what_fits_and_an_index_names_them(tmp_path):
  tensors = {name: np.full(100, i, np.float32) for i, name in enumerate("abcd")}
  tensors["large"] = np.zeros(1000, np.float32)
  safetensors_io.write_directory(str(tmp_path), lazily(tensors), 900)
  index = json.loads((tmp_path / safetensors_io.INDEX).read_text())
  files = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
  assert index["weight_map"] == dict(
    a=files[0], b=files[0], c=files[1], d=files[1], large=files[2]
  )
  assert index["metadata"] == {"total_size": 4 * 1400}
  assert_same(tensor_files.read(str(tmp_path)), tensors)


def test_a_directory_of_no_tensors_has_its_file(tmp_path):
  safetensors_io.write_directory(str(tmp_path), {})
  assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize("before,after", [(None, 500), (500, None), (500, 900)])
def test_a_second_save_leaves_nothing_of_the_first(tmp_path, before, after):
  tensors = {name: np.ones(100, np.float32) for name in "abcd"}
  safetensors_io.write_directory(str(tmp_path), lazily(tensors), before)
  tensors = {name: np.zeros(100, np.float32) for name in "abcd"}
  safetensors_io.write_directory(str(tmp_path), lazily(tensors), after)
  assert_same(tensor_files.read(str(tmp_path)), tensors)
  files = {os.path.basename(path) for path in _weights(tmp_path)}
  if after:
    files.add(safetensors_io.INDEX)
  assert {path.name for path in tmp_path.iterdir()} == files


def _weights(directory):
  return safetensors_io.weight_files(str(directory))


def test_a_failed_write_leaves_the_file_before_it(tmp_path):
  path = str(tmp_path / "x.safetensors")
  safetensors_io.write_safetensors(path, TENSORS)

  def fail():
    raise OSError("disk is full")

  lazy = (np.dtype(np.float32), (4,), fail)
  with pytest.raises(OSError, match="full"):
    safetensors_io.write_safetensors(path, {"a": lazy})
  assert_same(safetensors.numpy.load_file(path), TENSORS)
  assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def test_a_file_cut_while_it_is_read_is_named(tmp_path):
  path = tmp_path / "x.safetensors"
  safetensors_io.write_safetensors(path, {"a": np.ones(1000, np.float32)})
  [tensor] = safetensors_io.list_tensors(str(path))
  os.truncate(path, tensor.offset + 100)
  with pytest.raises(errors.UserError, match="ends within a"):
    tensor.read_rows(0, 1000)


def test_types_that_numpy_lacks_are_listed_and_named(tmp_path):
  header = b'{"x":{"dtype":"F8_E4M3","shape":[2],"data_offsets":[0,2]}}'
  path = tmp_path / "x.safetensors"
  path.write_bytes(len(header).to_bytes(8, "little") + header + b"ab")
  [tensor] = safetensors_io.list_tensors(str(path))
  assert tensor.dtype is None
  with pytest.raises(errors.UserError, match="x is F8_E4M3; give float16"):
    tensor.view()


def test_damaged_headers_are_one_line_or_harmless(tmp_path):
  path = tmp_path / "x.safetensors"
  safetensors_io.write_safetensors(path, TENSORS)
  whole = path.read_bytes()
  end = 8 + int.from_bytes(whole[:8], "little")
  rng = np.random.default_rng(0)
  refused = 0
  for trial in range(400):
    data = bytearray(whole)
    if trial % 2:
      data[rng.integers(end)] ^= 1 << rng.integers(8)
    else:
      start = rng.integers(end)
      data[start : start + rng.integers(1, 9)] = rng.bytes(3)
    path.write_bytes(data)
    try:
      tensors = safetensors_io.list_tensors(str(path))
    except errors.UserError as error:
      refused += 1
      assert "\n" not in str(error)
      continue
    for tensor in tensors:  # What is accepted lies inside the file.
      assert 0 <= tensor.offset <= tensor.offset + tensor.num_bytes <= len(data)
  assert refused > 200


def test_identity_is_of_the_bytes(tmp_path):
  path = tmp_path / safetensors_io.WEIGHTS
  safetensors_io.write_safetensors(path, TENSORS)
  found = safetensors_io.identity(str(tmp_path))
  assert found == {
    "path": str(tmp_path),
    "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
  }
  safetensors_io.write_directory(str(tmp_path), lazily(TENSORS), 20)
  files = _weights(tmp_path)
  assert len(files) > 1
  digests = []
  for file in files:
    with open(file, "rb") as f:
      digests.append(hashlib.sha256(f.read()).hexdigest())
  joined = hashlib.sha256("\n".join(digests).encode()).hexdigest()
  assert safetensors_io.identity(str(tmp_path))["sha256"] == joined
