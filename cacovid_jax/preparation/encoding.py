"""Fills the cache of video features ahead of training.

Each clip is decoded and run through the vision tower once; training then reads
its features and does neither. Which clips a process encodes depends on the
questions alone, so any number of them share the work, and one that was stopped
goes on behind what is there.
"""

import collections
import concurrent.futures
import dataclasses
import shutil
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from cacovid_jax import errors
from cacovid_jax import progress as progress_lib
from cacovid_jax.data import question as question_lib
from cacovid_jax.data import rejected_clips, video
from cacovid_jax.training import pipeline


@dataclasses.dataclass
class Report:
  """What became of the clips of one share.

  Attributes:
    num_clips: of the share.
    num_present: whose features were there.
    num_encoded: whose features were made.
    failed: path -> why a clip cannot be used.
  """

  num_clips: int = 0
  num_present: int = 0
  num_encoded: int = 0
  failed: dict[str, str] = dataclasses.field(default_factory=dict)


def clips_of(
  rows: Sequence[question_lib.Question], shard: tuple[int, int] = (0, 1)
) -> list[question_lib.Question]:
  """Returns one question about each clip of a share.

  Args:
    rows: questions; several may be about one clip.
    shard: (index, number): every number-th clip, by name.
  """
  index, number = shard
  if not 0 <= index < number:
    raise errors.UserError(
      f"shard {index}/{number}: the first number counts from 0 and is below the"
      " second"
    )
  first = {}
  for row in rows:
    first.setdefault(row.video, row)
  return [first[name] for name in sorted(first)][index::number]


def encode(
  source: pipeline.FeatureSource,
  rows: Sequence[question_lib.Question],
  directory: str,
  *,
  shard: tuple[int, int] = (0, 1),
  num_threads: int = 2,
  quarantine: rejected_clips.RejectedClips | None = None,
  progress: Callable[..., Any] = progress_lib.Progress,
) -> Report:
  """Makes the features that are missing; returns what was done.

  Args:
    source: with a cache on disk.
    rows: questions about the clips.
    directory: of the cache; once the size of a clip is known, it must have
      room for all that are missing, those of other shares too.
    shard: (index, number) of this process.
    num_threads: that decode ahead.
    quarantine: ledger of clips that cannot be used.
    progress: shows how far it is, made as `progress_lib.Progress` is.
  """
  quarantine = (
    rejected_clips.RejectedClips() if quarantine is None else quarantine
  )
  report, todo, size = Report(), [], 0
  share = clips_of(rows, shard)
  mine = {row.video for row in share}
  others = [row for row in clips_of(rows) if row.video not in mine]
  for row in share:
    report.num_clips += 1
    try:
      known = source.cached_bytes(row)
    except video.VideoError as error:
      _refuse(report, quarantine, row, error)
      continue
    report.num_present += known > 0
    size = size or known
    if not known:
      todo.append(row)
  if size:
    _check_room(source, directory, size, len(todo), others)
  done = report.num_clips - len(todo)
  with progress(report.num_clips, start=done, description="encoded") as bar:
    for row, payload, error in _loaded(source, todo, num_threads):
      if error is None:
        source.finish([payload])
        report.num_encoded += 1
        if not size:
          size = source.cached_bytes(row)
          left = report.num_clips - done - 1
          _check_room(source, directory, size, left, others)
      else:
        _refuse(report, quarantine, row, error)
      done += 1
      bar.update(done)
  return report


def _refuse(report, quarantine, row, error) -> None:
  report.failed[row.video] = error.reason
  quarantine.add(row, error, rejected_clips.content_or_none(error))


def _check_room(source, directory: str, size: int, count: int, others) -> None:
  """Refuses to go on to what the disk cannot hold.

  Args:
    source: as of `encode`.
    directory: likewise.
    size: bytes of a clip.
    count: clips that this share still makes.
    others: questions about the clips of other shares.
  """
  free = shutil.disk_usage(directory).free
  if (count + len(others)) * size <= free:
    return
  # Only now, since to look for an entry reads the whole clip.
  count += sum(_is_missing(source, row) for row in others)
  wanted = count * size
  if wanted > free:
    raise errors.UserError(
      f"{directory}: features of {count} more clips take {_text(wanted)}"
      f" ({_text(size)} each) and {_text(free)} are free; put"
      " config.data.feature_cache on a larger disk, or take fewer questions"
    )


def _is_missing(source, row) -> bool:
  """Returns whether features are still to be made of a clip that is there."""
  try:
    return not source.cached_bytes(row)
  except video.VideoError:
    return False


def _text(count: int) -> str:
  units, value = ["bytes", "kB", "MB", "GB", "TB"], float(count)
  while value >= 1000 and len(units) > 1:
    value, units = value / 1000, units[1:]
  return f"{value:.4g} {units[0]}"


def _loaded(source, rows, num_threads: int) -> Iterator:
  """Yields (question, payload, error) in order, decoding a few ahead."""

  def load(row):
    try:
      return row, source.load(row), None
    except video.VideoError as error:
      return row, None, error

  ahead = collections.deque()
  with concurrent.futures.ThreadPoolExecutor(max(num_threads, 1)) as pool:
    try:
      for row in rows:
        ahead.append(pool.submit(load, row))
        if len(ahead) > num_threads + 1:
          yield ahead.popleft().result()
      while ahead:
        yield ahead.popleft().result()
    finally:
      for waiting in ahead:
        waiting.cancel()
