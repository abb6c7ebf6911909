"""Safetensors files of a checkpoint directory: listed, read in slices, written.

A tensor is known by its place in a file until its rows are asked for, and a
file is written tensor by tensor: nothing holds more than a slice in memory.
"""

import concurrent.futures
import dataclasses
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

# NumPy has no floats of 8 bits.
_DTYPES = {
  "BOOL": bool, "U8": "u1", "U16": "u2", "U32": "u4", "U64": "u8",
  "I8": "i1", "I16": "i2", "I32": "i4", "I64": "i8",
  "F16": "f2", "F32": "f4", "F64": "f8", "BF16": ml_dtypes.bfloat16,
}  # fmt: skip
_DTYPES = {code: np.dtype(kind) for code, kind in _DTYPES.items()}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}

# Where our headers end, so that no reader meets a tensor that is not aligned;
# the format asks for 8.
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
    dtype = self._known_dtype()
    if not self.num_bytes:
      return np.zeros(self.shape, dtype)
    mapped = np.memmap(self.path, dtype, "r", self.offset, self.shape)
    return mapped.view(np.ndarray)

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
    with open(self.path, "rb") as file:
      file.seek(self.offset + start * self.row_bytes)
      if file.readinto(scratch) < num_bytes:
        raise errors.UserError(
          f"{self.path} ends within {self.name}; download it again"
        )
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
  index, paths = os.path.join(directory, INDEX), []
  names = indexed(directory) if os.path.exists(index) else {WEIGHTS}
  errors.check(names, f"{index} has no weight_map; download it again")
  for name in sorted(names):
    path = os.path.join(directory, name)
    # An index names files of its own directory, nothing else.
    if os.path.basename(path) != name:
      raise errors.UserError(f"{index} names {name!r}, not a plain file name")
    if not os.path.isfile(path):
      raise errors.UserError(f"{path} is missing; copy the weights there")
    paths.append(path)
  return paths


def list_tensors(path, mend="download it again"):
  """Returns the `Tensor`s of one file in the order of their bytes."""
  try:
    if os.path.exists(path) and not os.path.isfile(path):
      raise OSError("it is no file")  # A pipe would be waited for.
    # The library checks the header against the file's size; offsets, which it
    # does not tell, are then safe to take from the header as they stand.
    with safetensors.safe_open(path, framework="np"), open(path, "rb") as file:
      (size,) = struct.unpack("<Q", file.read(8))
      header = json.loads(file.read(size))
  except (safetensors.SafetensorError, OSError, ValueError) as error:
    raise errors.UserError(
      f"{path} is not a readable safetensors file ({errors.one_line(error)});"
      f" {mend}"
    ) from error
  header.pop("__metadata__", None)
  tensors = []
  for name, entry in header.items():
    shape, (start, end) = tuple(entry["shape"]), entry["data_offsets"]
    place = (8 + size + start, end - start)
    tensors.append(Tensor(name, path, entry["dtype"], shape, *place))
  return sorted(tensors, key=lambda tensor: tensor.offset)


def list_directory(directory):
  """Returns the `Tensor`s of all of a directory's files."""
  return [t for path in weight_files(directory) for t in list_tensors(path)]


def _lazy(tensor):
  """Returns (dtype, shape, function that makes the array) of any tensor."""
  if isinstance(tensor, tuple):
    return tensor
  array = np.asarray(tensor)
  return array.dtype, array.shape, lambda: array


def write_safetensors(path, tensors):
  """Writes one file, complete or not at all, making one tensor at a time.

  `tensors` is {name: array, or (dtype, shape, function that returns it)}.
  """
  tensors = {name: _lazy(tensor) for name, tensor in tensors.items()}
  # Wide types first, as the library writes them: all stay aligned.
  order = sorted(tensors, key=lambda name: (-tensors[name][0].itemsize, name))
  header, end = {"__metadata__": {"format": "pt"}}, 0
  for name in order:
    dtype, shape, _ = tensors[name]
    start, end = end, end + math.prod(shape) * dtype.itemsize
    header[name] = {
      "dtype": _CODES[dtype],
      "shape": list(shape),
      "data_offsets": [start, end],
    }
  text = json.dumps(header, separators=(",", ":")).encode()
  text += b" " * (-(8 + len(text)) % _ALIGNMENT)

  def pieces():
    yield struct.pack("<Q", len(text)) + text
    for name in order:
      dtype, shape, make = tensors[name]
      array = np.require(make(), requirements="C")
      if array.dtype != dtype or array.shape != tuple(shape):
        raise ValueError(f"{name} is {array.dtype}{array.shape}")
      yield memoryview(array.reshape(-1).view(np.uint8))

  files.write(path, pieces())


def write_directory(directory, tensors, max_shard_bytes=None):
  """Writes model.safetensors, or shards and their index, over an earlier save.

  `tensors` are as of `write_safetensors`, in the order in which they fill the
  shards. A new one is begun at `max_shard_bytes`, though a single tensor may be
  larger; None for one file.
  """
  shards, filled, total = [{}], 0, 0
  for name, tensor in tensors.items():
    dtype, shape, _ = tensor = _lazy(tensor)
    size = math.prod(shape) * dtype.itemsize
    if max_shard_bytes and shards[-1] and filled + size > max_shard_bytes:
      shards.append({})
      filled = 0
    shards[-1][name] = tensor
    filled, total = filled + size, total + size
  index, weight_map = os.path.join(directory, INDEX), {}
  stale = {WEIGHTS, *indexed(directory)}
  stale = {name for name in stale if os.path.basename(name) == name}
  for number, shard in enumerate(shards, start=1):
    file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
    file = WEIGHTS if len(shards) == 1 else file
    write_safetensors(os.path.join(directory, file), shard)
    weight_map |= dict.fromkeys(shard, file)
    stale.discard(file)
  # Only now: until here a reader found the earlier weights.
  if len(shards) > 1:
    metadata = {"total_size": total}
    files.write_json(index, {"metadata": metadata, "weight_map": weight_map})
  elif os.path.exists(index):
    os.remove(index)
  for name in stale:
    if os.path.exists(path := os.path.join(directory, name)):
      os.remove(path)


def indexed(directory):
  """Returns the names of files in a directory's index, none without one."""
  index = os.path.join(directory, INDEX)
  found = hf_config.read_json(index) if os.path.exists(index) else {}
  found = found.get("weight_map")
  return set(map(str, found.values())) if isinstance(found, dict) else set()


def identity(directory):
  """Returns {"path", "sha256"} of a directory's weights.

  Of several files it is the hash of their hashes in the order of their names.
  """
  # Hashing releases the interpreter's lock: files side by side.
  with concurrent.futures.ThreadPoolExecutor(4) as pool:
    digests = list(pool.map(files.sha256, weight_files(directory)))
  digest = digests[0]
  if len(digests) > 1:
    digest = hashlib.sha256("\n".join(digests).encode()).hexdigest()
  return {"path": os.path.abspath(directory), "sha256": digest}
