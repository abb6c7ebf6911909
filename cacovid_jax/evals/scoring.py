"""Scores of answers, one rule per benchmark, as published tables count them.

Every `score` function takes (question, text, rule=...). Of the rules, `own` is
that of one's own videos (`letters.read_own`),
`paper` is that behind CaCoVID's tables and `lmms-0.7.3` that of lmms-eval
0.7.3. Where no table of the paper has a benchmark (EgoSchema, MVBench,
NExT-QA), both are lmms-eval's, but for two things: a guess is drawn by the
question's id, and an empty answer to MVBench counts, as wrong.
"""

import functools
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from cacovid_jax.data import letters, rewards, wording
from cacovid_jax.data import question as question_lib

Question = question_lib.Question
_LONGVIDEOBENCH_PREAMBLES = (*letters.PREAMBLES, "The best option is",
  "The correct option is", "Best answer:", "Best option:")  # fmt: skip
_MVBENCH_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_MAX_PERIODS = 32
_OUTER_MARKS = (",", ".", "!", "?", ";", ":", "'")
_FEW_WORDS = 5


class Scored(NamedTuple):
  """One answer, scored."""

  score: float  # In [0, 1].
  letter: str = ""  # The option that was understood, "" if none.
  # True if none was understood, and the rule wants a guess.
  fallback: bool = False
  read_by: str = ""  # What told the letter, by the rule of own questions.


def of_letter(question: Question, letter: str) -> Scored:
  """Returns the score of an understood letter; "" is wrong."""
  return Scored(float(bool(letter) and letter == question.answer), letter)


def guess(question: Question) -> Scored:
  """Returns the score of a guessed option, flagged."""
  # The field's scorers draw at random here; the question's id gives the same
  # option in every run and for every method.
  count = max(len(question.options), 1)
  place = question_lib.question_hash(f"guess/{question.id}") % count
  letter = question_lib.LETTERS[place]
  return of_letter(question, letter)._replace(fallback=True)


def _of_letter_or_guess(question, letter) -> Scored:
  return of_letter(question, letter) if letter else guess(question)


def prepared(
  question: Question, text: str, *, rule="paper", rouge=rewards.UNICODE
) -> Scored:
  """Returns the score of an answer to prepared data, or own questions.

  `rouge` says what ROUGE counts in answers that are no letters.
  """
  # Rewards of training are the benchmarks' own measures.
  if not question.lettered:
    told = question.problem_type, text, question.answer, rouge
    return Scored(rewards.reward(*told))
  num_options = len(question.options) or 4
  if rule == letters.OWN:
    named = question_lib.LETTERS[:num_options]
    letter, how = letters.read_own(text, named, question.options)
    return of_letter(question, letter)._replace(read_by=how)
  letter = letters.extract(text, num_options=num_options, rule=rule)
  return of_letter(question, letter)


def videomme(question: Question, text: str, *, rule="paper") -> Scored:
  """Returns the score of one of four letters, wherever it stands."""
  return of_letter(question, letters.extract(text, rule=rule))


def longvideobench(question: Question, text: str, *, rule="paper") -> Scored:
  """Returns the score of the first of the letters A to E, option or not.

  Both rules are the same: CaCoVID's tables were counted by this one, and
  lmms-eval 0.7.3 has it unchanged.
  """
  letters.check_rule(rule)
  letter = letters.first(text, "ABCDE", _LONGVIDEOBENCH_PREAMBLES)
  return _of_letter_or_guess(question, letter)


def _mlvu(question, text, *, num_options, rule="paper") -> Scored:
  """The prompt ends in an open parenthesis, so the letter comes first.

  By the paper's rule it is the character before the first ")", else the whole
  text: "B", "B)" and "(B) red" are B, and "B." is no option.
  """
  letters.check_rule(rule)
  if rule != "paper":
    letter = letters.extract(text, num_options=num_options, rule=rule)
    return of_letter(question, letter)
  text = text.strip()
  before, parenthesis, _ = text.partition(")")
  letter = before[-1:] if parenthesis else text
  known = len(letter) == 1 and letter in question_lib.LETTERS[:num_options]
  return of_letter(question, letter if known else "")


mlvu_dev = functools.partial(_mlvu, num_options=4)
# The shared extractor looks for E and F as well here; lmms-eval's own task
# looks for A to D, so that it counts every E and F as wrong.
mlvu_test = functools.partial(_mlvu, num_options=6)


def mvbench(question: Question, text: str, *, rule="paper") -> Scored:
  """Returns the score of the first letter that stands alone, in either case."""
  # "B." and then one line is B. Else punctuation goes; the article "a" is A.
  letters.check_rule(rule)
  text = text.strip()
  found = re.match(r"([a-e])\.\s*.+\Z", text, re.IGNORECASE)
  if not found:
    found = re.search(r"\b([A-E])\b", _without_marks(text), re.IGNORECASE)
  return of_letter(question, found.group(1).upper() if found else "")


def _without_marks(text: str) -> str:
  """Returns the text with its marks dropped, or turned into spaces.

  A mark is dropped where it is next to a space anywhere in the text, and all
  of them are where a number has a comma in it: "(A)/(B)" is two words.
  """
  text = re.sub(r"[\n\t]", " ", text).strip()
  dropped = re.search(r"\d,\d", text) is not None
  out = text
  for mark in _MVBENCH_MARKS:
    beside_space = f"{mark} " in text or f" {mark}" in text
    out = out.replace(mark, "" if dropped or beside_space else " ")
  # The period of a number stays.
  return re.sub(r"\.(?!\d)", "", out, count=_MAX_PERIODS)


def egoschema(question: Question, text: str, *, rule="paper") -> Scored:
  """Returns the score of the option that is named first, or of a guess."""
  # The last mention of each form counts: of "(A) or (B) or (A)", B is first.
  letters.check_rule(rule)
  text, named = _framed(text), question_lib.LETTERS[: len(question.options)]
  found = []
  for form in ("({})", "{} ", "{}."):
    forms = {letter: form.format(letter) for letter in named}
    found += _places(text, forms).items()
  if not found:
    # The released options carry their letters, and are looked for with them.
    options = [option.strip() for option in question.options]
    lettered = wording.letter_options(options)
    found = list(_quoted(text, named, lettered).items())
  letter = min(found, key=lambda item: item[1])[0] if found else ""
  return _of_letter_or_guess(question, letter)


def nextqa(question: Question, text: str, *, rule="paper") -> Scored:
  """Returns the score of the option that is named last, or of a guess.

  Forms are tried one after the other. Of several options in a form without
  parentheses, that counts which stands last between two spaces, else the first.
  """
  letters.check_rule(rule)
  text, named = _framed(text), question_lib.LETTERS[: len(question.options)]
  found = _places(text, {letter: f"({letter})" for letter in named})
  for form in ("{} ", "{}."):
    if not found:
      forms = {letter: form.format(letter) for letter in named}
      found = {
        letter: text.rfind(f" {letter} ") for letter in _places(text, forms)
      }
  if not found:
    words = [option.strip() for option in question.options]
    found = _quoted(text, named, words)
  letter = max(found, key=found.__getitem__) if found else ""
  return _of_letter_or_guess(question, letter)


def _framed(text: str) -> str:
  """Returns the text without marks around it, between two spaces."""
  for mark in _OUTER_MARKS:
    text = text.strip(mark)
  return f" {text} "


def _places(text: str, forms: Mapping[str, str]) -> dict[str, int]:
  """Returns option letter -> where its form occurs last, if it does."""
  found = {letter: text.rfind(form) for letter, form in forms.items()}
  return {letter: place for letter, place in found.items() if place >= 0}


def _quoted(text: str, named: str, options: Sequence[str]) -> dict[str, int]:
  """Returns letter -> where its text stands last; {} of a few words."""
  if len(text.split()) <= _FEW_WORDS:
    return {}
  lowered = [option.lower() for option in options]
  return _places(text.lower(), dict(zip(named, lowered, strict=True)))
