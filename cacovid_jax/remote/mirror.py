"""A folder on an object store, worked on in a folder of this machine.

All code reads and writes files of the mirror, an ordinary folder on disk, and
`files` and `checkpointing` tell this module what is finished there; when their
call returns, the store has it. The store is what counts: a mirror is made anew
by each process, and removed when that ends.

  file                    one object, written whole
  log, `name.jsonl`       its first lines; the lines of each later append are an
                          object of their own, made unless its name is taken:
                          `name.jsonl.parts/DIGEST-OFFSET`, DIGEST of the first
                          lines, OFFSET in bytes; joined when read
  checkpoint step         its files, and the manifest last: without that it is
                          no step; deleted in the opposite order
  lock                    see `remote.lock`
"""

import contextlib
import fcntl
import hashlib
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Iterator

from absl import logging

from cacovid_jax import errors, terminal
from cacovid_jax.remote import lock as lock_lib
from cacovid_jax.remote import store as store_lib

_PARTS = ".parts"
_PART = re.compile(r"([0-9a-f]{16})-([0-9]{12})")
# More than so many parts of a shared log are made one.
_MANY = 64
# Left on the store when a mirror is made: event files, locks, parts; of the
# steps of checkpoints everything but the manifest.
_LATER = re.compile(
  rf"tensorboard/|{lock_lib.FOLDER}/|.*\{_PARTS}/"
  r"|checkpoints/[^/]+/(?!manifest\.json$)"
)
_HELD = "held"  # Locked as long as its mirror's process runs.
_open: dict[pathlib.Path, "Mirror"] = {}


class OutrunError(Exception):
  """Another process has appended to a shared log; to be read and tried anew."""


class Mirror:
  """One workdir on a store and its folder here; files are given by path."""

  def __init__(self, store: store_lib.Store, folder: pathlib.Path):
    self.store, self.folder = store, folder
    self._locks: list[lock_lib.Lock] = []
    # Of objects that were read here: their version then.
    self._versions: dict[str, object] = {}
    # Of logs: digest of the first lines' object.
    self._bases: dict[str, str] = {}
    # Names: written by this process, in parts; appended to by several.
    self._written, self._parts, self._shared = set(), set(), set()

  def fetch(self) -> None:
    """Reads all that a run needs from its start."""
    found = self.store.list()
    for name, info in found.items():
      if not _LATER.match(name):
        self._read(name, info, found)

  def refresh(self, path: pathlib.Path) -> None:
    """Reads what other processes have changed of files right in a folder."""
    prefix = self.name(path)
    prefix = f"{prefix}/" if prefix != "." else ""
    found = self.store.list(prefix.rstrip("/"))
    names = {n for n in found if "/" not in n.removeprefix(prefix)}
    own = self._written | self._shared
    for name in sorted(names - own):
      self._read(name, found[name], found)
    for name in set(self._versions) - names - own:
      if name.startswith(prefix) and "/" not in name.removeprefix(prefix):
        (self.folder / name).unlink(missing_ok=True)
        del self._versions[name]

  def refresh_log(self, path: pathlib.Path) -> None:
    """Reads what other processes have appended to a shared log."""
    name = self.name(path)
    self._shared.add(name)
    if (info := self.store.info(name)) is not None:
      found = self.store.list(name + _PARTS)
      self._read(name, info, found)
      if sum(part.size > 0 for part in found.values()) > _MANY:
        self._roll_up(name)

  def publish(self, path: pathlib.Path) -> None:
    """Writes a file that was written anew to the store."""
    name = self.name(path)
    if _is_partial(name):
      return
    self.check_locks()
    before = self.store.list(name + _PARTS) if path.suffix == ".jsonl" else ()
    self.put(name)
    self._written.add(name)
    self._parts.discard(name)
    for part in reversed(before):  # Of other first lines now.
      self.store.delete(part)

  def append(self, path: pathlib.Path, start: int) -> None:
    """Writes what stands behind byte `start` of a log to the store.

    Raises:
      OutrunError: where another process has appended at the same place.
    """
    name = self.name(path)
    if _is_partial(name):
      return
    known = name in self._bases
    if not name.endswith(".jsonl") or (start and not known):
      self.publish(path)
      return
    self.check_locks()
    with open(path, "rb") as file:
      file.seek(start)
      data = file.read()
    target = name
    if known:
      target = f"{name}{_PARTS}/{self._bases[name]}-{start:012d}"
    if not self.store.create(target, data):
      raise OutrunError(f"{self.store.url}/{name}")
    self._written.add(name)
    if known:
      self._parts.add(name)
    else:
      self._bases[name] = _digest(data)

  def remove(self, path: pathlib.Path) -> None:
    """Removes a file from the store."""
    self.check_locks()
    self.store.delete(self.name(path))

  @contextlib.contextmanager
  def locked(self, path: pathlib.Path, refused: str, hint: str):
    """Keeps other machines out who lock the same path; see `files.claim`."""
    lock = lock_lib.Lock(self.store, self.name(path))
    lock.take(refused, hint)
    with lock_lib.holding(lock):
      self._locks.append(lock)
      try:
        yield
        # Whoever looks at the store finds whole logs there.
        for name in sorted(self._parts - self._shared):
          self.publish(self.folder / name)
      finally:
        self._locks.remove(lock)

  def check_locks(self, *, now=False) -> None:
    """Stops a process that holds a lock no more, see `lock.Lock.check`."""
    for lock in self._locks:
      lock.check(now=now)

  def name(self, path: pathlib.Path) -> str:
    """Returns the object of a file here."""
    return path.absolute().relative_to(self.folder).as_posix()

  def put(self, name: str) -> None:
    """Writes an object from its file here."""
    path = self.folder / name
    if path.suffix == ".jsonl":
      data = path.read_bytes()
      self._bases[name] = _digest(data)
      self.store.put(name, data)
    else:
      self.store.put_file(name, path)

  def copy(self, name: str, info: store_lib.Info) -> None:
    """Reads an object into its file here."""
    path = self.folder / name
    partial = path.with_name(f"{path.name}.partial")
    self.store.get_file(name, partial, info.size)
    os.replace(partial, path)

  def _read(self, name: str, info: store_lib.Info, found) -> None:
    """Reads an object, and a log's parts, unless they are here by now."""
    known = info.version is not None
    known = known and self._versions.get(name) == info.version
    if not name.endswith(".jsonl"):
      if not known:
        self.copy(name, info)
    elif not self._join(name, found, known and name in self._bases):
      # Parts were made one, or the log written anew, since it was listed.
      info, found = self.store.info(name), self.store.list(name + _PARTS)
      if info is not None and not self._join(name, found, known=False):
        # What stands behind a gap is lost; the next append mends the log.
        logging.warning("%s/%s: parts are missing", self.store.url, name)
        self._bases.pop(name, None)
    self._versions[name] = info and info.version

  def _join(self, name: str, found, known: bool) -> bool:
    """Reads a log and its parts, or those behind what is `known`.

    Returns False if there is a gap, and has then read what is in front of it.
    """
    path, data = self.folder / name, b""
    if not known:
      data = self.store.get(name) or b""
      self._bases[name] = _digest(data)
    size, whole = path.stat().st_size if known else len(data), True
    for start, part in _offsets(name, self._bases[name], found):
      if start + found[part].size <= size:
        continue
      more = self.store.get(part) if start <= size else None
      if more is None:
        whole = False
        break
      data += more[size - start :]
      size = start + len(more)
    path.parent.mkdir(parents=True, exist_ok=True)
    if known:
      with open(path, "ab") as file:
        file.write(data)
    else:
      partial = path.with_name(f"{path.name}.partial")
      partial.write_bytes(data)
      os.replace(partial, path)
    return whole

  def _roll_up(self, name: str) -> None:
    """Makes one object of a shared log's parts, unless another process does.

    Others may append meanwhile: the names of parts stay taken, those of all but
    the first by nothing, so that who has not read the last one is outrun.
    """
    lock = lock_lib.Lock(self.store, name)
    try:
      lock.take("", "")
    except errors.UserError:
      return
    with lock_lib.holding(lock):
      info, found = self.store.info(name), self.store.list(name + _PARTS)
      if info is not None:
        self._read(name, info, found)
      parts = [
        (start, part)
        for start, part in _offsets(name, self._bases.get(name, ""), found)
        if found[part].size
      ]
      if len(parts) > 1:
        start, first = parts[0]
        data = (self.folder / name).read_bytes()
        lock.check(now=True)
        self.store.put(first, data[start:])
      for _, part in parts[1:]:
        self.store.put(part, b"")


def _offsets(name: str, base: str, found) -> list[tuple[int, str]]:
  """Returns (offset, object) of a log's parts, rising."""
  out, prefix = [], f"{name}{_PARTS}/"
  for part in found:
    match = _PART.fullmatch(part.removeprefix(prefix))
    if part.startswith(prefix) and match and match[1] == base:
      out.append((int(match[2]), part))
  return sorted(out)


def _is_partial(name: str) -> bool:
  """Returns whether a file is being made: it is renamed when it is whole."""
  return any(part.endswith(".partial") for part in name.split("/"))


def _digest(data: bytes) -> str:
  return hashlib.sha256(data).hexdigest()[:16]


def of(path: str | os.PathLike) -> Mirror | None:
  """Returns the mirror that a path lies in; None of an ordinary path."""
  if not _open:
    return None
  path = pathlib.Path(path).absolute()
  return next((m for f, m in _open.items() if path.is_relative_to(f)), None)


def fetch_folder(path: pathlib.Path) -> None:
  """Reads what is not here of a folder, such as a checkpoint's step."""
  if mirror := of(path):
    for name, info in mirror.store.list(mirror.name(path)).items():
      if not (mirror.folder / name).exists():
        mirror.copy(name, info)


def publish_folder(path: pathlib.Path, last: str) -> None:
  """Writes a folder to the store, in place of one of that name.

  It counts from when its file `last` is there, which is written at the end.
  """
  if mirror := of(path):
    remove_folder(path, last)
    found = [file for file in sorted(path.rglob("*")) if file.is_file()]
    for file in sorted(found, key=lambda file: file == path / last):
      mirror.check_locks(now=file == path / last)
      mirror.put(mirror.name(file))


def remove_folder(path: pathlib.Path, first: str) -> None:
  """Removes a folder from the store; it does not count once `first` is."""
  if mirror := of(path):
    mirror.check_locks()
    first = mirror.name(path / first)
    found = mirror.store.list(mirror.name(path))
    for name in sorted(found, key=lambda name: name != first):
      mirror.store.delete(name)


def remove_leftovers(path: pathlib.Path, last: str) -> None:
  """Removes from the store what lies in folders of one without file `last`.

  Others than steps: writing or removing them was cut off.
  """
  if mirror := of(path):
    prefix = f"{mirror.name(path)}/"
    found = mirror.store.list(prefix[:-1])
    for name in found:
      folder = name.removeprefix(prefix).partition("/")[0]
      if f"{prefix}{folder}/{last}" not in found:
        mirror.store.delete(name)


@contextlib.contextmanager
def mirrored(path: str | os.PathLike) -> Iterator[str | os.PathLike]:
  """Gives the folder to work in: the path as it is, or the mirror of a URL.

  It lies among the temporary files (TMPDIR); what others are told of it is the
  URL.
  """
  if not store_lib.is_url(path):
    yield path
    return
  store = store_lib.Store(os.fspath(path))
  name = hashlib.sha256(store.url.encode()).hexdigest()[:12]
  prefix = f"cacovid_jax-{os.getuid()}-{name}-"
  _remove_abandoned(prefix)
  made = pathlib.Path(tempfile.mkdtemp(prefix="cacovid_jax-")).resolve()
  own = made.with_name(prefix + made.name.rpartition("-")[2])
  folder = own / store.url.rpartition("/")[2]
  with contextlib.ExitStack() as stack:
    stack.callback(shutil.rmtree, made, ignore_errors=True)
    held = stack.enter_context(open(made / _HELD, "wb"))
    fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.rename(made, own)  # Others find it by its name, and held.
    stack.callback(shutil.rmtree, own, ignore_errors=True)
    folder.mkdir()
    mirror = Mirror(store, folder)
    mirror.fetch()
    terminal.NAMES[os.fspath(folder)] = store.url
    stack.callback(terminal.NAMES.pop, os.fspath(folder))
    _open[folder] = mirror
    stack.callback(_open.pop, folder)
    try:
      yield folder
    except errors.UserError as error:  # Told when the mirror is gone.
      raise errors.UserError(terminal.plain(str(error))) from error
    except OutrunError as error:
      raise errors.UserError(
        f"{error}: another process writes to it; stop that one, or use another"
        " workdir"
      ) from error


def _remove_abandoned(prefix: str) -> None:
  """Removes the mirrors that killed processes have left on this machine."""
  for held in pathlib.Path(tempfile.gettempdir()).glob(f"{prefix}*/{_HELD}"):
    with contextlib.suppress(OSError), open(held, "rb") as file:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      shutil.rmtree(held.parent, ignore_errors=True)
