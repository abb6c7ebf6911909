"""Clips that could not be used, known by their content."""

import functools
import json
import os

from cacovid_jax import files
from cacovid_jax.data import video

_KEYS = ("content", "video", "reason", "detail", "question")


class RejectedClips:
  """Clips that could not be used, as JSON lines.

  An entry is keyed by the clip's content, so a clip that is downloaded again is
  tried again.
  """

  def __init__(self, path=None):
    self.path = None if path is None else os.fspath(path)
    self.entries = []
    if self.path and os.path.isfile(self.path):
      with open(self.path, encoding="utf-8", errors="replace") as f:
        for line in f:
          try:
            entry = json.loads(line)
            self.entries.append({k: entry[k] for k in _KEYS})
          except (ValueError, KeyError, TypeError):
            continue  # The last line of a run that was killed.
    self._known = set(map(_key, self.entries))

  @property
  def refused(self) -> dict[str, str]:
    """Content hash -> reason, of clips that need not be tried again."""
    entries = ((entry["content"], entry["reason"]) for entry in self.entries)
    return {content: reason for content, reason in entries if content}

  def add(self, question, error: video.VideoError, content: str | None) -> bool:
    """Notes a clip; returns whether it is new."""
    told = (content, question.video, error.reason, error.detail, question.id)
    entry = dict(zip(_KEYS, told, strict=True))
    if _key(entry) in self._known:
      return False
    self._known.add(_key(entry))
    self.entries.append(entry)
    if self.path:
      os.makedirs(os.path.dirname(self.path) or ".", exist_ok=True)
      # One write in append mode: several processes may share the file.
      line = json.dumps(entry, sort_keys=True) + "\n"
      with open(self.path, "ab", buffering=0) as f:
        files.append(f, line.encode())
    return True


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


def content_or_none(error: video.VideoError) -> str | None:
  """Returns the hash of a bad clip's bytes, None where there are none."""
  try:
    return content_hash(error.path)
  except (video.VideoError, OSError, ValueError):
    return None
