"""An object store on a disk, in the place of gs://, that does no more than one.

Objects are written whole or not at all, and made unless there is one; there is
no rename, no append, no lock, and no folder. Several processes may share it.
"""

import os
import pathlib
import urllib.parse
import uuid

import fsspec


class ObjectStore(fsspec.AbstractFileSystem):
  """Keeps `bucket/run/x` in the file `bucket%2Frun%2Fx` of `root`."""

  protocol = ("gs", "gcs")
  cachable = False
  root = pathlib.Path()
  before = staticmethod(lambda operation, path: None)  # May refuse it.

  def pipe_file(self, path, value, mode="overwrite", **unused):
    self.before("write", path)
    partial = self.root / f".{uuid.uuid4().hex}"
    partial.write_bytes(value)
    if mode == "create":
      try:
        os.link(partial, self._file(path))
      finally:
        partial.unlink()
    else:
      os.replace(partial, self._file(path))

  def put_file(self, lpath, rpath, **unused):
    self.pipe_file(rpath, pathlib.Path(lpath).read_bytes())

  def cat_file(self, path, start=None, end=None, **unused):
    self.before("read", path)
    return self._file(path).read_bytes()[start:end]

  def get_file(self, rpath, lpath, **unused):
    pathlib.Path(lpath).write_bytes(self.cat_file(rpath))

  def rm_file(self, path):
    self.before("delete", path)
    self._file(path).unlink()

  def info(self, path, **unused):
    self.before("info", path)
    status = self._file(path).stat()
    return {
      "name": path,
      "size": status.st_size,
      "type": "file",
      "generation": f"{status.st_ino}.{status.st_mtime_ns}",
    }

  def find(self, path, maxdepth=None, withdirs=False, detail=False, **unused):
    self.before("list", path)
    names = [urllib.parse.unquote(name) for name in os.listdir(self.root)]
    below = [n for n in names if n.startswith(f"{path}/")]
    # Of an object, itself.
    found = {n: self.info(n) for n in below or names if n in (*below, path)}
    return found if detail else list(found)

  def _file(self, path):
    return self.root / urllib.parse.quote(self._strip_protocol(path), safe="")

  def _open(self, path, mode="rb", **unused):
    raise NotImplementedError("no streams, no appending")

  def mv(self, path1, path2, **unused):
    raise NotImplementedError("no renaming")


def use(root, before=None):
  """Makes gs:// a store in a folder; `before` is asked before operations."""
  ObjectStore.root = pathlib.Path(root)
  ObjectStore.before = staticmethod(before or (lambda operation, path: None))
  fsspec.register_implementation("gs", ObjectStore, clobber=True)


def made(folder, patch):
  """Returns the folder of an empty store, in use; mirrors lie beside it."""
  for name in ("store", "mirrors"):
    (folder / name).mkdir()
  patch.setattr("tempfile.tempdir", str(folder / "mirrors"))
  use(folder / "store")
  return folder / "store"


def names(root, prefix=""):
  """Returns the objects of a store that begin so, in order."""
  found = map(urllib.parse.unquote, os.listdir(root))
  return sorted(name for name in found if name.startswith(prefix))


def read(root, name):
  """Returns an object's content."""
  quoted = urllib.parse.quote(name, safe="")
  return pathlib.Path(root, quoted).read_bytes()
