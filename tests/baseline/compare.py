"""Runs the fixed small run again and compares it with a recorded one.

python -m tests.baseline.compare
python -m tests.baseline.compare --parts fixed,qwen --allow_differing=0.003
python -m tests.baseline.compare --found FILE

Prints how many values of each section differ, and where the first one does.
Exits with 1 if more of a section differ than are allowed, or if a section, row
or value is there on one side only. Without --found, which names the file of a
run that was recorded before, the run is computed here.
"""

import argparse
import base64
import json
import math
import pathlib
import sys
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

BASELINE = pathlib.Path(__file__).parent / "baseline.json"
# What the text of a set of indices begins with; its bits follow, in base 64.
SET = "set:"
_ABSENT = "(absent)"


class Outcome(NamedTuple):
  """How two recordings of a section compare.

  Attributes:
    section: its name.
    compared: number of values; elements of lists and sets are counted apart.
    differing: how many of them differ.
    absent: how many of these are there on one side only.
    first: where the first difference is, "" if there is none.
  """

  section: str
  compared: int
  differing: int
  absent: int
  first: str

  def passes(self, allow_differing: float) -> bool:
    """Returns whether at most that share differs and nothing is absent."""
    return not self.absent and (
      self.differing <= allow_differing * self.compared
    )


def compare(
  recorded: Mapping[str, Any],
  found: Mapping[str, Any],
  *,
  tolerance: float = 0.0,
) -> list[Outcome]:
  """Returns the outcome of each section of either side.

  Args:
    recorded: {section: {row: {name: value}}}; a value is a text, a number, or
      a list of these. A text that begins with `SET` is a set of indices.
    found: likewise.
    tolerance: relative difference of numbers that counts as none.
  """
  out = []
  for section in recorded | found:
    sides = [dict(_flat(side.get(section, {}))) for side in (recorded, found)]
    first, compared, differing, absent = "", 0, 0, 0
    for place in sides[0] | sides[1]:
      here, there = (side.get(place, _ABSENT) for side in sides)
      count, different = _count(here, there, tolerance)
      compared += count
      if different:
        differing += different
        absent += _ABSENT in (here, there)
        first = first or f"{', '.join(place)}: {_difference(here, there)}"
    if not compared:
      first, absent = "empty", 1
    out.append(Outcome(section, compared, differing, absent, first))
  return out


def _flat(rows) -> Iterator[tuple[tuple[str, ...], Any]]:
  """Yields ((row, name, place in a list), value)."""
  for row, values in rows.items():
    for name, value in values.items():
      if not isinstance(value, list):
        yield (row, name), value
        continue
      for place, one in enumerate(value):
        yield (row, name, str(place)), one


def indices(text: str) -> set[int]:
  """Returns the indices of a text that begins with `SET`."""
  bits = base64.b64decode(text.removeprefix(SET))
  return {
    8 * place + bit
    for place, byte in enumerate(bits)
    for bit in range(8)
    if byte >> (7 - bit) & 1
  }


def _count(here, there, tolerance) -> tuple[int, int]:
  """Returns how many values two entries are, and how many differ."""
  if _are_sets(here, there):
    a, b = indices(here), indices(there)
    return max(len(a), len(b)), max(len(a - b), len(b - a))
  if here == there:
    return 1, 0
  numbers = all(isinstance(value, (int, float)) for value in (here, there))
  same = numbers and (
    math.isclose(here, there, rel_tol=tolerance, abs_tol=tolerance)
  )
  return 1, int(not same)


def _are_sets(*values) -> bool:
  return all(isinstance(v, str) and v.startswith(SET) for v in values)


def _difference(here, there) -> str:
  """Returns what differs; of indices only those on one side."""
  if not _are_sets(here, there):
    return f"recorded {here!r}, found {there!r}"
  a, b = indices(here), indices(there)
  return f"recorded alone {sorted(a - b)}, found alone {sorted(b - a)}"


def table(outcomes, allow_differing: float) -> str:
  """Returns a line for each section, failures marked."""
  rows = [("section", "values", "differ", "first difference")]
  for one in outcomes:
    mark = "" if one.passes(allow_differing) else "FAILED "
    shown = [one.section, str(one.compared), str(one.differing)]
    rows.append((*shown, mark + one.first[:200]))
  widths = [max(len(row[i]) for row in rows) for i in range(3)]
  return "\n".join(
    f"{name:<{widths[0]}}  {n:>{widths[1]}}  {d:>{widths[2]}}  {first}".rstrip()
    for name, n, d, first in rows
  )


def machine_differences(recorded, here) -> list[str]:
  """Returns the facts in which two machines differ, one line each."""
  return [
    f"{name}: recorded with {recorded.get(name, _ABSENT)}, here"
    f" {here.get(name, _ABSENT)}"
    for name in recorded | here
    if recorded.get(name) != here.get(name)
  ]


def read(path) -> dict[str, Any]:
  """Returns a recorded file."""
  return json.loads(pathlib.Path(path).read_text(encoding="utf-8"))


def main(argv=None) -> int:
  """Compares as the arguments say; returns the exit code."""
  # The run's imports take seconds and are of no use to two files.
  from tests.baseline import record

  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
  parser.add_argument("--baseline", default=BASELINE, help="Recorded file.")
  parser.add_argument("--found", help="File to compare, instead of running.")
  parser.add_argument("--out", help="File that keeps what was computed.")
  parser.add_argument(
    "--parts",
    type=record.parts_of,
    default="",
    help="Comma-separated; default all.",
  )
  parser.add_argument(
    "--allow_differing",
    type=float,
    default=0.0,
    help="Share of a section's values that may differ.",
  )
  parser.add_argument(
    "--tolerance",
    type=float,
    default=0.0,
    help="Relative difference of numbers that counts as none.",
  )
  arguments = parser.parse_args(argv)
  for path in filter(None, (arguments.baseline, arguments.found)):
    if not pathlib.Path(path).is_file():
      parser.error(f"there is no file {path}; `record` writes one")
  recorded = read(arguments.baseline)
  if arguments.found:
    found = read(arguments.found)
  else:
    found = record.record(arguments.parts)
  if arguments.out:
    record.write(arguments.out, found)
  sides = [
    {
      section: rows
      for section, rows in side["sections"].items()
      if section.partition("/")[0] in arguments.parts
    }
    for side in (recorded, found)
  ]
  outcomes = compare(*sides, tolerance=arguments.tolerance)
  print(f"recorded at {recorded['commit']}, found at {found['commit']}")
  for line in machine_differences(recorded["machine"], found["machine"]):
    print(f"bits are not promised here: {line}")
  print(table(outcomes, arguments.allow_differing))
  failed = [x for x in outcomes if not x.passes(arguments.allow_differing)]
  print(f"{len(failed)} of {len(outcomes)} sections failed")
  return 1 if failed or not outcomes else 0


if __name__ == "__main__":
  sys.exit(main())
