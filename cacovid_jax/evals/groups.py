"""Accuracies by kind of question, length of clip, and other groups."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

# Groups with an order of their own; others by name.
_ORDER = {"short": 0, "medium": 1, "long": 2}
_TITLES = {"category": "kind of question", "duration": "length of clip"}


@dataclasses.dataclass(frozen=True)
class Facet:
  """One way to group the questions.

  Attributes:
    key: `category`, `duration`, or a name in `by_group`.
    title: in words.
    names: of its groups.
    counts: questions in each.
  """

  key: str
  title: str
  names: Sequence[str]
  counts: Sequence[int]


def facets(out: Mapping[str, Any]) -> list[Facet]:
  """Returns the ways in which results.json groups the questions."""
  vanilla = out["vanilla"]
  keys = ["category", "duration", *vanilla.get("by_group", {})]
  found = []
  for key in keys:
    by_name = _by_name(vanilla, key)
    names = sorted(by_name, key=_place)
    if names:
      counts = [by_name[name]["n"] for name in names]
      title = _TITLES.get(key, key.replace("_", " "))
      found.append(Facet(key, title, names, counts))
  return found


def table(out: Mapping[str, Any], facet: Facet, ratio: str) -> dict[str, Any]:
  """Returns a facet's groups and the accuracies of every row in them."""
  rows = [("vanilla", _values(out["vanilla"], facet))]
  for group in ("methods", "oracles"):
    rows += [
      (name, _values(row[ratio], facet)) for name, row in out[group].items()
    ]
  return {"facet": facet, "rows": rows}


def data(out: Mapping[str, Any], facets: Sequence[Facet]) -> dict[str, Any]:
  """Returns all accuracies by method, ratio and facet, ready for JSON."""
  vanilla = [_values(out["vanilla"], facet) for facet in facets]
  values = {}
  for group in ("methods", "oracles"):
    for name, row in out[group].items():
      values[name] = {
        ratio: [_values(cell, facet) for facet in facets]
        for ratio, cell in row.items()
        if cell["status"] == "ok"
      }
  return {
    "facets": [dataclasses.asdict(facet) for facet in facets],
    "vanilla": vanilla,
    "values": values,
  }


def _by_name(cell, key):
  if key in _TITLES:
    return cell.get(f"by_{key}", {})
  return cell.get("by_group", {}).get(key, {})


def _values(cell, facet) -> list[float | None]:
  by_name = _by_name(cell, facet.key)
  return [by_name.get(name, {}).get("accuracy") for name in facet.names]


def _place(name: str):
  # Lengths in seconds are numbers in a string.
  number = float(name) if name.isdecimal() else 0.0
  return _ORDER.get(name, len(_ORDER)), number, name
