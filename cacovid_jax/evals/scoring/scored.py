"""What a scorer says of one answer."""

from typing import NamedTuple

from cacovid_jax.data import question as question_lib


class Scored(NamedTuple):
  """One answer, scored.

  Attributes:
    score: in [0, 1].
    letter: the option that was understood, "" if none.
    fallback: True if none was understood and one was guessed, where the rule
      wants a guess.
  """

  score: float
  letter: str = ""
  fallback: bool = False


def of_letter(question: question_lib.Question, letter: str) -> Scored:
  """Returns the score of an understood letter, "" is wrong."""
  return Scored(float(bool(letter) and letter == question.answer), letter)


def guess(question: question_lib.Question) -> Scored:
  """Returns the score of a guessed option, flagged.

  The field's scorers draw at random here, so that a table cannot be repeated;
  this draws by the question's id and is the same in every run and for every
  method.
  """
  count = max(len(question.options), 1)
  place = question_lib.question_hash(f"guess/{question.id}") % count
  letter = question_lib.LETTERS[place]
  return of_letter(question, letter)._replace(fallback=True)
