"""Charts: what is drawn where, as text, and the same bytes every time."""

import re
from xml.etree import ElementTree

import numpy as np
import pytest

from cacovid_jax.evals.report import charts, html
from cacovid_jax.evals.report import svg as svg_lib
from tests.evals import report_test

SVG = "{http://www.w3.org/2000/svg}"


def chart(*names, **options):
  """Returns a chart of points that all lie in one place."""
  series = [
    charts.Series(name, [(1.0, 50.0, 40.0, 60.0)], "c0") for name in names
  ]
  return charts.Chart(
    series=series, x_label="x", y_label="y", log_x=True, **options
  )


def texts(svg):
  """Returns text -> (x, y) of a chart's <text> elements."""
  root = ElementTree.fromstring(svg)
  return {
    element.text: (float(element.get("x")), float(element.get("y")))
    for element in root.iter()
    if element.tag.rpartition("}")[2] == "text"
  }


def wide(page):
  return page[page.index("<svg") : page.index("</svg>") + 6]


def test_points_lie_where_their_values_say():
  """Four ratios on a logarithmic axis; higher accuracy is higher up."""
  out = report_test.results_of(cacovid=(0.85, 0.8), random=(0.6, 0.5))
  svg = wide(charts.over_ratio(out, report_test.RATIOS).page())
  found = re.findall(
    r'<circle cx="([\d.]+)" cy="([\d.]+)" r="(\d)".*?<title>(.*?)</title>', svg
  )
  assert [name for *_, name in found] == ["random", "random"] + [
    "decisive_boxes"
  ] * 2 + ["cacovid"] * 2
  places = texts(svg)
  for (x, *_), tick in zip(found[:2], ("10", "25"), strict=True):
    assert float(x) == pytest.approx(places[tick][0], abs=0.01)
  # From two ticks, the place of any value.
  (_, y0), (_, y1) = places["20"], places["100"]
  ys = [y0 - 4.56 + (y1 - y0) * (v - 20) / 80 for v in (50, 60, 89, 89, 80, 85)]
  np.testing.assert_allclose([float(y) for _, y, *_ in found], ys, atol=0.1)
  # The reference is drawn larger, and last.
  assert [r for _, _, r, _ in found] == ["3"] * 4 + ["4"] * 2
  assert {"vanilla", "guessing", "accuracy (%)"} <= set(places)


def test_intervals_end_at_the_top_of_the_axis():
  svg = wide(chart("a", most=50).page())
  top = min(float(y) for y in re.findall(r"M 46 ([\d.]+)  L [\d.]+ \1", svg))
  (bar,) = re.findall(r"M ([\d.]+) [\d.]+  L \1 ([\d.]+)", svg)
  assert float(bar[1]) == pytest.approx(top)


def test_the_same_chart_has_the_same_bytes():
  made = chart("a", "b", beside=True)
  assert made.file("title") == chart("a", "b", beside=True).file("title")
  assert made.page() == chart("a", "b", beside=True).page()
  assert "matplotlib v" not in made.file("title")
  assert "dc:date" not in made.file("title")


def test_a_file_holds_its_title_and_names_as_text():
  svg = chart("a_$x$_name", beside=True).file("5 < 6 & more")
  found = texts(svg)
  assert {"5 < 6 & more", "a_$x$_name", "x", "y"} <= set(found)
  root = ElementTree.fromstring(svg)
  assert root.tag == f"{SVG}svg" and root.get("viewBox") == "0 0 1040 440"
  # Colours of the light scheme: no page defines them there.
  assert "var(--" not in svg and svg_lib.PALETTE["c0"] in svg


def test_within_a_page_colours_are_those_of_its_style():
  style = html._source("page.css")
  for name, colour in svg_lib.PALETTE.items():
    assert f"--{name}: {colour};" in style
  page = chart("a").page()
  assert "var(--c0)" in page and "#" not in page
  # Several charts share a page: nothing in them has a name.
  assert " id=" not in page and "href" not in page and "url(" not in page


def test_any_name_can_be_drawn():
  names = (
    "_hidden",
    "<b>",
    "line\nbreak",
    "bell\a",
    "\N{SNOWMAN}",
    "$",
    "見る",
  )
  for made in (chart(*names), chart(*names, beside=True)):
    found = texts(made.file("\0"))
    expected = {
      "_hidden",
      "<b>",
      "line break",
      "bell ",
      "\N{SNOWMAN}",
      "$",
      "見る",
    }
    assert expected <= set(found)
    assert "<b>" not in made.page()


def test_a_chart_of_nothing_has_its_levels():
  made = charts.Chart(series=(), levels=[("all", 90)], x_label="x", y_label="y")
  assert "all" in texts(made.file("t"))


@pytest.mark.parametrize(
  "low,high", [(2.2, 2.4), (0.04, 900), (0.3, 4), (5, 5)]
)
def test_a_logarithmic_axis_has_few_round_ticks(low, high):
  points = [(x, 50.0) for x in (low, high)]
  made = charts.Chart(
    series=[charts.Series("a", points, "c0")], x_label="x", y_label="y",
    log_x=True,
  )  # fmt: skip
  for svg in re.findall(r"<svg.*?</svg>", made.page()):
    # Below the axis: all texts of the lowest line but one.
    rows = sorted({round(y) for _, y in texts(svg).values()})
    ticks = [
      float(t) for t, (_, y) in texts(svg).items() if round(y) == rows[-2]
    ]
    assert 1 <= len(ticks) <= 11
    assert all(f"{tick:e}"[0] in "125" for tick in ticks)


@pytest.mark.parametrize(
  "low,high,expected",
  [
    (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
    (23, 96, [20, 40, 60, 80, 100]),
    (0.5, 0.5, [0, 0.2, 0.4, 0.6, 0.8, 1]),
    (-30, 0, [-30, -20, -10, 0]),
  ],
)
def test_ticks_are_round_and_cover(low, high, expected):
  np.testing.assert_allclose(svg_lib.nice_ticks(low, high), expected)


def test_labels_keep_apart_and_stay_inside():
  places = svg_lib.spread_labels([50, 51, 52, 300, 299], 0, 300)
  ordered = sorted(places)
  assert np.min(np.diff(ordered)) >= 14.9
  assert ordered[-1] <= 300
  # Their order is that of what they name.
  assert np.argsort(places).tolist() == [0, 1, 2, 4, 3]


def test_smoothing_is_a_trailing_mean():
  assert charts.smooth([1, 3, 5, 7], 2) == [1, 2, 4, 6]


def test_names_beside_points_do_not_cover_each_other():
  svg = wide(chart(*(f"method_{i}" for i in range(6)), beside=True).page())
  boxes = [place for name, place in texts(svg).items() if "method" in name]
  assert len(boxes) == 6
  for i, (x, y) in enumerate(boxes):
    for other_x, other_y in boxes[:i]:
      assert abs(x - other_x) >= 50 or abs(y - other_y) >= 13.9


def test_a_line_of_dots_for_each_name():
  """Two seeds and their mean; the level is the mean of the first name."""
  svg = charts.by_name({"ours": [60.0, 80.0], "a+b": [50.0]}, "accuracy (%)")
  places = texts(svg)
  assert "accuracy (%)" in places
  assert places["ours"][1] < places["a+b"][1]
  root = ElementTree.fromstring(svg)
  found = [
    (float(use.get("x")), float(use.get("y"))) for use in root.iter(f"{SVG}use")
  ]
  (low, y), (high, _), (mean, _), (other, below), (last, _) = found
  assert mean == pytest.approx((low + high) / 2) and last == other
  # 60 - 50 is half of 80 - 60, and names stand beside their dots.
  assert low - other == pytest.approx((high - low) / 2)
  apart = places["a+b"][1] - places["ours"][1]
  assert below - y == pytest.approx(apart, abs=0.01)
  (level,) = [
    path.get("d")
    for path in root.iter(f"{SVG}path")
    if "stroke-dasharray" in path.get("style", "")
  ]
  assert float(level.split()[1]) == pytest.approx(mean)
  assert charts.by_name({}, "accuracy (%)").startswith("<?xml")


def test_long_names_of_lines_are_cut_at_the_right():
  """As the room beside them is counted; two that begin alike stay two."""
  names = [f"rollout.reward=log_likelihood;optimizer.lr={i}" for i in range(2)]
  svg = charts.by_name({name: [50.0] for name in names}, "accuracy (%)")
  found = [e.text for e in ElementTree.fromstring(svg).iter(f"{SVG}text")]
  assert found.count(f"{names[0][:31]}…") == 2
  places = [
    use.get("y") for use in ElementTree.fromstring(svg).iter(f"{SVG}use")
  ]
  assert len(set(places)) == 2
