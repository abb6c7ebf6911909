"""Answers as they come, one JSON line each, so that nothing is asked twice.

A file starts with a header: which run its answers belong to, and in which
environment they were computed. Where another environment goes on, a line says
so before its first answer. Damaged lines, and one cut off by a kill, are set
aside when the file is opened again, and their questions asked again; without
the header, all are. Several processes may share the work of a run, each with a
file of its own, locked while it is open, and look into the others (`shards`).

An answer with a `fault` is about a clip that could not be used. A file's faults
are not its answers: the clip may be there by now. Whoever asks again confirms
them, or adds an answer, whose line stands behind and wins.
"""

import contextlib
import json
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from cacovid_jax import errors, files, json_lines

_HEADER = "run"
MEND = "use another workdir, or share the work with --shard=0/2 and --shard=1/2"
_ENVIRONMENT = "environment"
_FAULT = "fault"
_CHANGE = b'{"environment": '  # So begins a line about a new environment.
_UNKNOWN = json_lines.encode({_ENVIRONMENT: None})
_AGAIN = "what they held is asked again"


class Key(NamedTuple):
  """One answer: who was asked what, with how many tokens."""

  method: str  # Name and options; "vanilla" keeps every token.
  ratio: float  # Of retention, 1.0 for vanilla.
  seed: int  # 0 for methods without randomness.
  question: str  # Id.


class AnswerLog(dict[Key, dict[str, Any]]):
  """The answers of one run, in memory as in a dict, and on disk.

  A context manager; once closed, the answers can still be looked up.
  """

  def __init__(
    self,
    path: str | os.PathLike | None,
    run: Mapping[str, Any],
    *,
    environment: Mapping[str, Any] | None = None,
    mend: str = MEND,
  ):
    """Opens or starts a file, and locks it; without a path there is none.

    Args:
      path: of the JSON lines.
      run: what the answers depend on; a file of another run is refused.
      environment: that computes new answers, see `provenance.environment`.
      mend: end of the refusal of a locked file, see `files.claim`.
    """
    super().__init__()
    # Of files: what was wrong with a clip then.
    self._faults: dict[Key, dict[str, Any]] = {}
    # Of the answers, as JSON; "" is not known.
    self._environments: dict[Key, str] = {}
    # Of new answers, and of the last line in the file.
    self._environment = self._last_environment = _text(environment)
    # Through JSON and back, so that it compares equal to what is read.
    self._run = json.loads(_text(run))
    self._path, self._lock = None, contextlib.ExitStack()
    if path is None:
      return
    self._path = pathlib.Path(path)
    with contextlib.ExitStack() as lock:
      lock.enter_context(files.claim(self._path, hint=mend))
      self._open()
      self._lock = lock.pop_all()

  def __enter__(self) -> "AnswerLog":
    return self

  def __exit__(self, *exc_info):
    self._lock.__exit__(*exc_info)

  def close(self) -> None:
    """Lets other processes write to the file."""
    self._lock.close()

  def add(self, records: Iterable[tuple[Key, Mapping[str, Any]]]) -> None:
    """Writes new answers and waits until they are on disk."""
    new = [(key, dict(fields)) for key, fields in records if key not in self]
    self.confirm([key for key, fields in new if self.fault(key) == fields])
    new = [(key, fields) for key, fields in new if key not in self]
    lines = [{**key._asdict(), **fields} for key, fields in new]
    if lines and self._last_environment != self._environment:
      lines.insert(0, {_ENVIRONMENT: json.loads(self._environment or "null")})
      self._last_environment = self._environment
    self._append(lines)
    for key, fields in new:
      self._take(key, fields, self._environment)

  def fault(self, key: Key) -> dict[str, Any] | None:
    """Returns the answer of a file about a clip that could not be used then."""
    return self._faults.get(key)

  def confirm(self, keys: Iterable[Key]) -> None:
    """Makes faults of files answers: the clips still cannot be used."""
    for key in keys:
      self[key] = self._faults.pop(key)

  def confirm_all(self) -> None:
    """Makes all faults of files answers that nothing better is known for."""
    self.confirm(list(self._faults))

  def environments(self, keys: Iterable[Key]) -> list[dict[str, Any]]:
    """Returns the environments that answers were computed in, each once."""
    found = {self._environments.get(key, "") for key in keys} - {""}
    return [json.loads(text) for text in sorted(found)]

  def look(self, paths: Iterable[str | os.PathLike]) -> None:
    """Takes the answers of other files of this run, which stay as they are.

    Another process may be writing to them.
    """
    for path in map(pathlib.Path, paths):
      if self._path is not None and path.name == self._path.name:
        continue
      try:
        data = path.read_bytes()
      except FileNotFoundError:
        continue  # Deleted since it was listed.
      lines = json_lines.parse(data, _entry, shared=True)
      lines, found, _ = self._sorted(path, lines)
      json_lines.tell(path, lines, _AGAIN)
      for key, record, environment in found:
        if key not in self and (_FAULT not in record or not self.fault(key)):
          self._take(key, record, environment, stored=True)

  def _take(self, key, record, environment: str, stored: bool = False) -> None:
    """Adds an answer; a fault of a file is none until it is confirmed."""
    if stored and _FAULT in record:
      self._faults[key] = record
    else:
      self._faults.pop(key, None)
      self[key] = record
    self._environments[key] = environment

  def _append(self, records: list[dict[str, Any]]) -> None:
    if records and self._path is not None:
      json_lines.append(self._path, records)

  def _open(self) -> None:
    data = self._path.read_bytes() if self._path.exists() else b""
    lines = json_lines.parse(data, _entry)
    lines, found, last = self._sorted(self._path, lines)
    for key, record, environment in found:
      if _FAULT not in record or key not in self:
        self._take(key, record, environment, stored=True)
    if json_lines.keep(self._path, lines, _AGAIN):
      self._last_environment = last
      return
    header = {_HEADER: self._run}
    if self._environment:
      header[_ENVIRONMENT] = json.loads(self._environment)
    self._append([header])

  def _sorted(self, path, lines: list[json_lines.Line]):
    """Returns (lines, [(key, answer, environment)], environment of the last).

    Without a header nobody knows whose answers these are: all are damaged.
    """
    if (run := _run_of(lines)) is None:
      return [line._replace(value=None) for line in lines], [], ""
    self._check_run(path, run)
    out, found, environment = [], [], ""
    for line in lines:
      out.append(line)
      if line.value is None and _told_environment(line.data):
        # Nobody knows where the next answers were computed.
        out.append(json_lines.Line(_UNKNOWN, (None, None, ""), True))
        environment = ""
      elif line.value is not None:
        key, record, text = line.value
        if key is None:
          environment = text
        else:
          found.append((key, record, environment))
    return out, found, environment

  def _check_run(self, path, found: Mapping[str, Any]) -> None:
    run, names = self._run, sorted({*found, *self._run})
    if differing := [n for n in names if found.get(n) != run.get(n)]:
      raise errors.UserError(
        f"{path} holds answers of another run (differs in"
        f" {', '.join(differing)}); use another workdir, or delete the file"
      )


def _text(entry: Mapping[str, Any] | None) -> str:
  """Returns JSON that is equal for equal entries; "" for none."""
  return "" if entry is None else json.dumps(dict(entry), sort_keys=True)


def header(path: str | os.PathLike) -> dict[str, Any]:
  """Returns the run that a ledger belongs to; {} if that is cut or damaged."""
  with open(path, "rb") as file:
    lines = json_lines.parse(file.readline(), _entry, shared=True)
  return _run_of(lines) or {}


def _run_of(lines: list[json_lines.Line]) -> dict[str, Any] | None:
  """Returns what the header of a file says; None without a sound one."""
  key, run, _ = (lines and lines[0].value) or (None, None, "")
  return run if key is None else None


def _told_environment(damaged: bytes) -> bool:
  """Returns whether a damaged line was one about the environment."""
  start = damaged[: len(_CHANGE)]
  return json_lines.resembles(start, _CHANGE) or _CHANGE in damaged


def _entry(record: dict[str, Any]):
  """Returns (key, answer, ""), or (None, run or None, environment)."""
  if _HEADER in record or _ENVIRONMENT in record:
    run = record.get(_HEADER)
    run = None if run is None else dict(run)
    return None, run, _text(record.get(_ENVIRONMENT))
  key = Key(*(record.pop(field) for field in Key._fields))
  hash(key)  # A TypeError of lists.
  return key, record, ""
