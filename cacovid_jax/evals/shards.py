"""Several processes or hosts that share one evaluation's work.

Process i of n asks batches i, i + n, i + 2 n, ... and writes a ledger of its
own, `answers-i-of-n.jsonl`. What others have answered is not asked again. When
it is done it says so in `answers-i-of-n.done.json`, together with what could
not be run; whoever finds that all n are done has all there is to a table. They
need a common folder and nothing else: no process waits for another.
"""

import dataclasses
import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import msgspec

from cacovid_jax import errors, files, schema
from cacovid_jax.data import answer_log
from cacovid_jax.evals import evaluator as evaluator_lib
from cacovid_jax.evals import provenance
from cacovid_jax.inference import methods as methods_lib

_SHARD = re.compile(r"([0-9]+)/([0-9]+)")


class Shard(NamedTuple):
  """Process `index` of `count`, from 0."""

  index: int = 0
  count: int = 1

  @classmethod
  def parse(cls, text: str) -> "Shard":
    """Returns the shard of "i/n"."""
    match = _SHARD.fullmatch(text.strip())
    if match is None:
      raise errors.UserError(
        f"shard {text!r}: give I/N, for example 0/4 for the first of four"
        " processes"
      )
    return cls(*map(int, match.groups())).checked()

  def checked(self) -> "Shard":
    """Returns itself; refuses a number that no process has."""
    if not 0 <= self.index < self.count:
      mend = "there is no process; give 0/1"
      if (n := self.count) > 0:
        mend = f"with {n} processes, give 0/{n} to {n - 1}/{n}"
      raise errors.UserError(f"shard {self.index}/{self.count}: {mend}")
    return self

  @property
  def alone(self) -> bool:
    return self.count == 1

  def file(self, name: str) -> str:
    """Returns this process's own form of a file name, "x-0-of-4.jsonl"."""
    if self.alone:
      return name
    stem, dot, suffix = name.partition(".")
    return f"{stem}-{self.index}-of-{self.count}{dot}{suffix}"


def ledgers(workdir: pathlib.Path, name: str) -> list[pathlib.Path]:
  """Returns all ledgers of a shared workdir, of a name like "answers.jsonl"."""
  files.refresh(workdir)
  stem, _, suffix = map(re.escape, name.partition("."))
  pattern = re.compile(rf"{stem}(-[0-9]+-of-[0-9]+)?\.{suffix}")
  return sorted(
    path for path in workdir.iterdir() if pattern.fullmatch(path.name)
  )


def ledger(
  workdir: pathlib.Path, shard: Shard, name: str, run: Mapping[str, Any]
) -> answer_log.AnswerLog:
  """Opens this process's ledger, with what all others have answered so far.

  The name is as of `ledgers`; answers depend on `run`.
  """
  found = answer_log.AnswerLog(
    workdir / shard.file(name), run, environment=provenance.environment()
  )
  try:
    found.look(ledgers(workdir, name))
  except BaseException:
    found.close()
    raise
  return found


def work(
  identity: Mapping[str, Any], cells: Sequence[methods_lib.Condition], questions
) -> str:
  """Returns a digest of all that is to be asked, whoever asks it."""
  asked = sorted((cell.spec, cell.ratio, cell.seed) for cell in cells)
  asked = [identity, asked, sorted(question.id for question in questions)]
  return provenance.digest(json.dumps(asked, sort_keys=True))


class _Failure(msgspec.Struct):
  """An `evaluator.Failure` and what failed."""

  method: str
  ratio: float
  reason: str
  minimum_ratio: float | None
  batch: int


class _Note(msgspec.Struct):
  """What a process that is done leaves in the folder."""

  work: str
  failures: list[_Failure]


@dataclasses.dataclass(frozen=True)
class ShardStatus:
  """Who is done, in a shared folder."""

  workdir: pathlib.Path  # Shared.
  shard: Shard  # This process.
  # Digest of what is to be asked; a note about other work counts as none.
  work: str

  def start(self) -> None:
    """Takes this process's own note away, if there is one."""
    files.remove(self._path(self.shard))

  def done(self, failures: evaluator_lib.Failures) -> None:
    """Notes that this process has asked its share, less what failed."""
    entries = [
      {"method": spec, "ratio": ratio, **failure._asdict()}
      for (spec, ratio), failure in failures.items()
    ]
    note = {"work": self.work, "failures": entries}
    files.write_json(self._path(self.shard), note)

  def read(self) -> tuple[list[int], evaluator_lib.Failures]:
    """Returns (numbers of the processes that are not done, all failures).

    Where all are done, failures are as one process alone would find them: the
    reason is that of the first batch that showed it.
    """
    files.refresh(self.workdir)
    missing, found = [], {}
    for index in range(self.shard.count):
      entries = self._read(index)
      if entries is None:
        missing.append(index)
      for entry in entries or ():
        place = entry.method, entry.ratio
        told = entry.reason, entry.minimum_ratio, entry.batch
        failure = evaluator_lib.Failure(*told)
        if place not in found or failure.batch < found[place].batch:
          found[place] = failure
    return missing, found

  def _path(self, shard: Shard) -> pathlib.Path:
    return self.workdir / shard.file("answers.done.json")

  def _read(self, index: int) -> "list[_Failure] | None":
    """Returns a process's failures; None if it is not done with this work."""
    path = self._path(Shard(index, self.shard.count))
    mend = f"delete it and start --shard={index}/{self.shard.count} again"
    try:
      text = path.read_bytes()
    except FileNotFoundError:  # Or it has just been taken away.
      return None
    note = schema.parse(text, _Note, path, mend)
    return note.failures if note.work == self.work else None
