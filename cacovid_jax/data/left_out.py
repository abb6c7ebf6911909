"""What is not used of a data set: rows, and clips known by their content."""

import collections
import dataclasses
import functools
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import msgspec

from cacovid_jax import errors, files, json_lines, schema
from cacovid_jax.data import readers, video

FILE = "left_out.json"
_SHOWN = 5
_KEYS = ("content", "video", "reason", "detail", "question")


class _Begun(msgspec.Struct):
  """What `FILE` says of the questions that a run began with."""

  questions: schema.Size
  missing_clips: dict[str, schema.Size]


@dataclasses.dataclass
class SkippedRows:
  """Rows and clips that are not trained on."""

  num_questions: int = 0  # That are.
  report: readers.Report = dataclasses.field(default_factory=readers.Report)
  # Clips that are not there -> questions lost.
  missing: Mapping[str, int] = dataclasses.field(default_factory=dict)

  def lines(self) -> list[str]:
    """Returns one line for each kind, none where nothing was left out."""
    report, found = self.report, []
    if report.num_images:
      sources = collections.Counter()
      for (source, _), count in report.images.items():
        sources[source] += count
      told = ", ".join(f"{name} {n}" for name, n in sorted(sources.items()))
      found.append(f"left out {report.num_images} image rows: {told}")
    if report.bad_rows:
      found.append(
        f"left out {len(report.bad_rows)} bad rows, first: {report.bad_rows[0]}"
      )
    if self.missing:
      found.append(
        f"left out {sum(self.missing.values())} questions about"
        f" {len(self.missing)} missing clips, first:"
        f" {', '.join(list(self.missing)[:_SHOWN])}"
      )
    return found

  def write(self, directory) -> None:
    """Writes every bad row and every clip into `FILE` of a folder."""
    images = sorted(self.report.images.items())
    out = {
      "questions": self.num_questions,
      "images": [
        {"source": source, "problem_type": kind, "rows": count}
        for (source, kind), count in images
      ],
      "bad_rows": [str(row) for row in self.report.bad_rows],
      "missing_clips": dict(self.missing),
    }
    files.make_folder(directory)
    # Processes that share a folder write the same, each by itself.
    files.write_json(os.path.join(directory, FILE), out)

  def check(self, directory) -> None:
    """Refuses to go on with a run, of that folder, that saw other questions.

    Which question stands in which step depends on all of them. Nothing is known
    where there is no `FILE`.
    """
    path = os.path.join(directory, FILE)
    if not os.path.exists(path):
      return
    mend = "delete it if the questions and clips are those that the run began"
    before = schema.read(path, _Begun, f"{mend} with")
    then = before.questions, before.missing_clips
    if then != (self.num_questions, dict(self.missing)):
      raise errors.UserError(
        f"{path}: the run began with {then[0]} questions and {len(then[1])}"
        f" missing clips, and now there are {self.num_questions} and"
        f" {len(self.missing)}; bring back the files as they were or use"
        " another workdir"
      )


class RejectedClips:
  """Clips that could not be used, as JSON lines.

  An entry is keyed by the clip's content, so a clip that is downloaded again is
  tried again, as is one whose line is damaged. Processes may share the file.
  """

  def __init__(self, path=None):
    self.path = None if path is None else os.fspath(path)
    self.entries = []
    if self.path and os.path.isfile(self.path):
      self.entries = files.shared(self.path, self._read)
    self._known = set(map(_key, self.entries))

  @property
  def refused(self) -> dict[str, str]:
    """Content hash -> reason, of clips that need not be tried again."""
    entries = ((entry["content"], entry["reason"]) for entry in self.entries)
    return {content: reason for content, reason in entries if content}

  def add(self, question, error: video.VideoError) -> bool:
    """Notes a clip; returns whether it is new."""
    try:
      content = content_hash(error.path)
    except (video.VideoError, OSError, ValueError):
      content = None  # There are no bytes.
    told = (content, question.video, error.reason, error.detail, question.id)
    entry = dict(zip(_KEYS, told, strict=True))
    if _key(entry) in self._known:
      return False
    self._known.add(_key(entry))
    self.entries.append(entry)
    if self.path:
      files.shared(self.path, lambda: json_lines.append(self.path, [entry]))
    return True

  def _read(self) -> list[dict[str, Any]]:
    data = pathlib.Path(self.path).read_bytes()
    lines = json_lines.parse(data, lambda line: {k: line[k] for k in _KEYS})
    then = "their clips are tried again"
    return json_lines.keep(self.path, lines, then)


def _key(entry) -> tuple[str, str]:
  return entry["content"] or entry["video"], entry["reason"]


@functools.lru_cache(maxsize=65_536)
def _hash_of(path: str, unused_size: int, unused_mtime_ns: int) -> str:
  return files.blake2b(path, 20)


def content_hash(path: str) -> str:
  """Returns blake2b of a clip's bytes; read again only if the file changes."""
  try:
    status = os.stat(path)
    if not os.path.isfile(path):
      raise video.VideoError(path, "not_a_file")
    return _hash_of(path, status.st_size, status.st_mtime_ns)
  except FileNotFoundError:
    raise video.VideoError(path, "missing") from None
  except OSError as error:
    raise video.VideoError(path, "unreadable", error.strerror or "") from None
