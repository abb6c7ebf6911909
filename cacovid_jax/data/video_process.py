"""Decoding in a separate process, which can be killed when it hangs.

The decoder's own deadline is checked between packets; a fault inside the C
libraries would get past it, or take the whole program down. `IsolatedDecoder`
keeps one child process per thread, kills it when the limit has passed, and
reports a child that died as an unreadable clip.
"""

import atexit
import multiprocessing
import threading
import weakref

from cacovid_jax import errors
from cacovid_jax.data import video

_GRACE_S = 5.0


def _serve(connection):
  """Runs in the child: decodes what it is asked for until the pipe closes."""
  while True:
    try:
      path, sampler, options = connection.recv()
    except (EOFError, OSError, KeyboardInterrupt):
      return
    try:
      answer = video.decode(path, sampler, **options)
    except errors.UserError as error:
      answer = error
    connection.send(answer)


class _Child:
  """One child process and the pipe to it."""

  def __init__(self):
    # Not fork: the parent runs threads of JAX and of Grain.
    context = multiprocessing.get_context("spawn")
    self.connection, theirs = context.Pipe()
    self.process = context.Process(target=_serve, args=(theirs,), daemon=True)
    self.process.start()
    theirs.close()

  def stop(self):
    """Ends the child, whatever it is doing."""
    self.connection.close()
    self.process.kill()
    self.process.join()


class IsolatedDecoder:
  """A function like `video.decode`; the rule passed in must be picklable."""

  def __init__(self):
    self._local = threading.local()
    self._children = weakref.WeakSet()
    atexit.register(self.close)

  def __getstate__(self):
    return {}

  def __setstate__(self, state):
    self.__init__()

  def __call__(
    self, path, sampler, *, size=None, resize=None, limits=None
  ) -> video.Clip:
    """Decodes in the calling thread's child; see `video.decode`."""
    limits = limits or video.Limits()
    child = getattr(self._local, "child", None)
    if child is None or not child.process.is_alive():
      child = self._local.child = _Child()
      self._children.add(child)
    timeout = None if limits.timeout_s is None else limits.timeout_s + _GRACE_S
    try:
      options = {"size": size, "resize": resize, "limits": limits}
      child.connection.send((path, sampler, options))
      if not child.connection.poll(timeout):
        child.stop()
        raise video.VideoError(
          path, "timeout", f"above {limits.timeout_s} s, the decoder hung"
        )
      answer = child.connection.recv()
    except (EOFError, OSError):
      child.stop()
      raise video.VideoError(path, "unreadable", "the decoder died") from None
    if isinstance(answer, Exception):
      raise answer
    return answer

  def close(self):
    """Ends all children."""
    for child in list(self._children):
      if child.process.is_alive():
        child.stop()
