"""Whatever ends a command is one line, with the path of the full log."""

import os
import pathlib
import re
import subprocess
import sys
import textwrap

import pytest

from cacovid_jax import errors

_MAIN = textwrap.dedent("""
  import errno
  from cacovid_jax import command, errors
  made = command.Command("", {"workdir": command.Flag("Where.")}, config="none",
                         num_arguments=1)
  def main(args):
    kind = args.arguments[0]
    if kind == "full":
      raise OSError(errno.ENOSPC, "No space left on device", "/data/x.bin")
    if kind == "bare":
      raise OSError(errno.EROFS, "Read-only file system")
    if kind == "odd":
      raise ZeroDivisionError("one\\ntwo")
    if kind in ("memory", "kernel", "type"):
      import jax
      with errors.during("training", "lower this"):
        with errors.during("reading", "lower that"):
          if kind == "type":
            raise NotImplementedError("Q must be BF16 or FP16")
          raise jax.errors.JaxRuntimeError({
            "memory": "RESOURCE_EXHAUSTED: Out of memory while trying to"
                      " allocate 8053063680 bytes.",
            "kernel": "UNIMPLEMENTED: no such call",
          }[kind])
    if kind == "mine":
      raise errors.UserError("mend it")
    if kind == "exit":
      raise SystemExit(143)
    if kind == "stop":
      raise KeyboardInterrupt
  made.run(main)
""")


def _run(*arguments, **environment):
  return subprocess.run(
    [sys.executable, "-c", _MAIN, *arguments],
    capture_output=True,
    text=True,
    check=False,
    env={**os.environ, **environment},
  )


def test_a_full_disk_is_one_line(tmp_path):
  done = _run("full", f"--workdir={tmp_path}")
  log = tmp_path / "error.log"
  assert done.stderr == (
    "error: /data/x.bin: No space left on device; free some space and go on:"
    f" what was written before is still there (full log: {log})\n"
  )
  assert done.returncode == 2
  text = log.read_text()
  assert "Traceback" in text and "No space left on device" in text


def test_an_error_nobody_foresaw_is_one_line(tmp_path):
  done = _run("odd", TMPDIR=str(tmp_path))
  told = re.fullmatch(
    r"error: ZeroDivisionError: one two \(full log: (.*)\)\n", done.stderr
  )
  assert told and done.returncode == 70, done.stderr
  log = pathlib.Path(told[1])
  assert log.parent == tmp_path and "ZeroDivisionError" in log.read_text()


@pytest.mark.parametrize(
  ("words", "asked"),
  [
    ("Failed to allocate request for 2.50GiB (2684354560B)", "2.50 GiB"),
    ("Allocation of 512.00MiB exceeds the memory", "512.00 MiB"),
    ("Ran out of memory in memory space hbm", "more"),
  ],
)
def test_what_was_asked_for_is_told(words, asked):
  error = type("XlaRuntimeError", (RuntimeError,), {})
  told = errors._of_device(error(f"RESOURCE_EXHAUSTED: {words}."))
  assert f"while computing ({asked} asked for); spread the weights" in told
  assert not errors._of_device(error("INTERNAL: a bug"))


_OTHER = "set config.model.backend=xla, or another config.model.dtype"
_CANNOT = "this device cannot do what is asked while reading"


@pytest.mark.parametrize(
  ("kind", "told"),
  [
    (
      "memory",
      "the device is out of memory while reading (7.5 GiB asked for); lower"
      " that",
    ),
    ("kernel", f"{_CANNOT}: UNIMPLEMENTED: no such call; {_OTHER}"),
    ("type", f"{_CANNOT}: Q must be BF16 or FP16; {_OTHER}"),
  ],
)
def test_what_the_device_refuses_names_stage_and_remedy(tmp_path, kind, told):
  """The innermost stage counts."""
  done = _run(kind, f"--workdir={tmp_path}")
  log = tmp_path / "error.log"
  assert done.stderr.splitlines()[-1] == f"error: {told} (full log: {log})"
  assert done.returncode == 2 and "Traceback" in log.read_text()


def test_a_workdir_that_cannot_hold_the_log_is_named(tmp_path):
  gone = tmp_path / "gone"
  done = _run("bare", f"--workdir={gone}", TMPDIR=str(tmp_path))
  assert done.stderr.startswith(
    f"error: {gone}: Read-only file system; see to its folder and permissions,"
    " or choose another place (full log: "
  )
  assert done.returncode == 2 and not gone.exists()


def test_a_long_line_loses_its_middle():
  line = errors.one_line(ValueError("first " + "n" * 10_000 + " last"))
  assert line.startswith("first n") and line.endswith("n last")
  assert " ... " in line and len(line) < 2100


@pytest.mark.parametrize(
  ("kind", "code", "told"),
  [("mine", 2, "error: mend it\n"), ("exit", 143, ""), ("fine", 0, "")],
)
def test_what_is_foreseen_leaves_no_log(tmp_path, kind, code, told):
  done = _run(kind, f"--workdir={tmp_path}")
  assert (done.returncode, done.stderr) == (code, told)
  assert not list(tmp_path.iterdir())


def test_an_interrupt_and_the_switch_are_pythons_own(tmp_path):
  stopped = _run("stop", f"--workdir={tmp_path}")
  assert stopped.returncode in (130, -2)
  done = _run("odd", f"--workdir={tmp_path}", CACOVID_TRACEBACK="1")
  assert done.returncode == 1 and "Traceback" in done.stderr
  assert not list(tmp_path.iterdir())
