"""Draws the figures of the house: `python docs/figures/draw.py`.

The floors are those of pyproject.toml, which `make lint` checks. floors.txt
says what each folder holds, and what flows through it. `method.svg` is drawn by
hand.
"""

import html
import pathlib
import tomllib

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parent.parent
WIDTH, MARGIN = 960, 16

STYLE = """
    .bg { fill: #ffffff; stroke: #d0d7de; }
    .box { fill: #f6f8fa; stroke: #8c959f; stroke-width: 1.2; }
    .paper { fill: #fff1e5; stroke: #bc4c00; stroke-width: 1.6; }
    text { fill: #1f2328; text-anchor: middle;
      font: 14px system-ui, "Segoe UI", Helvetica, Arial, sans-serif; }
    .name { font-weight: 600; }
    .small { font-size: 12.5px; fill: #59636e; }
    .label { font-size: 12.5px; fill: #59636e; text-anchor: start; }
    .line { stroke: #59636e; stroke-width: 1.6; }
    .tip { fill: #59636e; }
    @media (prefers-color-scheme: dark) {
      .bg { fill: #0d1117; stroke: #3d444d; }
      .box { fill: #151b23; stroke: #656c76; }
      .paper { fill: #2f1a0c; stroke: #f0883e; }
      text { fill: #f0f6fc; }
      .small, .label { fill: #9198a1; }
      .line { stroke: #9198a1; }
      .tip { fill: #9198a1; }
    }
"""
_MARKER = (
  '<defs><marker id="tip" viewBox="0 0 10 10" refX="9" refY="5"'
  ' markerWidth="7" markerHeight="7" orient="auto">'
  '<path class="tip" d="M0 0L10 5L0 10z"/></marker></defs>'
)


def floors() -> list[list[str]]:
  """Returns the names on each floor, the highest first, the ground last."""
  with open(ROOT / "pyproject.toml", "rb") as file:
    contracts = tomllib.load(file)["tool"]["importlinter"]["contracts"]
  (layers,) = [c["layers"] for c in contracts if c["type"] == "layers"]
  return [
    [name.strip() for name in layer.replace(":", "|").split("|")]
    for layer in layers
  ]


def read_floors() -> tuple[dict[str, str], dict[str, list]]:
  """Returns floors.txt: what each name holds, and the rows of its figure.

  A row is its label and a chain of (name, words). What stands behind a label
  with a colon is no chain.
  """
  holds, flows = {}, {}
  for line in (HERE / "floors.txt").read_text(encoding="utf-8").splitlines():
    indent = len(line) - len(line.lstrip())
    name, _, words = line.strip().partition(": ")
    if indent == 0:
      holds[name], rows = words, flows.setdefault(name, [])
    elif indent == 2:
      rows.append((line.strip(), []))
    else:
      rows[-1][1].append((name, words))
  return holds, {name: rows for name, rows in flows.items() if rows}


def house() -> str:
  """Returns the figure of all floors."""
  holds, _ = read_floors()
  step, height = 66, 56
  rows = [[("experiments/", "a table of the paper each"),
           ("configs/", "a run each"),
           ("docs/, tests/", "pages; a test beside every file")]]  # fmt: skip
  rows += [[(name, holds[name]) for name in floor] for floor in floors()[:-1]]
  rows.append([("errors, config, files, ...", holds["ground"])])
  shapes = []
  for number, row in enumerate(rows):
    y = MARGIN + number * step
    for x, width, (name, words) in _spread(row, MARGIN, WIDTH - MARGIN, 10):
      shapes += _box(x, y, width, height, name, words)
  return _picture(shapes, MARGIN * 2 + len(rows) * step - 10, "The house")


def flow(name: str, rows) -> str:
  """Returns the figure of one floor or folder; rows as of `read_floors`."""
  height, step = 56, 84
  shapes = []
  for number, (label, chain) in enumerate(rows):
    y = MARGIN + 20 + number * step
    shapes.append(_text(MARGIN, y - 7, label.rstrip(":"), "label"))
    for x, width, (title, words) in _spread(chain, MARGIN, WIDTH - MARGIN, 34):
      shapes += _box(x, y, width, height, title, words)
      if (title, words) != chain[-1] and not label.endswith(":"):
        middle = y + height / 2
        shapes.append(
          f'<path class="line" marker-end="url(#tip)"'
          f' d="M{x + width + 3:g} {middle:g}h28"/>'
        )
  return _picture(shapes, MARGIN * 2 + len(rows) * step - 6, name)


def figures() -> dict[str, str]:
  """Returns all figures: file name -> SVG."""
  _, flows = read_floors()
  return {"house.svg": house()} | {
    f"{name}.svg": flow(name, rows) for name, rows in flows.items()
  }


def _spread(items, left, right, gap):
  """Yields (x, width, item) of boxes side by side."""
  width = (right - left - gap * (len(items) - 1)) / len(items)
  for number, item in enumerate(items):
    yield round(left + number * (width + gap), 1), round(width, 1), item


def _box(x, y, width, height, name, words):
  kind = "paper" if name == "policy" else "box"
  middle = round(x + width / 2, 1)
  return [
    f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="{width:g}"'
    f' height="{height:g}" rx="7"/>',
    _text(middle, y + 24, name, "name"),
    _text(middle, y + 43, words, "small"),
  ]


def _text(x, y, words, kind):
  return f'<text class="{kind}" x="{x:g}" y="{y:g}">{html.escape(words)}</text>'


def _picture(shapes, height, title) -> str:
  inner = "\n  ".join(shapes)
  return (
    f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}"'
    f' role="img" aria-label="{html.escape(title)}">\n'
    f"  <style>{STYLE}  </style>\n  {_MARKER}\n"
    f'  <rect class="bg" x="0.5" y="0.5" width="{WIDTH - 1}"'
    f' height="{height - 1}" rx="8"/>\n  {inner}\n</svg>\n'
  )


if __name__ == "__main__":
  for name, picture in figures().items():
    (HERE / name).write_text(picture, encoding="utf-8")
