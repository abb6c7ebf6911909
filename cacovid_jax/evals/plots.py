"""Line charts as inline SVG: no scripts, no files, no network."""

import dataclasses
import math
from collections.abc import Sequence

import markupsafe

_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 176, 14, 40
_LABEL_GAP = 15


@dataclasses.dataclass(frozen=True)
class Line:
  """One named line.

  Attributes:
    name: written at its right end.
    points: (x, y, low, high) in ascending x; low = high = y draws no bar.
    colour: any CSS colour.
    strong: drawn heavier, on top.
    dashed: drawn dashed.
  """

  name: str
  points: Sequence[tuple[float, float, float, float]]
  colour: str
  strong: bool = False
  dashed: bool = False


@dataclasses.dataclass(frozen=True)
class Rule:
  """A horizontal reference line with a name."""

  name: str
  y: float


def line_chart(
  lines: Sequence[Line],
  *,
  x_label: str,
  y_label: str,
  x_ticks: Sequence[tuple[float, str]],
  rules: Sequence[Rule] = (),
  log_x: bool = False,
  markers: bool = True,
  most: float | None = None,
  width: int = 1040,
  height: int = 380,
) -> markupsafe.Markup:
  """Returns an SVG element.

  Args:
    lines: at least one, each with at least one point.
    x_label: below the axis.
    y_label: above the axis.
    x_ticks: (x, text).
    rules: reference lines; the axis includes them.
    log_x: logarithmic x axis.
    markers: draw points and their bars.
    most: largest value that y can take, where the axis then ends.
    width: of the drawing, in CSS pixels.
    height: likewise.
  """
  ys = [y for line in lines for point in line.points for y in point[1:]]
  ys += [rule.y for rule in rules]
  high = max(ys) if most is None else min(max(ys), most)
  y_ticks = nice_ticks(min(ys), high)
  xs = [point[0] for line in lines for point in line.points]
  xs += [x for x, _ in x_ticks]
  warp = math.log if log_x else float
  x_low, x_high = warp(min(xs)), warp(max(xs))
  pad = 0.03 * (x_high - x_low) or 1.0
  x_low, x_high = x_low - pad, x_high + pad
  right, bottom = width - _RIGHT, height - _BOTTOM

  def at_x(x):
    return _LEFT + (warp(x) - x_low) / (x_high - x_low) * (right - _LEFT)

  def at_y(y):
    share = (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
    return bottom - share * (bottom - _TOP)

  out = [
    f'<svg class="chart" viewBox="0 0 {width} {height}" role="img"'
    f' aria-label="{_escape(y_label)} over {_escape(x_label)}">'
  ]
  for tick in y_ticks:
    y = at_y(tick)
    out.append(
      f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{y:.1f}"'
      f' y2="{y:.1f}"/><text class="tick" x="{_LEFT - 8}" y="{y + 4:.1f}"'
      f' text-anchor="end">{tick:g}</text>'
    )
  for x, text in x_ticks:
    out.append(
      f'<text class="tick" x="{at_x(x):.1f}" y="{bottom + 18}"'
      f' text-anchor="middle">{_escape(text)}</text>'
    )
  out.append(
    f'<text class="axis" x="{(_LEFT + right) / 2:.0f}" y="{height - 4}"'
    f' text-anchor="middle">{_escape(x_label)}</text>'
  )
  labels = []
  for rule in rules:
    y = at_y(rule.y)
    out.append(
      f'<line class="rule" x1="{_LEFT}" x2="{right}" y1="{y:.1f}"'
      f' y2="{y:.1f}"/>'
    )
    labels.append((y, rule.name, "var(--muted)", False))
  for line in sorted(lines, key=lambda line: line.strong):
    places = [
      (at_x(x), at_y(y), at_y(low), at_y(min(high, y_ticks[-1])))
      for x, y, low, high in line.points
    ]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y, _, _ in places)
    style = (
      f'stroke="{line.colour}" stroke-width="{2.75 if line.strong else 1.5}"'
    )
    dash = ' stroke-dasharray="5 4"' if line.dashed else ""
    if markers:
      for x, _, low, high in places:
        if abs(low - high) > 0.5:
          out.append(
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{low:.1f}" y2="{high:.1f}"'
            f' stroke="{line.colour}" stroke-width="1" opacity="0.45"/>'
          )
    out.append(
      f'<polyline points="{path}" fill="none" {style}{dash}'
      ' stroke-linejoin="round" stroke-linecap="round"/>'
    )
    if markers:
      radius = 4 if line.strong else 3
      out += [
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" fill="{line.colour}"/>'
        for x, y, _, _ in places
      ]
    labels.append((places[-1][1], line.name, line.colour, line.strong))
  spread = spread_labels([y for y, *_ in labels], _TOP + 4, bottom)
  for (y, name, colour, strong), place in zip(labels, spread, strict=True):
    weight = ' font-weight="650"' if strong else ""
    out.append(
      f'<path d="M{right + 3},{y:.1f} L{right + 11},{place:.1f}"'
      f' stroke="{colour}" stroke-width="1" fill="none" opacity="0.6"/>'
      f'<text class="label" x="{right + 15}" y="{place + 4:.1f}"'
      f' fill="{colour}"{weight}>{_escape(name)}</text>'
    )
  out.append("</svg>")
  return markupsafe.Markup("".join(out))


def nice_ticks(low: float, high: float, most: int = 6) -> list[float]:
  """Returns round numbers, evenly spaced, that span [low, high]."""
  if high <= low:
    low, high = low - 0.5, high + 0.5
  raw = (high - low) / (most - 1)
  magnitude = 10.0 ** math.floor(math.log10(raw))
  step = next(
    (m * magnitude for m in (1, 2, 2.5, 5) if m * magnitude >= raw),
    10 * magnitude,
  )
  first, last = math.floor(low / step), math.ceil(high / step - 1e-9)
  return [round(i * step, 10) for i in range(first, max(last, first + 1) + 1)]


def spread_labels(
  places: Sequence[float], top: float, bottom: float
) -> list[float]:
  """Returns places at least a line apart, near the given ones, in order."""
  order = sorted(range(len(places)), key=lambda i: places[i])
  out = [0.0] * len(places)
  last = top - _LABEL_GAP
  for i in order:
    last = out[i] = max(places[i], last + _LABEL_GAP)
  excess = last - bottom
  # Push back up from the bottom, as far as is needed.
  limit = bottom
  for i in reversed(order):
    if excess <= 0 or out[i] <= limit:
      break
    out[i] = limit
    limit -= _LABEL_GAP
  return out


def smooth(values: Sequence[float], window: int) -> list[float]:
  """Returns running means over the last `window` values."""
  out, total = [], 0.0
  for i, value in enumerate(values):
    total += value
    if i >= window:
      total -= values[i - window]
    out.append(total / min(i + 1, window))
  return out


def _escape(text: str) -> str:
  return str(markupsafe.escape(text))
