"""Answers as they come, one JSON line each, so that nothing is asked twice.

A file starts with a header that says which run its answers belong to. Lines
are appended and synced to disk once per batch; a line cut off by a kill is
removed when the file is opened again.
"""

import json
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

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
  """The answers of one run, on disk and in memory."""

  def __init__(self, path: str | os.PathLike | None, run: Mapping[str, Any]):
    """Opens or starts a file.

    Args:
      path: of the JSON lines; None keeps answers in memory only.
      run: what the answers depend on; a file of another run is refused.
    """
    self._records: dict[Key, dict[str, Any]] = {}
    self._path = None if path is None else pathlib.Path(path)
    if self._path is None:
      return
    # Through JSON and back, so that it compares equal to what is read.
    self._run = json.loads(json.dumps(dict(run), sort_keys=True))
    self._path.parent.mkdir(parents=True, exist_ok=True)
    if self._path.exists():
      self._read()
    if not self._path.exists():
      self._append([{_HEADER: self._run}])

  def __contains__(self, key: Key) -> bool:
    return key in self._records

  def __getitem__(self, key: Key) -> dict[str, Any]:
    return self._records[key]

  def __len__(self) -> int:
    return len(self._records)

  def add(self, records: Iterable[tuple[Key, Mapping[str, Any]]]) -> None:
    """Writes new answers and waits until they are on disk."""
    new = [
      (key, dict(fields)) for key, fields in records if key not in self._records
    ]
    self._append([{**key._asdict(), **fields} for key, fields in new])
    self._records.update(new)

  def _append(self, lines: list[dict[str, Any]]) -> None:
    if not lines or self._path is None:
      return
    text = "".join(json.dumps(line, sort_keys=True) + "\n" for line in lines)
    with open(self._path, "a", encoding="utf-8") as f:
      f.write(text)
      f.flush()
      os.fsync(f.fileno())

  def _read(self) -> None:
    data = self._path.read_bytes()
    complete = data[: data.rfind(b"\n") + 1]
    if len(complete) < len(data):
      with open(self._path, "r+b") as f:
        f.truncate(len(complete))
    lines = complete.decode("utf-8", "replace").splitlines()
    if not lines:
      self._path.unlink()
      return
    for number, line in enumerate(lines, start=1):
      try:
        record = json.loads(line)
        if number == 1:
          self._check_run(record[_HEADER])
          continue
        key = Key(*(record.pop(field) for field in Key._fields))
      except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise errors.UserError(
          f"{self._path} line {number} is damaged ({type(error).__name__});"
          " delete the file to evaluate again"
        ) from error
      self._records[key] = record

  def _check_run(self, found: Mapping[str, Any]) -> None:
    names = sorted({*found, *self._run})
    differing = [n for n in names if found.get(n) != self._run.get(n)]
    if differing:
      raise errors.UserError(
        f"{self._path} holds answers of another run (differs in"
        f" {', '.join(differing)}); use another workdir, or delete the file"
      )
