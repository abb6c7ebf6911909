"""Which frames a run was shown, frozen when they are first decoded.

One JSON line per clip behind a header. Decoders and copies of a file differ,
and with them the score of the whole prompt: a clip that has a line is decoded
at the line's indices ever after, and its pixels must be the same to the bit.
The file of one run can be given to another, so that both see the same frames.

Processes that share a workdir share its file: lines are appended under a lock.
"""

import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Callable, Iterable

from cacovid_jax import errors, files
from cacovid_jax.data import frame_record
from cacovid_jax.data.frame_record import FrameRecord

FILE = "frames.jsonl"
_HEADER = "frames"
_EMPTY = dataclasses.asdict(FrameRecord(video=""))  # Such fields are left out.


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
      if not self._given.path.is_file():
        raise errors.UserError(
          f"there is no frame manifest {given}; give the {FILE} of a run"
        )
      self._given.take(self._given.path.read_bytes())
    if self._own.path.is_file():
      self._own.take(self._own.path.read_bytes())
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
    raise errors.UserError(
      f"{found.video}: {self._decoder} gives other frames than"
      f" {source.decoder}, which made {source.path}; install that version, or"
      " evaluate in another workdir without the file"
    )

  def add(self, entry: FrameRecord) -> None:
    """Writes a clip's line, once."""
    own = self._own
    if own.entries.get(entry.video) == entry:
      return
    own.path.parent.mkdir(parents=True, exist_ok=True)
    with open(own.path, "a+b") as f:
      files.lock(f, own.path, wait=True)
      # What other processes have found in the meantime.
      f.seek(own.size)
      data = f.read()
      own.take(data)
      if data and not data.endswith(b"\n"):
        f.truncate(own.size)  # Somebody was killed while writing.
      known = own.entries.get(entry.video)
      if known is not None and not known.fault:
        if not entry.fault:
          own.check_same(entry)
        return
      if known == entry:
        return
      fields = dataclasses.asdict(entry).items()
      lines = [{k: value for k, value in fields if value != _EMPTY[k]}]
      if not own.size:
        header = {"num_frames": own.num_frames, "decoder": self._decoder}
        lines.insert(0, {_HEADER: header})
      text = "".join(json.dumps(line, sort_keys=True) + "\n" for line in lines)
      files.append(f, text.encode("utf-8"))
      own.take(text.encode("utf-8"))

  def _source(self, name: str) -> "_File":
    return self._given if name in self._given.entries else self._own


def _same(entry, source, num_frames: int, duration: float) -> tuple[int, ...]:
  """Returns an entry's frames, of a clip that has as many as it had."""
  del duration
  if num_frames != entry.num_frames:
    how = f"has {num_frames} frames instead of {entry.num_frames}"
    raise _changed(entry.video, how, source)
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
    self.size = self.lines = 0  # Bytes and lines that have been read.

  def take(self, data: bytes) -> None:
    """Adds what stands behind what was read; a line without an end is none."""
    data = data[: data.rfind(b"\n") + 1]
    lines = data.decode("utf-8", "replace").split("\n")[:-1]
    for number, line in enumerate(lines, start=self.lines + 1):
      try:
        record = json.loads(line)
        if number == 1:
          self._check_header(record[_HEADER])
          continue
        entry = self._entry(record)
      except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise errors.UserError(
          f"{self.path} line {number} is damaged ({type(error).__name__});"
          " delete the file and its answers to evaluate again"
        ) from error
      before = self.entries.get(entry.video)
      if before is not None and not before.fault:
        self.check_same(entry)
      self.entries[entry.video] = entry
    self.size += len(data)
    self.lines += len(lines)

  def check_same(self, entry: FrameRecord) -> None:
    """Refuses another line about a clip than the file has."""
    if self.entries[entry.video] != entry:
      raise errors.UserError(
        f"{self.path} has two different lines about {entry.video}; evaluate in"
        " another workdir, or delete the file and its answers"
      )

  def _entry(self, record) -> FrameRecord:
    entry = FrameRecord(**record)
    if not entry.fault:
      numbers = (*entry.indices, *entry.size, entry.num_frames)
      if (
        len(entry.indices) != self.num_frames
        or len(entry.size) != 2
        or not all(type(number) is int for number in numbers)
        or not 0 <= min(entry.indices) <= max(entry.indices) < entry.num_frames
        or not entry.frame_hash
      ):
        raise ValueError("not the frames of a clip")
    return entry

  def _check_header(self, header) -> None:
    if header["num_frames"] != self.num_frames:
      raise errors.UserError(
        f"{self.path} names {header['num_frames']} frames of each clip, and the"
        f" evaluation shows {self.num_frames}; use another workdir, or"
        f" --num_frames={header['num_frames']}"
      )
    self.decoder = str(header["decoder"])
