"""An object store: whole objects, made, read and deleted, and nothing else.

There is no rename, no append and no lock. What a store does all or nothing is
one whole object, and to make one unless its name is taken; `remote.mirror` and
`remote.lock` build on these two. Objects are reached by fsspec and gcsfs.
"""

import errno
import logging
import os
import pathlib
import queue
import re
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from cacovid_jax import errors

SCHEME = "gs://"
COPY = "copy it to a disk (gcloud storage rsync -r) or mount it (gcsfuse)"
# An operation is tried again for so long, in all, before the run ends; and a
# second longer for each MiB that it moves.
PATIENCE = 120.0
_PAUSES = 1.0, 2.0, 4.0, 8.0, 16.0
_NEVER = (
  FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError,
  NotADirectoryError, NotImplementedError, TypeError, ValueError,
)  # fmt: skip
_DENIED = re.compile(
  r"forbidden|unauthori[sz]ed|credentials|permission|\b401\b", re.I
)


def is_url(text) -> bool:
  """Returns whether a path is one of a store, as `gs://bucket/run`."""
  return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", str(text)) is not None


def refuse(text, name: str) -> None:
  """Stops at a value, or the PATH of its NAME=PATH, that lies on a store."""
  if is_url(str(text).rpartition("=")[2]):
    raise errors.UserError(
      f"{name}={text}: only --workdir of train, evaluate, doctor and ckpt may"
      f" be on a store; {COPY}"
    )


class Info(NamedTuple):
  """What a store says of an object."""

  size: int  # Bytes.
  version: Any  # Differs between contents of one name; None is not known.


class Store:
  """The objects below one URL; names are relative to it, with slashes.

  An operation that fails is tried again for `PATIENCE` seconds in all, unless
  the store says no; then it is a `UserError` of one line.
  """

  def __init__(self, url: str):
    told = f"{url}: stores are {SCHEME}BUCKET/FOLDER; of another one, {COPY}"
    errors.check(url.startswith(SCHEME) and url[len(SCHEME) :].strip("/"), told)
    self.url = url.rstrip("/")
    self._root = self.url.removeprefix(SCHEME)
    # It logs with tracebacks what it raises as well.
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
    try:
      import fsspec

      self._files = fsspec.filesystem("gs", use_listings_cache=False)
    except ImportError:
      raise errors.UserError(
        f'{url} needs gcsfs: pip install "cacovid_jax[gcs]", or {COPY}'
      ) from None

  def put(self, name: str, data: bytes) -> None:
    """Writes an object whole, over one of that name."""
    self._ask("write", name, self._files.pipe_file, data, size=len(data))

  def create(self, name: str, data: bytes) -> bool:
    """Writes an object unless there is one; returns whether it is ours."""
    made = self._files.pipe_file
    try:
      self._ask("write", name, made, data, size=len(data), mode="create")
    except FileExistsError:
      # It may be ours, written by a try whose answer was lost.
      return self.get(name) == data
    return True

  def put_file(self, name: str, path: pathlib.Path) -> None:
    """Writes an object from a file on disk."""
    size = path.stat().st_size

    def put(target):
      self._files.put_file(os.fspath(path), target)

    self._ask("write", name, put, size=size)

  def get(self, name: str) -> bytes | None:
    """Returns an object's content; None without one."""
    try:
      return self._ask("read", name, self._files.cat_file)
    except FileNotFoundError:
      return None

  def get_file(self, name: str, path: pathlib.Path, size: int) -> None:
    """Copies an object of so many bytes to a file on disk."""

    def get(source):
      self._files.get_file(source, os.fspath(path))

    path.parent.mkdir(parents=True, exist_ok=True)
    self._ask("read", name, get, size=size)

  def info(self, name: str) -> Info | None:
    """Returns what is known of an object; None without one."""
    try:
      return _info(self._ask("read", name, self._files.info))
    except FileNotFoundError:
      return None

  def list(self, folder: str = "") -> dict[str, Info]:
    """Returns all objects below a folder, by name, in order."""
    try:
      found = self._ask("read", folder, self._files.find, detail=True)
    except FileNotFoundError:
      return {}
    prefix = f"{self._root}/{folder}".rstrip("/") + "/"
    start = len(self._root) + 1
    names = {path.lstrip("/"): entry for path, entry in found.items()}
    told = f"{self.url} is an object, no folder; give another --workdir"
    itself = names.get(self._root, {}).get("type") == "file"
    errors.check(not itself, told)
    return {
      name[start:]: _info(names[name])
      for name in sorted(names)
      if name.startswith(prefix)
    }

  def delete(self, name: str) -> None:
    """Deletes an object, unless it is gone."""
    try:
      self._ask("delete", name, self._files.rm_file)
    except FileNotFoundError:
      pass

  def _ask(self, what: str, name: str, act: Callable, *args, size=0, **options):
    """Returns what an operation on an object returns, tried again in time."""
    path = f"{self._root}/{name}".rstrip("/")
    end = time.monotonic() + PATIENCE + size / 2**20
    for count in range(10**6):
      try:
        left = end - time.monotonic()
        return _within(left, act, path, *args, **options)
      except (FileNotFoundError, FileExistsError):
        raise
      except Exception as error:
        pause = _PAUSES[min(count, len(_PAUSES) - 1)]
        if _is_final(error) or time.monotonic() + pause >= end:
          raise self._refusal(what, name, error) from error
      time.sleep(pause)

  def _refusal(self, what: str, name: str, error: Exception):
    url = f"{self.url}/{name}".rstrip("/")
    why = getattr(error, "strerror", None) or errors.one_line(error)
    why = why or type(error).__name__
    if getattr(error, "errno", None) in errors.FULL:
      mend = errors.mend_of(error)
    elif isinstance(error, PermissionError) or _DENIED.search(why):
      mend = "see to the bucket's permissions (gcloud auth application-default"
      mend += " login)"
    elif _is_final(error):
      mend = "see to the bucket, or use another workdir"
    else:
      mend = f"tried for {PATIENCE:.0f} s; give the command again when the"
      mend += " store answers"
    return errors.UserError(f"cannot {what} {url}: {why}; {mend}")


def _info(entry) -> Info:
  versions = (entry.get(k) for k in ("generation", "etag", "mtime", "created"))
  found = [str(version) for version in versions if version is not None]
  return Info(int(entry["size"]), found[0] if found else None)


def _is_final(error: Exception) -> bool:
  """Returns whether trying again is of no use."""
  code = str(getattr(error, "code", ""))
  if code.isdecimal():
    return code.startswith("4") and code not in ("408", "429")
  number = getattr(error, "errno", None)
  if isinstance(error, _NEVER) or number in (*errors.FULL, errno.EROFS):
    return True
  return bool(
    type(error).__module__.startswith("google.auth")
    or (isinstance(error, OSError) and str(error).startswith("Forbidden"))
  )


def _within(seconds: float, act: Callable, *args, **options):
  """Returns what a call returns; a TimeoutError if that takes longer.

  The call is then left alone: its thread ends with the process at the latest.
  """
  box = queue.SimpleQueue()

  def work():
    try:
      box.put((act(*args, **options), None))
    except BaseException as error:
      box.put((None, error))

  threading.Thread(target=work, daemon=True).start()
  try:
    found, error = box.get(timeout=max(seconds, 0.001))
  except queue.Empty:
    raise TimeoutError("no answer") from None
  if error is not None:
    raise error
  return found
