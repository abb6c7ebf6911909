"""How far own numbers lie from the paper's, and what may be called the same.

The answers from all tokens move by points with the decoder, the prompt and
the versions of libraries. A compressed row says something of the paper's only
where they agree, so that is checked first. Accuracies are per cent, keyed by
`paper.COLUMNS` and "average".
"""

from collections.abc import Mapping, Sequence
from typing import Any

from cacovid_jax import errors
from cacovid_jax.evals import paper

TOLERANCE = 1.0


def check_tolerance(tolerance: float) -> float:
  """Returns the points that may lie between two runs of one thing, checked."""
  if not 0 <= tolerance < float("inf"):
    raise errors.UserError(
      f"tolerance {tolerance:g}: give a number of points from 0 up, such as 1"
    )
  return tolerance


def compare(
  own: Mapping[str, float], reported: Mapping[str, float], tolerance: float
) -> dict[str, dict[str, Any]]:
  """Returns, by column that both have: own, paper, difference and within.

  Args:
    own: accuracies of a row.
    reported: those of the paper's row.
    tolerance: points.
  """
  out = {}
  for column, value in reported.items():
    if column not in own:
      continue
    # Tables have one decimal; so has what they are compared by.
    difference = round(round(own[column], 1) - value, 1)
    out[column] = {
      "own": round(own[column], 4),
      "paper": value,
      "difference": difference,
      "within": abs(difference) <= tolerance,
    }
  return out


def vanilla(
  model: str | None, own: Mapping[str, float], tolerance: float
) -> dict[str, Any]:
  """Returns the `drift` section of results.json.

  Args:
    model: key of `paper.MODELS`, None for a model that the paper has not.
    own: accuracies of answers from all tokens.
    tolerance: points.
  """
  row = paper.row(model, paper.VANILLA, 1.0)
  columns = compare(own, row.reported(), tolerance) if row else {}
  return {
    "model": model and paper.MODELS[model].name,
    "source": paper.SOURCE,
    "tolerance": tolerance,
    "columns": columns,
    "worst": max(
      (abs(entry["difference"]) for entry in columns.values()), default=None
    ),
  }


def reproduced(
  found: Mapping[str, Any],
  row: paper.Row | None,
  own: Mapping[str, float],
  obstacles: Sequence[str] = (),
) -> bool | str:
  """Returns whether a row says what the paper's says: True, False, or why not.

  Args:
    found: drift of the answers from all tokens, of `vanilla`.
    row: the paper's; None if it has none.
    own: accuracies of our row.
    obstacles: what makes any comparison void: other settings, questions that
      were not asked.
  """
  if row is None:
    return "not in the paper"
  if obstacles:
    return obstacles[0]
  tolerance = found["tolerance"]
  if found["worst"] is None:
    return "no column of the paper's vanilla was measured"
  if found["worst"] > tolerance:
    return (
      f"vanilla off by {found['worst']:.1f} points (tolerance {tolerance:.1f})"
    )
  columns = compare(own, row.reported(), tolerance)
  return bool(columns) and all(entry["within"] for entry in columns.values())
