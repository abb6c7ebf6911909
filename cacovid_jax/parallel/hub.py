"""Where the processes of a run meet, and learn that one of them is lost.

A child of process 0 that outlives it for a moment: with JAX's own service in
process 0, all others abort without a word of ours as soon as that one dies.
Messages are lines of JSON. A process says {"process", "processes"} and, at its
end, {"ended": why} or {"done"}; it is told {"service": port of JAX's service}
once all have come, or {"refused"} or {"lost"}, a sentence.
"""

import contextlib
import json
import os
import selectors
import signal
import socket
import time

_LONGEST = 4096  # Bytes of a message.
_SILENT = (
  "its connection ended without a word: killed, out of memory, or its machine"
  " or network gone"
)
_LINGER_S = 30.0  # For others to read of a loss.


def keep_alive(connection: socket.socket, seconds: int) -> None:
  """Makes the kernel end a connection whose other side is silent so long.

  The kernel asks and answers: a busy interpreter is not taken for a dead one.
  """
  options = {
    "TCP_KEEPIDLE": max(seconds // 2, 1),
    "TCP_KEEPINTVL": max(seconds // 8, 1),
    "TCP_KEEPCNT": 4,
    "TCP_USER_TIMEOUT": 1000 * seconds,
  }
  connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
  for name, value in options.items():
    if hasattr(socket, name):  # Linux has all of them.
      connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def send(connection: socket.socket, **message) -> None:
  """Sends a message; to whom it cannot be sent need not know."""
  with contextlib.suppress(OSError):
    connection.sendall(json.dumps(message).encode() + b"\n")


class Hub:
  """The processes that have come, by their numbers."""

  def __init__(self, listener: socket.socket, count: int, peer_timeout: int):
    """Takes connections of a listening socket; `count` processes are due."""
    self._listener, self._count, self._timeout = listener, count, peer_timeout
    self._selector = selectors.DefaultSelector()
    self._selector.register(listener, selectors.EVENT_READ)
    self._buffers: dict[socket.socket, bytes] = {}
    self._members: dict[socket.socket, int] = {}
    self._done: set[socket.socket] = set()
    self._service = None

  def run(self, start_timeout: float) -> None:
    """Serves until all are done, one is lost, or some have not come in time."""
    deadline, lost = time.monotonic() + start_timeout, ""
    while not lost and (self._service is None or self._members):
      left = None
      if self._service is None:
        left = max(deadline - time.monotonic(), 0)
      for key, _ in self._selector.select(left):
        lost = lost or self._take(key.fileobj)
      if self._service is None and not lost and left == 0:
        missing = sorted({*range(self._count)} - {*self._members.values()})
        named = ", ".join(map(str, missing))
        lost = (
          f"process {named} of {self._count} did not come within"
          f" {start_timeout:g} s; start all with the same --coordinator, or"
          " raise --start_timeout"
        )
    for member in self._members:
      send(member, lost=lost)
    self._selector.unregister(self._listener)
    self._listener.close()
    end = time.monotonic() + _LINGER_S
    while self._members and time.monotonic() < end:
      for key, _ in self._selector.select(end - time.monotonic()):
        self._take(key.fileobj)

  def _take(self, source) -> str:
    """Takes what there is to read; returns what is lost, "" for nothing."""
    if source is self._listener:
      with contextlib.suppress(OSError):
        found, _ = self._listener.accept()
        keep_alive(found, self._timeout)
        self._selector.register(found, selectors.EVENT_READ)
        self._buffers[found] = b""
      return ""
    try:
      data = source.recv(_LONGEST)
    except OSError:
      data = b""
    lines = (self._buffers[source] + data).split(b"\n")
    self._buffers[source] = lines.pop()
    for line in lines:
      lost = self._hear(source, line)
      if lost or source not in self._buffers:
        return lost
    if data and len(self._buffers[source]) <= _LONGEST:
      return ""
    return self._leave(source, _SILENT)

  def _hear(self, source, line: bytes) -> str:
    """Answers a message; returns what is lost."""
    try:
      message = json.loads(line)
      if source in self._members:
        if "done" in message:
          self._done.add(source)  # JAX's service is needed until the end.
          return ""
        return self._leave(source, str(message["ended"]))
      number, count = int(message["process"]), int(message["processes"])
    except (ValueError, TypeError, KeyError, RecursionError):
      self._leave(source)  # None of ours.
      return ""
    if count != self._count or not 0 <= number < count:
      send(source, refused=f"process {number} of {count} came to process 0 of"
           f" {self._count}; give all the same --num_processes")  # fmt: skip
    elif number in self._members.values() or self._service is not None:
      send(source, refused=f"there is a process {number} of {count} already;"
           " give each a --process_id of its own")  # fmt: skip
    else:
      self._members[source] = number
      if len(self._members) == self._count:
        self._start()
    return ""

  def _leave(self, source, why: str = "") -> str:
    """Forgets a connection; returns what its end means to the others."""
    self._selector.unregister(source)
    source.close()
    del self._buffers[source]
    number = self._members.pop(source, None)
    if number is None or not why or source in self._done:
      return ""
    return f"process {number} of {self._count} is lost ({why})"

  def _start(self) -> None:
    """Starts JAX's service, and tells all where it is."""
    from jaxlib import _jax  # Not for whoever imports `keep_alive`.

    with socket.socket(self._listener.family) as free:
      free.bind(("", 0))
      port = free.getsockname()[1]
    silent = 2 * self._timeout  # Only where the kernel does not see it.
    self._service = _jax.get_distributed_runtime_service(
      f"[::]:{port}", self._count, heartbeat_timeout=silent
    )
    for member in self._members:
      send(member, service=port)


def serve(descriptor: int, count: int, start_timeout: float, silent: int):
  """Does the work of the child, then ends it."""
  # Job systems send these to every process.
  for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
  listener = socket.socket(fileno=descriptor)
  Hub(listener, count, silent).run(start_timeout)
  os._exit(0)  # The service would wait for those who are gone.
