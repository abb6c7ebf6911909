"""Answers as they come, one JSON line each, so that nothing is asked twice.

A file starts with a header: which run its answers belong to, and in which
environment they were computed. Where another environment goes on, a line says
so before its first answer. A line cut off by a kill is removed when the file is
opened again. Several processes may share the work of a run, each with a file of
its own, locked while it is open, and look into the others (see `shards`).

An answer with a `fault` is about a clip that could not be used. A file's faults
are not its answers: the clip may be there by now. Whoever asks again confirms
them, or adds an answer, whose line stands behind and wins.
"""

import json
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from cacovid_jax import errors, files

_HEADER = "run"
_MEND = (
  "use another workdir, or share the work with --shard=0/2 and --shard=1/2"
)
_ENVIRONMENT = "environment"
_FAULT = "fault"


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
    mend: str = _MEND,
  ):
    """Opens or starts a file, and locks it; without a path there is none.

    Args:
      path: of the JSON lines.
      run: what the answers depend on; a file of another run is refused.
      environment: that computes new answers, see `provenance.environment`.
      mend: end of the refusal of a locked file, see `files.lock`.
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
    self._path = self._file = None
    if path is None:
      return
    self._path = pathlib.Path(path)
    self._path.parent.mkdir(parents=True, exist_ok=True)
    self._file = open(self._path, "a+b")
    try:
      files.lock(self._file, self._path, hint=mend)
      self._open()
    except BaseException:
      self.close()
      raise

  def __enter__(self) -> "AnswerLog":
    return self

  def __exit__(self, *exc_info):
    self.close()

  def close(self) -> None:
    """Lets other processes write to the file."""
    if self._file is not None:
      self._file.close()

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
      for key, record, environment in self._parse(path, data)[0]:
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

  def _append(self, lines: list[dict[str, Any]]) -> None:
    if not lines or self._path is None:
      return
    text = "".join(json.dumps(line, sort_keys=True) + "\n" for line in lines)
    files.append(self._file, text.encode("utf-8"))

  def _open(self) -> None:
    self._file.seek(0)
    data = self._file.read()
    found, last = self._parse(self._path, data)
    for key, record, environment in found:
      if _FAULT not in record or key not in self:
        self._take(key, record, environment, stored=True)
    complete = data.rfind(b"\n") + 1
    if complete < len(data):
      self._file.truncate(complete)
    if complete:
      self._last_environment = last
      return
    header = {_HEADER: self._run}
    if self._environment:
      header[_ENVIRONMENT] = json.loads(self._environment)
    self._append([header])

  def _parse(self, path, data: bytes):
    """Returns ([(key, answer, environment)], environment of the last line).

    A line of the file without an end is none.
    """
    found, environment = [], ""
    complete = data[: data.rfind(b"\n") + 1]
    lines = complete.decode("utf-8", "replace").split("\n")[:-1]
    for number, line in enumerate(lines, start=1):
      try:
        record = json.loads(line)
        if number == 1:
          self._check_run(path, record[_HEADER])
        if number == 1 or _ENVIRONMENT in record:
          environment = _text(record.get(_ENVIRONMENT))
          continue
        key = Key(*(record.pop(field) for field in Key._fields))
      except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(path, number, error) from error
      found.append((key, record, environment))
    return found, environment

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
  """Returns the run that a ledger belongs to; {} if it was cut off there."""
  line, end, _ = pathlib.Path(path).read_bytes().partition(b"\n")
  if not end:
    return {}
  try:
    return dict(json.loads(line)[_HEADER])
  except (ValueError, KeyError, TypeError) as error:
    raise _damaged(path, 1, error) from error


def _damaged(path, number: int, error: Exception) -> errors.UserError:
  return errors.UserError(
    f"{path} line {number} is damaged ({type(error).__name__}); delete the file"
    " to evaluate again"
  )
