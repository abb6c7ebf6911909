"""SVG from matplotlib: axes in pixels, names that keep apart, and its text.

Text stays text and the same input gives the same bytes. In a page, colours are
the variables of its style sheet, so that a chart follows its light or dark
scheme.
"""

import io
import itertools
import re
import warnings
from collections.abc import Sequence
from typing import NamedTuple
from xml.etree import ElementTree

import matplotlib
import numpy as np
from matplotlib import ticker

# Variables of the page's style sheet, in its light scheme.
PALETTE = {
  "ink": "#1e1e22", "muted": "#66656b", "hair": "#e5e2da", "accent": "#0b5fa5",
  "c0": "#b4541a", "c1": "#2f7d4f", "c2": "#8a4fa3", "c3": "#8c7300",
  "c4": "#b03060", "c5": "#4d7c8a", "c6": "#6b6257", "c7": "#c2762b",
  "c8": "#5564a8",
}  # fmt: skip
_HREF = "{http://www.w3.org/1999/xlink}href"
RC = {
  "font.family": "sans-serif",
  "font.sans-serif": ["DejaVu Sans"],
  "font.size": 12,
  "svg.fonttype": "none",
  "svg.hashsalt": "cacovid_jax",
  # A dollar sign in a name is no formula.
  "text.parse_math": False,
}
_LEFT, _TOP, _BOTTOM = 46, 32, 46  # Pixels around the axes.
_LONGEST = 32  # Characters of a name; tables hold it in full.
_LINE = 15  # Between two names.


def nice_ticks(low: float, high: float, most: int = 5) -> list[float]:
  """Returns round numbers, evenly spaced, that span [low, high]."""
  if high <= low:
    low, high = low - 0.5, high + 0.5
  locator = ticker.MaxNLocator(most, steps=(1, 2, 2.5, 5, 10))
  ticks = [round(float(tick), 10) for tick in locator.tick_values(low, high)]
  first = max(i for i, tick in enumerate(ticks) if tick <= low + 1e-9)
  last = min(i for i, tick in enumerate(ticks) if tick >= high - 1e-9)
  return ticks[first : last + 1]


def spread_labels(
  places: Sequence[float], top: float, bottom: float
) -> list[float]:
  """Returns places at least a line apart, near the given ones, in order."""
  order = np.argsort(places, kind="stable")
  out, last = np.array(places, float), top - _LINE
  for i in order:
    last = out[i] = max(out[i], last + _LINE)
  # Push back up from the bottom, as far as is needed.
  limit = bottom
  for i in order[::-1]:
    if last <= bottom or out[i] <= limit:
      break
    out[i], limit = limit, limit - _LINE
  return out.tolist()


def make_axes(width, height, right, title="", left=_LEFT):
  """Returns axes of a new figure, of which a pixel is a point."""
  # Most of matplotlib's imports, and no training draws.
  from matplotlib import figure as figure_lib

  # 72 dots per inch, as those of SVG files are counted.
  figure = figure_lib.Figure((width / 72, height / 72), dpi=72)
  high = height - _TOP - 24 * bool(title) - _BOTTOM
  box = (left, _BOTTOM, max(width - left - right, 60), high)
  box = np.array(box) / (width, height, width, height)
  axes = figure.add_axes(box, facecolor="none")
  axes.tick_params(length=0, pad=7, labelsize=12, labelcolor=PALETTE["muted"])
  axes.grid(axis="y", color=PALETTE["hair"], linewidth=1)
  axes.set_axisbelow(True)
  axes.spines[:].set_visible(False)
  place, title = (10 / width, 1 - 10 / height), short(title, 120)
  figure.text(*place, title, va="top", fontsize=14, color=PALETTE["ink"])
  return axes


class Label(NamedTuple):
  """A name, and the point that it is the name of."""

  name: str
  x: float
  y: float
  colour: str
  strong: bool = False

  @property
  def width(self) -> float:
    return name_width(self.name, self.strong)

  def write(self, axes, place, shift, coordinates="data", **leader):
    """Writes it `shift` pixels from a place, with a thin line from there."""
    style = dict(arrowstyle="-", color=self.colour, alpha=0.5, lw=1, shrinkA=2,
                 shrinkB=2)  # fmt: skip
    axes.annotate(
      short(self.name), place, xycoords=coordinates, xytext=shift,
      textcoords="offset points", color=self.colour,
      va="center" if self.x else "baseline",
      fontweight="bold" if self.strong else "normal",
      arrowprops=style | leader if leader else None,
    )  # fmt: skip


def write_at_end(axes, labels):
  """Writes names at the right, kept apart."""
  height, box = axes.figure.bbox.height, axes.bbox
  ys = [height - axes.transData.transform((1, label.y))[1] for label in labels]
  places = spread_labels(ys, height - box.y1 + 4, height - box.y0)
  for label, y, place in zip(labels, ys, places, strict=True):
    end = (1, label.y), (15, y - place), ("axes fraction", "data")
    label._replace(x=1).write(axes, *end, relpos=(0, 0.5))


def write_beside(axes, labels):
  """Writes names beside their points, where no other name or point is."""
  places = [axes.transData.transform((label.x, label.y)) for label in labels]
  taken = [(x - 5, y - 5, x + 5, y + 5) for x, y in places]
  pairs = zip(labels, places, strict=True)
  for label, (x, y) in sorted(pairs, key=lambda pair: not pair[0].strong):
    box = _free(taken, x, y, label.width, axes)
    taken.append(box)
    shift = box[0] - x, (box[1] + box[3]) / 2 - y
    far = {"relpos": (0.5, 0.5)} if abs(shift[1]) > 8 else {}
    label.write(axes, (label.x, label.y), shift, **far)


def _free(taken, x, y, length, axes):
  """Returns the box (left, bottom, right, top) of a name, nearest first."""
  inside, width = axes.bbox, axes.figure.bbox.x1
  found = []
  for shift, sign in itertools.product(range(0, 120, 4), (-1, 1)):
    low = y + sign * shift - 7
    for left in (x + 9, x - 9 - length):
      box = (left, low, left + length, low + 14)
      outside = max(box[2] - width, 0) + max(inside.x0 - left, 0)
      outside += max(inside.y0 - low, 0) + max(box[3] - inside.y1 - 8, 0)
      crossed = sum(_overlap(box, other) for other in taken) + outside
      found.append((crossed, shift + (left < x), box))
  return min(found)[2]


def _overlap(a, b) -> float:
  """Returns the area that two boxes share."""
  width = min(a[2], b[2]) - max(a[0], b[0])
  height = min(a[3], b[3]) - max(a[1], b[1])
  return max(width, 0) * max(height, 0)


def name_width(name: str, strong: bool = False) -> float:
  """Returns about how many pixels a name takes."""
  return (8.4 if strong else 7.2) * len(short(name))


def drawable(name: str) -> str:
  """Returns a name without line breaks and what XML does not allow."""
  return "".join(c if c.isprintable() else " " for c in name)


def short(name: str, longest: int = _LONGEST) -> str:
  """Returns a name that fits beside a chart."""
  name = drawable(name)
  return name if len(name) <= longest else f"{name[: longest - 1]}…"


@matplotlib.rc_context(RC)
def as_file(figure, facecolor="none") -> str:
  """Returns a figure as SVG, without date and version."""
  buffer = io.StringIO()
  with warnings.catch_warnings():
    # A browser has the letters that matplotlib's font lacks.
    warnings.filterwarnings("ignore", message="Glyph .* missing from")
    figure.savefig(
      buffer,
      format="svg",
      facecolor=facecolor,
      metadata={"Creator": None, "Date": None, "Format": None, "Type": None},
    )
  return buffer.getvalue()


def as_element(figure, label: str) -> str:
  """Returns a figure as an <svg> element that can stand in a page."""
  # Several charts of a page would share names: there are none, and each point
  # is a circle of its own, with its series' name as title.
  root = ElementTree.fromstring(as_file(figure))
  for element in root.iter():
    element.tag = element.tag.rpartition("}")[2]
  outlines = {path.get("id"): path.get("d") for path in root.iter("path")}
  for parent in list(root.iter()):
    name = parent.attrib.pop("id", "")
    parent.attrib.pop("clip-path", None)
    for part in list(parent):
      if part.tag in ("defs", "metadata"):
        parent.remove(part)
    for part in parent.iter("use") if name.startswith("points ") else ():
      _circle(part, outlines, name.removeprefix("points "))
    style = parent.get("style", "")
    for variable, colour in PALETTE.items():
      style = style.replace(colour, f"var(--{variable})")
    if style:
      parent.set("style", style)
  root.attrib = {
    "class": "chart",
    "viewBox": root.get("viewBox"),
    "role": "img",
    "aria-label": label,
  }
  text = ElementTree.tostring(root, encoding="unicode")
  return re.sub(r"\s*\n\s*", " ", text)


def _circle(element, outlines, title):
  """Turns a reference to an outline of a circle into a circle."""
  found = element.attrib
  # The outline begins at the circle's lowest point: M 0 radius.
  radius = outlines[found[_HREF].removeprefix("#")].split()[2]
  element.tag, element.attrib = "circle", {
    "cx": found["x"], "cy": found["y"], "r": radius, "style": found["style"],
  }  # fmt: skip
  ElementTree.SubElement(element, "title").text = title
