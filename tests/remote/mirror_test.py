"""Workdirs on a store: what is on it after every operation, and after none."""

import errno
import json
import os
import subprocess
import sys
import threading
import time

import jax.numpy as jnp
import numpy as np
import pytest

from cacovid_jax import errors, files, json_lines, terminal
from cacovid_jax.data import answer_log
from cacovid_jax.remote import lock as lock_lib
from cacovid_jax.remote import mirror as remote
from cacovid_jax.remote import store as store_lib
from cacovid_jax.training import checkpointing
from tests import object_store

URL = "gs://bucket/run"


class Clock:
  """A clock that sleeping moves, and each look a little."""

  def __init__(self):
    self.now = time.time()

  def time(self):
    self.now += 1e-3
    return self.now

  monotonic = time

  def sleep(self, seconds):
    self.now += seconds

  def __getattr__(self, name):
    return getattr(time, name)


@pytest.fixture
def store(tmp_path, monkeypatch):
  monkeypatch.setattr(store_lib, "time", Clock())
  return object_store.made(tmp_path, monkeypatch)


def refusing(*operations, error):
  def before(operation, unused_path):
    if operation in operations:
      raise error

  return before


def test_files_are_on_the_store_when_a_call_returns(store):
  with remote.mirrored(URL) as workdir:
    files.write_json(workdir / "config.json", {"a": 1})
    (workdir / "policy").mkdir()
    with files.replacing(workdir / "policy" / "w") as partial:
      files.write(partial, b"weights")
    assert terminal.plain(f"see {workdir}/policy") == f"see {URL}/policy"
    assert object_store.names(store) == [
      "bucket/run/config.json",
      "bucket/run/policy/w",
    ]
  assert not workdir.exists()
  with remote.mirrored(URL) as workdir:
    assert (workdir / "policy" / "w").read_bytes() == b"weights"
    files.remove(workdir / "policy" / "w")
  assert object_store.names(store) == ["bucket/run/config.json"]
  # Only what lies in a mirror is told by a URL.
  assert terminal.plain(f"see {workdir}") == f"see {workdir}"


def test_appended_lines_are_objects_and_one_at_the_end(store):
  with remote.mirrored(URL) as workdir:
    path = workdir / "answers.jsonl"
    with files.claim(path):
      for number in range(4):
        json_lines.append(path, [{"n": number}])
      # As another machine sees it, whatever happens to this one now.
      with remote.mirrored(URL) as other:
        assert (other / path.name).read_bytes() == path.read_bytes()
      parts = object_store.names(store, "bucket/run/answers.jsonl.parts/")
      assert len(parts) == 3
    whole = path.read_bytes()
  assert object_store.names(store) == ["bucket/run/answers.jsonl"]
  assert object_store.read(store, "bucket/run/answers.jsonl") == whole
  assert whole.count(b"\n") == 4


def test_lines_that_were_written_anew_leave_no_part_behind(store):
  with remote.mirrored(URL) as workdir:
    path = workdir / "metrics.jsonl"
    files.write(path, b"")  # As of a new run.
    for text in (b"a\n", b"b\n", b"c\n"):
      files.append(path, text)
    kept = {
      name: object_store.read(store, name) for name in object_store.names(store)
    }
    files.write(path, b"a\n")
    files.append(path, b"d\n")
  # The old parts come back, as after a kill before they were deleted.
  with remote.mirrored(URL) as workdir:
    for name, data in kept.items():
      if ".parts/" in name:
        remote.of(workdir).store.put(name.removeprefix("bucket/run/"), data)
  with remote.mirrored(URL) as workdir:
    assert (workdir / "metrics.jsonl").read_bytes() == b"a\nd\n"


def test_a_log_whose_part_is_lost_goes_on(store):
  with remote.mirrored(URL) as workdir:
    for text in (b"a\n", b"b\n", b"c\n", b"d\n"):
      files.append(workdir / "x.jsonl", text)
  gone = object_store.names(store, "bucket/run/x.jsonl.parts/")[1]
  with remote.mirrored(URL) as workdir:
    remote.of(workdir).store.delete(gone.removeprefix("bucket/run/"))
  with remote.mirrored(URL) as workdir:
    path = workdir / "x.jsonl"
    assert path.read_bytes() == b"a\nb\n"
    files.append(path, b"c again\n")
    files.append(path, b"e\n")
  with remote.mirrored(URL) as workdir:
    assert (workdir / path.name).read_bytes() == b"a\nb\nc again\ne\n"


def test_processes_append_to_a_shared_log_and_lose_nothing(store):
  with remote.mirrored(URL) as one, remote.mirrored(URL) as two:

    def append(workdir, number):
      path = workdir / "frames.jsonl"
      files.shared(path, lambda: json_lines.append(path, [{"n": number}]))

    # Each in turn, then both at once; more than are left as single parts.
    for number in range(70):
      append((one, two)[number % 2], number)
    parts = object_store.names(store, "bucket/run/frames.jsonl.parts/")
    assert sum(object_store.read(store, part) != b"" for part in parts) < 70
    threads = [
      threading.Thread(
        target=lambda w=workdir, s=start: [append(w, s + n) for n in range(10)]
      )
      for workdir, start in ((one, 100), (two, 200))
    ]
    for thread in threads:
      thread.start()
    for thread in threads:
      thread.join()
  with remote.mirrored(URL) as workdir:
    lines = (workdir / "frames.jsonl").read_bytes().splitlines()
  found = [json.loads(line)["n"] for line in lines]
  assert found[:70] == list(range(70))
  assert sorted(found[70:]) == [*range(100, 110), *range(200, 210)]


def test_the_slower_of_two_appends_again(store):
  with remote.mirrored(URL) as one, remote.mirrored(URL) as two:
    asked = []

    def act():
      asked.append((one / "x.jsonl").exists())
      if len(asked) == 1:  # Another machine comes first, just now.
        files.append(two / "x.jsonl", b"first\n")
      files.append(one / "x.jsonl", b"second\n")

    files.shared(one / "x.jsonl", act)
    assert asked == [False, True]
    assert (one / "x.jsonl").read_bytes() == b"first\nsecond\n"


def test_a_place_stays_taken_when_parts_are_made_one(store, monkeypatch):
  monkeypatch.setattr(remote, "_MANY", 1)
  with (
    remote.mirrored(URL) as one,
    remote.mirrored(URL) as two,
    remote.mirrored(URL) as three,
  ):

    def append(workdir, line):
      path = workdir / "x.jsonl"
      files.shared(path, lambda: files.append(path, line))

    append(one, b"head\n")
    append(three, b"first\n")
    asked = []

    def act():
      asked.append((two / "x.jsonl").read_bytes())
      if len(asked) == 1:  # Behind its back a line comes, and parts go.
        append(three, b"second\n")
        files.shared(one / "x.jsonl", lambda: None)
        parts = object_store.names(store, "bucket/run/x.jsonl.parts/")
        sizes = [len(object_store.read(store, part)) for part in parts]
        assert sorted(sizes) == [0, 13]
      files.append(two / "x.jsonl", b"own\n")

    files.shared(two / "x.jsonl", act)
    whole = b"head\nfirst\nsecond\n"
    assert asked == [b"head\nfirst\n", whole]
    append(one, b"last\n")
    assert (one / "x.jsonl").read_bytes() == whole + b"own\nlast\n"


def test_another_process_sees_what_was_written_meanwhile(store):
  run = {"run": 1}
  keys = [answer_log.Key("random", 0.1, 0, f"q{n}") for n in range(3)]
  with remote.mirrored(URL) as one, remote.mirrored(URL) as two:
    with answer_log.AnswerLog(one / "answers-0-of-2.jsonl", run) as log:
      for key in keys[:2]:
        log.add([(key, {"score": 1.0})])
        files.refresh(two)
        seen = answer_log.AnswerLog(None, run)
        seen.look(two.glob("answers-*.jsonl"))
        assert set(seen) == set(log)
    files.write_json(one / "answers-0-of-2.done.json", {})
    files.refresh(two)
    assert (two / "answers-0-of-2.done.json").exists()
    files.remove(one / "answers-0-of-2.done.json")
    files.refresh(two)
    assert not (two / "answers-0-of-2.done.json").exists()


# Locks.


def claimed(workdir):
  return files.claim(workdir / "train", "trainer", what=workdir)


def test_a_second_machine_is_told_who_holds_the_lock(store):
  with remote.mirrored(URL) as one, remote.mirrored(URL) as two:
    with claimed(one):
      with pytest.raises(errors.UserError) as error:
        with claimed(two):
          pass
    told = errors.one_line(error.value)
    assert told.startswith(
      f"another trainer is writing to {URL} (process {os.getpid()} on "
    )
    assert "or once you delete gs://bucket/run/locks/train/000001)" in told
    assert told.endswith("; wait for it, or use another workdir")
    with claimed(two):
      pass
  assert object_store.names(store) == []


def left_behind(store, **changes):
  """Leaves a lock as a killed process does, some of its fields changed."""
  lock = lock_lib.Lock(store_lib.Store(URL), "train")
  lock.take("", "")
  lock._ended.set()
  name = "bucket/run/locks/train/000001"
  path = store / name.replace("/", "%2F")
  path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
  "changes", [{"seen": 0}, {"process": 2**22 + 1}], ids=["expired", "ended"]
)
def test_a_lock_that_was_left_behind_is_taken_over(store, changes):
  left_behind(store, **changes)
  with remote.mirrored(URL) as workdir, claimed(workdir):
    names = object_store.names(store, "bucket/run/locks/")
    assert names == ["bucket/run/locks/train/000002"]


@pytest.mark.parametrize(
  "changes",
  [{"machine": "another", "process": 2**22 + 1}, {"seen": "soon"}],
  ids=["of_another_machine", "unreadable"],
)
def test_a_lock_that_may_be_held_is_not(store, changes):
  left_behind(store, **changes)
  with remote.mirrored(URL) as workdir:
    with pytest.raises(errors.UserError, match="delete"):
      with claimed(workdir):
        pass


def test_a_lock_that_is_overdue_is_waited_for(store, monkeypatch):
  left_behind(store, machine="another", seen=round(time.time()) - 200)
  monkeypatch.setattr(lock_lib, "time", clock := Clock())
  start = clock.now
  with remote.mirrored(URL) as workdir, claimed(workdir):
    assert 95 < clock.now - start < 125


def test_who_has_lost_the_lock_writes_no_step(store):
  tree = {"x": jnp.arange(3)}
  with remote.mirrored(URL) as one, remote.mirrored(URL) as two:
    with pytest.raises(errors.UserError, match="nothing more is written here"):
      with claimed(one):
        checkpointing.save(one / "checkpoints", 1, tree)
        # It sleeps for so long that another one takes over.
        left_behind_now(store)
        with claimed(two):
          checkpointing.save(one / "checkpoints", 2, tree)
    assert checkpointing.restore_latest(two / "checkpoints", tree) is None
  with remote.mirrored(URL) as workdir:
    assert checkpointing.steps(workdir / "checkpoints") == [1]


def left_behind_now(store):
  path = store / "bucket%2Frun%2Flocks%2Ftrain%2F000001"
  path.write_text(json.dumps(json.loads(path.read_text()) | {"seen": 0}))


# Steps of checkpoints.


def tree_of(step):
  return {"w": jnp.arange(6.0) * step, "step": jnp.int32(step)}


def save(workdir, step, **options):
  checkpointing.save(workdir / "checkpoints", step, tree_of(step), **options)


def restored(like=None):
  """Returns (step, w) as a machine finds it that has nothing yet."""
  with remote.mirrored(URL) as workdir:
    folder = workdir / "checkpoints"
    found = checkpointing.restore_latest(folder, like or tree_of(0))
    return found and (found[0], np.asarray(found[1]["w"]))


def test_steps_are_kept_restored_and_deleted_on_the_store(store):
  with remote.mirrored(URL) as workdir:
    for step in (1, 2, 3):
      save(workdir, step, keep=2)
  kept = {x.split("/")[3] for x in object_store.names(store)}
  assert kept == {"2", "3"}
  step, w = restored()
  assert step == 3
  np.testing.assert_array_equal(w, np.arange(6.0) * 3)


def test_a_damaged_step_is_kept_aside_and_the_one_before_taken(store):
  with remote.mirrored(URL) as workdir:
    save(workdir, 1)
    save(workdir, 2)
  damaged = object_store.names(store, "bucket/run/checkpoints/2/state/")[0]
  (store / damaged.replace("/", "%2F")).write_bytes(b"other bytes")
  assert restored()[0] == 1
  kept = {x.split("/")[3] for x in object_store.names(store)}
  assert kept == {"1", "2.bad"}
  with remote.mirrored(URL) as workdir:
    found = checkpointing.doctor(workdir / "checkpoints")
  assert [(v.name, v.ok) for v in found] == [("1", True), ("2.bad", False)]


class CutOffError(BaseException):
  """Stands for the end of a machine."""


def test_whenever_saving_is_cut_off_a_whole_step_is_found(store):
  """Every operation of a save on the store is the last one, once."""
  with remote.mirrored(URL) as workdir:
    save(workdir, 1)
  found, count = [], 0
  while True:
    left = [count := count + 1]

    def before(operation, unused_path, left=left):
      left[0] -= operation in ("write", "delete")
      if left[0] < 0:
        raise CutOffError

    try:
      with remote.mirrored(URL) as workdir:
        object_store.use(store, before)
        save(workdir, 2, keep=1)
        break
    except CutOffError:
      object_store.use(store)
      step, w = restored()
      found.append(step)
      np.testing.assert_array_equal(w, np.arange(6.0) * step)
      # Step 2 may be there by now; the run goes back and saves it again.
      with remote.mirrored(URL) as workdir:
        remote.remove_folder(workdir / "checkpoints" / "2", "manifest.json")
        if step == 2:
          save(workdir, 1)
    finally:
      object_store.use(store)
  assert count > 5 and set(found) == {1, 2}
  assert restored()[0] == 2
  kept = {x.split("/")[3] for x in object_store.names(store)}
  assert kept == {"2"}  # What was half written or half deleted has gone.


# What a store refuses.


@pytest.mark.parametrize(
  "error, told",
  [
    (
      PermissionError(errno.EACCES, "denied"),
      "see to the bucket's permissions",
    ),
    (OSError("Forbidden: bucket\nno storage.objects.create"), "permissions"),
    (OSError(errno.ENOSPC, "No space left on device"), "free some space"),
    (ConnectionError("connection reset"), "tried for 0 s; give the command"),
  ],
  ids=["permission", "forbidden", "full", "unreachable"],
)
def test_what_a_store_refuses_is_one_line(store, monkeypatch, error, told):
  monkeypatch.setattr(store_lib, "PATIENCE", 0.2)
  with remote.mirrored(URL) as workdir:
    path = workdir / "x.jsonl"
    files.append(path, b"a\n")
    mirror = remote.of(workdir)
    mirror.store._files.before = refusing("write", error=error)
    for write in (files.write, files.append):
      with pytest.raises(errors.UserError) as refused:
        write(path, b"b\n")
      line = errors.one_line(refused.value)
      assert line.startswith("cannot write gs://bucket/run/x.jsonl") and (
        told in line
      )
    with pytest.raises(errors.UserError, match="cannot write gs://"):
      save(workdir, 1)
  with remote.mirrored(URL) as workdir:
    assert (workdir / path.name).read_bytes() == b"a\n"


def test_what_passes_is_tried_again(store, monkeypatch):
  monkeypatch.setattr(store_lib, "PATIENCE", 1000)
  left = [3]

  def before(operation, unused_path):
    if operation == "write" and left[0]:
      left[0] -= 1
      raise ConnectionError("reset")

  object_store.use(store, before)
  with remote.mirrored(URL) as workdir:
    files.write(workdir / "x", b"x")
  assert object_store.read(store, "bucket/run/x") == b"x" and left == [0]


def test_an_append_whose_answer_was_lost_counts_once(store, monkeypatch):
  monkeypatch.setattr(store_lib, "PATIENCE", 1000)
  with remote.mirrored(URL) as workdir:
    made, left = remote.of(workdir).store._files.pipe_file, [1]

    def lose(path, *args, **options):
      made(path, *args, **options)
      if left[0]:
        left[0] -= 1
        raise ConnectionError("reset")

    remote.of(workdir).store._files.pipe_file = lose
    files.append(workdir / "x.jsonl", b"a\n")
    files.append(workdir / "x.jsonl", b"b\n")
  with remote.mirrored(URL) as workdir:
    assert (workdir / "x.jsonl").read_bytes() == b"a\nb\n"


def test_a_store_that_does_not_answer_ends_in_time(store, monkeypatch):
  monkeypatch.setattr(store_lib, "PATIENCE", 0.05)
  ended = threading.Event()
  object_store.use(store, lambda *unused: ended.wait())
  try:
    with pytest.raises(
      errors.UserError, match="cannot read .*no answer; tried"
    ):
      with remote.mirrored(URL):
        pass
  finally:
    ended.set()


@pytest.mark.parametrize(
  "url, told",
  [
    ("s3://bucket/run", "stores are gs://BUCKET/FOLDER"),
    ("gs://", "stores are gs://BUCKET/FOLDER"),
  ],
)
def test_other_stores_are_refused(url, told):
  with pytest.raises(errors.UserError, match=told):
    with remote.mirrored(url):
      pass


def test_without_gcsfs_the_extra_is_named():
  code = (
    "import sys; sys.modules['gcsfs'] = None\n"
    "from cacovid_jax import errors\n"
    "from cacovid_jax.remote import store\n"
    "try:\n  store.Store('gs://bucket/run')\n"
    "except errors.UserError as error:\n  print(error)"
  )
  told = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, check=True
  )
  assert 'pip install "cacovid_jax[gcs]"' in told.stdout


def test_a_killed_process_leaves_its_mirror_to_the_next(store, tmp_path):
  (tmp_path / "mirrors").mkdir(exist_ok=True)
  code = (
    "import os, sys, tempfile; tempfile.tempdir = sys.argv[2]\n"
    "from tests import object_store\n"
    "from cacovid_jax.remote import mirror\n"
    "object_store.use(sys.argv[1])\n"
    f"with mirror.mirrored('{URL}'): os.kill(os.getpid(), 9)\n"
  )
  mirrors = tmp_path / "mirrors"
  done = subprocess.run([sys.executable, "-c", code, store, mirrors])
  assert done.returncode == -9 and len(list(mirrors.iterdir())) == 1
  with remote.mirrored(URL) as one, remote.mirrored(URL) as two:
    # Those of running processes stay.
    assert sorted(mirrors.iterdir()) == sorted([one.parent, two.parent])
  assert not list(mirrors.iterdir())
