"""Video features on disk, under the hash of everything that made them.

One entry is a .npy file of float32 followed by the 32 bytes of its sha256 (a
plain .npy reader ignores them). Entries are written aside and renamed, so that
several processes may share one folder; an entry that does not verify counts as
absent and is removed.

Entries are read without `np.load`: it evaluates the header as Python source,
and CPython 3.11's parser now and then fails when several threads use it at once
("AST constructor recursion depth mismatch").
"""

import hashlib
import io
import json
import os
import re

import numpy as np
from absl import logging

from cacovid_jax import errors, files

_DIGEST_BYTES = 32
# The header that `put` writes: .npy version 1.0, float32 in C order.
_HEADER = re.compile(
  rb"\x93NUMPY\x01\x00(?P<length>..)\{'descr': '<f4', 'fortran_order': False,"
  rb" 'shape': \((?P<shape>[0-9, ]*)\), \} *\n",
  re.DOTALL,
)


def key(**parts) -> str:
  """Returns the name of an entry from all that determines its content."""
  text = json.dumps(parts, sort_keys=True, separators=(",", ":"))
  return hashlib.blake2b(text.encode(), digest_size=20).hexdigest()


class FeatureCache:
  """Arrays float32[...] in a folder; safe to share among processes."""

  def __init__(self, directory):
    self.directory = os.fspath(directory)
    try:
      os.makedirs(self.directory, exist_ok=True)
    except OSError as error:
      raise self._unwritable(error) from error

  def path(self, name: str) -> str:
    """Returns where the entry of this name lies."""
    return os.path.join(self.directory, name[:2], f"{name}.npy")

  def size(self, name: str) -> int:
    """Returns an entry's bytes, 0 without one; `get` tells if it is sound."""
    try:
      return os.path.getsize(self.path(name))
    except FileNotFoundError:
      return 0

  def get(self, name: str) -> np.ndarray | None:
    """Returns the entry; None if there is none that verifies."""
    path = self.path(name)
    try:
      with open(path, "rb") as f:
        data = f.read()
    except FileNotFoundError:
      return None
    body, digest = data[:-_DIGEST_BYTES], data[-_DIGEST_BYTES:]
    if hashlib.sha256(body).digest() == digest:
      value = _parse(body)
      if value is not None:
        return value
    logging.warning("%s: damaged cache entry, made anew", path)
    try:
      os.remove(path)
    except FileNotFoundError:
      pass  # Another process was faster.
    return None

  def put(self, name: str, value) -> None:
    """Stores an array; the same name always stands for the same content."""
    path = self.path(name)
    buffer = io.BytesIO()
    value = np.asarray(value, np.float32, order="C")
    np.save(buffer, value, allow_pickle=False)
    body = buffer.getvalue()
    try:
      os.makedirs(os.path.dirname(path), exist_ok=True)
      files.write(path, body + hashlib.sha256(body).digest())
    except OSError as error:
      raise self._unwritable(error) from error

  def _unwritable(self, error: OSError) -> errors.UserError:
    return errors.UserError(
      f"{self.directory}: cannot keep video features here ({error.strerror});"
      " make room or see to the folder's permissions, or name another folder"
      " for the feature cache"
    )


def _parse(body: bytes) -> np.ndarray | None:
  """Returns the array of a .npy file that `put` wrote; None of another."""
  header = _HEADER.match(body)
  if header is None:
    return None
  shape = tuple(int(n) for n in header["shape"].split(b",") if n.strip())
  values = np.frombuffer(body, "<f4", offset=header.end())
  # A copy: what is read from bytes cannot be written to.
  return values.reshape(shape).astype(np.float32, copy=True)
