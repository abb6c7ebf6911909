"""Letters that options carry, in the scripts of the world."""

import pytest

from cacovid_jax.data.readers import option_letters

CATS = ("cat", "dog", "cow")


@pytest.mark.parametrize(
  ("given", "marks"),
  [
    (("A. cat", "B. dog", "C. cow"), "A B C"),
    (("(A) cat", "(B)dog", "C) cow"), "A B C"),
    (("a) cat", "b) dog", "c) cow"), "A B C"),
    (("Ａ．cat", "Ｂ．dog", "Ｃ．cow"), "A B C"),
    (("（Ａ）cat", "（Ｂ）dog", "（Ｃ） cow"), "A B C"),
    (("A、cat", "B、dog", "C、cow"), "A B C"),
    (("Ⓐ cat", "Ⓑ dog", "Ⓒcow"), "A B C"),
    (("⒜ cat", "⒝ dog", "⒞ cow"), "A B C"),
    (("А. cat", "Б. dog", "В. cow"), "А Б В"),
    (("а) cat", "б) dog", "в) cow"), "А Б В"),
    (("Α. cat", "Β. dog", "Γ. cow"), "Α Β Γ"),
    (("א. cat", "ב. dog", "ג. cow"), "א ב ג"),
    (("أ. cat", "ب. dog", "ج. cow"), "أ ب ج"),
    (("(क) cat", "(ख) dog", "(ग) cow"), "क ख ग"),
    (("가. cat", "나. dog", "다. cow"), "가 나 다"),
    (("㉠ cat", "㉡ dog", "㉢ cow"), "ᄀ ᄂ ᄃ"),
    (("ア. cat", "イ. dog", "ウ. cow"), "ア イ ウ"),
    (("甲、cat", "乙、dog", "丙、cow"), "甲 乙 丙"),
    (("1. cat", "2. dog", "3. cow"), "1 2 3"),
    (("① cat", "②dog", "③ cow"), "1 2 3"),
    (("⒈cat", "⒉dog", "⒊cow"), "1 2 3"),
    (("١. cat", "٢. dog", "٣. cow"), "1 2 3"),
    (("I. cat", "II. dog", "III. cow"), "I II III"),
    (("ⅰ) cat", "ⅱ) dog", "ⅲ) cow"), "I II III"),
  ],
)
def test_letters_go(given, marks):
  found = option_letters.split_letters(given)
  assert found.options == CATS
  assert found.marks == tuple(marks.split())
  latin = given[0].startswith(("A. ", "(A) "))
  lines = list(given) if latin else ["A. cat", "B. dog", "C. cow"]
  assert found.lines == lines
  for letter, mark in zip("ABC", found.marks, strict=True):
    for answer in (mark, f"({mark})", f"{mark}.", mark.lower()):
      assert option_letters.place_of(answer, found.marks) == letter
  assert option_letters.place_of("no", found.marks) == ""


@pytest.mark.parametrize(
  "given",
  [
    ("cat", "dog"),
    ("A. cat", "dog"),
    ("A. cat", "C. dog"),
    ("A. cat", "Б. dog"),
    ("2. cat", "1. dog"),
    ("1.5", "2.5"),
    ("1", "2", "3"),
    ("1:30", "2:30"),
    ("10. cat", "20. dog"),
    ("Mon. cat", "Tue. dog"),
    ("A", "B"),
    ("３０", "４０"),
    ("²cat", "³dog"),
    ("①", "②"),
    ("1.", "2."),
  ],
)
def test_what_are_no_letters_stays(given):
  found = option_letters.split_letters(given)
  assert (found.options, found.marks) == (given, ())
  letters = "ABC"[: len(given)]
  expected = [f"{x}. {y}" for x, y in zip(letters, given, strict=True)]
  assert found.lines == expected


def test_no_options():
  assert option_letters.split_letters([]) == ((), [], ())


def test_full_width_answers():
  assert option_letters.letter("（Ｂ）", CATS, "answer") == "B"
  assert option_letters.letter("Ｂ．ｄｏｇ", CATS, "answer") == "B"
  marks = ("1", "2", "3")
  assert option_letters.letter("２．dog", CATS, "answer", marks) == "B"
