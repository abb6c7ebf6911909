"""Nothing that steers a terminal gets to it, whoever wrote the text."""

import io
import logging
import subprocess
import sys

import pytest
import rich.progress
import rich.table

from cacovid_jax import errors, progress, terminal

# What a terminal does with them, and what is left to be read.
STEERING = [
  ("\x1b[31mred\x1b[0m", "red"),
  ("\x1b[2J\x1b[1;1Hhome", "home"),
  ("\x9b31mred", "red"),
  ("a\x1b]0;title\x07b", "ab"),
  ("a\x1b]52;c;ZXZpbA==\x1b\\b", "ab"),  # Into the clipboard.
  ("a\x1b]8;;http://evil\x1b\\link\x1b]8;;\x1b\\b", "alinkb"),
  ("a\x9d0;title\x9cb", "ab"),
  ("a\x1bP1$r0m\x1b\\b", "ab"),
  ("a\x1b_Gdata\x1b\\b", "ab"),
  ("a\x1bcb", "ab"),  # Reset.
  ("a\x1b(0b", "ab"),
  ("a\x1b]0;never ends", "a0;never ends"),
  ("a\x1b[31", "a31"),
  ("a\x1b", "a"),
  ("over\rwritten\x08\x08", "overwritten"),
  ("a\x00b\x07c\x7fd\x85e", "abcde"),
  ("a\u202etxt.exe\u202c", "atxt.exe"),
  ("\u2066a\u2069", "a"),
  ("\x1b\x1b[31m[31ma", "[31ma"),
  ("half \udcff pair", "half \\udcff pair"),
  ("tab\tand\nline", "tab\tand\nline"),
  ("schön, 漢字, हिन्दी, عربي, 🙂", "schön, 漢字, हिन्दी, عربي, 🙂"),
]


@pytest.mark.parametrize(("text", "shown"), STEERING)
def test_what_is_left_of_a_text(text, shown, capsys):
  assert terminal.plain(text) == shown
  assert terminal.plain(shown) == shown
  terminal.tell(text)
  terminal.tell(text, error=True)
  assert capsys.readouterr() == (shown + "\n", shown + "\n")
  assert errors.one_line(ValueError(text)) == " ".join(shown.split())


def test_every_control_character_goes():
  # C0 and C1 as ECMA-48 lists them, and DEL; each alone.
  for code in (*range(0x20), *range(0x7F, 0xA0)):
    expected = chr(code) if chr(code) in "\t\n" else ""
    assert terminal.plain(f"a{chr(code)}") == f"a{expected}"


def test_openings_without_end_take_no_longer_than_their_length():
  assert terminal.plain("\x9d" * 300_000) == ""
  assert terminal.plain("\x1b]" * 300_000) == ""


def _console(**options):
  file = io.StringIO()
  return terminal.Console(file=file, **options), file


@pytest.mark.parametrize(("text", "shown"), STEERING[:18])
def test_tables_and_lines_of_a_terminal(text, shown):
  console, file = _console(force_terminal=True, width=200, color_system=None)
  table = rich.table.Table("\x1b[31mhead", title=text, caption=text)
  table.add_row(text)
  console.print(table)
  console.print(text)
  out = file.getvalue()
  # Rich takes bells out before, and then the title is left to be read.
  assert (out.count(shown) >= 4 or "\x07" in text) and "head" in out
  assert not any(x in out for x in ("\x1b[2J", "\x1b]", "\x9b", "\x07", "\r"))


def test_markup_and_emoji_are_text():
  console, file = _console(width=60)
  table = rich.table.Table(title="[/b] :smile:")
  table.add_row("[red]a[/]")
  console.print(table)
  console.print("[link=x]a [/nothing]")
  for text in ("[/b] :smile:", "[red]a[/]", "[link=x]a [/nothing]"):
    assert text in file.getvalue()


def test_colours_and_moves_of_our_own_stay():
  console, file = _console(
    force_terminal=True, width=60, color_system="standard", legacy_windows=False
  )
  console.print("a", style="red")
  with rich.progress.Progress(console=console) as bar:
    bar.update(bar.add_task("x", total=2), advance=1)
  assert "\x1b[31ma\x1b[0m" in file.getvalue()
  assert "\x1b[?25l" in file.getvalue()  # Hides the cursor.


def test_a_log_has_a_width_of_its_own():
  assert _console()[0].width == 120
  assert _console(width=33)[0].width == 33


def test_progress(capsys):
  with progress.Progress(3, description="a\x1b[31mb") as bar:
    bar.update(1, note="clip\x1b]0;x\x07.mp4\r")
  assert "ab 1/3" in capsys.readouterr().err


def test_logs(caplog):
  record = logging.LogRecord(
    "n", logging.INFO, "f", 1, "%s: \x1b[2J%d", ("a\x1b[31mb", 3), None
  )
  assert terminal.clean_record(record)
  assert record.getMessage() == "ab: 3"
  wrong = logging.LogRecord("n", logging.INFO, "f", 1, "%d", ("x",), None)
  assert terminal.clean_record(wrong)


_PROGRAM = """
import sys
from absl import flags, logging
import logging as plain_logging
from cacovid_jax import errors

def main(args):
  logging.warning("absl %s", "\\x1b[31mred\\x1b]0;t\\x07")
  plain_logging.getLogger("cacovid_jax.x").info("own %s", "\\x9b31mred")
  raise errors.UserError("no clip \\x1b[2Ja.mp4\\r\\nand more")

errors.run(main, flags.FLAGS)
"""


def test_a_command_that_logs_and_ends_by_a_mistake():
  done = subprocess.run(
    [sys.executable, "-c", _PROGRAM], capture_output=True, text=True
  )
  assert done.returncode == 2 and done.stdout == ""
  assert "absl red" in done.stderr and "own red" in done.stderr
  assert done.stderr.endswith("error: no clip a.mp4 and more\n")
  assert not {"\x1b", "\x9b", "\x07", "\r"} & set(done.stderr)
