"""Disks that are full or refuse to be written to, without being root."""

import contextlib
import errno
import os
import resource


@contextlib.contextmanager
def no_file_above(size):
  """Lets this process write no file beyond `size` bytes, as a full disk would.

  Python ignores the signal, so that the system refuses the write (EFBIG).
  """
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def fail(monkeypatch, module, name, number=errno.ENOSPC):
  """Lets a function of `os` fail as if the disk were full."""

  def refuse(*args, **options):
    raise OSError(number, os.strerror(number))

  monkeypatch.setattr(module, name, refuse)
