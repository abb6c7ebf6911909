"""The report's content, escaping and independence of any network."""

import html.parser
import re

import numpy as np
import pytest

from cacovid_jax.data import questions as questions_lib
from cacovid_jax.evals import plots, report, runner

GRID = (4, 3, 3)
RATIOS = ("0.25", "0.10")


def cell(accuracy):
  return {
    "accuracy": accuracy,
    "ci95": [accuracy - 0.04, accuracy + 0.04],
    "n": 20,
    "kept_tokens": 9,
    "equivalent_ratio": 0.25,
    "of_vanilla": accuracy / 0.9,
    "of_vanilla_ci95": [0.5, 1.0],
    "by_duration": {"short": {"accuracy": accuracy, "n": 20}},
    "by_category": {"order <first>": {"accuracy": accuracy, "n": 20}},
    "status": "ok",
  }


def results_of(**methods):
  """Returns a results.json of made-up accuracies {method: by ratio}."""
  paired = [
    {
      "method": name,
      "vs": "cacovid",
      "ratio": ratio,
      "mean": -0.2,
      "ci95": [-0.3, -0.1],
    }
    for name in methods
    if name != "cacovid"
    for ratio in RATIOS
  ]
  return {
    "schema": 1,
    "benchmark": "dense <b>",
    "split": "test",
    "grid": list(GRID),
    "num_clips": 7,
    "chance": 0.25,
    "vanilla": {**cell(0.9), "n": 20, "kept_tokens": 36},
    "methods": {
      name: dict(zip(RATIOS, map(cell, values), strict=True))
      for name, values in methods.items()
    },
    "oracles": {"decisive_boxes": dict.fromkeys(RATIOS, cell(0.89))},
    "paired": paired,
    "frame_head": {
      "method": "cacovid",
      "frames": 1,
      "of": 4,
      "n": 20,
      "hit": 0.61,
      "ci95": [0.5, 0.7],
      "chance": 0.25,
      "above_chance": 0.36,
      "above_chance_ci95": [0.2, 0.5],
    },
    "chosen": {
      "last_query": {
        "split": "validation",
        "n": 10,
        "ratio": "0.10",
        "best": "last_query?layer=1",
        "candidates": [{"method": "last_query?layer=1", "accuracy": 0.5}],
      }
    },
    "unreadable": [{"video": "gone.mp4", "reason": "missing", "questions": 2}],
    "seeds": [0],
    "provenance": {
      "checkpoint": "c0ffee",
      "decoder": "PyAV 0",
      "frame_hash": "f00d",
      "generator_hash": "9e9e",
      "git_commit": "abc123",
      "packages": {"jax": "0"},
      "policies": {"policy": "5eed"},
      "python": "3",
      "settings": {},
    },
  }


def example(number, right, *, scores=True):
  rng = np.random.default_rng(number)
  question = questions_lib.Question(
    id=f"q{number}",
    video=f"clip{number}.mp4",
    question='Is <script>alert("x")</script> & first?',
    options=("<i>yes</i>", "no"),
    answer="A",
    category="order <first>",
    duration="short",
  )
  trace = runner.Trace(
    text="A" if right else "B",
    letter="A" if right else "B",
    index=np.sort(rng.permutation(36)[:9]),
    token_gap=rng.normal(size=36) if scores else None,
    frame_gap=rng.normal(size=4) if scores else None,
  )
  return report.Example(
    question=question,
    frames=rng.integers(0, 255, (4, 24, 24, 3), dtype=np.uint8),
    grid=GRID,
    method="cacovid",
    ratio=0.1,
    trace=trace,
    others={"vanilla": "A", "random": ""},
    decisive=frozenset({3, 4}),
  )


CURVES = [
  {
    "step": step,
    "reward_token": 0.4,
    "reward_token_greedy": 0.3 + step / 100,
    "reward_frame": 0.3,
    "reward_frame_greedy": None if step == 1 else 0.35,
    "reward_content": 0.2,
  }
  for step in range(1, 41)
]


@pytest.fixture(scope="module")
def page():
  out = results_of(
    cacovid=(0.85, 0.8), random=(0.6, 0.5), last_query=(0.7, 0.6)
  )
  examples = [example(number, number % 2 == 0) for number in range(6)]
  return report.render(out, examples, CURVES)


class Outline(html.parser.HTMLParser):
  """Collects tags, checks that they close in order, and keeps the text."""

  VOID = {"meta", "img", "br"}

  def __init__(self, text):
    super().__init__()
    self.open, self.tags, self.texts = [], [], []
    self.feed(text)
    assert not self.open

  def handle_starttag(self, tag, attributes):
    self.tags.append((tag, dict(attributes)))
    if tag not in self.VOID:
      self.open.append(tag)

  def handle_startendtag(self, tag, attributes):
    self.tags.append((tag, dict(attributes)))

  def handle_endtag(self, tag):
    assert self.open.pop() == tag, tag

  def handle_data(self, data):
    self.texts.append(data)

  def joined(self):
    return " ".join(" ".join(self.texts).split())


def test_is_well_formed_and_shows_everything(page):
  outline = Outline(page)
  text = outline.joined()
  for expected in (
    "vanilla",
    "random",
    "decisive_boxes",
    "88.9 % of vanilla",
    "\N{MINUS SIGN}20.0 [\N{MINUS SIGN}30.0, \N{MINUS SIGN}10.0]",
    "layer = 1",
    "gone.mp4",
    "61.0",
    "order <first>",
    "abc123",
    "3 answered rightly and 3 wrongly",
    "guessing",
    "token mode, greedy",
  ):
    assert expected in text, expected
  tags = [tag for tag, _ in outline.tags]
  assert tags.count("article") == 6
  # Frames, with and without scores of their tokens.
  assert tags.count("image") == 6 * 4
  heat = [a for t, a in outline.tags if t == "svg" and a.get("class") == "heat"]
  assert len(heat) == 6 * 4


def test_right_and_wrong_answers_are_marked(page):
  assert page.count("verdict yes") == 3
  assert page.count("verdict no") == 3


def test_kept_and_decisive_tokens_are_outlined(page):
  outline = Outline(page)
  strokes = [a.get("stroke") for t, a in outline.tags if t == "rect"]
  assert strokes.count("#0b5fa5") == 6 * 9
  assert strokes.count("#f0a000") == 6 * 2


def test_text_of_the_data_set_is_escaped(page):
  assert "<script" not in page
  assert "<i>yes" not in page
  assert "&lt;script&gt;alert(" in page
  assert "dense &lt;b&gt;" in page


def test_nothing_is_loaded_from_elsewhere(page):
  outline = Outline(page)
  for tag, attributes in outline.tags:
    assert tag not in ("script", "link", "iframe", "object", "embed")
    for name in ("src", "href", "xlink:href", "srcset", "action"):
      value = attributes.get(name)
      assert value is None or value.startswith("data:image/jpeg;base64,")
    assert not any(name.startswith("on") for name in attributes)
  assert not re.search(r"https?://|//[a-z]|@import", page)
  assert re.findall(r"url\((.)", page) == ["#"] * (6 * 4)
  assert "default-src 'none'" in page


def test_the_same_input_gives_the_same_page(page):
  out = results_of(
    cacovid=(0.85, 0.8), random=(0.6, 0.5), last_query=(0.7, 0.6)
  )
  examples = [example(number, number % 2 == 0) for number in range(6)]
  assert report.render(out, examples, CURVES) == page


def test_without_policy_curves_and_clips():
  out = results_of(random=(0.6, 0.5))
  out |= {"frame_head": None, "chosen": {}, "unreadable": [], "oracles": {}}
  out["paired"] = []
  out["provenance"]["generator_hash"] = None
  page = report.render(out, [example(1, True, scores=False)], ())
  outline = Outline(page)
  assert "Training" not in page
  assert not any(a.get("class") == "heat" for _, a in outline.tags)
  Outline(report.render(out, [], ()))


def test_a_cell_that_cannot_be_run_shows_why():
  out = results_of(cacovid=(0.8, 0.7))
  out["methods"]["cacovid"]["0.10"] = {"status": "needs 0.12 at least"}
  page = report.render(out, [], ())
  assert "needs 0.12 at least" in page
  # Nor does a column without any accuracy break the page.
  out["methods"]["cacovid"]["0.25"] = {"status": "no", "note": "A stand-in."}
  out["oracles"] = {}
  assert "A stand-in." in Outline(report.render(out, [], ())).joined()


def test_write_leaves_only_the_report(tmp_path):
  path = tmp_path / "report.html"
  report.write(path, results_of(cacovid=(0.8, 0.7)), [], CURVES)
  assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
  assert path.read_text(encoding="utf-8").startswith("<!doctype html>")


@pytest.mark.parametrize(
  "low,high,expected",
  [
    (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
    (23, 96, [20, 40, 60, 80, 100]),
    (0.5, 0.5, [0, 0.2, 0.4, 0.6, 0.8, 1]),
  ],
)
def test_ticks_are_round_and_cover(low, high, expected):
  np.testing.assert_allclose(plots.nice_ticks(low, high), expected)


def test_labels_keep_apart_and_stay_inside():
  places = plots.spread_labels([50, 51, 52, 300, 299], 0, 300)
  ordered = sorted(places)
  assert np.min(np.diff(ordered)) >= 14.9
  assert ordered[-1] <= 300
  # Their order is that of what they name.
  assert np.argsort(places).tolist() == [0, 1, 2, 4, 3]


def test_smoothing_is_a_trailing_mean():
  assert plots.smooth([1, 3, 5, 7], 2) == [1, 2, 4, 6]
