"""Tests of evals.scoring; expected letters worked out by hand."""

import dataclasses

import pytest

from cacovid_jax import errors
from cacovid_jax.data import letters
from cacovid_jax.data import question as question_lib
from cacovid_jax.evals import benchmarks, scoring
from tests.evals import awkward_answers


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
  assert letters.extract(text) == letter


@pytest.mark.parametrize(
  "text,letter",
  [
    ("B", "B"),
    ("B. the red one", "B"),
    ("Answer: B", "B"),
    # Any capital behind the phrase counts, and the last one wins.
    ("I think the answer is (C), not D because", "D"),
    ("It shows (A) first but later (C) wins the day", "C"),
    ("", ""),
    ("...", ""),
  ],
)
def test_lmms_rule(text, letter):
  assert letters.extract(text, rule="lmms-0.7.3") == letter


def test_letters_follow_the_number_of_options():
  assert letters.extract("F", num_options=6) == "F"
  assert letters.extract("F", num_options=4) == ""


@pytest.mark.parametrize("rule", letters.EXTRACTORS)
def test_an_empty_answer_is_never_correct(rule):
  for name in ("prepared", "videomme", "mlvu_dev", "mlvu_test", "mvbench"):
    for gold in "ABCDE":
      question = _question(awkward_answers.OPTIONS, gold)
      scored_empty = benchmarks.task(name).score(question, "", rule=rule)
      assert scored_empty == scoring.Scored(0.0)


def test_unknown_rule_is_named():
  with pytest.raises(errors.UserError, match="bleu"):
    letters.extract("A", rule="bleu")


def _question(options, answer="A", **fields):
  return question_lib.Question(
    id="q", video="v.mp4", question="?", options=options, answer=answer,
    **fields,
  )  # fmt: skip


@pytest.mark.parametrize("name,rule", awkward_answers.EXPECTED)
def test_awkward_answers_are_read_as_the_benchmarks_read_them(name, rule):
  score = benchmarks.task(name).score
  expected = awkward_answers.EXPECTED[name, rule]
  for text, letter in zip(awkward_answers.ANSWERS, expected, strict=True):
    for gold in "ABCDE":
      question = _question(awkward_answers.OPTIONS, gold)
      got = score(question, text, rule=rule)
      if letter == "?":
        assert got.fallback, text
        assert got.letter == scoring.guess(question).letter, text
      else:
        wanted = ("" if letter == "-" else letter, False)
        assert (got.letter, got.fallback) == wanted, text
      assert got.score == (got.letter == gold), text


def test_every_benchmark_and_rule_has_its_awkward_answers():
  wanted = {
    (name, rule)
    for name in benchmarks.names()
    # What `letters.OWN` reads is the same for all, see letters_test.
    for rule in set(letters.EXTRACTORS) - {letters.OWN}
    if benchmarks.task(name).score is not scoring.prepared
  }
  assert set(awkward_answers.EXPECTED) == wanted


def test_a_guess_depends_on_the_question_alone_and_reaches_every_option():
  counts = dict.fromkeys("ABC", 0)
  for number in range(300):
    question = _question(("x", "y", "z"))
    question = dataclasses.replace(question, id=f"q{number}")
    guess = scoring.guess(question)
    assert guess == scoring.guess(question)
    assert guess.fallback and guess.score == (guess.letter == "A")
    counts[guess.letter] += 1
  # One third each; five standard deviations are 41.
  assert all(abs(count - 100) < 41 for count in counts.values())


def test_options_in_lower_case_words_are_found_in_long_answers():
  """As released, EgoSchema's options carry letters, which must be said too."""
  task = benchmarks.task("egoschema")
  question = _question(("C cooks", "C paints"), "B")
  said = "in short, b. c paints describes it"
  assert task.score(question, said) == scoring.Scored(1.0, "B")
  assert task.score(question, "in short, c paints describes it").fallback
  task = benchmarks.task("nextqa")
  question = _question(("dance", "fall over"), "B")
  said = "they dance a lot before they fall over it"
  assert task.score(question, said) == scoring.Scored(1.0, "B")
  assert task.score(question, "dance and fall over").fallback


def test_prepared_data_of_other_problem_types_are_scored_by_reward():
  question = _question((), "3.50", problem_type="numerical")
  assert scoring.prepared(question, "3.5") == scoring.Scored(1.0)
  assert scoring.prepared(question, "3.6") == scoring.Scored(0.0)


@pytest.mark.parametrize("name", benchmarks.names())
def test_every_scorer_names_an_unknown_rule(name):
  question = _question(awkward_answers.OPTIONS)
  with pytest.raises(errors.UserError, match="unknown extraction rule 'bleu'"):
    benchmarks.task(name).score(question, "A", rule="bleu")
