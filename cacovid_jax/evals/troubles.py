"""What did not go as asked, so that nothing is dropped silently."""

from collections.abc import Mapping
from typing import Any

# Listed one by one up to here; results.json holds all of them.
_MOST = 100
_LEFT_OUT = {
  "bad_rows": "Rows that could not be used",
  "other_rows": "Rows that are no part of the benchmark's score",
  "not_there": "Files of the benchmark that are not there",
}


def listed(out: Mapping[str, Any]) -> list[dict[str, Any]]:
  """Returns tables of what could not be run, read or understood.

  Each has a `title`, a `note`, `columns` and `rows` of words; those without
  rows are left out.
  """
  tables = [
    _cells(out),
    _clips(out),
    *_left_out(out),
    _counts(
      out,
      "num_fallbacks",
      "Answers in which no option could be read",
      "The rule of scoring guesses one for them; all seeds together.",
      lambda count: f"{count:g}",
    ),
    _counts(
      out,
      "forced",
      "Rules that were left to stay within the budget",
      "Share of the questions for which a method kept other tokens than its"
      " rule asks for.",
      lambda share: f"{100 * share:.1f} %",
    ),
  ]
  return [table for table in tables if table["rows"]]


def _cells(out):
  rows = []
  for name, ratio, cell in _all(out):
    if cell["status"] != "ok":
      lowest = cell.get("minimum_ratio")
      least = "" if lowest is None else f"{100 * lowest:g} %"
      rows.append((name, _percent(ratio), least, cell["status"]))
  return _table(
    "Cells that could not be run",
    "The other cells are not touched by these.",
    ("method", "kept", "least possible", "reason"),
    rows,
  )


def _clips(out):
  rows = [
    (entry["video"], str(entry["questions"]), entry["reason"])
    for entry in out["unreadable"]
  ]
  return _table(
    "Clips that could not be used",
    "Their questions count as wrong, for every method.",
    ("clip", "questions", "reason"),
    rows,
  )


def _left_out(out):
  for kind, found in out.get("left_out", {}).items():
    if isinstance(found, Mapping):
      rows = [(_words(name), _words(value)) for name, value in found.items()]
      columns = ("what", "how many")
    else:
      entries = found if isinstance(found, (list, tuple)) else [found]
      rows = [(_words(entry),) for entry in entries if entry]
      columns = ("what",)
    title = _LEFT_OUT.get(kind, f"Left out: {kind.replace('_', ' ')}")
    note = "Not asked, and not among the questions counted above."
    yield _table(title, note, columns, rows)


def _counts(out, field, title, note, words):
  cells = [("vanilla", None, out["vanilla"]), *_all(out)]
  rows = [
    (name, _percent(ratio) if ratio else "100 %", words(cell[field]))
    for name, ratio, cell in cells
    if cell.get(field)
  ]
  return _table(title, note, ("method", "kept", "how many"), rows)


def _table(title, note, columns, rows):
  count = len(rows)
  if count > _MOST:
    note += f" The first {_MOST} of {count}; results.json has all of them."
  return {
    "title": title,
    "note": note,
    "columns": columns,
    "rows": rows[:_MOST],
    "count": count,
  }


def _all(out):
  """Yields (name, ratio, cell) of every row and column."""
  for group in ("methods", "oracles"):
    for name, row in out[group].items():
      for ratio, cell in row.items():
        yield name, ratio, cell


def _percent(ratio: str) -> str:
  return f"{100 * float(ratio):g} %"


def _words(value: Any) -> str:
  """Returns a JSON value as a person would write it."""
  if isinstance(value, Mapping):
    return ", ".join(f"{key}: {_words(part)}" for key, part in value.items())
  if isinstance(value, (list, tuple)):
    return ": ".join(map(_words, value))
  return str(value)
