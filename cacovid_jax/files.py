"""Files that survive a kill: atomic writes, appended lines, locks, hashes."""

import contextlib
import fcntl
import functools
import hashlib
import json
import os
import pathlib
import socket
import uuid
from collections.abc import Iterable, Iterator
from typing import Any

from absl import logging

from cacovid_jax import errors


@contextlib.contextmanager
def replacing(path) -> Iterator[pathlib.Path]:
  """Gives a free path beside `path`; what is written there replaces it.

  Readers see the old file or the whole new one, whoever is killed.
  """
  path = pathlib.Path(path)
  name = f"{socket.gethostname()}.{os.getpid()}.{uuid.uuid4().hex[:8]}"
  partial = path.with_name(f"{path.name}.{name}.partial")
  try:
    yield partial
    sync(partial)
    os.replace(partial, path)
  except BaseException:
    partial.unlink(missing_ok=True)
    raise


def write(path, content: str | bytes | Iterable[bytes]) -> None:
  """Writes text (UTF-8), bytes or pieces of bytes, all or nothing."""
  if isinstance(content, str):
    content = content.encode("utf-8")
  pieces = [content] if isinstance(content, bytes) else content
  with replacing(path) as partial, open(partial, "wb") as file:
    file.writelines(pieces)


def write_json(path: str | os.PathLike, value: Any) -> None:
  """Writes JSON with sorted keys, all or nothing; NaN is a ValueError."""
  text = json.dumps(value, indent=2, sort_keys=True, allow_nan=False)
  write(path, text + "\n")


def append(file, data: bytes) -> None:
  """Appends bytes to an open binary file and waits until they are on disk."""
  file.write(data)
  file.flush()
  os.fsync(file.fileno())


def sync(path: str | os.PathLike) -> None:
  """Forces a file or a folder to disk."""
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)


def blake2b(path: str | os.PathLike, digest_size: int) -> str:
  """Returns the blake2b of a file's content, in hexadecimal digits."""
  with open(path, "rb") as file:
    made = functools.partial(hashlib.blake2b, digest_size=digest_size)
    return hashlib.file_digest(file, made).hexdigest()


def sha256(path: str | os.PathLike) -> str:
  """Returns the sha256 of a file's content, in hexadecimal digits."""
  with open(path, "rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def lock(file, path, *, wait=False, hint="or use another workdir") -> None:
  """Locks a file that is open for writing until it is closed.

  Without `wait`, one that another process has is refused; `hint` ends the
  refusal: what else the command can do, by its own flags.
  """
  try:
    fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
  except BlockingIOError:
    raise errors.UserError(
      f"another process is writing to {path}; wait for it, {hint}"
    ) from None
  except OSError as error:
    # Some network file systems have no locks; the rest works without.
    logging.warning("%s cannot be locked (%s)", path, error.strerror)
