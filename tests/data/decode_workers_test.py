"""Children that crash, hang and swell; what they decode equals our own."""

import concurrent.futures
import contextlib
import dataclasses
import fcntl
import functools
import os
import pathlib
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time

import av
import numpy as np
import pytest

from cacovid_jax import errors
from cacovid_jax.data import decode_workers, frames, video, video_stream
from cacovid_jax.evals import frame_manifest
from cacovid_jax.models import processors
from tests import disks
from tests.data import clips
from tests.data import faulty_decoders as faulty

LIMITS = video.Limits()
ROOT = pathlib.Path(__file__).parents[2]


def _run(function, path="clip.mp4", *args, **limits):
  return decode_workers.run(
    function, path, *args, limits=dataclasses.replace(LIMITS, **limits)
  )


def _reason(function, path="clip.mp4", *args, **limits):
  with pytest.raises(video.VideoError) as caught:
    _run(function, path, *args, **limits)
  assert "\n" not in str(caught.value) and "clip.mp4" in str(caught.value)
  return caught.value.reason


def _wait_until(true):
  end = time.monotonic() + 600
  while not true():
    assert time.monotonic() < end
    time.sleep(0.01)


def _gone(number) -> bool:
  try:
    os.kill(number, 0)
  except ProcessLookupError:
    return True
  return False


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("clips")
  clips.write(folder / "clip.mp4")
  clips.write(folder / "mpeg.avi", codec="mpeg4", width=80, height=48)
  clips.write_rotated(folder / "turned.mp4", folder / "clip.mp4")
  # Damaged in the middle.
  data = bytearray((folder / "clip.mp4").read_bytes())
  start = data.find(b"mdat") + 700
  data[start : start + 60] = bytes(60)
  (folder / "damaged.mp4").write_bytes(data)
  clips.write_sound(folder / "sound.mp4")
  (folder / "empty.mp4").touch()
  (folder / "text.mp4").write_text("no clip")
  os.mkfifo(folder / "pipe.mp4")
  return folder


def _outcome(way, function, path, *args, **options):
  try:
    return decode_workers.WAYS[way](function, path, *args, **options)
  except errors.UserError as error:
    return type(error), str(error), vars(error)


def _assert_same(one, other):
  if not isinstance(one, video.Clip):
    assert one == other
    return
  for field in dataclasses.fields(one):
    first, second = (getattr(clip, field.name) for clip in (one, other))
    if isinstance(first, np.ndarray):
      assert first.dtype == second.dtype and second.flags.writeable
      np.testing.assert_array_equal(first, second)
    else:
      assert first == second


RESIZES = {
  "own size": None,
  "square": functools.partial(frames.resize_frame, size=20),
  "processor": functools.partial(
    processors.Qwen2_5VLProcessor.tiny().resize_frame, num_frames=4
  ),
  "refused": functools.partial(
    processors.LlavaOnevisionProcessor(image_size=8).resize_frame,
    num_frames=4,
    above=64,
  ),
}


@pytest.mark.parametrize("resize", RESIZES)
@pytest.mark.parametrize(
  "name", ["clip.mp4", "mpeg.avi", "turned.mp4", "damaged.mp4"]
)
def test_frames_hashes_and_warnings_are_those_of_this_process(
  folder, name, resize
):
  one, other = (
    _outcome(
      way, video.decode, folder / name, frames.FrameRule(4),
      resize=RESIZES[resize], limits=None, hashed=True,
    )
    for way in ("in_process", "workers")
  )  # fmt: skip
  _assert_same(one, other)
  if resize != "refused":
    assert len(one.warnings) == (2 if name == "damaged.mp4" else 0)


@pytest.mark.parametrize(
  "name", ["absent.mp4", "sound.mp4", "empty.mp4", "text.mp4", "pipe.mp4", ""]
)
@pytest.mark.parametrize("function", [video.probe, video.frame_size])
def test_errors_are_those_of_this_process(folder, function, name):
  given = function, folder / name
  one, other = (
    _outcome(way, *given, limits=None) for way in ("in_process", "workers")
  )
  assert one[0] is video.VideoError and one == other


@pytest.mark.parametrize(
  "limits",
  [
    {"max_bytes": 100},
    {"max_pixels": 64 * 63},
    {"max_seconds": 2.0},
    {"max_frames": 10},
    {"max_pixels_decoded": 23 * 64 * 64},
    {"timeout_s": 0.0},
  ],
)
def test_limits_hold_as_in_this_process(folder, limits):
  limits = dataclasses.replace(LIMITS, **limits)
  given = video.decode, folder / "clip.mp4", frames.FrameRule(4)
  one, other = (
    _outcome(way, *given, limits=limits) for way in ("in_process", "workers")
  )
  assert one[0] is video.VideoError and one == other
  reasons = ("too_large", "too_many_bytes", "too_long", "timeout")
  assert one[2]["reason"] in reasons


@pytest.mark.parametrize("name", ["some", "none", "beyond"])
def test_frame_rules_are_sent_along(folder, name):
  given = video.decode, folder / "clip.mp4"
  rule = functools.partial(faulty.rule, name)
  _assert_same(
    *(
      _outcome(way, *given, rule, limits=None)
      for way in ("in_process", "workers")
    )
  )


def test_frames_that_were_written_down_are_sent_along(folder, tmp_path):
  path = tmp_path / "frames.jsonl"
  manifest = frame_manifest.FrameManifest(path, num_frames=4)
  assert manifest.rule("clip.mp4") is None
  manifest.add(
    frame_manifest.FrameRecord(
      video="clip.mp4",
      num_frames=24,
      size=(64, 64),
      indices=(1, 2, 3, 5),
      frame_hash="0",
    )  # fmt: skip
  )
  rule = manifest.rule("clip.mp4")
  clip = _run(video.decode, folder / "clip.mp4", rule)
  assert clips.numbers(clip.frames) == [1, 2, 3, 5]
  longer = clips.write(tmp_path / "clip.mp4", 25)
  with pytest.raises(errors.UserError, match="25 frames instead of 24"):
    _run(video.decode, longer, rule)


def test_a_child_never_imports_jax(folder):
  processor = processors.LlavaOnevisionProcessor(image_size=8)
  resize = functools.partial(processor.resize_frame, num_frames=4)
  decode_workers.run(
    video.decode, folder / "clip.mp4", frames.FrameRule(4), resize=resize
  )
  loaded = set(_run(faulty.modules))
  assert {"av", "cacovid_jax.models.processors"} <= loaded
  assert not {"jaxlib", "flax", "jax.numpy", "grain"} & loaded


def test_what_needs_jax_is_refused_in_one_line(folder):
  from cacovid_jax.models import llava_onevision

  path = folder / "clip.mp4"
  for function in (llava_onevision.LlavaOnevisionConfig, lambda n, s: [0]):
    with pytest.raises(errors.UserError, match="data.decode=in_proc") as caught:
      decode_workers.run(video.decode, path, function)
    assert "\n" not in str(caught.value)
  _run(faulty.pid)


def test_a_child_is_used_again(folder):
  assert _run(faulty.pid) == _run(faulty.pid) != os.getpid()


def test_a_path_is_looked_for_where_the_parent_is(folder, monkeypatch):
  _run(faulty.pid)  # So that there is a child, which began elsewhere.
  monkeypatch.chdir(folder)
  rule = frames.FrameRule(4)
  found = _run(video.decode, "clip.mp4", rule)
  expected = video.decode(folder / "clip.mp4", rule)
  np.testing.assert_array_equal(found.frames, expected.frames)


def test_a_large_parent_makes_no_large_child():
  assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss > 2**27 // 1024
  first, second = (_run(faulty.pid, max_memory=2**28) for _ in range(2))
  assert first == second


def test_a_crash_costs_one_clip_and_its_child():
  before = _run(faulty.pid)
  for number in (signal.SIGSEGV, signal.SIGABRT, signal.SIGKILL):
    with pytest.raises(video.VideoError, match=number.name) as caught:
      _run(faulty.die, "clip.mp4", number)
    assert caught.value.reason == "crashed"
  with pytest.raises(video.VideoError, match="exit code 3"):
    _run(faulty.leave)
  assert _run(faulty.pid) != before and _gone(before)


def test_a_child_that_the_system_ended_is_replaced(tmp_path):
  assert _run(faulty.die_once, tmp_path / "mark") == "well"


def test_signals_of_a_job_system_make_no_clip_bad():
  assert _run(faulty.outlive) == _run(faulty.pid)


@pytest.mark.parametrize("function", [faulty.hang, faulty.hang_in_c])
def test_a_child_that_hangs_is_ended(tmp_path, monkeypatch, function):
  monkeypatch.setattr(decode_workers, "_GRACE_S", 0.1)
  path = tmp_path / "clip.mp4"
  assert _reason(function, path, timeout_s=0.2) == "timeout"
  _run(faulty.pid)


def test_a_child_that_takes_too_much_memory_is_ended():
  assert _reason(faulty.fill, max_memory=2**28) == "too_much_memory"
  assert _reason(faulty.no_memory) == "too_much_memory"
  _run(faulty.pid)


def test_what_ffmpeg_cannot_allocate_is_not_damage(folder):
  """Else other pictures would stand in for what there was no memory for."""

  class Bad:
    def decode(self):
      raise av.error.MemoryError(12, "Cannot allocate memory")

    def demux(self, stream):
      yield self.decode()

  with video_stream.VideoStream(folder / "clip.mp4", None) as stream:
    with pytest.raises(video.VideoError, match="too much memory"):
      stream.decode(Bad())
    container, stream.container = stream.container, Bad()
    with pytest.raises(video.VideoError, match="too much memory"):
      next(stream.packets())
    stream.container = container


def test_other_failures_keep_their_trace():
  with pytest.raises(RuntimeError, match="in careless(?s:.)*what is it"):
    _run(faulty.careless)
  with pytest.raises(errors.UserError, match="^the frame rule is wrong"):
    _run(faulty.user_error)


def test_values_travel_unchanged():
  rng = np.random.default_rng(0)
  value = {
    "none": None,
    "arrays": [rng.random(shape) for shape in ((), (0,), (3, 5), (1000, 1000))],
    "bytes": rng.bytes(3 * 2**20),
    "column": np.asfortranarray(rng.random((7, 9))),
    "steps": np.arange(20)[::3],
  }
  found = _run(faulty.echo, "clip.mp4", value)
  assert found["none"] is None and found["bytes"] == value["bytes"]
  arrays = [*value["arrays"], value["column"], value["steps"]]
  others = [*found["arrays"], found["column"], found["steps"]]
  for array, other in zip(arrays, others, strict=True):
    assert array.dtype == other.dtype and array.shape == other.shape
    np.testing.assert_array_equal(array, other)


def test_a_clip_is_not_to_blame_where_frames_find_no_room():
  decode_workers._idle.clear()
  with disks.no_file_above(2**16):  # Children inherit it.
    with pytest.raises(errors.UserError, match="no room.*ulimit") as caught:
      _run(faulty.echo_thrice, "clip.mp4", np.ones(2**15, np.uint8))
    _run(faulty.pid)
  assert not isinstance(caught.value, video.VideoError)
  decode_workers._idle.clear()


@contextlib.contextmanager
def _descriptors(count):
  """Lets this process open so many more files."""
  kind = resource.RLIMIT_NOFILE
  soft, hard = resource.getrlimit(kind)
  free = [os.dup(0) for _ in range(count + 1)]
  for number in free:
    os.close(number)
  resource.setrlimit(kind, (max(free), hard))
  try:
    yield
  finally:
    resource.setrlimit(kind, (soft, hard))


@pytest.mark.parametrize("idle", [False, True])
@pytest.mark.parametrize("count", [0, 1, 2, 4, 7])
def test_a_clip_is_not_to_blame_where_files_run_out(folder, idle, count):
  decode_workers._idle.clear()
  if idle:
    _run(faulty.pid)
  try:
    with _descriptors(count):
      _run(video.probe, folder / "clip.mp4")
  except errors.UserError as error:
    assert not isinstance(error, video.VideoError)
    assert "Too many open files" in str(error) and "\n" not in str(error)
    assert count < 7
  assert _run(video.probe, folder / "clip.mp4").num_frames == 24


def test_what_is_sent_without_a_file_is_told():
  one, other = socket.socketpair()
  with one, other:
    decode_workers._send(one, decode_workers._pickled(1))
    with _descriptors(0), pytest.raises(OSError, match="Too many open files"):
      decode_workers._receive(other)


def test_a_clip_that_cannot_be_opened_for_want_of_files_is_not_bad(folder):
  with _descriptors(0), pytest.raises(errors.UserError, match="-n") as caught:
    video.probe(folder / "clip.mp4")
  assert not isinstance(caught.value, video.VideoError)


def test_a_lower_limit_of_memory_stays():
  kind = resource.RLIMIT_DATA
  soft, hard = resource.getrlimit(kind)
  decode_workers._idle.clear()
  assert _run(faulty.memory_limits, max_memory=2**28) == (2**29, hard)
  assert _run(faulty.memory_limits, max_memory=2**29) == (2**30, hard)
  decode_workers._idle.clear()
  resource.setrlimit(kind, (2**40, hard))  # Children inherit it.
  try:
    assert _run(faulty.memory_limits, max_memory=2**40) == (2**40, hard)
  finally:
    resource.setrlimit(kind, (soft, hard))
  decode_workers._idle.clear()


def test_without_a_table_of_processes_no_limit_of_memory_is_told_of(
  monkeypatch, caplog
):
  monkeypatch.setattr(decode_workers.os.path, "isdir", lambda path: False)
  with caplog.at_level("WARNING"):
    assert decode_workers._held(2**30) == decode_workers._held(2**30) == 0
  assert caplog.text.count("does not tell what memory") == 1


def test_a_file_that_is_too_long_takes_no_turn(folder, monkeypatch):
  monkeypatch.setattr(decode_workers, "_turn", lambda: pytest.fail("waits"))
  path = folder / "clip.mp4"
  assert _reason(video.probe, path, max_bytes=100) == "too_many_bytes"


def test_threads_have_children_of_their_own(folder):
  names = ["clip.mp4", "mpeg.avi", "turned.mp4", "absent.mp4"] * 4
  rule = frames.FrameRule(4)

  def outcome(way, name):
    return _outcome(
      way, video.decode, folder / name, rule, limits=None, hashed=True
    )

  with concurrent.futures.ThreadPoolExecutor(2) as pool:
    found = list(pool.map(functools.partial(outcome, "workers"), names))
  for name, one in zip(names, found, strict=True):
    _assert_same(outcome("in_process", name), one)
  assert len(decode_workers._idle) <= 2


def test_an_idle_child_ends_and_leaves_nothing(monkeypatch):
  decode_workers._idle.clear()
  monkeypatch.setattr(decode_workers, "IDLE_S", 0.05)
  before = _run(faulty.pid)
  _wait_until(lambda: _gone(before))
  assert _run(faulty.pid) != before


def test_a_child_is_replaced_after_many_clips(monkeypatch):
  decode_workers._idle.clear()
  monkeypatch.setattr(decode_workers, "MAX_CLIPS", 3)
  one, two = [[_run(faulty.pid) for _ in range(3)] for _ in range(2)]
  assert len({*one}) == len({*two}) == 1 and one != two


def test_a_child_is_replaced_after_a_clip_that_filled_it():
  before = _run(faulty.pid)
  assert _run(faulty.swell, "clip.mp4", 2**20) == 1
  assert _run(faulty.pid) == before
  assert _run(faulty.swell, "clip.mp4", 3 * 2**26, max_memory=2**28 + 2**27)
  assert _run(faulty.pid) != before


def test_a_child_ends_with_its_parent(tmp_path):
  path = tmp_path / "clip.mp4"
  code = (
    "from cacovid_jax.data import decode_workers\n"
    "from tests.data import faulty_decoders\n"
    f"decode_workers.run(faulty_decoders.hang, {str(path)!r})\n"
  )
  environment = {**os.environ, "PYTHONPATH": str(ROOT)}
  command = [sys.executable, "-c", code]
  with subprocess.Popen(command, env=environment) as parent:
    _wait_until(lambda: path.exists() and path.read_text())
    parent.kill()
  with open(path) as file:

    def unlocked():
      try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except BlockingIOError:
        return False
      return True

    _wait_until(unlocked)


def test_a_fork_has_children_of_its_own():
  before = _run(faulty.pid)
  code = os.fork()
  if not code:
    os._exit(len(decode_workers._idle))
  assert os.waitpid(code, 0)[1] == 0
  assert _run(faulty.pid) == before


def test_large_clips_take_turns(folder, tmp_path, monkeypatch):
  monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
  with decode_workers._turn():
    (path,) = tmp_path.iterdir()
  assert _run(faulty.in_turn, path) == "taken"
  # Another one waits.
  with open(path, "r+b") as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    found = []
    thread = threading.Thread(
      target=lambda: found.append(_run(faulty.in_turn, path))
    )
    thread.start()
    thread.join(0.3)
    assert not found
  thread.join()
  assert found == ["taken"]
  # Here, clips of 64 x 64 are large.
  monkeypatch.setattr(video_stream, "LARGE", 64 * 63)
  clip = _run(video.decode, folder / "clip.mp4", faulty.SOME)
  assert clips.numbers(clip.frames) == [0, 23, 3, 3]
  with video_stream.VideoStream(folder / "clip.mp4", None) as stream:
    assert stream.stream.codec_context.thread_count == 2


def test_a_turn_that_cannot_be_taken_is_told(tmp_path, monkeypatch):
  monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
  with pytest.raises(errors.UserError, match="TMPDIR"):
    _run(faulty.in_turn)


@pytest.mark.parametrize(
  "executable, told",
  [("/nowhere/python", "No such file"), ("/bin/false", "does not start")],
)
def test_a_child_that_does_not_start_is_no_fault_of_a_clip(
  monkeypatch, executable, told
):
  decode_workers._idle.clear()
  monkeypatch.setattr(sys, "executable", executable)
  with pytest.raises(errors.UserError, match=told) as caught:
    _run(faulty.pid)
  assert not isinstance(caught.value, video.VideoError)
  assert "data.decode=in_process" in str(caught.value)
