"""Decoding in processes of their own, which a bad clip may crash, hang or fill.

Such a child is a plain interpreter with PyAV, NumPy and PIL, without JAX. It
belongs to the process that started it, serves its threads in turn, and ends
when that one does or nothing is asked of it. Values travel pickled, arrays
beside them, in files without a name that the receiver maps.
"""

import collections
import contextlib
import dataclasses
import errno
import fcntl
import functools
import json
import mmap
import operator
import os
import pickle
import re
import resource
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing import connection
from typing import Any

from absl import logging

from cacovid_jax import errors
from cacovid_jax.data import video_stream

IDLE_S = 15.0  # Seconds without a clip, after which a child ends.
# Clips after which a new child takes the place of one: memory may leak.
MAX_CLIPS = 1000
_START_S = 120.0
# A child stops by itself when a clip's time is up, unless it hangs.
_GRACE_S = 2.0
_LOOK_S = 0.05  # Between looks at a child's memory and time.
# Job systems send these to every process; what is decoded then is not bad.
_IGNORED = ("SIGHUP", "SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2")
_MAIN = """import sys
sys.path[:] = sys.argv[4:]
sys.modules["jax"] = None  # Never to be imported.
from cacovid_jax.data import decode_workers
decode_workers.serve(*map(float, sys.argv[1:4]))
"""
_ALIGN = 64  # Bytes.


def run(function: Callable, path, *args, limits=None, **kwargs) -> Any:
  """Returns `function(path, *args, limits=limits, **kwargs)`, run in a child.

  Function, arguments and result must be picklable, their modules free of JAX.
  Clips of more than `video_stream.LARGE` pixels are decoded one at a time among
  all processes of a user.

  Args:
    function: of `data.video`, or one that has its first argument and `limits`.
    path: of the clip.
    *args: further ones of the function.
    limits: `video_stream.Limits`; the defaults if None.
    **kwargs: further ones of the function.

  Raises:
    VideoError: as in this process; also if the child crashed twice, hung, or
      held too much memory.
  """
  limits = limits or video_stream.Limits()
  most = min(limits.max_pixels, video_stream.LARGE)
  small = dataclasses.replace(limits, max_pixels=most)
  try:
    return _ask(function, path, args, {**kwargs, "limits": small})
  except video_stream.VideoError as error:
    if error.reason != "too_large" or small == limits:
      raise
  with _turn():
    return _ask(function, path, args, {**kwargs, "limits": limits})


# How clips are decoded, by the name in a config: `WAYS[name](function, ...)`.
WAYS = {"workers": run, "in_process": operator.call}


@contextlib.contextmanager
def _turn():
  """Waits until no other large clip is decoded; ends with the process."""
  name = f"cacovid_jax-large-clip-{os.getuid()}.lock"
  path = os.path.join(tempfile.gettempdir(), name)
  flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
  try:
    descriptor = os.open(path, flags, 0o600)
  except OSError as error:
    raise errors.UserError(
      f"{path}: {error.strerror}; set TMPDIR to a folder of your own"
    ) from error
  with open(descriptor, "r+b") as file:
    with contextlib.suppress(OSError):  # A file system without locks.
      fcntl.flock(file, fcntl.LOCK_EX)
    yield


_idle: collections.deque["_Child"] = collections.deque()
# Those of a process that forks stay its own.
os.register_at_fork(after_in_child=_idle.clear)


def _ask(function, path, args, kwargs) -> Any:
  """Asks one child, and another one if the first crashes."""
  here = ""  # Where the parent is now, of which paths may be given.
  with contextlib.suppress(FileNotFoundError):
    here = os.getcwd()
  try:
    request = _pickled((here, function, (path, *args), kwargs))
  except (pickle.PicklingError, AttributeError, TypeError) as error:
    raise _unsendable(error) from error
  crashes = 0
  while crashes < 2:
    try:
      child = _idle.pop()
    except IndexError:
      child = _Child()
    try:
      error, result = child.ask(request, path, kwargs["limits"])
    except (EOFError, ConnectionError):
      # 0 is that of a child that was idle, or was to be replaced. The system
      # may have killed another one without a fault of the clip.
      code = child.exit_code()
      crashes += code != 0
      continue
    except BaseException:
      child.end()
      raise
    _idle.append(child)
    if error is not None:
      raise error
    return result
  how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
  raise video_stream.VideoError(path, "crashed", how)


class _Child:
  """A decoding process, asked one thing at a time."""

  def __init__(self):
    paths = [path for path in sys.path if isinstance(path, str)]
    # NumPy would reserve memory for threads that it does not need.
    few = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    try:
      self._socket, theirs = socket.socketpair()
      with theirs:
        numbers = map(str, (theirs.fileno(), IDLE_S, MAX_CLIPS))
        self._process = subprocess.Popen(
          [sys.executable, "-c", _MAIN, *numbers, *paths],
          stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
          stderr=subprocess.PIPE, pass_fds=[theirs.fileno()],
          start_new_session=True, env={**os.environ, **few},
        )  # fmt: skip
      # So that one which has ended leaves nothing in the table of processes.
      threading.Thread(target=self._process.wait, daemon=True).start()
    except (OSError, RuntimeError) as error:
      raise _no_start(getattr(error, "strerror", None) or error) from error
    with self._process.stderr as told:
      try:
        if not connection.wait([self._socket], _START_S):
          raise _no_start(f"not within {_START_S:.0f} s")
        _receive(self._socket)
      except (EOFError, ConnectionError):
        lines = told.read().decode("utf-8", "replace").split("\n")
        lines = [line for line in lines if line.strip()] or [""]
        raise _no_start(lines[-1]) from None
      except BaseException as error:
        self.end()
        if isinstance(error, OSError):
          raise _no_start(error.strerror) from error
        raise

  def ask(self, request, path, limits) -> tuple[Exception | None, Any]:
    """Returns (error, None) or (None, result); EOFError if the child ends."""
    try:
      _send(self._socket, request)
      self._wait(path, limits)
      return _receive(self._socket)
    except ConnectionError:
      raise
    except OSError as error:
      raise _no_room(error) from error

  def _wait(self, path, limits) -> None:
    """Waits for an answer; `VideoError` above the limits."""
    wait = limits.timeout_s
    end = None if wait is None else time.monotonic() + wait + _GRACE_S
    while not connection.wait([self._socket], _LOOK_S):
      if _held(self._process.pid) > limits.max_memory:
        told = f"above {limits.max_memory} bytes"
        raise video_stream.VideoError(path, "too_much_memory", told)
      if end is not None and time.monotonic() > end:
        raise video_stream.VideoError(path, "timeout", f"above {wait} s")

  def exit_code(self) -> int:
    """Returns the exit code of one that ends, -N of one killed by signal N."""
    try:
      return self._process.wait(_START_S)
    except subprocess.TimeoutExpired:
      return -signal.SIGKILL
    finally:
      self.end()

  def end(self) -> None:
    """Ends the process, and does not wait: a file system may hold it."""
    self._socket.close()
    self._process.kill()


def _no_start(why) -> errors.UserError:
  return errors.UserError(
    f"a process that decodes clips does not start ({why}); run fewer processes"
    f" at once, or set config.data.decode=in_process"
  )


def _unsendable(error: Exception) -> errors.UserError:
  return errors.UserError(
    "what is done to frames cannot run in a process that decodes clips"
    f" ({errors.one_line(error)}); put it in a module that does not import"
    f" JAX, or set config.data.decode=in_process"
  )


def _no_room(error: OSError) -> errors.UserError:
  return errors.UserError(
    "there is no room for frames between two processes"
    f" ({error.strerror}); free memory, raise the limits of files (ulimit -f"
    " and -n), or set config.data.decode=in_process"
  )


def _held(pid: int) -> int:
  """Returns the bytes that only this process has in memory; 0 if not known."""
  try:
    with open(f"/proc/{pid}/statm", encoding="ascii") as file:
      _, resident, shared, *_ = map(int, file.read().split())
  except (OSError, ValueError):  # It has just ended, or is on another system.
    if not os.path.isdir("/proc/self"):
      told = "this system does not tell what memory decoding takes: no limit"
      logging.log_first_n(logging.WARNING, f"{told} of it is kept", 1)
    return 0
  return (resident - shared) * mmap.PAGESIZE


def _pickled(value) -> list:
  """Returns the pickle of a value and the bytes of its arrays."""
  buffers = []
  head = pickle.dumps(value, 5, buffer_callback=buffers.append)
  return [head, *(buffer.raw() for buffer in buffers)]


def _send(channel: socket.socket, parts: Sequence) -> None:
  """Sends what `_pickled` returned: the sizes, and a file that holds it."""
  sizes = [memoryview(part).nbytes for part in parts]
  if hasattr(os, "memfd_create"):
    file = open(os.memfd_create("clip"), "w+b")
  else:
    file = tempfile.TemporaryFile()
  with file:
    for part, size in zip(parts, sizes, strict=True):
      file.write(part)
      file.write(bytes(-size % _ALIGN))
    file.flush()
    socket.send_fds(channel, [json.dumps(sizes).encode()], [file.fileno()])


def _receive(channel: socket.socket) -> Any:
  """Returns what the other side sent; EOFError if it has ended."""
  sizes, descriptors, _, _ = socket.recv_fds(channel, 4096, 1)
  if not sizes:
    raise EOFError
  if not descriptors:  # The system drops what this process has no number for.
    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
  with open(descriptors[0], "r+b") as file:
    data = memoryview(mmap.mmap(file.fileno(), 0))
  parts, start = [], 0
  for size in json.loads(sizes):
    parts.append(data[start : start + size])
    start += size + -size % _ALIGN
  return pickle.loads(parts[0], buffers=parts[1:])


def ignore_signals() -> None:
  """Leaves what job systems send to all processes to the parent alone."""
  for name in _IGNORED:
    signal.signal(getattr(signal, name), signal.SIG_IGN)


def serve(descriptor: float, idle_s: float, most: float) -> None:
  """Does what a parent asks for by a socket, as the only work of a child.

  It ends after `most` requests, or one that took half of the memory allowed:
  what is left of that is in pieces.
  """
  ignore_signals()
  with contextlib.suppress(ValueError):  # Above what there may be.
    # It writes no more than 0, which would still call a program for dumps.
    hard = resource.getrlimit(resource.RLIMIT_CORE)[1]
    resource.setrlimit(resource.RLIMIT_CORE, (1, hard))
  # What C libraries say of a clip is no word of a command's.
  os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
  parent = socket.socket(fileno=int(descriptor))
  threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
  _send(parent, _pickled(None))
  parent.settimeout(idle_s)
  for _ in range(int(most)):
    try:
      here, function, args, kwargs = _receive(parent)
    except (TimeoutError, EOFError, ConnectionError):
      break
    except Exception as error:
      told = _no_room if isinstance(error, OSError) else _unsendable
      _send(parent, _pickled((told(error), None)))
      continue
    with contextlib.suppress(OSError):
      os.chdir(here)
    try:
      _send(parent, _pickled(_answer(function, args, kwargs)))
    except OSError as error:  # The clip is not to blame.
      _send(parent, _pickled((_no_room(error), None)))
    if peak_memory() > kwargs["limits"].max_memory // 2:
      break
  os._exit(0)


def peak_memory() -> int:
  """Returns the most bytes that this process has had in memory.

  What `getrusage` tells of Linux is that of the parent, if that had more.
  """
  try:
    with open("/proc/self/status", encoding="ascii") as file:
      found = re.search(r"^VmHWM:\s+(\d+) kB", file.read(), re.MULTILINE)
    return int(found[1]) * 1024
  except OSError:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _answer(function, args, kwargs) -> tuple[Exception | None, Any]:
  """Returns (error, None) or (None, result) of a call."""
  limits = kwargs["limits"]
  # Stacks of threads count as well. The parent looks closer, before anything
  # that cannot be had makes a picture wrong.
  _cap_memory(2 * limits.max_memory)
  if limits.timeout_s is not None:
    # Should it hang, and its parent have been killed.
    wait = min(limits.timeout_s + 2 * _GRACE_S, 1e8)
    signal.setitimer(signal.ITIMER_REAL, wait)
  try:
    return None, function(*args, **kwargs)
  except MemoryError:
    return video_stream.VideoError(args[0], "too_much_memory"), None
  except errors.UserError as error:
    return error, None
  except Exception as error:
    # Others may be of classes that cannot be sent.
    told = "".join(traceback.format_exception(error))
    return RuntimeError(f"a decoding process failed: {told}"), None
  finally:
    signal.setitimer(signal.ITIMER_REAL, 0)


# As they were before any change.
_rlimit = functools.cache(resource.getrlimit)


def _cap_memory(most: int) -> None:
  """Limits this process, to no more than it may have anyway."""
  soft, hard = _rlimit(resource.RLIMIT_DATA)
  if soft != resource.RLIM_INFINITY:
    most = min(most, soft)
  with contextlib.suppress(ValueError, OSError):  # Not everywhere is it heeded.
    resource.setrlimit(resource.RLIMIT_DATA, (most, hard))


def _end_with(parent: socket.socket) -> None:
  """Ends this process when the parent has ended."""
  hung_up = select.poll()
  hung_up.register(parent, 0)
  hung_up.poll()
  os._exit(0)
