"""Letters out of answers about one's own videos."""

import pytest

from cacovid_jax.data import letters
from cacovid_jax.data import question as question_lib
from cacovid_jax.evals import scoring

OPTIONS = ("red", "dark red", "a blue cat", "green")


@pytest.mark.parametrize(
  ("text", "letter", "how"),
  [
    ("B", "B", "letter"),
    ("b", "B", "letter"),
    ("Ｂ", "B", "letter"),
    ("ｂ．", "B", "letter"),
    ("(b)", "B", "letter"),
    (" **B** ", "B", "letter"),
    ("B.", "B", "letter"),
    ("<answer>c</answer> because of A", "C", "letter"),
    ("B. dark red", "B", "lettered"),
    ("(B) dark red", "B", "lettered"),
    ("b) dark red", "B", "lettered"),
    ("Ｂ：dark red", "B", "lettered"),
    ("B: red", "B", "lettered"),
    ("Answer: B", "B", "named"),
    ("answer: b", "B", "named"),
    ("Answer：Ｂ", "B", "named"),
    ("The answer is B", "B", "named"),
    ("The correct answer is (d).", "D", "named"),
    ("Final answer: **C**", "C", "named"),
    ("I take option B because it moves.", "B", "named"),
    ("Answer: A? No. Answer: D.", "D", "named"),
    ("Ответ: Б или B", "B", "alone"),
    ("Ответ: B", "B", "named"),
    ("答案是B", "B", "named"),
    ("答案：Ｂ。", "B", "named"),
    ("정답은 B", "B", "named"),
    ("उत्तर: B", "B", "named"),
    ("الإجابة: B", "B", "named"),
    ("red", "A", "option"),
    ("RED.", "A", "option"),
    ("It is dark red.", "B", "option"),
    ("The answer is a blue cat", "C", "option"),
    ("Answer: green", "D", "option"),
    ("It must be B, I see", "B", "alone"),
    ("A cat, so C", "C", "alone"),
    ("red and green", "", ""),
    ("A or B", "", ""),
    ("A cat is seen", "", ""),
    ("reddish", "", ""),
    ("Option A is wrong. It is green.", "D", "option"),
    ("Option A is wrong. It is green or dark red.", "", ""),
    ("Option A is wrong.", "", ""),
    ("A is incorrect", "", ""),
    ("A isn't right. Answer: C", "C", "named"),
    ("A is not the answer, B is", "B", "named"),
    ("not B", "", ""),
    ("It is not (B); it's green", "D", "option"),
    ("It is not red, it is green", "D", "option"),
    ("It is not dark red", "", ""),
    ("I don't choose B", "", ""),
    ("Neither A nor B, but D", "D", "alone"),
    ("The answer is not A or B, so C.", "C", "alone"),
    ("The answer is C, not B", "C", "named"),
    ("I choose B rather than green", "B", "alone"),
    ("All but B", "", ""),
    ("答案不是B", "", ""),
    ("E", "", ""),
    ("Answer: F", "", ""),
    ("nothing of these", "", ""),
    ("", "", ""),
    ("!?", "", ""),
  ],
)
def test_the_rule_of_own_videos(text, letter, how):
  assert letters.read_own(text, "ABCD", OPTIONS) == (letter, how)
  question = question_lib.Question(
    id="1", video="a.mp4", question="?", options=OPTIONS, answer="B"
  )
  scored = scoring.prepared(question, text, rule="own")
  assert (scored.letter, scored.read_by) == (letter, how)
  assert scored.score == float(letter == "B")
  got = letters.extract(text, rule="own", num_options=4, options=OPTIONS)
  assert got == letter


@pytest.mark.parametrize(
  ("options", "text", "letter"),
  [
    (("да", "нет"), "Нет.", "B"),
    (("кот", "пёс"), "который", ""),
    (("锅", "碗"), "我觉得是碗里", "B"),
    (("1", "2", "3"), "2", "B"),
    (("1", "12"), "It is 12", "B"),
    (("+", "-"), "-", "B"),
    (("हाँ", "नहीं"), "नहीं", "B"),
    (("ＡＢＣ株式会社", "その他"), "ABC株式会社です", "A"),
    (("x", "x y"), "x y", "B"),
    # What an option itself denies is no denial.
    (("He runs", "He does not run"), "He does not run.", "B"),
    (("open", "not open"), "It is not open", "B"),
    (("True", "False"), "B is False", "B"),
    (("yes", "no"), "No, it is not.", "B"),
    (("a (b", "c*"), "not a (b, c*", "B"),
  ],
)
def test_the_options_text_in_any_script(options, text, letter):
  assert letters.extract_own(text, "ABC"[: len(options)], options) == letter


def test_a_long_answer_is_read_soon():
  assert letters.extract_own("A or " * 20_000 + "C", "ABC") == ""
  assert letters.extract_own("not the " * 20_000 + "C", "ABC") == ""


def test_other_rules_are_what_they_were():
  # By the paper's rule "Answer" is A; recorded from the published function.
  assert letters.extract("Answer: B", rule="paper") == "A"
  assert letters.extract("Answer: B", rule="lmms-0.7.3") == "B"
