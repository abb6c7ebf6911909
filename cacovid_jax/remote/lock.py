"""Locks on a store, of objects that are made unless their name is taken.

The holder of a lock is the newest of the numbered objects in its folder,
`locks/ROLE/000001`, `000002`, ...: who finds none, or one left behind, makes
the next, and of several that try, the store lets one. The object says who holds
it and is written anew every `RENEWAL` seconds. One that was not for `EXPIRY`
seconds counts as left behind, and who finds it overdue waits for that; so does
at once one whose process has ended on this machine. Deleting the object breaks
a lock by hand. A holder that finds a newer number, having slept so long, stops
before it writes anything more.
"""

import contextlib
import json
import os
import pathlib
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from typing import Any

from absl import logging

from cacovid_jax import errors
from cacovid_jax.remote import store as store_lib

FOLDER = "locks"
# Seconds. Between two renewals lie 60 and the patience of a store at most.
RENEWAL, OVERDUE, EXPIRY = 60.0, 90.0, 300.0


class Lock:
  """A lock of one role, held from `take` to `release`."""

  def __init__(self, store: store_lib.Store, role: str):
    self._store, self._folder = store, f"{FOLDER}/{role}"
    self._number, self._seen = 0, 0.0
    self._told = {
      "process": os.getpid(),
      "host": socket.gethostname(),
      "machine": _machine(),
      "since": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
      "token": uuid.uuid4().hex,  # Makes the content this lock's alone.
    }
    self._ended, self._alone = threading.Event(), threading.Lock()

  def take(self, refused: str, hint: str) -> None:
    """Takes the lock, or raises a `TakenError` that begins with `refused`."""
    told = False
    while before := self._numbers():
      held, overdue = self._held(before[-1])
      if not held:
        break
      if not overdue:
        raise errors.TakenError(f"{refused} ({held}); wait for it, {hint}")
      if not told:
        logging.warning("%s (%s); waiting for that", refused, held)
        told = True
      time.sleep(RENEWAL / 6)
    newest = before[-1] if before else 0
    self._number, self._seen = newest + 1, time.time()
    content = self._content(self._seen)
    if not self._store.create(self._name(self._number), content):
      raise errors.TakenError(
        f"{refused} (it came first, just now); wait for it, {hint}"
      )
    for number in before:
      self._store.delete(self._name(number))
    threading.Thread(target=self._keep, daemon=True).start()

  def check(self, *, now=False) -> None:
    """Stops a process that has lost the lock; to be asked before writing.

    The store is asked if it was not for half an `EXPIRY`, or `now`.
    """
    if now or time.time() - self._seen > EXPIRY / 2:
      self._renew()

  def release(self) -> None:
    """Lets others take the lock."""
    self._ended.set()
    with self._alone:
      self._store.delete(self._name(self._number))

  def _renew(self) -> None:
    with self._alone:
      # A lock that was released is not made again.
      if not self._ended.is_set():
        self._write_again()

  def _write_again(self) -> None:
    seen = time.time()
    if self._numbers()[-1:] != [self._number]:
      raise errors.UserError(
        f"{self._store.url}/{self._name(self._number)}: another process has"
        f" taken this lock, or it was deleted; nothing more is written here"
      )
    self._store.put(self._name(self._number), self._content(seen))
    self._seen = seen

  def _keep(self) -> None:
    while not self._ended.wait(RENEWAL):
      # The holder is told by `check`, before it writes.
      with contextlib.suppress(errors.UserError):
        self._renew()

  def _numbers(self) -> list[int]:
    names = (name.rpartition("/")[2] for name in self._store.list(self._folder))
    return sorted(int(name) for name in names if name.isdecimal())

  def _name(self, number: int) -> str:
    return f"{self._folder}/{number:06d}"

  def _content(self, seen: float) -> bytes:
    told = self._told | {"seen": round(seen)}  # Seconds since 1970.
    return (json.dumps(told, sort_keys=True) + "\n").encode()

  def _held(self, number: int) -> tuple[str, bool]:
    """Returns (who holds a lock in words, if its renewal is overdue).

    "" is one that was left behind, or released meanwhile.
    """
    name = self._name(number)
    data = self._store.get(name)
    if data is None:
      return "", False
    url = f"{self._store.url}/{name}"
    try:
      holder = json.loads(data)
      seen = time.time() - float(holder["seen"])
      who = f"process {int(holder['process'])} on {holder['host']}"
      since = holder["since"]
    except (ValueError, KeyError, TypeError):
      told = f"{url} says nothing that can be read; delete it if it is old"
      return told, False
    if seen > EXPIRY or _has_ended(holder):
      return "", False
    told = (
      f"{who} since {since}, seen {max(seen, 0):.0f} s ago; if it has ended,"
      f" its lock counts no more after {EXPIRY:.0f} s, or once you delete {url}"
    )
    return told, seen > OVERDUE


@contextlib.contextmanager
def holding(lock: Lock) -> Iterator[None]:
  """Releases a lock that was taken; what ends the work is told, not this."""
  try:
    yield
  except BaseException:
    with contextlib.suppress(errors.UserError):
      lock.release()
    raise
  lock.release()


def _machine() -> str:
  """Returns what processes that see each other's numbers have in common."""
  try:
    boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}-{os.stat('/proc/self/ns/pid').st_ino}"
  except OSError:
    return ""


def _has_ended(holder: dict[str, Any]) -> bool:
  """Returns whether a holder was of this machine and runs no more."""
  if not _machine() or holder.get("machine") != _machine():
    return False
  try:
    os.kill(int(holder["process"]), 0)
  except ProcessLookupError:
    return True
  except OSError:
    pass
  return False
