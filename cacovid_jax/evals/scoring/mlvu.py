"""MLVU: the prompt ends in an open parenthesis, so the letter comes first."""

from cacovid_jax.data import letters
from cacovid_jax.data import question as question_lib
from cacovid_jax.evals.scoring import scored as scored_lib


def extract_paper(text: str) -> str:
  """Returns the character before the first ")", else the whole text.

  Thus "B", "B)" and "(B) red" are B, and "B." is no option.
  """
  text = text.strip()
  before, parenthesis, _ = text.partition(")")
  return before[-1:] if parenthesis else text


def score_dev(
  question: question_lib.Question, text: str, *, rule: str = "paper"
) -> scored_lib.Scored:
  """Returns the score of an answer to one of four options."""
  return _score(question, text, rule, 4)


def score_test(
  question: question_lib.Question, text: str, *, rule: str = "paper"
) -> scored_lib.Scored:
  """Returns the score of an answer to one of six options.

  The shared extractor looks for E and F as well here; lmms-eval's own task
  looks for A to D, so that it counts every E and F as wrong.
  """
  return _score(question, text, rule, 6)


def _score(question, text, rule, num_options) -> scored_lib.Scored:
  letters.check_rule(rule)
  if rule == "paper":
    letter = extract_paper(text)
    allowed = question_lib.LETTERS[:num_options]
    letter = letter if len(letter) == 1 and letter in allowed else ""
  else:
    letter = letters.extract(text, num_options=num_options, rule=rule)
  return scored_lib.of_letter(question, letter)
