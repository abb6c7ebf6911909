"""Ledgers are locked, and those of others can be read (see shards_test)."""

import errno
import json
import logging
import os
import subprocess
import sys

import numpy as np
import pytest

from cacovid_jax import errors, files
from cacovid_jax.data import answer_log
from tests import disks

RUN = {"checkpoint": "0"}


@pytest.fixture(autouse=True)
def warnings_are_caught(caplog):
  caplog.set_level(logging.WARNING)


def lines_of(path):
  """Returns the objects of a file without their checksums."""
  lines = map(json.loads, path.read_text().splitlines())
  return [{k: v for k, v in x.items() if k != "crc"} for x in lines]


def key(question, method="random"):
  return answer_log.Key(method, 0.1, 0, question)


def test_one_process_at_a_time(tmp_path):
  path = tmp_path / "answers.jsonl"
  program = (
    "import sys\n"
    "from cacovid_jax import errors\n"
    "from cacovid_jax.data import answer_log\n"
    "try:\n"
    f"  answer_log.AnswerLog(sys.argv[1], {RUN!r})\n"
    "except errors.UserError as error:\n"
    "  print(error)\n"
  )

  def another():
    run = [sys.executable, "-c", program, str(path)]
    return subprocess.run(run, capture_output=True, text=True, check=True)

  with answer_log.AnswerLog(path, RUN) as answers:
    answers.add([(key("q"), {"score": 1.0})])
    before = path.read_bytes()
    said = another().stdout
    assert f"another process is writing to {path}" in said
    assert said.count("\n") == 1
    assert path.read_bytes() == before
    assert f"(process {os.getpid()} on " in said
    # The remedy is the caller's: not every command has --shard.
    with pytest.raises(errors.UserError, match="wait for it, or stop$"):
      answer_log.AnswerLog(path, RUN, mend="or stop")
  assert another().stdout == ""
  # What is closed can still be looked up.
  assert answers[key("q")] == {"score": 1.0}


def test_a_refused_file_is_not_kept_locked(tmp_path):
  path = tmp_path / "answers.jsonl"
  answer_log.AnswerLog(path, RUN).close()
  for _ in range(2):
    with pytest.raises(errors.UserError, match="differs in checkpoint"):
      answer_log.AnswerLog(path, {"checkpoint": "1"})
  answer_log.AnswerLog(path, RUN).close()


def test_a_file_system_without_locks(tmp_path, monkeypatch):
  def refuse(file, how):
    raise OSError(errno.ENOLCK, "No locks available")

  monkeypatch.setattr(files.fcntl, "flock", refuse)
  with answer_log.AnswerLog(tmp_path / "answers.jsonl", RUN) as answers:
    answers.add([(key("q"), {})])
  assert key("q") in answers


def test_answers_of_others_are_known_but_not_copied(tmp_path):
  mine, other = tmp_path / "mine.jsonl", tmp_path / "other.jsonl"
  with answer_log.AnswerLog(other, RUN) as theirs:
    theirs.add([(key("a"), {"text": "A"})])
    before = other.read_bytes()
    with open(other, "ab") as f:
      f.write(b'{"half": ')  # It is being written.
    with answer_log.AnswerLog(mine, RUN) as answers:
      answers.look([mine, other])
      assert answers[key("a")] == {"text": "A"}
      answers.add([(key("a"), {"text": "B"}), (key("b"), {"text": "B"})])
      assert answers[key("a")] == {"text": "A"}
  lines = lines_of(mine)
  assert [line.get("question") for line in lines] == [None, "b"]
  assert other.read_bytes() == before + b'{"half": '


def test_a_file_without_a_whole_header_starts_anew(tmp_path):
  path = tmp_path / "answers.jsonl"
  path.write_bytes(b'{"run": {"check')
  with answer_log.AnswerLog(path, RUN) as answers:
    assert not len(answers)
  assert lines_of(path) == [{"run": RUN}]
  aside = tmp_path / "answers.jsonl.damaged"
  assert aside.read_bytes() == b'{"run": {"check\n'


@pytest.mark.parametrize("left", [b"", b'{"run": {"check', b"%"])
def test_what_is_left_of_a_killed_process_stops_nobody(tmp_path, left):
  """No header, half of one, or a whole file whose last line is cut."""
  mine, other = tmp_path / "mine.jsonl", tmp_path / "other.jsonl"
  with answer_log.AnswerLog(other, RUN) as theirs:
    theirs.add([(key("a"), {"text": "A"}), (key("b"), {"text": "\u00e4"})])
  whole = other.read_bytes()
  other.write_bytes(whole[:-3] if left == b"%" else left)
  with answer_log.AnswerLog(mine, RUN) as answers:
    answers.look([mine, other, tmp_path / "deleted-since.jsonl"])
    assert len(answers) == (1 if left == b"%" else 0)
  with answer_log.AnswerLog(other, RUN) as theirs:
    theirs.add([(key("a"), {"text": "A"}), (key("b"), {"text": "\u00e4"})])
  assert other.read_bytes() == whole


def test_a_fault_on_disk_is_no_answer_until_it_is_confirmed(tmp_path):
  path = tmp_path / "answers.jsonl"
  fault = {"text": "", "score": 0.0, "fault": "missing"}
  with answer_log.AnswerLog(path, RUN) as answers:
    answers.add([(key(name), fault) for name in "abc"])
    assert key("a") in answers and answers.fault(key("a")) is None
  before = path.read_bytes()
  with answer_log.AnswerLog(path, RUN) as answers:
    assert not len(answers) and answers.fault(key("a")) == fault
    answers.confirm([key("a")])
    answers.add([(key("b"), fault)])
    assert answers[key("a")] == answers[key("b")] == fault
    assert path.read_bytes() == before  # Both are there already.
    answers.add([(key("c"), {"text": "C", "score": 1.0})])
  # The last line about a question counts.
  with answer_log.AnswerLog(path, RUN) as answers:
    assert answers[key("c")]["text"] == "C" and len(answers) == 1
    answers.confirm_all()
    assert len(answers) == 3 and answers[key("a")] == fault


def test_an_answer_of_any_process_goes_before_a_fault(tmp_path):
  mine, other = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
  with answer_log.AnswerLog(mine, RUN) as answers:
    answers.add([(key("a"), {"fault": "missing"})])
  with answer_log.AnswerLog(other, RUN) as answers:
    answers.add([(key("a"), {"text": "A"})])
  for first, second in ((mine, other), (other, mine)):
    with answer_log.AnswerLog(first, RUN) as answers:
      answers.look([second])
      assert answers[key("a")] == {"text": "A"}
      assert answers.fault(key("a")) is None


def test_answers_know_where_they_were_computed(tmp_path):
  path = tmp_path / "answers.jsonl"
  gpu, cpu = {"device": "gpu X"}, {"device": "cpu"}

  def add(name, environment):
    with answer_log.AnswerLog(path, RUN, environment=environment) as answers:
      answers.add([(key(name), {})])

  # A second process on the same machine leaves no trace.
  for name, environment in zip("abcd", (gpu, gpu, cpu, gpu), strict=True):
    add(name, environment)
  lines = lines_of(path)
  assert lines[0] == {"run": RUN, "environment": gpu}
  assert [sorted(line) == ["environment"] for line in lines[1:]] == [
    False,
    False,
    True,
    False,
    True,
    False,
  ]
  with answer_log.AnswerLog(
    tmp_path / "mine.jsonl", RUN, environment=cpu
  ) as answers:
    answers.look([path])
    assert answers.environments(map(key, "ab")) == [gpu]
    assert answers.environments([key("c")]) == [cpu]
    assert answers.environments(map(key, "abcd")) == [cpu, gpu]
    answers.add([(key("e"), {})])
    assert answers.environments([key("e")]) == [cpu]
  # Nothing is added by looking at a file.
  before = path.read_bytes()
  answer_log.AnswerLog(path, RUN, environment={"device": "tpu"}).close()
  assert path.read_bytes() == before


def test_a_header_tells_the_run_of_a_file(tmp_path):
  path = tmp_path / "answers.jsonl"
  with answer_log.AnswerLog(path, RUN) as answers:
    # While it is open.
    assert answer_log.header(path) == RUN
    answers.add([(key("a"), {"text": "A"})])
  assert answer_log.header(path) == RUN
  for cut in (b"", b'{"run": {"check'):
    path.write_bytes(cut)
    assert answer_log.header(path) == {}
  for damaged in (b"{\n", b"[]\n", b'{"method": "random"}\n', b"\xff\n"):
    path.write_bytes(damaged)
    assert answer_log.header(path) == {}


MACHINES = [{"device": "gpu X"}, {"device": "cpu"}]


@pytest.fixture
def of_two_machines(tmp_path):
  """Returns (path of a ledger, its bytes, its answers)."""
  path = tmp_path / "answers.jsonl"
  for machine, names in zip(MACHINES, ("abc", "de"), strict=True):
    with answer_log.AnswerLog(path, RUN, environment=machine) as answers:
      answers.add(
        (key(name), {"text": name, "score": 0.5, "kept": [1, 2]})
        for name in names
      )
  return path, path.read_bytes(), dict(answers)


def changed_bytes(data, count, seed):
  """Yields (place, data with one other bit there); few in the header."""
  rng, first = np.random.default_rng(seed), data.index(b"\n") + 1
  places = [*rng.integers(first, len(data), count), *rng.integers(0, first, 10)]
  for place in places:
    changed = bytearray(data)
    changed[place] ^= 1 << int(rng.integers(8))
    yield place, bytes(changed)


def check_answers(answers, expected, place, first):
  """Checks that what was read is right; returns the keys that were lost."""
  assert answers.items() <= expected.items()
  lost = expected.keys() - answers.keys()
  # A line's end joins two of them; one line is about the machine.
  assert len(lost) <= (2 if place >= first else 5)
  for name in "abcde":
    found = answers.environments([key(name)])
    if key(name) in answers and (found or name in "abc"):
      assert found == [MACHINES[name in "de"]]
  return lost


def test_two_thousand_changed_bytes_are_found(of_two_machines, caplog):
  path, data, expected = of_two_machines
  first = data.index(b"\n") + 1
  for place, changed in changed_bytes(data, 2000, seed=0):
    path.write_bytes(changed)
    caplog.clear()
    answers = answer_log.AnswerLog(None, RUN)
    answers.look([path])
    lost = check_answers(answers, expected, place, first)
    # A last line without an end may be one that is being written.
    assert "damaged lines" in caplog.text or lost == {key("e")}


def test_what_a_changed_byte_held_is_asked_again(of_two_machines, caplog):
  path, data, expected = of_two_machines
  first, aside = data.index(b"\n") + 1, f"{path}.damaged"
  for place, changed in changed_bytes(data, 60, seed=1):
    path.write_bytes(changed)
    caplog.clear()
    machine = MACHINES[0]
    with answer_log.AnswerLog(path, RUN, environment=machine) as answers:
      lost = check_answers(answers, expected, place, first)
      answers.add((k, expected[k]) for k in sorted(lost))
    assert sum(aside in told for told in caplog.messages) == 1
    with open(aside, "rb") as file:
      assert file.read().rstrip(b"\n") in changed
    os.remove(aside)
    # The rest stands where it stood, and all of it is sound.
    caplog.clear()
    with answer_log.AnswerLog(path, RUN) as answers:
      assert answers == expected
    assert not caplog.messages


def test_answers_of_an_earlier_version_go_on(tmp_path, caplog):
  path = tmp_path / "answers.jsonl"
  old = [{"run": RUN}, key("a")._asdict() | {"text": "A"}]
  text = "".join(json.dumps(line, sort_keys=True) + "\n" for line in old)
  path.write_text(text)
  with answer_log.AnswerLog(path, RUN) as answers:
    assert answers == {key("a"): {"text": "A"}}
    answers.add([(key("b"), {"text": "B"})])
  [told] = caplog.messages
  assert "2 lines have no checksum" in told
  assert path.read_text().startswith(text)
  with answer_log.AnswerLog(path, RUN) as answers:
    assert len(answers) == 2


def test_a_full_disk_loses_no_answer(tmp_path):
  path = tmp_path / "answers.jsonl"
  with answer_log.AnswerLog(path, RUN) as answers:
    answers.add([(key("a"), {"text": "A"})])
    before = path.read_bytes()
    with disks.no_file_above(len(before) + 30):
      with pytest.raises(errors.UserError, match="free some space"):
        answers.add([(key("b"), {"text": "B"})])
    assert key("b") not in answers and path.read_bytes() == before
    answers.add([(key("b"), {"text": "B"})])
  with answer_log.AnswerLog(path, RUN) as answers:
    assert len(answers) == 2


def test_damage_of_another_ledger_is_told_and_left_to_its_process(
  tmp_path, caplog
):
  mine, other = tmp_path / "mine.jsonl", tmp_path / "other.jsonl"
  with answer_log.AnswerLog(other, RUN) as theirs:
    theirs.add([(key(name), {"text": name}) for name in "ab"])
  lines = other.read_bytes().splitlines(keepends=True)
  for damaged, count in (([lines[0], b"\xff\n", lines[2]], 1), (lines[1:], 0)):
    other.write_bytes(b"".join(damaged))
    caplog.clear()
    with answer_log.AnswerLog(mine, RUN) as answers:
      answers.look([other])
      assert len(answers) == count
    assert "damaged lines; what they held is asked again" in caplog.text
    assert other.read_bytes() == b"".join(damaged)
