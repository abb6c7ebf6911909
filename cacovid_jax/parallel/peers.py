"""Start and end of the processes of a multi-host run: no wait without a bound.

All meet at process 0's `hub`, and stay connected. A process that ends by an
error says so; of one that was killed the kernel closes the connection; of a
machine that is gone nothing comes for `peer_timeout` seconds. The others then
end at once, whatever they wait for, with one line that names it.
"""

import contextlib
import json
import multiprocessing
import os
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator

import jax

from cacovid_jax import errors, terminal
from cacovid_jax.parallel import hub

LOST = os.EX_TEMPFAIL  # Exit code: the same command goes on.
_AGAIN = (
  "give the same command again on all: the run goes on from what is saved"
)
# Between an error of this process and the news that another one caused it.
_NEWS_S = 10.0
_RETRY_S = 0.2
_MAIN = """import sys
sys.path[:] = sys.argv[5:]
from cacovid_jax.parallel import hub
hub.serve(*map(int, sys.argv[1:5]))
"""


@contextlib.contextmanager
def joined(
  coordinator: str | None, num_processes: int, process_id: int, *,
  start_timeout: int = 300, peer_timeout: int = 100, workdir=None,
) -> Iterator[None]:  # fmt: skip
  """Joins the processes of a multi-host run; one process needs nothing.

  Coordinator, number and count are given, never guessed from the environment,
  so that a wrong launch fails here and not as a hang in the first collective.
  What ends the block is told here, since JAX would wait for the others.

  Args:
    coordinator: host:port where process 0 listens.
    start_timeout: seconds that all wait for each other at the start.
    peer_timeout: seconds of silence of a machine after which it is lost.
    workdir: of the log of an error that nobody foresaw.

  Raises:
    UserError: arguments do not fit, or others did not come in time.
  """
  if num_processes <= 1:
    yield
    return
  if not coordinator or not 0 <= process_id < num_processes:
    raise errors.UserError(
      f"num_processes={num_processes} needs coordinator=host:port and a"
      f" process_id from 0 to {num_processes - 1}, got {coordinator!r} and"
      f" {process_id}"
    )
  host, _, port = coordinator.rpartition(":")
  if not host or not port.isdecimal() or not 0 < int(port) < 65536:
    raise errors.UserError(f"coordinator {coordinator!r} is not host:port")
  place = host.strip("[]"), int(port)
  if process_id == 0:
    _start_hub(place[1], num_processes, start_timeout, peer_timeout)
  connection = _connect(place, start_timeout)
  hub.keep_alive(connection, peer_timeout)
  hub.send(connection, process=process_id, processes=num_processes)
  lines = connection.makefile("rb")
  connection.settimeout(start_timeout + _NEWS_S)
  service = _hear(lines, coordinator)
  if "service" not in service:
    raise errors.UserError(service.get("refused") or service["lost"])
  connection.settimeout(None)
  peers = _Peers(connection, lines, coordinator)
  with peers.watched(workdir):
    jax.distributed.initialize(
      f"{host}:{service['service']}",
      num_processes,
      process_id,
      # One that nobody comes to: the hub has the service.
      coordinator_bind_address="localhost:0",
      initialization_timeout=start_timeout,
      heartbeat_timeout_seconds=2 * peer_timeout,
    )
    yield


def _start_hub(port: int, *numbers: int) -> None:
  """Starts the child at which all meet; a taken port is a `UserError`."""
  both = socket.has_dualstack_ipv6()
  family = socket.AF_INET6 if both else socket.AF_INET
  try:
    listener = socket.create_server(
      ("", port), family=family, dualstack_ipv6=both, backlog=1024
    )
  except OSError as error:
    raise errors.UserError(
      f"process 0 cannot listen at port {port} ({error.strerror}); give another"
      " --coordinator, or wait for the run that has it"
    ) from error
  with listener:
    given = [listener.fileno(), *numbers]
    subprocess.Popen(
      [sys.executable, "-c", _MAIN, *map(str, given), *sys.path],
      pass_fds=[listener.fileno()],
      stdin=subprocess.DEVNULL,
      stdout=subprocess.DEVNULL,
      stderr=subprocess.DEVNULL,
      start_new_session=True,
    )


def _connect(place: tuple[str, int], seconds: float) -> socket.socket:
  """Returns a connection to the hub, which may come later."""
  end = time.monotonic() + seconds
  while True:
    left = max(end - time.monotonic(), _RETRY_S)
    try:
      return socket.create_connection(place, timeout=left)
    except OSError as error:
      if time.monotonic() + _RETRY_S >= end:
        raise errors.UserError(
          f"process 0 is not at {place[0]}:{place[1]} after {seconds:g} s"
          f" ({error.strerror or error}); start it there, see that the port is"
          " open, or raise --start_timeout"
        ) from error
    time.sleep(_RETRY_S)


def _hear(lines, coordinator: str) -> dict:
  """Returns the hub's next message; its end is one too."""
  with contextlib.suppress(OSError, ValueError):
    return json.loads(lines.readline())
  return {
    "lost": f"the machine of process 0 is lost ({coordinator} ended without a"
    " word)"
  }


class _Peers:
  """The others, heard in a thread of its own."""

  def __init__(self, connection, lines, coordinator):
    self._connection, self._lines = connection, lines
    self._coordinator, self._done = coordinator, False
    self._last = threading.Lock()  # Of whoever ends this process.

  @contextlib.contextmanager
  def watched(self, workdir) -> Iterator[None]:
    """Ends the process as soon as another one is lost, or by what is raised."""
    threading.Thread(target=self._watch, daemon=True).start()
    try:
      yield
    except SystemExit:  # All leave together.
      self._part()
      raise
    except BaseException as error:
      stopped = isinstance(error, (errors.UserError, KeyboardInterrupt))
      if not stopped:
        time.sleep(_NEWS_S)  # A collective fails before its cause is known.
      if os.environ.get(errors.TRACEBACK):
        traceback.print_exc()
      line, code = errors.told(error, workdir)
      self._end(line, code)
    self._part()

  def _part(self) -> None:
    self._done = True
    hub.send(self._connection, done=True)

  def _watch(self) -> None:
    message = _hear(self._lines, self._coordinator)
    if not self._done:
      self._end(f"{message['lost']}; {_AGAIN}", LOST)

  def _end(self, line: str, code: int) -> None:
    """Ends the process without waiting for the others, as JAX would."""
    self._last.acquire()
    try:
      hub.send(self._connection, ended=line)
      terminal.tell(f"error: {line}", error=True)
      for child in multiprocessing.active_children():
        child.kill()
      sys.stdout.flush()
    finally:  # Also where nobody reads what is told.
      os._exit(code)
