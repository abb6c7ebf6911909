"""The report's content, escaping and independence of any network."""

import base64
import dataclasses
import hashlib
import html.parser
import json
import re

import numpy as np
import pytest

from cacovid_jax.data import question as question_lib
from cacovid_jax.evals.report import html as report
from cacovid_jax.evals.report import viewer
from cacovid_jax.inference import batch as batch_lib

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


HOSTILE = '</script><img src=x onerror="alert(1)">'


def example(number, right, *, scores=True, text=HOSTILE, method="cacovid"):
  """Returns an example with views of two methods; the second lacks 10 %."""
  rng = np.random.default_rng(number)
  question = question_lib.Question(
    id=f"q{number}",
    video=f"clip{number}.mp4",
    question=f"Is {text} & first?",
    options=(f"<i>yes</i> {text}", "no"),
    answer="A",
    category="order <first>",
    duration="short",
  )
  kept = [np.sort(rng.permutation(36)[:count]) for count in (9, 4, 9)]
  gaps = {}
  if scores:
    gaps = {"token_gap": rng.normal(size=36), "frame_gap": rng.normal(size=4)}
  said = viewer.Said(f"A {text}", "A", True)
  wrong = viewer.Said(f"B {text}", "B", False)
  return viewer.Example(
    question=question,
    frames=rng.integers(0, 255, (4, 24, 24, 3), dtype=np.uint8),
    grid=GRID,
    views={
      (method, 0.25): batch_lib.KeptTokens(kept[0], **gaps),
      (method, 0.1): batch_lib.KeptTokens(kept[1], **gaps),
      ("random", 0.25): batch_lib.KeptTokens(kept[2]),
    },
    answers={
      "vanilla": {1.0: said},
      method: {0.25: said, 0.1: said if right else wrong},
      "random": {0.25: viewer.Said("", "", False)},
    },
    shown=(method, 0.1),
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


EXAMPLES = [example(number, number % 2 == 0) for number in range(6)]


def full():
  """Returns a results.json with something of everything."""
  out = results_of(
    cacovid=(0.85, 0.8), random=(0.6, 0.5), last_query=(0.7, 0.6)
  )
  out["methods"]["random"]["0.10"] = {
    "status": "no <reason>",
    "minimum_ratio": 0.1875,
  }
  out["methods"]["last_query"]["0.10"]["forced"] = 0.25
  out["methods"]["cacovid"]["0.25"]["num_fallbacks"] = 3
  for row in (out["vanilla"], out["methods"]["cacovid"]["0.25"]):
    row["by_group"] = {"sub_category": {"Football": {"accuracy": 0.75, "n": 4}}}
  out["left_out"] = {
    "bad_rows": [["row 3", f"answer {HOSTILE}"], {"row": 5, "why": "empty"}],
    "other_rows": {"summary": 217},
    "not_there": [],
    "image_rows": 12,
  }
  out["metric"], out["rule"] = "videomme_perception_score", "paper"
  out["macro"] = ["order <first>", "count"]
  return out


TIMES = {
  "vanilla": {"1.00": 90.0},
  "cacovid": {"0.25": 20.0, "0.10": 12.5},
  "last_query": {"0.10": 40.0},
  "decisive_boxes": {"0.10": 12.0},
}


@pytest.fixture(scope="module")
def page():
  return report.render(full(), EXAMPLES, CURVES, TIMES)


class Outline(html.parser.HTMLParser):
  """Collects tags, checks that they close in order, and keeps the text."""

  VOID = {"meta", "img", "br", "wbr", "input"}

  def __init__(self, text):
    super().__init__()
    self.open, self.tags, self.texts, self.scripts = [], [], [], []
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
    within = self.open[-1] if self.open else ""
    if within == "script":
      self.scripts.append((self.tags[-1][1], data))
    elif within != "style":
      self.texts.append(data)

  def joined(self):
    return " ".join(" ".join(self.texts).split())

  def classed(self, name):
    """Returns the attributes of the elements of a class."""
    return [
      found
      for _, found in self.tags
      if name in (found.get("class") or "").split()
    ]

  def data(self):
    """Returns what the page's script reads."""
    (text,) = [text for found, text in self.scripts if found.get("id")]
    return json.loads(text)


def test_is_well_formed_and_shows_everything(page):
  outline = Outline(page)
  text = outline.joined()
  for expected in (
    "vanilla",
    "88.9 % of vanilla",
    "\N{MINUS SIGN}20.0 [\N{MINUS SIGN}30.0, \N{MINUS SIGN}10.0]",
    "layer = 1",
    "61.0",
    "order <first>",
    "abc123",
    "3 answered rightly and 3 wrongly",
    "guessing",
    "token mode, greedy",
    "videomme_perception_score",
    "the unweighted mean of 2 kinds of question",
    "by the rule paper",
    "every method by sub category",
  ):
    assert expected in text, expected
  # Names may be broken, nowhere else than behind an underscore.
  assert "decisive_<wbr>boxes" in page and "last_<wbr>query" in page
  tags = [tag for tag, _ in outline.tags]
  assert tags.count("article") == 6
  frames = [a for t, a in outline.tags if t == "img" and a.get("src")]
  assert len(frames) == 6 * 4
  assert all(a["alt"].startswith("frame ") for a in frames)


def test_every_form_field_and_region_has_a_name(page):
  outline = Outline(page)
  labelled = 0
  for place, (tag, found) in enumerate(outline.tags):
    if tag in ("select", "input"):
      around = [t for t, _ in outline.tags[max(0, place - 3) : place]]
      assert "label" in around, found
      labelled += 1
    if found.get("role") in ("region", "group"):
      assert found["aria-label"]
  assert labelled == 9
  headings = [a for t, a in outline.tags if t == "th"]
  assert headings and all(a.get("scope") in ("row", "col") for a in headings)


def test_right_and_wrong_answers_are_marked(page):
  outline = Outline(page)
  verdicts = outline.classed("verdict")
  assert [a["class"] for a in verdicts].count("verdict yes") == 3
  assert [a["class"] for a in verdicts].count("verdict no") == 3
  assert len(outline.classed("answer")) == 6


def test_kept_and_decisive_tokens_are_outlined(page):
  outline = Outline(page)
  shown = [view.views["cacovid", 0.1].index for view in EXAMPLES]
  paths = [a["d"] for a in outline.classed("kept") if "d" in a]
  for number, index in enumerate(shown):
    mine = paths[4 * number : 4 * number + 4]
    expected = [
      {(i % 3, i % 9 // 3) for i in index if i // 9 == t} for t in range(4)
    ]
    assert [squares(path) for path in mine] == expected
  # Tokens 3 and 4: the second row of the first frame.
  paths = [a["d"] for a in outline.classed("decisive") if "d" in a]
  assert paths == ["M0 1h1v1h-1zM1 1h1v1h-1z", "", "", ""] * 6


def squares(path):
  """Returns the (column, row) of each unit square of path data."""
  found = re.findall(r"M(\d+) (\d+)h1v1h-1z", path)
  assert "".join(f"M{x} {y}h1v1h-1z" for x, y in found) == path
  return {(int(x), int(y)) for x, y in found}


def unpack(text, count):
  """Returns the tokens of a base64 bit mask, one by one."""
  content = base64.b64decode(text)
  return [i for i in range(count) if content[i // 8] >> (i % 8) & 1]


def test_the_script_gets_tokens_and_scores_of_all_views(page):
  data = Outline(page).data()["viewer"]["clips"]
  for found, made in zip(data, EXAMPLES, strict=True):
    assert {
      (method, float(ratio)): unpack(mask, 36)
      for method, row in found["views"].items()
      for ratio, mask in row.items()
    } == {key: view.index.tolist() for key, view in made.views.items()}
    assert unpack(found["decisive"], 36) == [3, 4]
    assert set(found["scores"]) == {"cacovid"}
    gap = made.views["cacovid", 0.1].token_gap
    heat = np.frombuffer(
      base64.b64decode(found["scores"]["cacovid"]["tokens"]), np.uint8
    )
    # The order of the scores but for ties at the ends.
    order = np.argsort(gap)[2:-2]
    assert (np.diff(heat[order].astype(int)) >= 0).all()
    assert heat.min() == 0 and heat.max() == 255
    frame = made.views["cacovid", 0.1].frame_gap
    softmax = np.exp(frame) / np.exp(frame).sum()
    np.testing.assert_allclose(
      found["scores"]["cacovid"]["frames"], softmax / softmax.max(), atol=1e-4
    )
    assert found["shown"] == ["cacovid", "0.1"]
    assert found["answers"]["cacovid"]["0.1"][2] is made.said.right


def test_the_script_gets_every_group(page):
  groups = Outline(page).data()["groups"]
  assert [f["key"] for f in groups["facets"]] == [
    "category",
    "duration",
    "sub_category",
  ]
  assert groups["facets"][2]["names"] == ["Football"]
  assert groups["facets"][2]["counts"] == [4]
  assert groups["values"]["cacovid"]["0.25"] == [[0.85], [0.85], [0.75]]
  # Nothing is made up for a method that has no such group.
  assert groups["values"]["last_query"]["0.25"][2] == [None]
  assert "0.10" not in groups["values"]["random"]
  assert groups["vanilla"] == [[0.9], [0.9], [0.75]]


def test_lengths_in_seconds_are_in_their_order():
  out = full()
  lengths = {
    name: {"accuracy": 0.5, "n": 1} for name in ("15", "3600", "60", "600")
  }
  out["vanilla"]["by_duration"] = lengths
  data = Outline(report.render(out, [])).data()
  assert data["groups"]["facets"][1]["names"] == ["15", "60", "600", "3600"]


def test_what_did_not_go_as_asked_is_listed(page):
  text = Outline(page).joined()
  text = text[text.index("What did not go as asked") :]
  for expected in (
    "random 10 % 18.75 % no <reason>",
    "gone.mp4 2 missing",
    f"row 3: answer {HOSTILE}",
    "row: 5, why: empty",
    "Rows that are no part of the benchmark's score 1",
    "summary 217",
    "Left out: image rows 1",
    "cacovid 25 % 3",
    "last_query 10 % 25.0 %",
  ):
    assert expected in text, expected
  assert "are not there" not in text


def test_a_long_list_says_what_it_leaves_out():
  out = full()
  out["unreadable"] = [
    {"video": f"v{i}.mp4", "reason": "missing", "questions": 1}
    for i in range(150)
  ]
  text = Outline(report.render(out, [])).joined()
  assert "v99.mp4" in text and "v100.mp4" not in text
  assert "The first 100 of 150; results.json has all of them." in text


def test_text_of_the_data_set_is_escaped(page):
  assert "<i>yes" not in page and "<img src=x" not in page
  assert "&lt;/script&gt;&lt;img src=x onerror=" in page
  assert "dense &lt;b&gt;" in page
  outline = Outline(page)
  assert [a for t, a in outline.tags if t == "script"] == [
    {"type": "application/json", "id": "data"},
    {},
  ]
  # In the script's data as well, which the browser does not unescape.
  (block,) = [text for found, text in outline.scripts if found]
  assert not set(block) & set("<>&\u2028\u2029")
  said = outline.data()["viewer"]["clips"][0]["answers"]["vanilla"]["1"]
  assert said[1] == f"A {HOSTILE}"


def test_any_text_survives_in_json():
  text = '</script><!-- <script> & ]]> \u2028 \u2029 " \\ \N{SNOWMAN}'
  block = report.json_block({text: text})
  assert not set(block) & set("<>&\u2028\u2029")
  assert json.loads(block) == {text: text}
  with pytest.raises(ValueError):
    report.json_block(float("nan"))


def test_only_its_own_script_may_run(page):
  outline = Outline(page)
  (policy,) = [
    a["content"] for t, a in outline.tags
    if a.get("http-equiv") == "Content-Security-Policy"
  ]  # fmt: skip
  rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
  ((_, script),) = [s for s in outline.scripts if not s[0]]
  digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
  assert rules == {
    "default-src": "'none'",
    "img-src": "data:",
    "style-src": "'unsafe-inline'",
    "script-src": f"'sha256-{digest}'",
    "base-uri": "'none'",
    "form-action": "'none'",
  }
  # It writes text, never markup, and reaches for nothing outside the page.
  for word in ("innerHTML", "outerHTML", "insertAdjacent", "eval(", "Function(",
               "fetch(", "XMLHttp", "import(", "WebSocket"):  # fmt: skip
    assert word not in script, word


def test_nothing_is_loaded_from_elsewhere(page):
  outline = Outline(page)
  for tag, attributes in outline.tags:
    assert tag not in ("link", "iframe", "object", "embed", "base", "form")
    for name in ("src", "href", "xlink:href", "srcset", "action"):
      value = attributes.get(name)
      inside = value and value.startswith("#")
      picture = value and value.startswith("data:image/jpeg;base64,")
      assert value is None or picture or (inside and tag == "a")
    assert not any(name.startswith("on") for name in attributes)
  assert not re.search(r"https?://|@import|url\(", page)


def test_links_within_the_page_have_a_target(page):
  outline = Outline(page)
  names = {a.get("id") for _, a in outline.tags}
  links = [a["href"][1:] for t, a in outline.tags if t == "a"]
  assert len(links) == 7 and set(links) <= names
  ids = [a["id"] for _, a in outline.tags if "id" in a]
  assert len(ids) == len(set(ids))


def test_the_same_input_gives_the_same_page(page):
  examples = [example(number, number % 2 == 0) for number in range(6)]
  assert report.render(full(), examples, CURVES, TIMES) == page


def test_accuracy_over_time_where_it_was_measured(page):
  outline = Outline(page)
  (points,) = re.findall(
    r'aria-label="accuracy \(%\) over milliseconds to the first token'
    r' \(logarithmic\)">(.*?)</svg>',
    page,
  )[:1]
  # Random could not be run at 10 %, and has no time at 25 %.
  names = re.findall(r'<circle cx="([\d.]+)".*?<title>(.*?)</title>', points)
  places = {name: float(x) for x, name in names}
  assert len(names) == 5
  # The last of a name is that of the largest ratio.
  order = ["decisive_boxes", "cacovid", "last_query", "vanilla"]
  assert sorted(places, key=places.get) == order
  assert "No times were measured" not in outline.joined()
  text = Outline(report.render(full(), [])).joined()
  assert "No times were measured" in text


def test_differences_stand_on_one_scale(page):
  """Of both ratios: -30 to -10 points on a scale from -30 to 0."""
  outline = Outline(page)
  spans = [a["style"] for a in outline.classed("span")]
  dots = [a["style"] for a in outline.classed("dot")]
  assert len(outline.classed("forest")) == 2
  assert set(spans) == {"left:0.0%;width:66.67%"} and len(spans) == 4
  assert set(dots) == {"left:33.33%"}
  assert {a["style"] for a in outline.classed("zero")} == {"left:100.0%"}


def test_without_policy_curves_and_clips():
  out = results_of(random=(0.6, 0.5))
  out |= {"frame_head": None, "chosen": {}, "unreadable": [], "oracles": {}}
  out["paired"] = []
  out["provenance"]["generator_hash"] = None
  page = report.render(
    out, [example(1, True, scores=False, method="uniform")], ()
  )
  outline = Outline(page)
  text = outline.joined()
  assert "Training" not in text and "Paired differences" not in text
  assert "Nothing: every method was run" in text
  assert outline.data()["viewer"]["clips"][0]["scores"] == {}
  outline = Outline(report.render(out, [], ()))
  assert not any(a.get("id") == "viewer" for _, a in outline.tags)
  assert outline.data()["viewer"] == {"clips": []}


def test_results_without_groups_and_with_grids_that_differ():
  out = results_of(cacovid=(0.8, 0.7))
  out["grid"] = None
  out["vanilla"]["kept_tokens"] = 36.5
  out["chance"] = 0.0
  for found in (out["vanilla"], *out["methods"]["cacovid"].values()):
    del found["by_category"], found["by_duration"]
  text = Outline(report.render(out, [])).joined()
  assert "guessing" not in text
  assert "By group of questions" not in text
  assert "all 36.5 video tokens" in text and "7 clips." in text


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


def test_a_long_run_stays_below_six_megabytes():
  """8 clips of 32 frames of noise, which compresses worst, and 20 views."""
  rng = np.random.default_rng(0)
  frames = rng.integers(0, 255, (32, 180, 320, 3), dtype=np.uint8)
  gaps = {"token_gap": rng.normal(size=6272), "frame_gap": rng.normal(size=32)}
  names = ("cacovid", "one", "two", "three")
  views = {
    (name, ratio): batch_lib.KeptTokens(np.arange(int(6272 * ratio)), **gaps)
    for name in names
    for ratio in (0.25, 0.2, 0.15, 0.1, 0.05)
  }
  said = viewer.Said("A", "A", True)
  answers = {name: {r: said for _, r in views} for name in names}
  clip = dataclasses.replace(
    example(0, True),
    frames=frames,
    grid=(32, 14, 14),
    views=views,
    answers=answers,
  )
  page = report.render(results_of(cacovid=(0.8, 0.7)), [clip] * 8)
  assert page.count("data:image/jpeg;base64,") == 8 * 32
  assert len(page.encode()) < 6_000_000


def test_a_long_answer_is_cut():
  said = viewer.Said("ab" * 500, "A", True)
  clip = example(0, True)
  answers = {"cacovid": {0.25: said, 0.1: said}, "vanilla": {1.0: said}}
  clip = dataclasses.replace(clip, answers=answers)
  page = report.render(results_of(cacovid=(0.8, 0.7)), [clip])
  cut = "ab" * 200 + "… (1000 characters)"
  # Its words, a tip of each cell, and what the script writes.
  assert page.count(cut) == 1 + 3 + 3 and "ab" * 201 not in page


def test_a_long_name_is_shortened_beside_a_chart_only():
  name = "cacovid?" + "&".join(f"option{i}=1" for i in range(9))
  page = report.render(results_of(**{name: (0.8, 0.7)}), [])
  texts = re.findall(r"<text .*?>(.*?)</text>", page)
  assert texts.count("cacovid?option0=1&amp;option1=1&amp;opt…") == 1
  outline = Outline(page)
  assert any(a.get("data-value") == name for _, a in outline.tags)


def test_slices_of_several_frames():
  frames = np.arange(5)[:, None, None, None] * np.ones((1, 2, 2, 3))
  clip = dataclasses.replace(example(0, True), frames=frames, grid=(3, 1, 1))
  assert clip.slices[:, 0, 0, 0].tolist() == [0, 2, 4]
  assert clip.labels[1] == "3–4"
