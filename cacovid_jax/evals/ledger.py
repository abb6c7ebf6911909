"""Answers as they come, one JSON line each, so that nothing is asked twice.

A file starts with a header that says which run its answers belong to. Lines
are appended and synced to disk once per batch; a line cut off by a kill is
removed when the file is opened again. An open file is locked: two processes
cannot write to one. Several may share the work of a run, each with a file of
its own, and look into those of the others (see `shards`).
"""

import fcntl
import json
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from absl import logging

from cacovid_jax import errors

_HEADER = "run"


class Key(NamedTuple):
  """One answer: who was asked what, with how many tokens.

  Attributes:
    method: name and options of the method; "vanilla" keeps every token.
    ratio: retention ratio, 1.0 for vanilla.
    seed: evaluation seed; 0 for methods without randomness.
    question: id.
  """

  method: str
  ratio: float
  seed: int
  question: str


class Ledger:
  """The answers of one run, on disk and in memory.

  A context manager; once closed, the answers can still be looked up.
  """

  def __init__(self, path: str | os.PathLike | None, run: Mapping[str, Any]):
    """Opens or starts a file, and locks it.

    Args:
      path: of the JSON lines; None keeps answers in memory only.
      run: what the answers depend on; a file of another run is refused.
    """
    self._records: dict[Key, dict[str, Any]] = {}
    self._path = None if path is None else pathlib.Path(path)
    self._file = None
    # Through JSON and back, so that it compares equal to what is read.
    self._run = json.loads(json.dumps(dict(run), sort_keys=True))
    if self._path is None:
      return
    self._path.parent.mkdir(parents=True, exist_ok=True)
    self._file = open(self._path, "a+b")
    try:
      lock(self._file, self._path)
      self._open()
    except BaseException:
      self.close()
      raise

  def __contains__(self, key: Key) -> bool:
    return key in self._records

  def __getitem__(self, key: Key) -> dict[str, Any]:
    return self._records[key]

  def __len__(self) -> int:
    return len(self._records)

  def __enter__(self) -> "Ledger":
    return self

  def __exit__(self, *exc_info):
    self.close()

  def close(self) -> None:
    """Lets other processes write to the file."""
    if self._file is not None:
      self._file.close()
      self._file = None

  def add(self, records: Iterable[tuple[Key, Mapping[str, Any]]]) -> None:
    """Writes new answers and waits until they are on disk."""
    new = [
      (key, dict(fields)) for key, fields in records if key not in self._records
    ]
    self._append([{**key._asdict(), **fields} for key, fields in new])
    self._records.update(new)

  def look(self, paths: Iterable[str | os.PathLike]) -> None:
    """Takes the answers of other files of this run, which stay as they are.

    Args:
      paths: of ledgers; another process may be writing to them.
    """
    for path in map(pathlib.Path, paths):
      if self._path is not None and path.name == self._path.name:
        continue
      for key, record in self._parse(path, path.read_bytes()):
        self._records.setdefault(key, record)

  def _append(self, lines: list[dict[str, Any]]) -> None:
    if not lines or self._path is None:
      return
    text = "".join(json.dumps(line, sort_keys=True) + "\n" for line in lines)
    self._file.write(text.encode("utf-8"))
    self._file.flush()
    os.fsync(self._file.fileno())

  def _open(self) -> None:
    self._file.seek(0)
    data = self._file.read()
    complete = data.rfind(b"\n") + 1
    self._records.update(self._parse(self._path, data))
    if complete < len(data):
      self._file.truncate(complete)
    if not complete:
      self._append([{_HEADER: self._run}])

  def _parse(self, path, data: bytes) -> list[tuple[Key, dict[str, Any]]]:
    """Returns the answers of a file; a line without an end is none."""
    found = []
    complete = data[: data.rfind(b"\n") + 1]
    lines = complete.decode("utf-8", "replace").split("\n")[:-1]
    for number, line in enumerate(lines, start=1):
      try:
        record = json.loads(line)
        if number == 1:
          self._check_run(path, record[_HEADER])
          continue
        key = Key(*(record.pop(field) for field in Key._fields))
      except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise errors.UserError(
          f"{path} line {number} is damaged ({type(error).__name__}); delete"
          " the file to evaluate again"
        ) from error
      found.append((key, record))
    return found

  def _check_run(self, path, found: Mapping[str, Any]) -> None:
    names = sorted({*found, *self._run})
    differing = [n for n in names if found.get(n) != self._run.get(n)]
    if differing:
      raise errors.UserError(
        f"{path} holds answers of another run (differs in"
        f" {', '.join(differing)}); use another workdir, or delete the file"
      )


def header(path: str | os.PathLike) -> dict[str, Any]:
  """Returns the run that a ledger belongs to; {} if it was cut off there.

  Args:
    path: of a ledger, which another process may be writing to.
  """
  line, end, _ = pathlib.Path(path).read_bytes().partition(b"\n")
  if not end:
    return {}
  try:
    return dict(json.loads(line)[_HEADER])
  except (ValueError, KeyError, TypeError) as error:
    raise errors.UserError(
      f"{path} line 1 is damaged ({type(error).__name__}); delete the file to"
      " evaluate again"
    ) from error


def lock(file, path: str | os.PathLike, *, wait: bool = False) -> None:
  """Locks an open file until it is closed.

  Args:
    file: open for writing.
    path: its name, for the error.
    wait: for a process that has it, instead of refusing.
  """
  try:
    fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
  except BlockingIOError:
    raise errors.UserError(
      f"another process is writing to {path}; wait for it, use another"
      " workdir, or share the work with --shard=0/2 and --shard=1/2"
    ) from None
  except OSError as error:
    # Some network file systems have no locks; the rest works without.
    logging.warning("%s cannot be locked (%s)", path, error.strerror)
