"""Which frames a run was shown, frozen when they are first decoded.

One JSON line per clip behind a header. Decoders and copies of a file differ,
and with them the score of the whole prompt: a clip that has a line is decoded
at the line's indices ever after, and its pixels must be the same to the bit.
The file of one run can be given to another, so that both see the same frames.

Processes that share a workdir share its file: lines are appended under a lock.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Iterable
from typing import Any

from cacovid_jax import errors, files
from cacovid_jax.data import frame_record
from cacovid_jax.data.frame_record import FrameRecord

FILE = "frames.jsonl"
_HEADER = "frames"


class FrameManifest:
  """The lines of one run's file, and of the file that it was given."""

  def __init__(
    self,
    path: str | os.PathLike,
    *,
    num_frames: int,
    given: str | os.PathLike = "",
  ):
    """Reads what there is; a file is written when the first clip is added.

    Args:
      path: of the run's own file.
      num_frames: T, frames shown of each clip.
      given: a file of another run, whose frames are to be shown; "" for none.
    """
    self._path = pathlib.Path(path)
    self._num_frames = num_frames
    self._decoder = frame_record.decoder()
    self._made_by = {}
    self._own: dict[str, FrameRecord] = {}
    self._given: dict[str, FrameRecord] = {}
    self._given_path = pathlib.Path(given) if given else None
    if self._given_path:
      if not self._given_path.is_file():
        raise errors.UserError(
          f"there is no frame manifest {given}; give the {FILE} of a run"
        )
      data = self._given_path.read_bytes()
      self._given, _ = self._parse(self._given_path, data, {}, 0)
    # Of the own file: bytes and lines that have been read.
    self._read = self._lines = 0
    if self._path.is_file():
      self._take(self._path.read_bytes())
      for name in sorted(self._own.keys() & self._given.keys()):
        self._check_same(self._path, self._given[name], self._own[name])

  def __getitem__(self, name: str) -> FrameRecord | None:
    """Returns the line that a clip must agree with; None of a new clip.

    A clip that could not be used is tried again, unless the file was given.
    """
    if name in self._given:
      return self._given[name]
    entry = self._own.get(name)
    return None if entry is None or entry.fault else entry

  def require(self, names: Iterable[str]) -> None:
    """Refuses clips that a given file does not name."""
    if self._given_path is None:
      return
    names = list(dict.fromkeys(names))
    missing = [name for name in names if name not in self._given]
    if missing:
      raise errors.UserError(
        f"{self._given_path} names no frames of {len(missing)} of {len(names)}"
        f" clips (first: {missing[0]}); take the file of a run with the same"
        " questions, or none"
      )

  def indices(self, name: str, num_frames: int) -> tuple[int, ...] | None:
    """Returns a known clip's frames, of a file that has `num_frames`."""
    entry = self[name]
    if entry is None:
      return None
    if num_frames != entry.num_frames:
      raise self._changed(
        name, f"has {num_frames} frames instead of {entry.num_frames}"
      )
    return entry.indices

  def check(self, found: FrameRecord) -> None:
    """Refuses a clip of which other pixels are decoded than before."""
    entry = self[found.video]
    if entry is None or found == entry:
      return
    if found.content != entry.content:
      raise self._changed(found.video, "has another content")
    source = self._source(found.video)
    raise errors.UserError(
      f"{found.video}: {self._decoder} gives other frames than"
      f" {self._made_by[source]}, which made {source}; install that version, or"
      " evaluate in another workdir without the file"
    )

  def add(self, entry: FrameRecord) -> None:
    """Writes a clip's line, once."""
    if self._own.get(entry.video) == entry:
      return
    self._path.parent.mkdir(parents=True, exist_ok=True)
    with open(self._path, "a+b") as f:
      files.lock(f, self._path, wait=True)
      # What other processes have found in the meantime.
      f.seek(self._read)
      data = f.read()
      complete = data.rfind(b"\n") + 1
      if complete < len(data):
        f.truncate(self._read + complete)  # Somebody was killed while writing.
      self._take(data)
      known = self._own.get(entry.video)
      if known == entry:
        return
      if known is not None and not known.fault:
        if not entry.fault:
          self._check_same(self._path, known, entry)
        return
      lines = [_line(entry)]
      if not self._read:
        lines.insert(0, self._header())
      text = "".join(json.dumps(line, sort_keys=True) + "\n" for line in lines)
      files.append(f, text.encode("utf-8"))
      self._take(text.encode("utf-8"))

  def _take(self, data: bytes) -> None:
    """Adds what the own file holds behind what has been read of it."""
    found, self._lines = self._parse(self._path, data, self._own, self._lines)
    self._own = found
    self._read += data.rfind(b"\n") + 1

  def _header(self) -> dict[str, Any]:
    return {_HEADER: {"num_frames": self._num_frames, "decoder": self._decoder}}

  def _source(self, name: str) -> pathlib.Path:
    return self._given_path if name in self._given else self._path

  def _changed(self, name: str, how: str) -> errors.UserError:
    source = self._source(name)
    return errors.UserError(
      f"{name}: the file {how} since {source} was made; restore it, or evaluate"
      " in another workdir without the file"
    )

  def _check_same(self, path, known: FrameRecord, found: FrameRecord) -> None:
    if known != found:
      raise errors.UserError(
        f"{path} has two different lines about {found.video}; evaluate in"
        " another workdir, or delete the file and its answers"
      )

  def _parse(self, path: pathlib.Path, data: bytes, known, count: int):
    """Returns (clip -> line, lines in all); a line without an end is none.

    Args:
      path: of the file.
      data: what stands in it behind the first `count` lines.
      known: what those lines say.
      count: how many there are.
    """
    found = dict(known)
    lines = data[: data.rfind(b"\n") + 1].decode("utf-8", "replace")
    lines = lines.split("\n")[:-1]
    for number, line in enumerate(lines, start=count + 1):
      try:
        record = json.loads(line)
        if number == 1:
          self._check_header(path, record[_HEADER])
          continue
        entry = self._entry(record)
      except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise errors.UserError(
          f"{path} line {number} is damaged ({type(error).__name__}); delete"
          " the file and its answers to evaluate again"
        ) from error
      before = found.get(entry.video)
      if before is not None and not before.fault:
        self._check_same(path, before, entry)
      found[entry.video] = entry
    return found, count + len(lines)

  def _entry(self, record) -> FrameRecord:
    entry = FrameRecord(**record)
    if not entry.fault:
      numbers = (*entry.indices, *entry.size, entry.num_frames)
      if (
        len(entry.indices) != self._num_frames
        or len(entry.size) != 2
        or not all(type(number) is int for number in numbers)
        or not 0 <= min(entry.indices) <= max(entry.indices) < entry.num_frames
        or not entry.frame_hash
      ):
        raise ValueError("not the frames of a clip")
    return entry

  def _check_header(self, path, header) -> None:
    if header["num_frames"] != self._num_frames:
      raise errors.UserError(
        f"{path} names {header['num_frames']} frames of each clip, and the"
        f" evaluation shows {self._num_frames}; use another workdir, or"
        f" --num_frames={header['num_frames']}"
      )
    self._made_by[path] = str(header["decoder"])


def _line(entry: FrameRecord) -> dict[str, Any]:
  """Returns an entry's fields, less those that are empty."""
  empty = dataclasses.asdict(FrameRecord(video=""))
  fields = dataclasses.asdict(entry).items()
  return {name: value for name, value in fields if value != empty[name]}
