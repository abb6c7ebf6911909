"""Start and loss of processes: a hub in a thread, processes as sockets."""

import json
import queue
import socket
import threading

import pytest

from cacovid_jax import errors
from cacovid_jax.parallel import hub, peers

LONG = 600  # Seconds, of what ends by an event.


class Meeting:
  """A hub for two that serves in a thread, without JAX's service."""

  def __init__(self, monkeypatch, start_timeout=LONG):
    monkeypatch.setattr(hub, "_LINGER_S", 0.0)

    def start(own):
      own._service = "started"
      for member in own._members:
        hub.send(member, service=7)

    monkeypatch.setattr(hub.Hub, "_start", start)
    listener = socket.create_server(("localhost", 0))
    self.place = listener.getsockname()
    serving = hub.Hub(listener, 2, 60)
    self.thread = threading.Thread(
      target=serving.run, args=(start_timeout,), daemon=True
    )
    self.thread.start()

  def come(self, **message):
    """Returns a connection that has said something, and its lines."""
    connection = socket.create_connection(self.place, timeout=LONG)
    if message:
      hub.send(connection, **message)
    return connection, connection.makefile("rb")

  def two(self):
    """Returns both processes, told where the service is."""
    both = [self.come(process=n, processes=2) for n in range(2)]
    for _, lines in both:
      assert json.loads(lines.readline()) == {"service": 7}
    return both


def _end(connection, lines):
  lines.close()
  connection.close()


@pytest.mark.parametrize("victim", [0, 1])
def test_who_is_killed_is_named_to_the_other(monkeypatch, victim):
  meeting = Meeting(monkeypatch)
  both = meeting.two()
  _end(*both[victim])
  told = json.loads(both[1 - victim][1].readline())
  assert told["lost"].startswith(
    f"process {victim} of 2 is lost (its connection ended without a word"
  )
  meeting.thread.join(LONG)
  assert not meeting.thread.is_alive()


def test_who_ends_by_an_error_says_why(monkeypatch):
  (first, lines), (second, _) = Meeting(monkeypatch).two()
  hub.send(second, ended="a clip is bad; mend it")
  why = "process 1 of 2 is lost (a clip is bad; mend it)"
  assert json.loads(lines.readline()) == {"lost": why}
  first.close()


def test_who_is_done_is_not_lost(monkeypatch):
  meeting = Meeting(monkeypatch)
  both = meeting.two()
  for connection, _ in both:
    hub.send(connection, done=True)
  _end(*both[0])
  both[1][0].shutdown(socket.SHUT_WR)
  assert both[1][1].readline() == b""  # Nothing was said.
  meeting.thread.join(LONG)
  assert not meeting.thread.is_alive()


def test_who_never_comes_is_named(monkeypatch):
  _, lines = Meeting(monkeypatch, 0.2).come(process=1, processes=2)
  assert json.loads(lines.readline()) == {
    "lost": "process 0 of 2 did not come within 0.2 s; start all with the same"
    " --coordinator, or raise --start_timeout"
  }


@pytest.mark.parametrize(
  ("message", "told"),
  [
    ({"process": 1, "processes": 3}, "process 1 of 3 came to process 0 of 2"),
    ({"process": 0, "processes": 2}, "there is a process 0 of 2 already"),
  ],
)
def test_who_does_not_fit_is_refused(monkeypatch, message, told):
  meeting = Meeting(monkeypatch)
  first = meeting.come(process=0, processes=2)
  _, lines = meeting.come(**message)
  assert json.loads(lines.readline())["refused"].startswith(told)
  # Nor does a stranger do harm.
  for text in (b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 9000, b"[1]\n", b"{}\n"):
    stranger, lines = meeting.come()
    stranger.sendall(text)
    stranger.shutdown(socket.SHUT_WR)
    _end(stranger, lines)
  meeting.come(process=1, processes=2)
  assert json.loads(first[1].readline()) == {"service": 7}


def test_a_silent_machine_is_lost_after_the_bound():
  with socket.socket() as connection:
    hub.keep_alive(connection, 60)
    get = connection.getsockopt
    assert get(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
    idle, each, count = (
      get(socket.IPPROTO_TCP, getattr(socket, f"TCP_KEEP{name}"))
      for name in ("IDLE", "INTVL", "CNT")
    )
    assert 0 < idle + each * count <= 60
    assert get(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 60_000


def test_a_watching_process_ends_when_the_hub_is_gone(monkeypatch):
  here, there = socket.socketpair()
  watching = peers._Peers(here, here.makefile("rb"), "host:1")
  ended = queue.Queue()
  monkeypatch.setattr(watching, "_end", lambda *told: ended.put(told))
  with watching.watched(None):
    there.close()
    line, code = ended.get(timeout=LONG)
  assert code == peers.LOST == 75
  assert line.startswith("the machine of process 0 is lost (host:1 ended")
  here.close()


def test_one_process_needs_no_coordinator():
  with peers.joined(None, 1, 0):
    pass


@pytest.mark.parametrize(
  ("coordinator", "process", "told"),
  [
    (None, 0, "num_processes=2 needs coordinator=host:port"),
    ("host:1", 2, "num_processes=2 needs coordinator=host:port"),
    ("host", 1, "coordinator 'host' is not host:port"),
    ("host:99999", 1, "coordinator 'host:99999' is not host:port"),
  ],
)
def test_wrong_start_up_is_named(coordinator, process, told):
  with (
    pytest.raises(errors.UserError, match=told) as caught,
    peers.joined(coordinator, 2, process),
  ):
    raise AssertionError("must not come here")
  assert "\n" not in str(caught.value)


def test_process_0_that_never_comes_is_one_line():
  with socket.create_server(("localhost", 0)) as taken:
    port = taken.getsockname()[1]
    with (
      pytest.raises(errors.UserError, match=f"cannot listen at port {port}"),
      peers.joined(f"localhost:{port}", 2, 0),
    ):
      raise AssertionError("must not come here")
  with (
    pytest.raises(errors.UserError, match=f"is not at localhost:{port} after"),
    peers.joined(f"localhost:{port}", 2, 1, start_timeout=1),
  ):
    raise AssertionError("must not come here")
