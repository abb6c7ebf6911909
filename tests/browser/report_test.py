"""The report and the page of an answer, used as a person would use them.

The pages hold hostile text wherever text of a data set or a model goes. After
every test the console must be empty, and nothing may have been asked for but
the page itself.
"""

import base64
import dataclasses
import json

import numpy as np
import pytest
from PIL import Image
from selenium.webdriver.common import action_chains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support import ui

from cacovid_jax.data import question as question_lib
from cacovid_jax.evals.report import html as report
from cacovid_jax.evals.report import viewer
from cacovid_jax.inference import batch as batch_lib
from tests.evals import report_test

HOSTILE = report_test.HOSTILE
GRID = (6, 4, 4)
RATIOS = (0.25, 0.1, 0.05)


def kept(number, method, ratio):
  """Returns the tokens that a made-up method keeps: known to the tests."""
  rng = np.random.default_rng([number, len(method), int(100 * ratio)])
  return np.sort(rng.permutation(96)[: int(96 * ratio)])


def example(number):
  """Returns clip `number`; even ones are answered rightly at 10 %."""
  rng = np.random.default_rng(number)
  gaps = {"token_gap": np.linspace(-1, 1, 96), "frame_gap": np.arange(6.0)}
  views = {
    (method, ratio): batch_lib.KeptTokens(
      kept(number, method, ratio), **(gaps if method == "cacovid" else {})
    )
    for method in ("cacovid", "random", HOSTILE)
    for ratio in RATIOS
    if (method, ratio) != ("random", 0.05)
  }
  right = viewer.Said(f"A {HOSTILE}", "A", True)
  wrong = viewer.Said(f"B, says clip {number}", "B", False)
  answers = {"vanilla": {1.0: right}}
  for method, ratio in views:
    good = method == "cacovid" and (ratio == 0.25 or number % 2 == 0)
    answers.setdefault(method, {})[ratio] = right if good else wrong
  return viewer.Example(
    question=question_lib.Question(
      id=f"q{number}{HOSTILE}",
      video=f"{HOSTILE}.mp4",
      question=f"Question {number} {HOSTILE}?",
      options=(f"yes {HOSTILE}", "no"),
      answer="A",
      category=f"kind {HOSTILE}",
      duration="short",
    ),
    frames=rng.integers(0, 255, (6, 90, 160, 3), dtype=np.uint8),
    grid=GRID,
    views=views,
    answers=answers,
    shown=("cacovid", 0.1),
    decisive=frozenset({0, 5}),
  )


def results():
  """Returns results.json with three ratios, failures and hostile names."""
  out = report_test.full()
  order = ("random", "cacovid", "last_query", HOSTILE)
  base = dict(zip(order, (0.5, 0.9, 0.7, 0.3), strict=True))
  out["methods"] = {
    name: {
      f"{ratio:.2f}": report_test.cell(value - 0.2 * (ratio == 0.05))
      for ratio in RATIOS
    }
    for name, value in base.items()
  }
  out["methods"]["random"]["0.05"] = {
    "status": f"no {HOSTILE}",
    "minimum_ratio": 0.0625,
  }
  out["oracles"] = {
    "decisive_boxes": {
      f"{ratio:.2f}": report_test.cell(0.95) for ratio in RATIOS
    }
  }
  groups = {"Football": {"accuracy": 0.75, "n": 4}}
  groups[f"Chess {HOSTILE}"] = {"accuracy": 0.5, "n": 6}
  out["vanilla"]["by_group"] = {"sub_category": groups}
  out["methods"]["cacovid"]["0.10"]["by_group"] = {
    "sub_category": {
      "Football": {"accuracy": 0.25, "n": 4},
      f"Chess {HOSTILE}": {"accuracy": 1.0, "n": 6},
    }
  }
  out["unreadable"] = [
    {"video": f"{HOSTILE}.mp4", "reason": "missing", "questions": 2}
  ]
  return out


@pytest.fixture(scope="session")
def paths(tmp_path_factory):
  folder = tmp_path_factory.mktemp("pages")
  examples = [example(number) for number in range(4)]
  times = {"cacovid": {"0.10": 2.0}, "random": {"0.10": 0.1}}
  report.write(
    folder / "report.html", results(), examples, report_test.CURVES, times
  )
  unknown = dataclasses.replace(
    examples[0],
    question=dataclasses.replace(
      examples[0].question,
      id=f"{HOSTILE}.mp4",
      question=f"What {HOSTILE}?",
      answer="",
    ),
    views={k: v for k, v in examples[0].views.items() if k[0] == "cacovid"},
    answers={"cacovid": {r: viewer.Said(f"B {HOSTILE}", "B") for r in RATIOS}},
  )
  page = report.page(
    "answer.html.jinja",
    [unknown],
    question=unknown.question,
    lead="lead",
    note="note",
    warnings=[HOSTILE],
    columns=("tokens from", "answer"),
    rows=[("cacovid", HOSTILE)],
    provenance=results()["provenance"],
  )
  (folder / "answer.html").write_text(page, "utf-8")
  return folder


class Page:
  """A page in the browser, and short words for what the tests do with it."""

  def __init__(self, driver, url):
    self.driver, self.url = driver, url

  def open(self, width=1280, scheme="light"):
    command = self.driver.execute_cdp_cmd
    command("Emulation.setDeviceMetricsOverride", dict(
      width=width, height=900, deviceScaleFactor=1, mobile=False))  # fmt: skip
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    command("Emulation.setEmulatedMedia", {"features": features})
    for kind in ("browser", "performance"):
      self.driver.get_log(kind)  # What came before is not of this page.
    self.driver.get(self.url)

  def find(self, selector):
    return self.driver.find_element(By.CSS_SELECTOR, selector)

  def all(self, selector):
    return self.driver.find_elements(By.CSS_SELECTOR, selector)

  def shown(self, selector):
    return [found for found in self.all(selector) if found.is_displayed()]

  def script(self, text, *arguments):
    return self.driver.execute_script(text, *arguments)

  def choose(self, selector, text):
    ui.Select(self.find(selector)).select_by_visible_text(text)

  def press(self, *keys):
    chain = action_chains.ActionChains(self.driver, duration=0)
    for key in keys:
      chain = chain.send_keys(key)
    chain.perform()

  def question(self):
    (heading,) = self.shown("article h3")
    return heading.text

  def kept(self):
    """Returns the tokens outlined in the frames of the shown clip."""
    (article,) = self.shown("article")
    paths = article.find_elements(By.CSS_SELECTOR, ".frame path.kept")
    return [
      16 * frame + 4 * y + x
      for frame, path in enumerate(paths)
      for x, y in sorted(
        report_test.squares(path.get_attribute("d")), key=lambda p: p[::-1]
      )
    ]

  def rows(self):
    return [
      row.get_attribute("data-name")
      for row in self.all("#results tbody:last-child tr")
    ]

  def picture(self, path, width):
    """Writes a screenshot of the whole page, and returns it."""
    height = self.script("return document.documentElement.scrollHeight")
    clip = dict(x=0, y=0, width=width, height=height, scale=1)
    found = self.driver.execute_cdp_cmd("Page.captureScreenshot", dict(
      format="png", captureBeyondViewport=True, clip=clip))  # fmt: skip
    path.write_bytes(base64.b64decode(found["data"]))
    return np.asarray(Image.open(path).convert("RGB"))


def check_quiet(driver, url):
  """Fails on anything in the console and on any request but the page's."""
  assert driver.get_log("browser") == []
  for entry in driver.get_log("performance"):
    event = json.loads(entry["message"])["message"]
    if event["method"] == "Network.requestWillBeSent":
      asked = event["params"]["request"]["url"]
      assert asked.split("#")[0] == url or asked.startswith("data:image/jpeg")
  # An alert, or the mark of an image's onerror, would be left behind.
  assert driver.execute_script("return document.querySelector('[src=x]')") is (
    None
  )


@pytest.fixture
def page(driver, paths):
  url = (paths / "report.html").as_uri()
  made = Page(driver, url)
  made.open()
  yield made
  check_quiet(driver, url)


@pytest.fixture
def answer_page(driver, paths):
  url = (paths / "answer.html").as_uri()
  made = Page(driver, url)
  made.open()
  yield made
  check_quiet(driver, url)


def test_a_click_on_a_heading_sorts(page):
  start = ["random", "cacovid", "last_query", HOSTILE, "decisive_boxes"]
  assert page.rows() == start
  heading = page.find('#results th[data-column="0.10"]')
  heading.find_element(By.TAG_NAME, "button").click()
  best = ["decisive_boxes", "cacovid", "last_query", "random", HOSTILE]
  assert page.rows() == best
  assert heading.get_attribute("aria-sort") == "descending"
  heading.find_element(By.TAG_NAME, "button").click()
  assert page.rows() == best[::-1]
  assert heading.get_attribute("aria-sort") == "ascending"
  others = page.all('#results th[aria-sort="none"]')
  assert len(others) == 3
  # Vanilla stays on top.
  assert "vanilla" in page.find("#results tbody tr").text


def test_enter_and_space_sort_and_failures_stay_last(page):
  button = page.find('#results th[data-column="0.05"] button')
  page.script("arguments[0].focus()", button)
  page.press(Keys.ENTER)
  order = ["decisive_boxes", "cacovid", "last_query", HOSTILE, "random"]
  assert page.rows() == order
  page.press(Keys.SPACE)
  assert page.rows() == [*order[3::-1], "random"]
  page.find("#results th button").click()
  names = ["cacovid", "decisive_boxes", "last_query", "random"]
  assert page.rows() == [HOSTILE, *names]


def test_one_ratio_alone(page):
  page.choose("#columns", "10 % kept")
  headings = [heading.text for heading in page.shown("#results thead th")]
  assert headings == ["method", "10 % kept"]
  assert all(
    len(row.find_elements(By.CSS_SELECTOR, "td:not([hidden])")) == 1
    for row in page.all("#results tbody tr")
  )
  assert [f.get_attribute("data-column") for f in page.shown(".forest")] == [
    "0.10"
  ]
  page.choose("#columns", "all")
  assert len(page.shown("#results thead th")) == 4


def test_groups_by_facet_method_and_ratio(page):
  assert [s.text for s in page.shown("#bars .name")][0].startswith("order <f")
  page.choose("#facet", "sub category")
  page.choose("#bars-method", "cacovid")
  page.choose("#bars-ratio", "10 %")
  names = [name.text for name in page.shown("#bars .name")]
  assert names == [f"Chess {HOSTILE}\nn = 6", "Football\nn = 4"]
  values = [value.text for value in page.shown("#bars .measure b")]
  assert values == ["100.0", "50.0", "25.0", "75.0"]
  widths = page.script(
    "return [...document.querySelectorAll('#bars .track')].map((t) =>"
    " t.firstChild.getBoundingClientRect().width"
    " / t.getBoundingClientRect().width)"
  )
  np.testing.assert_allclose(widths, [1, 0.5, 0.25, 0.75], atol=0.01)
  assert "25.0" in page.find("#bars").get_attribute("aria-label")
  # The table of the same facet, and no other.
  (table,) = page.shown("details.facet")
  assert "sub category" in table.text
  page.choose("#bars-method", "random")
  page.choose("#bars-ratio", "5 %")
  assert "random could not be run at 5 %" in page.find("#bars").text
  values = [value.text for value in page.shown("#bars .measure b")]
  assert values == ["–", "50.0", "–", "75.0"]


def test_the_slider_moves_the_kept_tokens(page):
  assert page.kept() == kept(0, "cacovid", 0.1).tolist()
  slider = page.find("#ratio")
  page.script("arguments[0].focus()", slider)
  page.press(Keys.ARROW_RIGHT)
  assert page.kept() == kept(0, "cacovid", 0.25).tolist()
  assert page.find("#share").text == "25 %, 24 of 96 tokens"
  assert slider.get_attribute("aria-valuetext") == "25 %, 24 of 96 tokens"
  page.press(Keys.ARROW_LEFT, Keys.ARROW_LEFT)
  assert page.kept() == kept(0, "cacovid", 0.05).tolist()
  assert "cacovid keeps 4 of 96 tokens (5 %)" in page.find(".keeps").text
  # The whole of each frame is veiled but for its kept tokens.
  (article,) = page.shown("article")
  veil = article.find_element(By.CSS_SELECTOR, ".frame path.veil")
  first = [i for i in kept(0, "cacovid", 0.05) if i < 16]
  holes = veil.get_attribute("d").removeprefix("M0 0H4V4H0z")
  assert len(report_test.squares(holes)) == len(first)


def test_another_method_at_another_ratio(page):
  page.choose("#method", "random")
  assert page.kept() == kept(0, "random", 0.1).tolist()
  assert page.shown(".verdict")[0].text == "wrong: B"
  (article,) = page.shown("article")
  (now,) = article.find_elements(By.CSS_SELECTOR, ".answers .now")
  assert now.get_attribute("data-ratio") == "0.1"
  # Random has no scores, and was not run at 5 %.
  assert not article.find_elements(By.CSS_SELECTOR, ".timeline .score")
  page.script("document.getElementById('ratio').focus()")
  page.press(Keys.ARROW_LEFT)
  assert page.kept() == []
  assert page.find("#share").text == "5 %: random could not be run"
  assert page.shown(".verdict")[0].text == "could not be run"
  # A cell of the answers' table leads there as well.
  row = next(
    row for row in article.find_elements(By.CSS_SELECTOR, ".answers tr.looked")
    if row.get_attribute("data-method") == HOSTILE
  )  # fmt: skip
  row.find_element(By.CSS_SELECTOR, 'td[data-ratio="0.25"]').click()
  assert page.kept() == kept(0, HOSTILE, 0.25).tolist()
  assert page.find("#method").get_attribute("value") == HOSTILE


def test_keys_turn_to_other_clips(page):
  seen = [page.question()]
  for key in (Keys.ARROW_RIGHT, "j", "j", "j", "k", Keys.ARROW_LEFT):
    page.press(key)
    seen.append(page.question())
  numbers = [int(text.split()[1]) for text in seen]
  assert numbers == [0, 1, 2, 3, 0, 3, 2]
  assert page.find("#position").text == "clip 3 of 4"
  assert len(page.shown("article")) == 1
  # A list takes letters for itself; a slider takes the arrows.
  page.script("document.getElementById('method').focus()")
  page.press("j")
  assert page.question() == seen[-1]
  page.script("document.getElementById('ratio').focus()")
  page.press(Keys.ARROW_RIGHT)
  assert page.question() == seen[-1]
  page.press("j")
  assert page.question().startswith("Question 3")
  page.find("#next").click()
  assert page.question().startswith("Question 0")


def test_up_and_down_change_the_ratio_within_the_viewer_only(page):
  page.press(Keys.ARROW_UP)
  assert page.find("#share").text.startswith("10 %")
  page.shown("article .meta")[0].click()
  page.press(Keys.ARROW_UP)
  assert page.find("#share").text.startswith("25 %")
  page.press(Keys.ARROW_UP, Keys.ARROW_DOWN, Keys.ARROW_DOWN, Keys.ARROW_DOWN)
  assert page.find("#share").text.startswith("5 %")


def test_right_and_wrong_ones(page):
  page.choose("#show", "answered wrongly")
  assert page.question().startswith("Question 1")
  page.script("document.activeElement.blur()")
  page.press("j")
  assert page.question().startswith("Question 3")
  page.press("j")
  assert page.question().startswith("Question 1")
  assert "2 of 4 clips match; this is number 1" == page.find("#position").text
  # At 25 % all are right.
  page.find("#ratio").send_keys(Keys.ARROW_RIGHT)
  assert page.shown(".viewer .none") and not page.shown("article")
  page.choose("#show", "all clips")
  assert page.question().startswith("Question 1")


def test_frames_by_click_and_by_arrow(page):
  (article,) = page.shown("article")

  def current():
    frames = article.find_elements(By.CSS_SELECTOR, ".frame")
    (found,) = [
      i for i, frame in enumerate(frames)
      if "current" in frame.get_attribute("class")
    ]  # fmt: skip
    bars = article.find_elements(By.CSS_SELECTOR, ".timeline button")
    (marked,) = [
      i for i, bar in enumerate(bars)
      if bar.get_attribute("aria-current") == "true"
    ]  # fmt: skip
    caption = article.find_element(By.CSS_SELECTOR, ".caption").text
    source = article.find_element(By.CSS_SELECTOR, ".stage img")
    picture = frames[found].find_element(By.TAG_NAME, "img")
    assert source.get_attribute("src") == picture.get_attribute("src")
    assert marked == found and caption.startswith(f"frame {found + 1},")
    return found

  assert current() == 0
  article.find_elements(By.CSS_SELECTOR, ".timeline button")[3].click()
  assert current() == 3
  page.press(Keys.ARROW_RIGHT)
  assert current() == 4
  page.press(Keys.ARROW_LEFT, Keys.ARROW_LEFT)
  assert current() == 2
  assert page.question().startswith("Question 0")
  article.find_elements(By.CSS_SELECTOR, ".frame")[5].click()
  assert current() == 5
  # Bars follow the scores: the last frame's is the clip's best.
  heights = page.script(
    "return [...document.querySelectorAll('article:not([hidden]) .score')]"
    ".map((bar) => bar.getBoundingClientRect().height)"
  )
  assert len(heights) == 6
  expected = [max(1, 36 * float(np.exp(t - 5))) for t in range(6)]
  np.testing.assert_allclose(heights, expected, atol=0.1)
  label = page.all("article:not([hidden]) .timeline button")[5]
  assert "frame score 5" in label.get_attribute("aria-label")


def test_token_scores_are_painted(page):
  canvas = "article:not([hidden]) .frame canvas"
  assert not page.shown(canvas)
  page.find("#heat").click()
  assert len(page.shown(canvas)) == 6
  colours = page.script(
    "const c = document.querySelectorAll(arguments[0]);"
    "return [...c].map((x) => [...x.getContext('2d').getImageData(0, 0, 4, 4)"
    ".data]);",
    canvas,
  )
  red = np.array(colours).reshape(96, 4)[:, 0]
  # Rising scores: ever darker, from paper to ink.
  assert red[0] == 247 and red[-1] == 8 and (np.diff(red) <= 0).all()
  page.choose("#method", "random")
  assert not page.shown(canvas)
  page.choose("#method", "cacovid")
  page.find("#heat").send_keys(Keys.SPACE)
  assert not page.shown(canvas)


def test_all_can_be_reached_by_keyboard_and_focus_is_seen(page):
  reached = set()
  page.script("document.getElementById('clip').focus()")
  for _ in range(9):
    element = page.driver.switch_to.active_element
    reached.add(element.get_attribute("id") or element.tag_name)
    page.press(Keys.TAB)
  assert {"clip", "next", "show", "method", "ratio", "heat"} <= reached
  page.script("document.getElementById('next').focus()")
  page.press(Keys.TAB)
  style = page.script(
    "return getComputedStyle(document.activeElement).outlineStyle"
  )
  assert style == "solid"


def test_hostile_text_is_text(page):
  assert HOSTILE in page.question()
  for selector in (
    "article:not([hidden]) .options",
    "article:not([hidden]) .answers",
    "#results",
  ):
    assert HOSTILE in page.find(selector).text
  assert HOSTILE in page.find("article:not([hidden]) .said").text
  assert not page.all("img[src='x']")
  assert len(page.all("script")) == 2
  # The policy forbids what is not the page's own script.
  page.script(
    "const s = document.createElement('script'); s.textContent = 'window.bad ="
    " 1'; document.body.append(s); s.remove();"
    "const i = document.createElement('img'); i.setAttribute('onerror',"
    " 'window.bad = 2'); i.src = 'data:,'; document.body.append(i);"
  )
  assert page.script("return window.bad") is None
  refused = page.driver.get_log("browser")
  assert refused and all(
    "Content Security Policy" in entry["message"] for entry in refused
  )


def test_without_scripts_everything_can_be_read(page):
  page.driver.execute_cdp_cmd(
    "Emulation.setScriptExecutionDisabled", {"value": True}
  )
  try:
    page.driver.get(page.url)
    assert len(page.shown("article")) == 4
    assert len(page.shown("article .frame img")) == 24
    assert page.shown("svg.chart") and page.shown("#results")
    assert len(page.shown("details.facet table")) == 3
    assert not page.shown(".scripted")
  finally:
    page.driver.execute_cdp_cmd(
      "Emulation.setScriptExecutionDisabled", {"value": False}
    )


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_looks_right(page, pictures, width, scheme):
  page.open(width, scheme)
  wide = page.script(
    "return document.documentElement.scrollWidth"
    " - document.documentElement.clientWidth"
  )
  assert wide <= 0
  # Nothing sticks out but what lies in a box that scrolls by itself.
  outside = page.script(
    "return [...document.querySelectorAll('body *')].filter((e) =>"
    " !e.closest('.scroll, svg, [hidden]') && e.getClientRects().length &&"
    " e.getBoundingClientRect().right > innerWidth + 1)"
    ".map((e) => e.outerHTML.slice(0, 80))"
  )
  assert outside == []
  image = page.picture(pictures / f"report_{width}_{scheme}.png", width)
  assert image.shape[1] == width and image.shape[0] > 2000
  paper = {"light": (251, 250, 247), "dark": (23, 24, 27)}[scheme]
  assert tuple(image[2, 2]) == paper
  assert len(np.unique(image.reshape(-1, 3)[::97], axis=0)) > 100
  # Text against what it stands on.
  assert contrast(page, "p.note") >= 4.5
  assert contrast(page, "#results .small") >= 4.5
  assert contrast(page, ".verdict") >= 4.5


def contrast(page, selector):
  """Returns the WCAG contrast of an element's text."""
  colours = page.script(
    "let e = document.querySelector(arguments[0]);"
    "const ink = getComputedStyle(e).color; let paper;"
    "do { paper = getComputedStyle(e).backgroundColor; e = e.parentElement; }"
    " while (paper === 'rgba(0, 0, 0, 0)');"
    "return [ink, paper].map((c) => c.match(/[\\d.]+/g).slice(0, 3));",
    selector,
  )
  light = []
  for colour in colours:
    value = np.array(colour, float) / 255
    linear = np.where(
      value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4
    )
    light.append(float(linear @ [0.2126, 0.7152, 0.0722]))
  return (max(light) + 0.05) / (min(light) + 0.05)


def test_the_answer_page_shares_the_viewer(answer_page, pictures):
  page = answer_page
  assert HOSTILE in page.find("h1").text
  assert page.kept() == kept(0, "cacovid", 0.1).tolist()
  page.find("#ratio").send_keys(Keys.ARROW_RIGHT)
  assert page.kept() == kept(0, "cacovid", 0.25).tolist()
  # What is right is not known: nothing is called right, nothing to filter by.
  assert not page.all(".verdict") and not page.shown("#show")
  # Nor are there other clips to turn to.
  assert (
    not page.shown("#next") and "next clip" not in page.find("#viewer").text
  )
  options = page.all(".options li")
  assert [o.get_attribute("class").strip() for o in options] == ["", "picked"]
  page.picture(pictures / "answer_1280_light.png", 1280)
