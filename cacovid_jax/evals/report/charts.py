"""Charts of a report and of tables: what they show, see `svg` for how."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import markupsafe
import matplotlib
import numpy as np
from matplotlib import ticker

from cacovid_jax.evals import results
from cacovid_jax.evals.report import svg

_NUM_COLOURS = 9
# Reward curves of the training metrics: name, title, colour, strong, dashed.
_CURVES = (
  ("reward_token", "token mode, mean", "accent", False, False),
  ("reward_token_greedy", "token mode, greedy", "accent", True, False),
  ("reward_frame", "frame mode, mean", "c0", False, False),
  ("reward_frame_greedy", "frame mode, greedy", "c0", True, False),
  ("reward_content", "content control", "muted", False, True),
)


class Series(NamedTuple):
  """Named points, joined by a line if they are several."""

  name: str  # Written at the right end of the line, or beside the only point.
  # (x, y), or (x, y, low, high) with an interval; in ascending x.
  points: Sequence[tuple[float, ...]]
  colour: str  # Key of `svg.PALETTE`.
  strong: bool = False  # Drawn heavier, on top.
  dashed: bool = False  # Drawn dashed.
  # Points of somebody else, drawn as open circles.
  reported: Sequence[tuple[float, float]] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chart:
  """Lines, or single points, over one axis."""

  # What is drawn; a chart of none has its levels alone.
  series: Sequence[Series]
  levels: Sequence[tuple[str, float]] = ()  # (name, y) of horizontal lines.
  x_label: str
  y_label: str  # Above the axis.
  x_ticks: Sequence[float] = ()  # Places on the axis; chosen if there are none.
  log_x: bool = False
  # Largest value that y can take, where the axis then ends.
  most: float = np.inf
  # Whether lines have circles and intervals at their points.
  marks: bool = True
  # Whether names stand beside the points, not at the right end.
  beside: bool = False
  height: int = 380

  def page(self) -> markupsafe.Markup:
    """Returns the chart for wide pages, and one with names below for narrow."""
    label = f"{self.y_label} over {self.x_label}"
    wide = svg.as_element(self._draw(1040, self.height), label)
    narrow = svg.as_element(self._draw(360, 280, names=False), label)
    entry = markupsafe.Markup('<li><i style="background:var(--{})"></i>{}</li>')
    key = "".join(entry.format(one.colour, one.name) for one in self.series)
    return markupsafe.Markup(
      f'<div class="wide">{wide}</div><div class="narrow">{narrow}'
      f'<ul class="key">{key}</ul></div>'
    )

  def file(self, title: str) -> str:
    """Returns the text of an SVG file."""
    return svg.as_file(
      self._draw(1040, max(self.height, 440), title=title), "white"
    )

  @matplotlib.rc_context(svg.RC)
  def _draw(self, width, height, names=True, title=""):
    colours = svg.PALETTE
    labels = [
      svg.Label(one.name, *one.points[-1][:2], colours[one.colour], one.strong)
      for one in self.series
      if one.points
    ]
    levels = [svg.Label(n, 0, y, colours["muted"]) for n, y in self.levels]
    at_end = names and not self.beside
    room = max((label.width for label in labels + levels), default=0)
    right = round(20 + room) if at_end else 10
    axes = svg.make_axes(width, height, right, title)
    self._scale(axes, width)
    for label in levels:
      axes.axhline(label.y, color=label.colour, ls=(0, (2, 3)), lw=1, zorder=1)
      if names and self.beside:
        # Below the line where it is the top of the axis.
        shift = (4, 4) if label.y < axes.get_ylim()[1] else (4, -14)
        label.write(axes, (0, label.y), shift, ("axes fraction", "data"))
    for one in sorted(self.series, key=lambda one: one.strong):
      self._draw_series(axes, one)
    if names:
      (svg.write_at_end if at_end else svg.write_beside)(
        axes, labels + levels if at_end else labels
      )
    return axes.figure

  def _scale(self, axes, width):
    points = [p for one in self.series for p in (*one.points, *one.reported)]
    ys = [y for point in points for y in point[1:]]
    ys += [y for _, y in self.levels]
    ticks = svg.nice_ticks(min(ys), min(max(ys), self.most))
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_ylim(ticks[0], ticks[-1])
    xs = np.array([*(x for x, *_ in points), *self.x_ticks] or [1.0])
    low, high = np.array([xs.min(), xs.max()])
    if self.log_x:
      low, high = np.log([low, high])
    # Without given ticks, room for at least one of 1, 2, 5, 10.
    least = 0.0 if self.x_ticks else 1.7
    pad = max(0.03 * (high - low), (least - high + low) / 2) or 1.0
    ends = np.array([low - pad, high + pad])
    if self.log_x:
      axes.set_xscale("log")
      crowded = 3 * (high - low) / np.log(10) > width / 90
      subs = (1,) if crowded else (1, 2, 5)
      axes.xaxis.set_major_locator(ticker.LogLocator(subs=subs))
      ends = np.exp(ends)
    if self.x_ticks:
      axes.set_xticks(self.x_ticks)
    axes.xaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    axes.xaxis.set_minor_locator(ticker.NullLocator())
    axes.set_xlim(*ends)
    style = {"color": svg.PALETTE["muted"], "fontsize": 12}
    axes.set_xlabel(self.x_label, labelpad=5, **style)
    axes.set_title(self.y_label, loc="left", pad=8, **style)

  def _draw_series(self, axes, one):
    style = {"color": svg.PALETTE[one.colour], "zorder": 3 if one.strong else 2}
    xs, ys = [p[0] for p in one.points], [p[1] for p in one.points]
    if len(one.points) > 1:
      width, dash = 2.75 if one.strong else 1.5, (0, (3, 2))
      axes.plot(xs, ys, lw=width, ls=dash if one.dashed else "-", **style)
    if not self.marks:
      return
    top = axes.get_ylim()[1]
    for x, _, *interval in one.points:
      low, high = interval or (0, 0)
      if low != high:
        axes.vlines(x, low, min(high, top), lw=1, alpha=0.45, **style)
    for points, fill in ((one.points, style["color"]), (one.reported, "none")):
      axes.plot(
        [p[0] for p in points], [p[1] for p in points], "o",
        markersize=8 if one.strong else 6, markerfacecolor=fill,
        gid=f"points {svg.drawable(one.name)}", **style,
      )  # fmt: skip


def over_ratio(out: Mapping[str, Any], ratios: Sequence[str]) -> Chart:
  """Returns accuracy over the share of tokens kept, of results.json."""
  rows, series = {**out["methods"], **out["oracles"]}, []
  ratios = sorted(ratios, key=float)
  for name, one in _series(rows).items():
    cells = [(100 * float(ratio), rows[name][ratio]) for ratio in ratios]
    points = [_point(x, c) for x, c in cells if c["status"] == "ok"]
    if points:
      series.append(one._replace(points=points, dashed=name in out["oracles"]))
  guessing = [("guessing", 100 * out["chance"])] if out["chance"] else []
  return Chart(
    series=series,
    levels=[("vanilla", 100 * out["vanilla"]["accuracy"]), *guessing],
    x_label="video tokens kept (%, logarithmic)",
    y_label="accuracy (%)",
    x_ticks=[100 * float(ratio) for ratio in ratios],
    log_x=True,
    most=100,
    # A line of text for each name.
    height=max(460, 18 * (len(series) + 6)),
  )


def over_time(
  out: Mapping[str, Any], times: Mapping[str, Mapping[str, float]]
) -> Chart:
  """Returns accuracy over milliseconds to the first token, where measured.

  `times` are by method, "vanilla" among them, and by ratio as in `out`.
  """
  rows = {**out["methods"], **out["oracles"]}
  known, vanilla = _series(rows), out["vanilla"]
  known["vanilla"] = Series("vanilla", (), "muted")
  series = []
  for name, row in [*rows.items(), ("vanilla", {"1.00": vanilla})]:
    cells = [(time, row[ratio]) for ratio, time in times.get(name, {}).items()]
    points = sorted(_point(time, cell) for time, cell in cells)
    if points:
      series.append(known[name]._replace(points=points))
  return Chart(
    series=series,
    levels=[("all tokens", 100 * vanilla["accuracy"])],
    x_label="milliseconds to the first token (logarithmic)",
    y_label="accuracy (%)",
    log_x=True,
    most=100,
    height=max(460, 18 * (len(series) + 6)),
  )


def rewards(curves: Sequence[Mapping[str, Any]]) -> Chart:
  """Returns the reward curves, smoothed over a twentieth of the run."""
  series = []
  for name, title, *style in _CURVES:
    known = [line for line in curves if line.get(name) is not None]
    if len(known) > 1:
      means = smooth([line[name] for line in known], len(known) // 20 or 1)
      steps = [line["step"] for line in known]
      series.append(Series(title, list(zip(steps, means, strict=True)), *style))
  last = max((one.points[-1][0] for one in series), default=0)
  return Chart(
    series=series,
    x_label="training step",
    y_label="mean reward",
    x_ticks=[x for x in svg.nice_ticks(0, last) if x <= last and x % 1 == 0],
    marks=False,
    height=330,
  )


def averages(out: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
  """Returns an SVG file of the main table's averages, of `tables.main_rows`."""
  vanilla, *rows = rows
  rows = sorted(rows, key=lambda row: float(row["ratio"]))
  series = []
  for name, one in _series(out["average"]["methods"]).items():
    own, papers = (
      [
        (100 * float(row["ratio"]), row[column])
        for row in rows
        if row["method"] == name and row[column] is not None
      ]
      for column in ("accuracy", "paper")
    )
    series.append(one._replace(points=own, reported=papers))
  chart = Chart(
    series=series,
    levels=[("vanilla", vanilla["accuracy"])],
    x_label="video tokens kept (%)",
    y_label=f"average of {len(out['average']['benchmarks'])} (%)",
    x_ticks=sorted({100 * float(row["ratio"]) for row in rows}),
  )
  return chart.file(f"{out['model'] or 'main table'}; open points: the paper")


def lines(points: Mapping[str, Sequence], x: str, y: str, **options) -> Chart:
  """Returns named lines of (x, y) points; x and y are labels."""
  series = [
    Series(name, found, f"c{i % _NUM_COLOURS}")
    for i, (name, found) in enumerate(points.items())
  ]
  levels = [] if series else [("nothing was measured", 0.0)]
  return Chart(series=series, levels=levels, x_label=x, y_label=y, **options)


@matplotlib.rc_context(svg.RC)
def first_token(out: Mapping[str, Any]) -> str:
  """Returns an SVG file of milliseconds to the first token, a bar per row."""
  rows = [row for row in out["rows"] if row["status"] == "ok"]
  title = f"{out['size']}, {out['dtype']}, {out['host']['device']}"
  names = [f"{row['method']}, {row['ratio']:.0%}" for row in rows]
  room = 20 + round(max(map(svg.name_width, names), default=0))
  axes = svg.make_axes(1040, 110 + 22 * len(rows), 10, title, left=room)
  shared = out["tower_ms"] + out["embed_ms"]
  left = np.zeros(len(rows))
  for label, colour, values in (
    ("tower and prompt", "#c7ccd1", [shared] * len(rows)),
    ("choosing tokens", "#e08a1e", [row["compression_ms"] for row in rows]),
    ("prefill", svg.PALETTE["accent"], [row["prefill_ms"] for row in rows]),
  ):
    axes.barh(names, values, left=left, color=colour, label=label, height=0.7)
    left += np.array(values)
  axes.invert_yaxis()
  axes.set_xlabel("milliseconds to the first token")
  axes.legend(frameon=False, loc="lower right")
  return svg.as_file(axes.figure, "white")


@matplotlib.rc_context(svg.RC)
def by_name(values: Mapping[str, Sequence[float]], label: str) -> str:
  """Returns an SVG file: a line per name, with its values and their mean.

  `label` is that of the axis; a vertical line shows the mean of the first name.
  """
  room = 20 + round(max(map(svg.name_width, values), default=0))
  axes = svg.make_axes(1040, 86 + 22 * len(values), 10, left=room)
  axes.invert_yaxis()
  axes.set_yticks(range(len(values)), list(map(svg.short, values)))
  for at, found in enumerate(values.values()):
    if not axes.lines:
      line = {"color": svg.PALETTE["muted"], "ls": (0, (2, 3)), "lw": 1}
      axes.axvline(np.mean(found), **line)
    style = {"color": svg.PALETTE["accent"]}
    axes.plot(found, [at] * len(found), "o", markersize=4, alpha=0.5, **style)
    axes.plot([np.mean(found)], [at], "o", markersize=8, **style)
  axes.set_xlabel(label)
  return svg.as_file(axes.figure, "white")


def smooth(values: Sequence[float], window: int) -> list[float]:
  """Returns running means over the last `window` values."""
  sums = np.concatenate([[0.0], np.cumsum(values)])
  last = np.arange(1, len(sums))
  first = np.maximum(last - window, 0)
  return ((sums[last] - sums[first]) / (last - first)).tolist()


def _series(names) -> dict[str, Series]:
  """Returns series without points, of the same colours in every chart."""
  found = {
    name: Series(name, (), f"c{i % _NUM_COLOURS}")
    for i, name in enumerate(names)
  }
  if (reference := results.REFERENCE) in found:
    found[reference] = Series(reference, (), "accent", strong=True)
  return found


def _point(x, cell):
  return (x, *(100 * value for value in (cell["accuracy"], *cell["ci95"])))
