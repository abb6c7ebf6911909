"""Tests of evals.scoring; expected letters worked out by hand."""

import pytest

from cacovid_jax import errors
from cacovid_jax.evals import scoring


@pytest.mark.parametrize(
  "text,letter",
  [
    ("B", "B"),
    (" c ", ""),
    ("(D) a red cube.", "D"),
    ("The best answer is C.", "C"),
    ("The answer is: B", "B"),
    # The rule takes any letter anywhere: the A of "Answer".
    ("Answer: B", "A"),
    ("", ""),
    ("none of these", ""),
    ("one two three four five six seven eight nine ten eleven", ""),
    ("E", ""),
  ],
)
def test_paper_rule(text, letter):
  assert scoring.extract(text) == letter


@pytest.mark.parametrize(
  "text,letter",
  [
    ("B", "B"),
    ("B. the red one", "B"),
    ("Answer: B", "B"),
    ("I think the answer is (C), not D because", "C"),
    ("It shows (A) first but later (C) wins the day", "C"),
    ("", ""),
    ("...", ""),
  ],
)
def test_lmms_rule(text, letter):
  assert scoring.extract(text, rule="lmms-0.7.3") == letter


def test_letters_follow_the_number_of_options():
  assert scoring.extract("F", num_options=6) == "F"
  assert scoring.extract("F", num_options=4) == ""


def test_an_empty_answer_is_never_correct():
  assert not scoring.is_correct("", "A")
  assert not scoring.is_correct("", "")
  assert scoring.is_correct("A.", "A")
  assert scoring.is_correct("A.", "a ")


def test_unknown_rule_is_named():
  with pytest.raises(errors.UserError, match="bleu"):
    scoring.extract("A", rule="bleu")
