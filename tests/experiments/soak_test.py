"""Short forms of the soak's sections, and that each can find a fault."""

import os
import signal

import numpy as np
import pytest

from cacovid_jax import errors, files, metrics
from cacovid_jax.data import answer_log
from cacovid_jax.training import checkpointing
from experiments import clip_matrix
from experiments.soak import __main__ as soak
from experiments.soak import flips, harms, inputs
from experiments.soak import ground as ground_lib
from tests.data import clips
from tests.experiments import commands

KEY = answer_log.Key("uniform", 0.5, 0, "q1")


class Ground(ground_lib.Ground):
  """Runs `tests.experiments.soak_command`, which takes no second."""

  flags = ()

  def __init__(self, *given):
    super().__init__(*given)
    self.pace = lambda name: {"": [(0.01, 0.0)]}

  def commands(self, name, folder, flags):
    folders = [folder, folder / "other"][: 1 + (name == "two")]
    module = "tests.experiments.soak_command"
    return [(module, [f"--workdir={one}", *self.flags]) for one in folders]


@pytest.fixture(name="ground")
def fixture_ground(tmp_path):
  return Ground(tmp_path / "ground")


@pytest.fixture(name="trained", scope="module")
def fixture_trained(tmp_path_factory):
  """Returns what a training leaves behind, with a log of answers."""
  folder = tmp_path_factory.mktemp("trained")
  numbers = np.arange(6, dtype=np.float32)
  state = {"params": {"w": numbers}, "opt_state": {"mu": numbers + 1}}
  checkpointing.save(folder / "checkpoints", 2, state | {"step": np.int32(2)})
  (folder / "policy").mkdir()
  files.write(folder / "policy" / "policy.safetensors", b"weights")
  with metrics.MetricsWriter(folder, tensorboard=False) as writer:
    for step in (1, 2):
      writer.write_scalars(step, {"reward": 0.5, "seconds_per_step": step})
  with answer_log.AnswerLog(folder / "answers.jsonl", {"model": "x"}) as log:
    log.add([(KEY._replace(seed=i), {"answer": "AB"[i % 2]}) for i in range(4)])
  return folder


def rng(number=0):
  return np.random.default_rng(number)


def test_an_end_state_has_weights_optimiser_and_rewards(trained):
  state = ground_lib.end_state(trained)
  assert sorted(state) == [
    "metrics line 0",
    "metrics line 1",
    "opt_state.mu",
    "params.w",
    "policy/policy.safetensors",
    "step",
  ]
  assert ground_lib.differences(trained, state) == []
  other = state | {"step": "0", "gone": "0"}
  found = ground_lib.differences(trained, other)
  assert found == ["gone differs", "step differs"]


@pytest.mark.parametrize("kind", ["train", "evaluate", "two processes"])
def test_kills_are_counted_and_survived(ground, kind):
  row = harms.kill(ground, rng(), harms._ORDER.index(kind), 2)
  assert row["told"] == [] and row["kind"] == kind
  assert row["count"] == 2


def test_another_end_and_a_traceback_are_found(ground):
  ground.reference("train")
  ground.flags = ["--careless"]
  row = harms.kill(ground, rng(), 0, 2)
  assert row["faults"] == len(row["told"]) == 2
  assert row["told"][0].startswith("a traceback")
  assert row["told"][1] == "results.json differs"


def test_evaluations_at_once(ground):
  row = harms.concurrency(ground, rng(), 0, 3)
  assert (row["count"], row["told"]) == (3, [])
  assert row["kind"] == "3 at once"


@pytest.mark.parametrize("number, kind", [(0, "train"), (1, "evaluate")])
def test_a_full_disk_is_told_and_survived(ground, number, kind):
  row = harms.disk(ground, rng(), number, 1)
  assert (row["told"], row["count"]) == ([], 1)
  assert row["kind"] == kind


def test_a_traceback_on_a_full_disk_is_found(ground):
  ground.reference("train")
  ground.flags = ["--careless"]
  row = harms.disk(ground, rng(), 0, 1)
  assert "a traceback" in " ".join(row["told"]) and row["faults"] > 1


def test_growing_memory_is_found(ground, monkeypatch):
  used = [1e9] * 300 + [1.2e9] * 20
  ended = ground_lib.Ended([0], "", {"metrics": [(0.1, x) for x in used]})
  monkeypatch.setattr(ground, "run", lambda *args, **options: ended)
  row = harms.memory(ground, rng(), 0, 320)
  assert (row["count"], row["faults"]) == (320, 20)
  assert (row["least"], row["most"]) == (1e9, 1.2e9)


@pytest.mark.parametrize("number", range(3))
def test_every_flip_is_noticed(ground, trained, number):
  ground.reference = lambda name: (trained, {})
  row = flips.flip(ground, rng(number), number, 20)
  assert (row["count"], row["told"]) == (20, [])


def test_a_flip_that_nobody_notices_is_found(ground, trained, monkeypatch):
  ground.reference = lambda name: (trained, {})
  monkeypatch.setattr(flips, "_state", lambda folder: [])
  row = flips.flip(ground, rng(), 0, 3)
  assert row["faults"] == 3
  assert "is not noticed" in row["told"][0]


def test_damage_is_noticed_if_it_is_told_and_nothing_is_wrong(tmp_path):
  def read(entries, aside=False):
    if aside:
      (tmp_path / "log.damaged").touch()
    return entries

  known = ["a", "b"]
  assert not flips.noticed(lambda folder: read(["a"]), tmp_path, known)
  assert flips.noticed(lambda folder: read(["a"], True), tmp_path, known)
  (tmp_path / "log.damaged").unlink()
  assert not flips.noticed(lambda folder: read(["c"], True), tmp_path, known)


def test_damaged_files_are_read_or_refused(ground, tmp_path, monkeypatch):
  path = tmp_path / "own_json" / "questions.json"
  path.parent.mkdir()
  files.write(path, inputs._OWN["own_json/questions.json"])
  monkeypatch.setattr(inputs, "_copies", lambda ground: tmp_path)
  monkeypatch.setattr(inputs, "_SAMPLES", inputs._SAMPLES[:1])
  row = inputs.fuzz(ground, rng(), inputs._GROUPS.index("texts"), 50)
  assert (row["count"], row["told"]) == (50, [])
  # It is put back as it was.
  assert path.read_text() == inputs._OWN["own_json/questions.json"]


def test_what_a_reader_must_not_do_is_found(ground, tmp_path, monkeypatch):
  path = tmp_path / "questions.json"
  path.write_text("{")
  with inputs._Worker() as worker:
    assert worker.read(0, path) == ""
    assert "IndexError" in worker.read(999, path)
    worker._process.kill()
    assert worker.read(0, path) == "the process ended with -9"
    assert worker.read(0, path) == ""  # Another one has been started.
    with monkeypatch.context() as less:
      less.setattr(inputs, "_BYTES", 1)
      assert "bytes of memory" in worker.read(0, path)
    # A process that stands still answers however long one waits.
    os.kill(worker._process.pid, signal.SIGSTOP)
    monkeypatch.setattr(inputs, "_SECONDS", 0.01)
    assert worker.read(0, path).startswith("no end within")


def test_damage_is_small_and_depends_on_the_seed_alone():
  data = b'{"a": 12, "b": "text"}' * 10
  found = [inputs.damaged(data, rng(i), words=i % 2) for i in range(40)]
  again = [inputs.damaged(data, rng(i), words=i % 2) for i in range(40)]
  assert found == again and len({*found, data}) > 38
  assert inputs.damaged(b"", rng(), words=True) == b""


def test_clips_are_decoded_and_counted(ground, tmp_path, monkeypatch, capsys):
  kinds = [clip_matrix.Kind("mjpeg", "avi"), clip_matrix.Kind("flv1", "flv")]
  monkeypatch.setattr(clip_matrix, "kinds", lambda: kinds)
  clip = clips.write(tmp_path / "own.mp4", 9)
  flags = {"section": "decode", "workdir": tmp_path / "soak"}
  assert commands.run(soak, **flags, count=1) == 0
  made = []
  real = clip_matrix.make
  monkeypatch.setattr(
    clip_matrix, "make", lambda *args: made.append(args[1]) or real(*args)
  )
  wrong = ["frame 3 is another one"]
  monkeypatch.setattr(clip_matrix, "faults", lambda path: wrong)
  assert commands.run(soak, **flags, clips=f"{tmp_path}/*.mp4") == 1
  assert made == kinds[1:]  # It went on.
  told = capsys.readouterr().out
  assert f"decode 2: {clip.name}: frame 3 is another one" in told
  rows = (tmp_path / "soak" / "table.md").read_text().splitlines()[2:]
  assert [row.split(" | ")[1:5] for row in rows] == [
    ["generated", "2", "1", "0"],
    ["given", "1", "1", "0"],
  ]


def test_mistakes_are_named(tmp_path):
  with pytest.raises(errors.UserError, match="there are kill, flip"):
    commands.run(soak, section="kil", workdir=tmp_path)
  with pytest.raises(errors.UserError, match="--clips=.*no such file"):
    commands.run(soak, clips=f"{tmp_path}/*.mp4", workdir=tmp_path)
  with pytest.raises(errors.UserError, match="--count"):
    commands.run(soak, count=-1, workdir=tmp_path)
