"""Video features on disk, under the hash of everything that made them.

An entry is a line of JSON (facts, and the shapes of its arrays), the arrays as
little-endian float32 one after the other, and the sha256 of all that. Entries
are written aside and renamed, so that several processes may share one folder;
an entry that does not verify counts as absent and is removed.
"""

import hashlib
import json
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import msgspec
import numpy as np
from absl import logging

from cacovid_jax import errors, files, schema

_DIGEST_BYTES = 32


class Entry(NamedTuple):
  """Named arrays float32[...], and what JSON can say of them."""

  arrays: dict[str, np.ndarray]
  facts: dict[str, Any]


def key(**parts) -> str:
  """Returns the name of an entry from all that determines its content."""
  text = json.dumps(parts, sort_keys=True, separators=(",", ":"))
  return hashlib.blake2b(text.encode(), digest_size=20).hexdigest()


class _Head(msgspec.Struct):
  """The first line of an entry."""

  facts: dict[str, Any]
  shapes: dict[str, list[schema.Size]]


class FeatureCache:
  """Entries in a folder; safe to share among processes."""

  def __init__(self, directory):
    self.directory = os.fspath(directory)
    files.make_folder(self.directory)

  def path(self, name: str) -> str:
    """Returns where the entry of this name lies."""
    return os.path.join(self.directory, name[:2], f"{name}.features")

  def size(self, name: str) -> int:
    """Returns an entry's bytes, 0 without one; `get` tells if it is sound."""
    try:
      return os.path.getsize(self.path(name))
    except FileNotFoundError:
      return 0

  def facts(self, name: str) -> dict[str, Any] | None:
    """Returns an entry's facts, unverified; None if there are none."""
    try:
      with open(self.path(name), "rb") as f:
        return schema.parse(f.readline(), _Head).facts
    except (FileNotFoundError, errors.UserError):
      return None

  def get(self, name: str) -> Entry | None:
    """Returns the entry; None if there is none that verifies."""
    path = pathlib.Path(self.path(name))
    try:
      data = path.read_bytes()
    except FileNotFoundError:
      return None
    body, digest = data[:-_DIGEST_BYTES], data[-_DIGEST_BYTES:]
    if hashlib.sha256(body).digest() == digest:
      try:
        return _parse(body)
      except (ValueError, errors.UserError):
        pass  # Whole, and written by something else.
    logging.warning("%s: damaged cache entry, made anew", path)
    path.unlink(missing_ok=True)  # Another process may be faster.
    return None

  def put(self, name: str, arrays: Mapping[str, Any], facts=None) -> None:
    """Stores an entry; the same name always stands for the same content."""
    path = self.path(name)
    arrays = {k: np.asarray(v, "<f4", order="C") for k, v in arrays.items()}
    shapes = {k: v.shape for k, v in arrays.items()}
    line = json.dumps({"facts": facts or {}, "shapes": shapes}) + "\n"
    body = b"".join([line.encode(), *(v.tobytes() for v in arrays.values())])
    files.make_folder(os.path.dirname(path))
    files.write(path, body + hashlib.sha256(body).digest())


def _parse(body: bytes) -> Entry:
  start = body.index(b"\n") + 1
  head, arrays = schema.parse(body[:start], _Head), {}
  for name, shape in head.shapes.items():
    count = math.prod(shape)
    values = np.frombuffer(body, "<f4", count, start)
    # A copy: what is read from bytes cannot be written to.
    arrays[name] = values.reshape(shape).astype(np.float32, copy=True)
    start += 4 * count
  return Entry(arrays, head.facts)
