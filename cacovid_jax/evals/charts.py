"""The charts of a report: accuracies, and rewards of a training run.

Colours are those of the page's style sheet.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from cacovid_jax.evals import plots, results

_STRONG = "var(--accent)"
_NUM_COLOURS = 9
# Reward curves of the training metrics: name, title, colour, strong, dashed.
_CURVES = (
  ("reward_token", "token mode, mean", _STRONG, False, False),
  ("reward_token_greedy", "token mode, greedy", _STRONG, True, False),
  ("reward_frame", "frame mode, mean", "var(--c0)", False, False),
  ("reward_frame_greedy", "frame mode, greedy", "var(--c0)", True, False),
  ("reward_content", "content control", "var(--muted)", False, True),
)


def _colours(out) -> dict[str, str]:
  """Returns the CSS colour of each row, the same in every chart."""
  names = [*out["methods"], *out["oracles"]]
  colours = {
    name: f"var(--c{place % _NUM_COLOURS})" for place, name in enumerate(names)
  }
  return colours | {results.REFERENCE: _STRONG}


def _point(x, cell):
  low, high = cell["ci95"]
  return x, 100 * cell["accuracy"], 100 * low, 100 * high


def over_ratio(out: Mapping[str, Any], ratios: Sequence[str]):
  """Returns accuracy over the share of tokens kept; None of one ratio."""
  lines, colours = [], _colours(out)
  for name, row in [*out["methods"].items(), *out["oracles"].items()]:
    points = [
      _point(100 * float(ratio), row[ratio])
      for ratio in sorted(ratios, key=float)
      if row[ratio]["status"] == "ok"
    ]
    if points:
      strong = name == results.REFERENCE
      dashed = name in out["oracles"]
      lines.append(plots.Line(name, points, colours[name], strong, dashed))
  if not lines or len(ratios) < 2:
    return None
  return plots.responsive(
    plots.line_chart,
    lines,
    x_label="video tokens kept (%, logarithmic)",
    y_label="accuracy (%)",
    x_ticks=[
      (100 * float(r), f"{100 * float(r):g}") for r in sorted(ratios, key=float)
    ],
    rules=_levels(out),
    log_x=True,
    most=100,
    # A line of text for each name.
    height=max(460, 18 * (len(lines) + 6)),
  )


def _levels(out):
  """Returns the level of vanilla, then that of guessing where there is one."""
  levels = [plots.Rule("vanilla", 100 * out["vanilla"]["accuracy"])]
  if out["chance"]:
    levels.append(plots.Rule("guessing", 100 * out["chance"]))
  return levels


def over_time(
  out: Mapping[str, Any],
  ratio: str,
  times: Mapping[str, Mapping[str, float]],
):
  """Returns accuracy over the milliseconds of choosing; None without times."""
  colours = _colours(out)
  found = [
    (name, times[name][ratio], row[ratio])
    for name, row in [*out["methods"].items(), *out["oracles"].items()]
    if row[ratio]["status"] == "ok" and ratio in times.get(name, {})
  ]
  # A time of nothing has no place on a logarithmic axis.
  floor = min((time for _, time, _ in found if time > 0), default=None)
  if floor is None:
    return None
  lines = [
    plots.Line(
      name,
      [_point(max(time, floor), cell)],
      colours[name],
      name == results.REFERENCE,
    )
    for name, time, cell in found
  ]
  return plots.responsive(
    plots.point_chart,
    lines,
    x_label="milliseconds to choose (logarithmic)",
    y_label="accuracy (%)",
    rules=_levels(out)[:1],
    most=100,
    height=440,
  )


def rewards(curves: Sequence[Mapping[str, Any]]):
  """Returns the reward curves, smoothed over a twentieth of the run."""
  lines = []
  for name, title, colour, strong, dashed in _CURVES:
    found = [
      (line["step"], line[name])
      for line in curves
      if line.get(name) is not None
    ]
    if len(found) < 2:
      continue
    means = plots.smooth([value for _, value in found], len(found) // 20 or 1)
    points = [
      (step, mean, mean, mean)
      for (step, _), mean in zip(found, means, strict=True)
    ]
    lines.append(plots.Line(title, points, colour, strong, dashed))
  if not lines:
    return None
  last = max(point[0] for line in lines for point in line.points)
  ticks = [x for x in plots.nice_ticks(0, last) if x <= last and x % 1 == 0]
  return plots.responsive(
    plots.line_chart,
    lines,
    x_label="training step",
    y_label="mean reward",
    x_ticks=[(x, f"{x:g}") for x in ticks],
    markers=False,
    height=330,
  )
