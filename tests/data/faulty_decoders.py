"""What a decoding process may be asked; most of it does the process no good."""

import fcntl
import functools
import os
import re
import resource
import signal
import sys
import time

import numpy as np

from cacovid_jax import errors
from cacovid_jax.data import video_stream


def pid(path, *, limits):
  return os.getpid()


def modules(path, *, limits):
  return sorted(sys.modules)


def echo(path, value, *, limits):
  return value


def echo_thrice(path, value, *, limits):
  return np.concatenate([value, value, value])


def die(path, number, *, limits):
  os.kill(os.getpid(), number)
  time.sleep(60)


def leave(path, *, limits):
  os._exit(3)


def die_once(path, *, limits):
  """Dies unless the file is there, which it makes."""
  if not os.path.exists(path):
    open(path, "w").close()
    os.kill(os.getpid(), signal.SIGKILL)
  return "well"


def outlive(path, *, limits):
  """Gets the signals of a job system."""
  for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
    os.kill(os.getpid(), number)
  return os.getpid()


def hang(path, *, limits):
  """Holds a lock on the file for ever; other threads may run."""
  with open(path, "w") as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    file.write(str(os.getpid()))
    file.flush()
    time.sleep(3600)


def hang_in_c(path, *, limits):
  """Runs C code without an end, which no other thread can interrupt."""
  re.match("(a+)+$", "a" * 200 + "b")


def fill(path, *, limits):
  """Takes memory, eight megabytes at a time."""
  held = []
  while True:
    held.append(np.ones(2**20))


def swell(path, size, *, limits):
  """Takes `size` bytes and gives them back."""
  return int(np.ones(size, np.uint8)[-1])


def no_memory(path, *, limits):
  raise MemoryError


def careless(path, *, limits):
  raise LookupError("what is it")


def in_turn(path, *, limits):
  """Says whether a large clip's turn is taken, after asking for one."""
  if limits.max_pixels <= video_stream.LARGE:
    raise video_stream.VideoError(path, "too_large")
  with open(path, "r+b") as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      return "taken"
  return "free"


def user_error(path, *, limits):
  raise errors.UserError("the frame rule is wrong; correct it")


def memory_limits(path, *, limits):
  """Returns (soft, hard) bytes of this process's data."""
  return resource.getrlimit(resource.RLIMIT_DATA)


def rule(name, count, seconds):
  """Returns frame numbers: some, none, or one that is not there."""
  return {"some": [0, count - 1, 3, 3], "none": [], "beyond": [count]}[name]


SOME = functools.partial(rule, "some")
