"""Rewards worked out by hand, and against independent slow versions."""

import functools
import random
import unicodedata

import numpy as np
import pytest
from rouge_score import rouge_scorer

from cacovid_jax import config_limits
from cacovid_jax.data import rewards as rewards_lib

CHOICE, NUMBER, OCR = "multiple choice", "numerical", "OCR"
FREE, REGRESSION = "free-form", "regression"

TABLE = [
  # Option letters: the first character of the answer, or of the raw text.
  (CHOICE, "B", "B", 1),
  (CHOICE, "B", "<answer>B</answer>", 1),
  (CHOICE, "<answer>B</answer>", "B", 1),
  (CHOICE, "Because ... <answer> B. A rope </answer>", "B", 1),
  (CHOICE, "B. <answer>C</answer>", "B", 1),
  (CHOICE, "<answer>\nB\n</answer>", "B", 1),
  (CHOICE, "<answer>C</answer><answer>B</answer>", "B", 0),
  (CHOICE, " .B. ", "B", 1),
  (CHOICE, "B. A rope", "B.", 1),
  (CHOICE, "Blue", "B", 1),
  (CHOICE, "b", "B", 0),
  (CHOICE, "(B)", "B", 0),
  (CHOICE, "The answer is B", "B", 0),
  (CHOICE, "", "B", 0),
  (CHOICE, "...", "B", 0),
  (CHOICE, "", "", 0),
  (CHOICE, "B", "", 0),
  (CHOICE, ". .", ". .", 0),
  (CHOICE, "<answer></answer>", "<answer></answer>", 0),
  # Numbers: equal to two decimals, both or neither with a mark.
  (NUMBER, "3.14", "3.141", 1),
  (NUMBER, "3.15", "3.141", 0),
  (NUMBER, "42", "42", 1),
  (NUMBER, "42.0", "42", 0),
  (NUMBER, "1,000", "1000.00", 1),
  (NUMBER, "1,000", "1000", 0),
  (NUMBER, "-0.001", "0.0", 1),
  (NUMBER, "1e2", "100", 1),
  (NUMBER, "<answer> 42 </answer>", "42", 1),
  (NUMBER, "forty-two", "42", 0),
  (NUMBER, "42 apples", "42", 0),
  (NUMBER, "", "42", 0),
  (NUMBER, "nan", "nan", 0),
  (NUMBER, "inf", "inf", 0),
  (NUMBER, "1" * 400, "1" * 400, 0),
  # Transcription: one minus word errors over the words of the right text.
  (OCR, "EXIT 12", "EXIT 12", 1),
  (OCR, "exit 12", "EXIT 12", 0.5),
  (OCR, "EXIT  \n12", "EXIT 12", 1),
  (OCR, "EXIT 12 now", "EXIT 12", 0.5),
  (OCR, "EXIT", "EXIT 12", 0.5),
  (OCR, "a b c d e", "x", 0),
  (OCR, "", "EXIT 12", 0),
  # Free form: mean F1 of ROUGE-1, -2, -L after stemming.
  (FREE, "the cats run", "The cat runs.", 1),
  (FREE, "cat", "dog", 0),
  (FREE, "", "dog", 0),
  (FREE, "dog", "dog", 2 / 3),  # No pair of words, so ROUGE-2 is 0.
  # ROUGE-1 4/5 and ROUGE-L 4/5 of 3 and 2 words, ROUGE-2 2/3.
  (FREE, "a red car", "red car", (0.8 + 2 / 3 + 0.8) / 3),
  # Regression: one minus the relative error.
  (REGRESSION, "9", "10", 0.9),
  (REGRESSION, "10", "10", 1),
  (REGRESSION, "-10", "10", 0),
  (REGRESSION, "1,100", "1000", 0.9),
  (REGRESSION, "1000000", "1", 0),
  (REGRESSION, "about 9", "10", 0),
  (REGRESSION, "nan", "10", 0),
  (REGRESSION, "inf", "10", 0),
  (REGRESSION, "9", "ten", 0),
  # The public formula gives nothing for a right answer of zero.
  (REGRESSION, "0", "0", 0),
  # What is no type scores nothing.
  ("riddle", "B", "B", 0),
]


@pytest.mark.parametrize("problem_type, completion, solution, expected", TABLE)
def test_awkward_answers(problem_type, completion, solution, expected):
  got = rewards_lib.reward(problem_type, completion, solution)
  assert isinstance(got, float)
  assert got == pytest.approx(expected, abs=1e-6)


def test_a_group_is_scored_together():
  got = rewards_lib.rewards(CHOICE, ["A", "B", "B.", "", "A"], "B")
  assert got.dtype == np.float32
  np.testing.assert_array_equal(got, [0, 1, 1, 0, 0])
  assert rewards_lib.rewards(CHOICE, [], "B").shape == (0,)


def _distance(first, second):
  @functools.cache
  def to(i, j):
    if i == 0 or j == 0:
      return i + j
    return min(
      to(i - 1, j) + 1,
      to(i, j - 1) + 1,
      to(i - 1, j - 1) + (first[i - 1] != second[j - 1]),
    )

  return to(len(first), len(second))


def test_edit_distance_equals_its_definition():
  rng = random.Random(0)
  for _ in range(200):
    first = [rng.choice("abc") for _ in range(rng.randrange(8))]
    second = [rng.choice("abc") for _ in range(rng.randrange(8))]
    assert rewards_lib.edit_distance(first, second) == _distance(first, second)


def _f1(overlap, first, second):
  if not overlap:
    return 0.0
  precision, recall = overlap / first, overlap / second
  return 2 * precision * recall / (precision + recall)


def _common(first, second):
  """Length of the longest common subsequence, by trying all."""
  if not first or not second:
    return 0
  if first[0] == second[0]:
    return 1 + _common(first[1:], second[1:])
  return max(_common(first[1:], second), _common(first, second[1:]))


def test_free_form_equals_an_independent_rouge():
  # Words of up to three letters are not stemmed.
  rng = random.Random(0)
  for _ in range(50):
    first = [rng.choice(["cat", "dog", "cow"]) for _ in range(5)]
    second = [rng.choice(["cat", "dog", "cow"]) for _ in range(4)]
    one = sum(min(first.count(w), second.count(w)) for w in set(first))
    pairs = [list(zip(x, x[1:], strict=False)) for x in (first, second)]
    two = sum(min(pairs[0].count(p), pairs[1].count(p)) for p in set(pairs[0]))
    expected = np.mean(
      [_f1(one, 5, 4), _f1(two, 4, 3), _f1(_common(first, second), 5, 4)]
    )
    got = rewards_lib.reward(FREE, " ".join(first), " ".join(second))
    assert got == pytest.approx(expected)


SCRIPTS = [
  "他把鸡蛋打进碗里",
  "彼は卵を割ってボウルに入れる",
  "그는 달걀을 그릇에 깨 넣는다",
  "Он разбивает яйцо в миску",
  "वह कटोरे में अंडा फोड़ता है",
  "هو يكسر البيضة في الوعاء",
  "הוא שובר ביצה לקערה",
  "เขาตอกไข่ใส่ชาม",
  "Σπάει το αυγό στο μπολ",
  "Он кладёт 2 яйца (свежих) в миску №3!",
  "Er schlägt zwölf Eier in die Schüssel",
]


@pytest.mark.parametrize("text", SCRIPTS)
def test_every_script_against_itself_and_against_another(text):
  assert rewards_lib.reward(FREE, text, text) == 1.0
  assert rewards_lib.reward(FREE, text.upper(), text.casefold()) == 1.0
  wide = unicodedata.normalize("NFD", text)
  assert rewards_lib.reward(FREE, wide, text) == pytest.approx(1.0)
  assert rewards_lib.reward(FREE, "the cat sat", text) == 0.0
  others = [other for other in SCRIPTS if other[:2] != text[:2]]
  for other in others:
    assert rewards_lib.reward(FREE, other, text) < 1.0
  if "№" not in text and "ü" not in text:
    assert rewards_lib.reward(FREE, text, text, "public") == 0.0


@pytest.mark.parametrize(
  ("first", "second", "words", "expected"),
  [
    # 3 of 4 characters, 2 of 3 pairs; by hand: (6/8 + 4/6 + 6/8) / 3.
    ("打碎鸡蛋", "打碎鸡头", 4, (6 / 8 + 4 / 6 + 6 / 8) / 3),
    # Words of a script with spaces are not cut: 1 of 2 words, no pair.
    ("красный кот", "красные кот", 2, (1 / 2 + 0 + 1 / 2) / 3),
    ("लाल बिल्ली", "लाल कुत्ता", 2, (1 / 2 + 0 + 1 / 2) / 3),
    ("ＡＢＣ　１２", "abc 12", 2, 1.0),
    ("naïve café", "na ve caf", 2, 0.0),
  ],
)
def test_words_of_scripts(first, second, words, expected):
  assert len(rewards_lib.words_of(first)) == words
  assert rewards_lib.reward(FREE, first, second) == pytest.approx(expected)


def test_ascii_texts_score_as_the_library_does():
  rng = random.Random(1)
  words = (
    "The cats were running, quickly! it's 3.5 e-mail_x CAT don't A".split()
  )
  texts = [" ".join(rng.choices(words, k=rng.randrange(9))) for _ in range(80)]
  texts += ["".join(map(chr, range(128))), "", "_", "..."]
  for first, second in zip(texts, texts[1:], strict=False):
    both = [
      rewards_lib.reward(FREE, first, second, words)
      for words in config_limits.ROUGE
    ]
    assert both[0] == both[1]


def test_public_words_are_those_of_the_library():
  scorer = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"], True)
  for first, second in [("naïve café", "na ve caf"), ("漢 ab cd", "ab cd")]:
    found = scorer.score(second, first).values()
    expected = sum(x.fmeasure for x in found) / 3
    got = rewards_lib.reward(FREE, first, second, "public")
    assert got == pytest.approx(expected)
  assert rewards_lib.rewards(FREE, ["漢字"], "漢字", "public") == [0.0]


def test_arbitrary_text_never_raises_and_stays_in_range():
  rng = random.Random(0)
  letters = "AB.,<>/answer 019eE+-∞\n\0漢"
  for _ in range(300):
    texts = ["".join(rng.choices(letters, k=rng.randrange(20))) for _ in "ab"]
    for problem_type in (CHOICE, NUMBER, OCR, FREE, REGRESSION):
      assert 0.0 <= rewards_lib.reward(problem_type, *texts) <= 1.0
