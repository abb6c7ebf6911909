"""What a comparison of one system consists of: cases, a table, bars, a picture.

A case with a seed runs every arm on the same data. Figures are ours alone: what
others published stands in the docs.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from cacovid_jax.evals import tables
from cacovid_jax.evals.report import charts

# Arm -> measure -> value.
Arms = Mapping[str, Mapping[str, float]]


class Bar(NamedTuple):
  """What a study is to show, and whether it does."""

  text: str
  value: float
  holds: bool

  @classmethod
  def least(cls, text: str, value: float, bound: float) -> "Bar":
    return cls(f"{text}, at least {bound:g}", value, bool(value >= bound))

  @classmethod
  def most(cls, text: str, value: float, bound: float) -> "Bar":
    return cls(f"{text}, at most {bound:g}", value, bool(value <= bound))


class Outcome:
  """Values of all seeds, by case, arm and measure."""

  def __init__(self, found: Iterable[tuple[str, int, Arms]]):
    """Takes (case, seed, arms) of each cell."""
    self._values: dict[tuple[str, str], dict[str, list[float]]] = {}
    for case, _, arms in found:
      for arm, measures in arms.items():
        row = self._values.setdefault((case, arm), {})
        for name, value in measures.items():
          row.setdefault(name, []).append(value)

  @property
  def rows(self) -> list[tuple[str, str]]:
    """(case, arm) in the order of the cells."""
    return list(self._values)

  def values(self, case: str, arm: str, measure: str) -> list[float]:
    """Returns the values, one for each seed."""
    return self._values[case, arm][measure]

  def mean(self, case: str, arm: str, measure: str) -> float:
    """Returns their mean."""
    return float(np.mean(self.values(case, arm, measure)))

  def gap(self, case: str, arm: str, other: str, measure: str) -> list[float]:
    """Returns the first arm's values less the second's, seed by seed."""
    pair = (self.values(case, one, measure) for one in (arm, other))
    return np.subtract(*pair).tolist()

  def markdown(self) -> str:
    """Returns a table: mean and standard deviation over the seeds."""
    measures = dict.fromkeys(
      name for row in self._values.values() for name in row
    )
    head = ["case", "arm", *measures, "seeds"]
    lines = []
    for (case, arm), row in self._values.items():
      cells = [_told(row.get(name)) for name in measures]
      count = len(next(iter(row.values())))
      lines.append([case, arm, *cells, str(count)])
    return tables.as_markdown(head, lines, range(2, len(head)))

  def by_arm(self, cases: Sequence[str], measure: str, label: str) -> str:
    """Returns a picture: a line per arm of some cases, a dot per seed."""
    values = {
      f"{case}: {arm}" if len(cases) > 1 else arm: row[measure]
      for (case, arm), row in self._values.items()
      if case in cases and measure in row
    }
    return charts.by_name(values, label)


class Study(NamedTuple):
  """A system's comparison."""

  title: str
  cases: Mapping[str, Callable[[int], Arms]]  # Of a seed.
  bars: Callable[[Outcome], list[Bar]]
  shown: tuple[Sequence[str], str, str]  # Arguments of `Outcome.by_arm`.

  def picture(self, outcome: Outcome) -> str:
    """Returns the text of an SVG file."""
    return outcome.by_arm(*self.shown)


def _told(values) -> str:
  if values is None:
    return ""
  mean = f"{np.mean(values):.3f}"
  return mean if len(values) < 2 else f"{mean} ± {np.std(values, ddof=1):.3f}"
