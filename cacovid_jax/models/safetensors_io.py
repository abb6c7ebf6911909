"""Safetensors files of a checkpoint directory: listed, read in slices, written.

Nothing here holds more than a slice of a checkpoint in memory: a tensor is
known by its place in a file until its rows are asked for, and a file is
written tensor by tensor.
"""

import concurrent.futures
import dataclasses
import functools
import hashlib
import json
import math
import os
import struct

import ml_dtypes
import numpy as np
import safetensors

from cacovid_jax import errors, files
from cacovid_jax.models import hf_config

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

_DTYPES = {"BOOL": np.dtype(bool), "BF16": np.dtype(ml_dtypes.bfloat16)}
_DTYPES |= {
  f"{code}{bits}": np.dtype(f"{kind}{bits}")
  for code, kind in (("U", "uint"), ("I", "int"), ("F", "float"))
  for bits in (8, 16, 32, 64)
  if (code, bits) != ("F", 8)  # NumPy has none.
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}

# Ours ends on this boundary, so that no reader meets a tensor that is not
# aligned; the format asks for 8.
_ALIGNMENT = 64


@dataclasses.dataclass(frozen=True)
class Tensor:
  """One tensor of a file, not read yet."""

  name: str  # As the file spells it.
  path: str  # Of the file.
  code: str  # The file's name of the dtype, "BF16" and so on.
  shape: tuple[int, ...]  # Sizes.
  offset: int  # Bytes from the beginning of the file.
  num_bytes: int  # Size in the file.

  @property
  def dtype(self):
    """NumPy's dtype; None where NumPy has none (8-bit floats)."""
    return _DTYPES.get(self.code)

  @property
  def row_bytes(self):
    """Bytes of one entry of the first axis."""
    return self.num_bytes // max(self.shape[0] if self.shape else 1, 1)

  def view(self):
    """Returns the whole tensor, mapped read-only; pages come as needed."""
    if not self.num_bytes:
      return np.zeros(self.shape, self._known_dtype())
    mapped = np.memmap(
      self.path, np.uint8, "r", self.offset, shape=(self.num_bytes,)
    )
    return mapped.view(np.ndarray).view(self._known_dtype()).reshape(self.shape)

  def read_rows(self, start, stop, scratch=None):
    """Returns the rows [start, stop) of the first axis; all of a scalar.

    The result may lie in `scratch`, uint8[n], large enough.
    """
    shape = (stop - start, *self.shape[1:]) if self.shape else ()
    num_bytes = self.row_bytes * (stop - start)
    if scratch is None:
      scratch = np.empty(num_bytes, np.uint8)
    scratch = scratch[:num_bytes]
    out = scratch.view(self._known_dtype()).reshape(shape)
    rest = memoryview(scratch)
    with open(self.path, "rb", buffering=0) as file:
      file.seek(self.offset + start * self.row_bytes)
      while rest:
        count = file.readinto(rest)
        if not count:
          raise errors.UserError(
            f"{self.path} ends within {self.name}; download it again"
          )
        rest = rest[count:]
    return out

  def _known_dtype(self):
    if self.dtype is None:
      raise errors.UserError(
        f"{self.path}: {self.name} is {self.code}; give float16, bfloat16 or"
        " float32 weights"
      )
    return self.dtype


def weight_files(directory):
  """Returns the sorted paths of a directory's safetensors files."""
  index = os.path.join(directory, INDEX)
  if not os.path.exists(index):
    names = [WEIGHTS]
  else:
    names = hf_config.read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names:
      raise errors.UserError(f"{index} has no weight_map; download it again")
    names = sorted(set(map(str, names.values())))
  paths = []
  for name in names:
    path = os.path.join(directory, name)
    # An index names files of its own directory, nothing else.
    if os.path.basename(path) != name:
      raise errors.UserError(f"{index} names {name!r}, not a plain file name")
    if not os.path.isfile(path):
      raise errors.UserError(f"{path} is missing; copy the weights there")
    paths.append(path)
  return paths


def list_tensors(path):
  """Returns the `Tensor`s of one file in the order of their bytes."""
  try:
    # The library checks the header against the file's size; offsets, which it
    # does not tell, are then safe to take from the header as they stand.
    with safetensors.safe_open(path, framework="np"), open(path, "rb") as file:
      (size,) = struct.unpack("<Q", file.read(8))
      header = json.loads(file.read(size))
  except (safetensors.SafetensorError, OSError, ValueError) as error:
    reason = " ".join(str(error).split())
    raise errors.UserError(
      f"{path} is not a readable safetensors file ({reason}); download it again"
    ) from error
  header.pop("__metadata__", None)
  tensors = [
    Tensor(
      name=name,
      path=path,
      code=entry["dtype"],
      shape=tuple(entry["shape"]),
      offset=8 + size + entry["data_offsets"][0],
      num_bytes=entry["data_offsets"][1] - entry["data_offsets"][0],
    )
    for name, entry in header.items()
  ]
  return sorted(tensors, key=lambda tensor: tensor.offset)


def list_directory(directory):
  """Returns the `Tensor`s of all of a directory's files."""
  return [t for path in weight_files(directory) for t in list_tensors(path)]


def made(array):
  """Returns an array as `write_lazily` takes it."""
  array = np.asarray(array)
  return array.dtype, array.shape, functools.partial(np.asarray, array)


def write_safetensors(path, tensors):
  """Writes {name: array} so that a reader sees the old file or the new one."""
  write_lazily(path, {name: made(array) for name, array in tensors.items()})


def write_lazily(path, tensors):
  """Writes one file, complete or not at all, making one tensor at a time.

  `tensors` is {name: (dtype, shape, function that returns the array)}.
  """
  header, offset, order = {"__metadata__": {"format": "pt"}}, 0, []
  # Wide types first, as the library writes them: all stay aligned.
  for name in sorted(tensors, key=lambda n: (-tensors[n][0].itemsize, n)):
    dtype, shape, make = tensors[name]
    end = offset + math.prod(shape) * dtype.itemsize
    header[name] = {
      "dtype": _CODES[dtype],
      "shape": list(shape),
      "data_offsets": [offset, end],
    }
    order.append((name, dtype, shape, make))
    offset = end
  text = json.dumps(header, separators=(",", ":")).encode()
  text += b" " * (-(8 + len(text)) % _ALIGNMENT)

  def pieces():
    yield struct.pack("<Q", len(text)) + text
    for name, dtype, shape, make in order:
      array = np.require(make(), requirements="C")
      if array.dtype != dtype or array.shape != tuple(shape):
        raise ValueError(f"{name} is {array.dtype}{array.shape}")
      yield memoryview(array.reshape(-1).view(np.uint8))

  files.write(path, pieces())


def write_directory(directory, tensors, max_shard_bytes=None):
  """Writes model.safetensors, or shards and their index.

  Weights of an earlier save are replaced. `tensors` are as of `write_lazily`,
  in the order in which they fill the shards. A new shard is begun at
  `max_shard_bytes`, though a single tensor may be larger; None for one file.
  """
  sizes = {
    name: math.prod(shape) * dtype.itemsize
    for name, (dtype, shape, _) in tensors.items()
  }
  shards, filled = [[]], 0
  for name, size in sizes.items():
    if max_shard_bytes and shards[-1] and filled + size > max_shard_bytes:
      shards.append([])
      filled = 0
    shards[-1].append(name)
    filled += size
  index = os.path.join(directory, INDEX)
  stale = {os.path.join(directory, name) for name in _indexed(index)}
  count = len(shards)
  parts = [
    f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)
  ]
  parts = [WEIGHTS] if count == 1 else parts
  for file, names in zip(parts, shards, strict=True):
    path = os.path.join(directory, file)
    write_lazily(path, {name: tensors[name] for name in names})
    stale.discard(path)
  # Only now: until here a reader found the earlier weights.
  if count > 1:
    weight_map = {
      name: file
      for file, names in zip(parts, shards, strict=True)
      for name in names
    }
    total = {"total_size": sum(sizes.values())}
    files.write_json(index, {"metadata": total, "weight_map": weight_map})
  elif os.path.exists(index):
    os.remove(index)
  for path in filter(os.path.exists, stale):
    os.remove(path)


def _indexed(index):
  """Returns the names of files that an earlier save may have written."""
  found = {}
  if os.path.exists(index):
    found = hf_config.read_json(index).get("weight_map")
  names = map(str, found.values()) if isinstance(found, dict) else ()
  return {WEIGHTS, *(name for name in names if os.path.basename(name) == name)}


def identity(directory):
  """Returns {"path", "sha256"} of a directory's weights.

  The hash is the file's own; with several files, that of their hashes in the
  order of their names.
  """
  # Hashing releases the interpreter's lock: files side by side.
  with concurrent.futures.ThreadPoolExecutor(4) as pool:
    digests = list(pool.map(files.sha256, weight_files(directory)))
  digest = digests[0]
  if len(digests) > 1:
    digest = hashlib.sha256("\n".join(digests).encode()).hexdigest()
  return {"path": os.path.abspath(directory), "sha256": digest}
