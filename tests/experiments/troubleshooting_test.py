"""The guide quotes errors as the package words them, and its code runs."""

import ast
import json
import pathlib
import re
import subprocess
import sys
import textwrap

ROOT = pathlib.Path(__file__).parent.parent.parent
GUIDE = ROOT / "docs" / "troubleshooting.md"
TEXT = GUIDE.read_text(encoding="utf-8")
QUOTED = re.findall(r"^error: (.+)$", TEXT, re.M)


def worded():
  """Returns all texts of the package; … stands for what is filled in."""
  texts = [(ROOT / "Makefile").read_text(encoding="utf-8")]
  for path in (ROOT / "cacovid_jax").rglob("*.py"):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
      if isinstance(node, ast.JoinedStr):
        parts = [getattr(part, "value", "") for part in node.values]
        parts = [p if isinstance(p, str) else "…" for p in parts]
        texts.append("".join(parts))
      elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        texts.append(node.value)
  return texts


def occurs(quoted, texts):
  """Returns whether one text holds the quoted words, in this order."""
  return any(quoted in text for text in texts)


def test_every_quoted_error_is_in_the_source():
  assert len(QUOTED) > 15
  texts = worded()
  missing = [line for line in QUOTED if not occurs(line, texts)]
  assert not missing


def test_the_check_notices_another_wording():
  texts = worded()
  assert occurs("…: columns … are missing (it has …)", texts)
  assert not occurs("…: columns … are gone (it has …)", texts)


def test_the_comparison_of_frames(tmp_path):
  code = re.search(r"```python\n(.*?)```", TEXT, re.S)[1]
  (tmp_path / "compare.py").write_text(textwrap.dedent(code))

  def line(name, **fields):
    same = {"content": "c", "num_frames": 9, "indices": [0, 8]}
    return {"video": name, "frame_hash": "h", **same, **fields}

  runs = {
    "first": [line(name) for name in "abcd"],
    "second": [
      line("a"),
      line("b", frame_hash="x"),
      line("c", indices=[0, 4], frame_hash="y"),
      line("e"),
    ],
  }
  for name, lines in runs.items():
    text = "".join(json.dumps(x) + "\n" for x in [{"frames": {}}, *lines])
    (tmp_path / name).write_text(text)
  done = subprocess.run(
    [sys.executable, "compare.py", "first", "second"],
    cwd=tmp_path,
    capture_output=True,
    text=True,
    check=True,
  )
  assert done.stdout.splitlines() == [
    "b: frame_hash differs",
    "c: indices differs",
    "d: content differs",
    "e: content differs",
  ]
