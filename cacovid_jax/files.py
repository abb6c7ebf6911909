"""Files that survive a kill or a full disk: atomic writes, locks, hashes.

What is written into the mirror of a workdir on an object store is on the store
when a call returns, see `remote.mirror`.
"""

import contextlib
import errno
import fcntl
import functools
import hashlib
import json
import os
import pathlib
import socket
import uuid
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from absl import logging

from cacovid_jax import errors
from cacovid_jax.remote import mirror as remote

# What a disk or a path can refuse; anything else is no matter of theirs.
_REFUSED = errors.FULL + (
  errno.EACCES, errno.EEXIST, errno.EIO, errno.EISDIR, errno.ELOOP,
  errno.ENAMETOOLONG, errno.ENOENT, errno.ENOTDIR, errno.EPERM, errno.EROFS,
)  # fmt: skip


def unwritable(path, error: OSError) -> errors.UserError:
  """Returns the refusal of a path that a disk did not take."""
  why, mend = error.strerror or error, errors.mend_of(error)
  return errors.UserError(f"cannot write {path}: {why}; {mend}")


@contextlib.contextmanager
def writing(path, *others) -> Iterator[None]:
  """Turns what a disk refuses of a path into a `UserError` that names it.

  Errors about other files, but for `others`, stay as they are.
  """
  try:
    yield
  except OSError as error:
    about = {None, *map(os.fspath, (path, *others))}
    named = error.filename and os.fspath(error.filename)
    if error.errno in _REFUSED and named in about:
      raise unwritable(path, error) from error
    raise


def make_folder(path) -> None:
  """Makes a folder and those above it, unless they are there."""
  path = pathlib.Path(path)
  with writing(path, *path.parents):
    path.mkdir(parents=True, exist_ok=True)


def partial_name(path) -> pathlib.Path:
  """Returns a free path beside another one; it tells who writes there."""
  path = pathlib.Path(path)
  name = f"{socket.gethostname()}.{os.getpid()}.{uuid.uuid4().hex[:8]}"
  return path.with_name(f"{path.name}.{name}.partial")


@contextlib.contextmanager
def replacing(path) -> Iterator[pathlib.Path]:
  """Gives a free path beside `path`; what is written there replaces it.

  Readers see the old file or the whole new one, whoever is killed.
  """
  partial = partial_name(path)
  with writing(path, partial):
    try:
      yield partial
      sync(partial)
      os.replace(partial, path)
    except BaseException:
      with contextlib.suppress(OSError):
        partial.unlink()
      raise
  if mirror := remote.of(path):
    mirror.publish(pathlib.Path(path))


def remove(path) -> None:
  """Deletes a file, unless it is gone."""
  pathlib.Path(path).unlink(missing_ok=True)
  if mirror := remote.of(path):
    mirror.remove(pathlib.Path(path))


def refresh(folder) -> None:
  """Looks at what other processes have written right into a shared folder."""
  if mirror := remote.of(folder):
    mirror.refresh(pathlib.Path(folder))


def check_writable(path, flag: str) -> pathlib.Path:
  """Returns the path of a file to be written; refuses one that cannot be.

  To be asked before the work. Folders above it are made.
  """
  path = pathlib.Path(path)
  if os.path.isdir(path):
    raise errors.UserError(f"{path} is a folder; give {flag} a file name in it")
  for parent in path.parents:
    if os.path.exists(parent) and not os.path.isdir(parent):
      raise errors.UserError(f"{parent} is no folder; give another {flag}")
  make_folder(path.parent)
  partial = partial_name(path)
  with writing(path, partial):
    partial.touch()
    partial.unlink()
  return path


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


def append(path, data: bytes) -> None:
  """Appends bytes to a file and waits until they are on disk: all or nothing.

  Processes that share the file do so one after the other, see `claim`.
  """
  with writing(path), open(path, "ab", buffering=0) as file:
    size, rest = file.tell(), memoryview(data)
    try:
      while rest:
        rest = rest[file.write(rest) :]
      os.fsync(file.fileno())
      if mirror := remote.of(path):
        mirror.append(pathlib.Path(path), size)
    except BaseException:
      with contextlib.suppress(OSError):
        file.truncate(size)
      raise


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


@contextlib.contextmanager
def claim(
  path, who="process", *, what="", wait=False, hint="or use another workdir"
) -> Iterator[None]:
  """Keeps others out who claim the same path; they need not be of this host.

  The file PATH.lock says who holds it, is removed at the end, and means nothing
  without that process. Who does not `wait` for the holder gets a
  `TakenError`.

  Args:
    path: of a file, or of a role within a folder.
    who: what the other one is, such as "trainer".
    what: is written to; `path` if empty.
    wait: for the end of the others, on this machine; see `shared`.
    hint: end of the refusal: what else the command can do, by its own flags.
  """
  path = pathlib.Path(path)
  made = not os.path.exists(path.parent)
  lock = path.with_name(f"{path.name}.lock")
  refused = f"another {who} is writing to {what or path}"
  with _locked(lock, refused, hint, wait=wait) as file:
    # Who is told to others; there may be no room for it.
    with contextlib.suppress(OSError):
      file.truncate(0)
      file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
    mirror = None if wait else remote.of(path)
    try:
      with (
        mirror.locked(path, refused, hint)
        if mirror
        else contextlib.nullcontext()
      ):
        yield
    finally:
      with contextlib.suppress(OSError):
        lock.unlink()
        if made:  # A mistake leaves no empty folder.
          path.parent.rmdir()


def shared(path, act: Callable[[], Any]) -> Any:
  """Returns what `act` returns, while no other process writes to a log.

  It reads the log and appends to it at most once. On a store it is called again
  if another process was faster.
  """
  with claim(path, wait=True):
    mirror = remote.of(path)
    while mirror:
      mirror.refresh_log(pathlib.Path(path))
      try:
        return act()
      except remote.OutrunError:
        continue
    return act()


def _locked(path, refused: str, hint: str, *, wait: bool):
  """Returns the open file of this path, locked until it is closed."""
  while True:
    make_folder(path.parent)  # Its maker may have removed it meanwhile.
    with writing(path):
      file = open(path, "a+b", buffering=0)
    try:
      fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
      file.seek(0)
      holder = file.read(200).decode("utf-8", "replace")
      file.close()
      told = f" ({holder})" if holder else ""
      raise errors.TakenError(f"{refused}{told}; wait for it, {hint}") from None
    except OSError as error:
      _tell_no_locks(path.parent, error.strerror)
    with contextlib.suppress(FileNotFoundError):
      # Another one may have removed it while this process waited.
      if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
        return file
    file.close()


@functools.cache
def _tell_no_locks(folder, reason) -> None:
  """Says once of a folder that nothing keeps a second process out."""
  logging.warning(
    "%s: its file system has no locks (%s); see to it that no second process"
    " writes there",
    folder,
    reason,
  )
