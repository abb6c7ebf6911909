"""Which frames a run was shown, frozen when they are first decoded.

One JSON line per clip behind a header. Decoders and copies of a file differ,
and with them the score of the whole prompt: a clip that has a line is decoded
at the line's indices ever after, and its pixels must be the same to the bit.
The file of one run can be given to another, so that both see the same frames.

Processes that share a workdir share its file: lines are appended under a lock.
A damaged line is set aside, and its clip decoded as if it were new.
"""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable, Iterable

import msgspec

from cacovid_jax import errors, files, json_lines, schema
from cacovid_jax.data import frame_record
from cacovid_jax.data.frame_record import FrameRecord

FILE = "frames.jsonl"
_HEADER = "frames"
_EMPTY = dataclasses.asdict(FrameRecord(video=""))  # Such fields are left out.


class _Header(msgspec.Struct):
  num_frames: schema.Count
  decoder: str


class _First(msgspec.Struct):
  frames: _Header


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
    self._decoder = frame_record.decoder()
    self._own, self._given = _File(path, num_frames), _File(given, num_frames)
    self._has_given = bool(given)
    if given:
      told = f"there is no frame manifest {given}; give the {FILE} of a run"
      errors.check(os.path.isfile(given), told)
      self._given.read()
    if os.path.isfile(path):
      files.shared(self._own.path, self._own.update)
      for name in sorted(self._own.entries.keys() & self._given.entries.keys()):
        self._own.check_same(self._given.entries[name])

  def __getitem__(self, name: str) -> FrameRecord | None:
    """Returns the line that a clip must agree with; None of a new clip.

    A clip that could not be used is tried again, unless the file was given.
    """
    if name in self._given.entries:
      return self._given.entries[name]
    entry = self._own.entries.get(name)
    return None if entry is None or entry.fault else entry

  def require(self, names: Iterable[str]) -> None:
    """Refuses clips that a given file does not name."""
    names = list(dict.fromkeys(names))
    missing = [name for name in names if name not in self._given.entries]
    if self._has_given and missing:
      raise errors.UserError(
        f"{self._given.path} names no frames of {len(missing)} of {len(names)}"
        f" clips (first: {missing[0]}); take the file of a run with the same"
        " questions, or none"
      )

  def rule(self, name: str) -> Callable[[int, float], tuple] | None:
    """Returns the frame rule of a known clip, which can be pickled."""
    entry = self[name]
    return entry and functools.partial(_same, entry, self._source(name).path)

  def check(self, found: FrameRecord) -> None:
    """Refuses a clip of which other pixels are decoded than before."""
    entry = self[found.video]
    if entry is None or found == entry:
      return
    source = self._source(found.video)
    if found.content != entry.content:
      raise _changed(found.video, "has another content", source.path)
    told = (
      f"{self._decoder} gives other frames than {source.decoder}, which made"
      f" {source.path}; install that version, or"
    )
    if source.decoder == self._decoder:
      told = (
        f"other frames are decoded than those of {source.path}, which an"
        " earlier version of this program may have sought wrongly;"
      )
    raise errors.UserError(
      f"{found.video}: {told} evaluate in another workdir without the file"
    )

  def add(self, entry: FrameRecord) -> None:
    """Writes a clip's line, once."""
    if self._own.entries.get(entry.video) != entry:
      files.shared(self._own.path, functools.partial(self._add, entry))

  def _add(self, entry: FrameRecord) -> None:
    own = self._own
    own.update()  # What other processes have found in the meantime.
    known = own.entries.get(entry.video)
    if known is not None and not known.fault:
      if not entry.fault:
        own.check_same(entry)
      return
    if known == entry:
      return
    fields = dataclasses.asdict(entry).items()
    records = [{k: value for k, value in fields if value != _EMPTY[k]}]
    if not own.decoder:
      header = {"num_frames": own.num_frames, "decoder": self._decoder}
      records.insert(0, {_HEADER: header})
    json_lines.append(own.path, records)
    own.update()

  def _source(self, name: str) -> "_File":
    return self._given if name in self._given.entries else self._own


def _same(entry, source, num_frames: int, duration: float) -> tuple[int, ...]:
  """Returns an entry's frames, of a clip that has as many as it had."""
  del duration
  if num_frames != entry.num_frames:
    how = f"has {num_frames} frames instead of {entry.num_frames}"
    raise _changed(entry.video, f"{how} (or was miscounted)", source)
  return entry.indices


def _changed(name: str, how: str, source) -> errors.UserError:
  return errors.UserError(
    f"{name}: the file {how} since {source} was made; restore it, or evaluate"
    " in another workdir without the file"
  )


class _File:
  """A file as far as it has been read."""

  def __init__(self, path: str | os.PathLike, num_frames: int):
    self.path, self.num_frames = pathlib.Path(path), num_frames
    self.entries: dict[str, FrameRecord] = {}
    self.decoder = ""  # That made it.
    self._inode, self._size = 0, 0  # Of the file, bytes that have been read.

  def read(self) -> None:
    """Takes the lines of a file that is another run's."""
    json_lines.look(self.path, self._take, "their clips have no frames here")

  def update(self) -> None:
    """Takes what stands behind what was read; the caller has claimed it."""
    if not os.path.isfile(self.path):
      return
    with open(self.path, "rb") as file:
      written_anew = os.fstat(file.fileno()).st_ino != self._inode
      lines = self._parse(file, 0 if written_anew else self._size)
      if any(line.value is None for line in lines):
        lines = self._parse(file, 0)  # All of them, to be kept or not.
    json_lines.keep(self.path, lines, "their clips are decoded as new ones")
    status = os.stat(self.path)
    self._inode, self._size = status.st_ino, status.st_size

  def _parse(self, file, start: int) -> list[json_lines.Line]:
    if not start:
      self.entries.clear()
    file.seek(start)
    return json_lines.parse(file.read(), self._take)

  def _take(self, record):
    if _HEADER in record:
      self._check_header(msgspec.convert(record, _First).frames)
      return record
    entry = msgspec.convert(record, FrameRecord)
    self._check(entry)
    before = self.entries.get(entry.video)
    if before is not None and not before.fault:
      self.check_same(entry)
    self.entries[entry.video] = entry
    return entry

  def check_same(self, entry: FrameRecord) -> None:
    """Refuses another line about a clip than the file has."""
    if self.entries[entry.video] != entry:
      raise errors.UserError(
        f"{self.path} has two different lines about {entry.video}; evaluate in"
        " another workdir, or delete the file and its answers"
      )

  def _check(self, entry: FrameRecord) -> None:
    if not entry.fault and not (
      len(entry.indices) == self.num_frames
      and 0 <= min(entry.indices) <= max(entry.indices) < entry.num_frames
      and entry.frame_hash
    ):
      raise ValueError("it tells no frames of a clip")

  def _check_header(self, header: "_Header") -> None:
    if header.num_frames != self.num_frames:
      raise errors.UserError(
        f"{self.path} names {header.num_frames} frames of each clip, and the"
        f" evaluation shows {self.num_frames}; use another workdir, or"
        f" --num_frames={header.num_frames}"
      )
    self.decoder = header.decoder
