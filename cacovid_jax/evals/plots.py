"""Charts as inline SVG: no scripts, no files, no network.

Colours are CSS, so that a chart can follow the page's light or dark scheme.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import markupsafe

_LEFT, _TOP, _BOTTOM = 46, 14, 40
_LABEL_GAP = 15
# Of a character of a label, about, and how many are written.
_CHARACTER = 6.6
_LONGEST = 32
_NARROW = dict(width=360, height=280, names=False)


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


def responsive(
  draw: Callable[..., markupsafe.Markup],
  lines: Sequence[Line],
  *,
  height: int = 380,
  **options,
) -> markupsafe.Markup:
  """Returns a chart for wide pages, and one with its names below for narrow.

  The page's style shows one of them.

  Args:
    draw: `line_chart` or `point_chart`.
    lines: what it draws.
    height: of the wide one.
    **options: others of `draw`.
  """
  wide = draw(lines, height=height, **options)
  narrow = draw(lines, **options, **_NARROW)
  key = "".join(
    f'<li><i style="background:{line.colour}"></i>{_escape(line.name)}</li>'
    for line in lines
  )
  return markupsafe.Markup(
    f'<div class="wide">{wide}</div><div class="narrow">{narrow}'
    f'<ul class="key">{key}</ul></div>'
  )


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
  names: bool = True,
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
    names: write the lines' names at their ends.
  """
  margin = 10
  if names:
    longest = max(len(_short(entry.name)) for entry in (*lines, *rules))
    margin = round(24 + _CHARACTER * longest)
  axes = _Axes.around(lines, x_ticks, rules, log_x, most, width, height, margin)
  out = axes.furniture(x_label, y_label, x_ticks, rules)
  labels = [
    (axes.y(rule.y), rule.name, "var(--muted)", False) for rule in rules
  ]
  for line in sorted(lines, key=lambda line: line.strong):
    places = [axes.place(point) for point in line.points]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y, _, _ in places)
    style = (
      f'stroke="{line.colour}" stroke-width="{2.75 if line.strong else 1.5}"'
    )
    dash = ' stroke-dasharray="5 4"' if line.dashed else ""
    if markers:
      out += [_interval(place, line.colour) for place in places]
    out.append(
      f'<polyline points="{path}" fill="none" {style}{dash}'
      ' stroke-linejoin="round" stroke-linecap="round"/>'
    )
    if markers:
      out += [_dot(place, line) for place in places]
    labels.append((places[-1][1], line.name, line.colour, line.strong))
  if names:
    out += _end_labels(labels, axes)
  out.append("</svg>")
  return markupsafe.Markup("".join(out))


def point_chart(
  lines: Sequence[Line],
  *,
  x_label: str,
  y_label: str,
  rules: Sequence[Rule] = (),
  most: float | None = None,
  width: int = 1040,
  height: int = 380,
  names: bool = True,
) -> markupsafe.Markup:
  """Returns an SVG element of named points over a logarithmic axis.

  Args:
    lines: each of one point, with x above 0.
    x_label: below the axis.
    y_label: above the axis.
    rules: as of `line_chart`.
    most: likewise.
    width: likewise.
    height: likewise.
    names: write the names beside the points.
  """
  xs = [x for line in lines for x, *_ in line.points]
  ticks = [(x, f"{x:g}") for x in log_ticks(min(xs), max(xs), width // 90)]
  axes = _Axes.around(lines, ticks, rules, True, most, width, height, 10)
  out = axes.furniture(x_label, y_label, ticks, rules)
  places = [axes.place(line.points[0]) for line in lines]
  for line, place in zip(lines, places, strict=True):
    out += [_interval(place, line.colour), _dot(place, line)]
  if names:
    out += [
      f'<text class="label" x="{_LEFT + 4}" y="{axes.y(rule.y) - 4:.1f}"'
      f' fill="var(--muted)">{_escape(rule.name)}</text>'
      for rule in rules
    ]
    out += _beside(lines, places, axes)
  out.append("</svg>")
  return markupsafe.Markup("".join(out))


@dataclasses.dataclass(frozen=True)
class _Axes:
  """Where values lie in a drawing."""

  x_range: tuple[float, float]
  y_ticks: Sequence[float]
  log_x: bool
  width: int
  height: int
  right: int
  bottom: int

  @classmethod
  def around(cls, lines, x_ticks, rules, log_x, most, width, height, margin):
    """Returns axes that hold all of it, with a margin for names."""
    ys = [y for line in lines for point in line.points for y in point[1:]]
    ys += [rule.y for rule in rules]
    high = max(ys) if most is None else min(max(ys), most)
    xs = [point[0] for line in lines for point in line.points]
    xs += [x for x, _ in x_ticks]
    low_x, high_x = (math.log(x) if log_x else x for x in (min(xs), max(xs)))
    pad = 0.03 * (high_x - low_x) or 1.0
    return cls(
      (low_x - pad, high_x + pad),
      nice_ticks(min(ys), high),
      log_x,
      width,
      height,
      width - margin,
      height - _BOTTOM,
    )

  def x(self, value: float) -> float:
    low, high = self.x_range
    value = math.log(value) if self.log_x else value
    return _LEFT + (value - low) / (high - low) * (self.right - _LEFT)

  def y(self, value: float) -> float:
    low, high = self.y_ticks[0], self.y_ticks[-1]
    return self.bottom - (value - low) / (high - low) * (self.bottom - _TOP)

  def place(self, point) -> tuple[float, float, float, float]:
    x, y, low, high = point
    top = min(high, self.y_ticks[-1])
    return self.x(x), self.y(y), self.y(low), self.y(top)

  def furniture(self, x_label, y_label, x_ticks, rules) -> list[str]:
    """Returns the opening tag, grid, ticks, axis labels and rules."""
    out = [
      f'<svg class="chart" viewBox="0 0 {self.width} {self.height}" role="img"'
      f' aria-label="{_escape(y_label)} over {_escape(x_label)}">'
    ]
    for tick in self.y_ticks:
      y = self.y(tick)
      out.append(
        f'<line class="grid" x1="{_LEFT}" x2="{self.right}" y1="{y:.1f}"'
        f' y2="{y:.1f}"/><text class="tick" x="{_LEFT - 8}" y="{y + 4:.1f}"'
        f' text-anchor="end">{tick:g}</text>'
      )
    out += [
      f'<text class="tick" x="{self.x(x):.1f}" y="{self.bottom + 18}"'
      f' text-anchor="middle">{_escape(text)}</text>'
      for x, text in x_ticks
    ]
    out.append(
      f'<text class="axis" x="{(_LEFT + self.right) / 2:.0f}"'
      f' y="{self.height - 4}" text-anchor="middle">{_escape(x_label)}</text>'
    )
    out += [
      f'<line class="rule" x1="{_LEFT}" x2="{self.right}"'
      f' y1="{self.y(rule.y):.1f}" y2="{self.y(rule.y):.1f}"/>'
      for rule in rules
    ]
    return out


def _interval(place, colour) -> str:
  x, _, low, high = place
  if abs(low - high) <= 0.5:
    return ""
  return (
    f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{low:.1f}" y2="{high:.1f}"'
    f' stroke="{colour}" stroke-width="1" opacity="0.45"/>'
  )


def _dot(place, line) -> str:
  x, y, _, _ = place
  return (
    f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{4 if line.strong else 3}"'
    f' fill="{line.colour}"><title>{_escape(line.name)}</title></circle>'
  )


def _end_labels(labels, axes) -> list[str]:
  """Returns names at the right, (y, name, colour, strong), kept apart."""
  out, right = [], axes.right
  spread = spread_labels([y for y, *_ in labels], _TOP + 4, axes.bottom)
  for (y, name, colour, strong), place in zip(labels, spread, strict=True):
    weight = ' font-weight="650"' if strong else ""
    out.append(
      f'<path d="M{right + 3},{y:.1f} L{right + 11},{place:.1f}"'
      f' stroke="{colour}" stroke-width="1" fill="none" opacity="0.6"/>'
      f'<text class="label" x="{right + 15}" y="{place + 4:.1f}"'
      f' fill="{colour}"{weight}>{_escape(_short(name))}</text>'
    )
  return out


def _beside(lines, places, axes) -> list[str]:
  """Returns names beside their points, where no other name or point is."""
  taken = [(x - 5, y - 5, x + 5, y + 5) for x, y, _, _ in places]
  pairs = sorted(
    zip(lines, places, strict=True), key=lambda pair: not pair[0].strong
  )
  out = []
  for line, (x, y, _, _) in pairs:
    box = _free(taken, x, y, _CHARACTER * len(_short(line.name)), axes)
    taken.append(box)
    weight = ' font-weight="650"' if line.strong else ""
    middle = (box[1] + box[3]) / 2
    if abs(middle - y) > 8:
      near = box[0] if box[0] > x else box[2]
      out.append(
        f'<path d="M{x:.1f},{y:.1f} L{near:.1f},{middle:.1f}"'
        f' stroke="{line.colour}" stroke-width="1" opacity="0.4"/>'
      )
    out.append(
      f'<text class="label" x="{box[0]:.1f}" y="{middle + 4:.1f}"'
      f' fill="{line.colour}"{weight}>{_escape(_short(line.name))}</text>'
    )
  return out


def _free(taken, x, y, length, axes):
  """Returns the box (left, top, right, bottom) of a name, nearest first."""

  def cost(box, shift):
    outside = max(box[2] - axes.width, 0) + max(_LEFT - box[0], 0)
    outside += max(_TOP - 8 - box[1], 0) + max(box[3] - axes.bottom, 0)
    return sum(_overlap(box, other) for other in taken) + outside, shift

  found = []
  for shift in range(0, 120, 4):
    for up in (-1, 1):
      for left in (x + 9, x - 9 - length):
        top = y + up * shift - 7
        box = (left, top, left + length, top + 14)
        found.append((cost(box, shift + (left < x)), box))
  return min(found)[1]


def _overlap(a, b) -> float:
  """Returns the area that two boxes share."""
  width = min(a[2], b[2]) - max(a[0], b[0])
  height = min(a[3], b[3]) - max(a[1], b[1])
  return max(width, 0) * max(height, 0)


def log_ticks(low: float, high: float, most: int = 8) -> list[float]:
  """Returns 1, 2, 5, 10 … that span [low, high]; powers of ten if too many."""
  for steps in ((1, 2, 5), (1,)):
    exponents = range(
      math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1
    )
    found = [
      round(step * 10.0**exponent, 9)
      for exponent in exponents
      for step in steps
    ]
    first = max((i for i, x in enumerate(found) if x <= low), default=0)
    last = next((i for i, x in enumerate(found) if x >= high), len(found) - 1)
    found = found[first : last + 1]
    if len(found) <= most:
      break
  return found


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


def _short(name: str) -> str:
  """Returns a name that fits beside a chart; tables hold it in full."""
  return name if len(name) <= _LONGEST else f"{name[: _LONGEST - 1]}…"


def _escape(text: str) -> str:
  return str(markupsafe.escape(text))
