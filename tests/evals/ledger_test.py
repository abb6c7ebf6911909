"""Ledgers are locked, and those of others can be read (see runner_test)."""

import errno
import json
import subprocess
import sys

import pytest

from cacovid_jax import errors
from cacovid_jax.evals import ledger

RUN = {"checkpoint": "0"}


def key(question, method="random"):
  return ledger.Key(method, 0.1, 0, question)


def test_one_process_at_a_time(tmp_path):
  path = tmp_path / "answers.jsonl"
  program = (
    "import sys\n"
    "from cacovid_jax import errors\n"
    "from cacovid_jax.evals import ledger\n"
    "try:\n"
    f"  ledger.Ledger(sys.argv[1], {RUN!r})\n"
    "except errors.UserError as error:\n"
    "  print(error)\n"
  )

  def another():
    run = [sys.executable, "-c", program, str(path)]
    return subprocess.run(run, capture_output=True, text=True, check=True)

  with ledger.Ledger(path, RUN) as answers:
    answers.add([(key("q"), {"score": 1.0})])
    before = path.read_bytes()
    said = another().stdout
    assert f"another process is writing to {path}" in said
    assert said.count("\n") == 1
    assert path.read_bytes() == before
    # The remedy is the caller's: not every command has --shard.
    with open(path, "ab") as file:
      with pytest.raises(errors.UserError, match="wait for it, or stop$"):
        ledger.lock(file, path, mend="or stop")
  assert another().stdout == ""
  # What is closed can still be looked up.
  assert answers[key("q")] == {"score": 1.0}


def test_a_refused_file_is_not_kept_locked(tmp_path):
  path = tmp_path / "answers.jsonl"
  ledger.Ledger(path, RUN).close()
  for _ in range(2):
    with pytest.raises(errors.UserError, match="differs in checkpoint"):
      ledger.Ledger(path, {"checkpoint": "1"})
  ledger.Ledger(path, RUN).close()


def test_a_file_system_without_locks(tmp_path, monkeypatch):
  def refuse(file, how):
    raise OSError(errno.ENOLCK, "No locks available")

  monkeypatch.setattr(ledger.fcntl, "flock", refuse)
  with ledger.Ledger(tmp_path / "answers.jsonl", RUN) as answers:
    answers.add([(key("q"), {})])
  assert key("q") in answers


def test_answers_of_others_are_known_but_not_copied(tmp_path):
  mine, other = tmp_path / "mine.jsonl", tmp_path / "other.jsonl"
  with ledger.Ledger(other, RUN) as theirs:
    theirs.add([(key("a"), {"text": "A"})])
    before = other.read_bytes()
    with open(other, "ab") as f:
      f.write(b'{"half": ')  # It is being written.
    with ledger.Ledger(mine, RUN) as answers:
      answers.look([mine, other])
      assert answers[key("a")] == {"text": "A"}
      answers.add([(key("a"), {"text": "B"}), (key("b"), {"text": "B"})])
      assert answers[key("a")] == {"text": "A"}
  lines = [json.loads(line) for line in mine.read_text().splitlines()]
  assert [line.get("question") for line in lines] == [None, "b"]
  assert other.read_bytes() == before + b'{"half": '


def test_a_file_without_a_whole_header_starts_anew(tmp_path):
  path = tmp_path / "answers.jsonl"
  path.write_bytes(b'{"run": {"check')
  with ledger.Ledger(path, RUN) as answers:
    assert not len(answers)
  assert json.loads(path.read_text()) == {"run": RUN}
