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
  cells = [
    (name, ratio, cell)
    for group in ("methods", "oracles")
    for name, row in out[group].items()
    for ratio, cell in row.items()
  ]
  counted = [("vanilla", "1", out["vanilla"]), *cells]

  tables = [
    _table(
      "Cells that could not be run",
      "The other cells are not touched by these.",
      ("method", "kept", "least possible", "reason"),
      [
        (name, _percent(ratio), _percent(cell.get("minimum_ratio")),
         cell["status"])
        for name, ratio, cell in cells
        if cell["status"] != "ok"
      ],
    ),
    _table(
      "Clips that could not be used",
      "Their questions count as wrong, for every method.",
      ("clip", "questions", "reason"),
      [
        (entry["video"], str(entry["questions"]), entry["reason"])
        for entry in out["unreadable"]
      ],
    ),
    *(_left_out(*item) for item in out.get("left_out", {}).items()),
    _table(
      "Answers in which no option could be read",
      "The rule of scoring guesses one for them; all seeds together.",
      ("method", "kept", "how many"),
      _told(counted, "num_fallbacks", "{:g}".format),
    ),
    _table(
      "Rules that were left to stay within the budget",
      "Share of the questions for which a method kept other tokens than its"
      " rule asks for.",
      ("method", "kept", "how many"),
      _told(counted, "forced", lambda share: f"{100 * share:.1f} %"),
    ),
  ]  # fmt: skip
  return [table for table in tables if table["rows"]]


def _told(counted, name, form):
  return [
    (method, _percent(ratio), form(cell[name]))
    for method, ratio, cell in counted
    if cell.get(name)
  ]


def _left_out(kind, found):
  if isinstance(found, Mapping):
    rows = [(_words(name), _words(value)) for name, value in found.items()]
    columns = ("what", "how many")
  else:
    entries = found if isinstance(found, (list, tuple)) else [found]
    rows, columns = [(_words(entry),) for entry in entries if entry], ("what",)
  title = _LEFT_OUT.get(kind, f"Left out: {kind.replace('_', ' ')}")
  note = "Not asked, and not among the questions counted above."
  return _table(title, note, columns, rows)


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


def _percent(ratio) -> str:
  return "" if ratio is None else f"{100 * float(ratio):g} %"


def _words(value: Any) -> str:
  """Returns a JSON value as a person would write it."""
  if isinstance(value, Mapping):
    return ", ".join(f"{key}: {_words(part)}" for key, part in value.items())
  if isinstance(value, (list, tuple)):
    return ": ".join(map(_words, value))
  return str(value)
