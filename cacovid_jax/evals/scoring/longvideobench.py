"""LongVideoBench: one of five letters; without any, an option is guessed.

Both rules are the same here: CaCoVID's tables were counted by this one, and
lmms-eval 0.7.3 has it unchanged.
"""

from cacovid_jax.data import letters
from cacovid_jax.data import question as question_lib
from cacovid_jax.evals.scoring import scored as scored_lib

_PREAMBLES = (
  *letters.PREAMBLES,
  "The best option is",
  "The correct option is",
  "Best answer:",
  "Best option:",
)


def score(
  question: question_lib.Question, text: str, *, rule: str = "paper"
) -> scored_lib.Scored:
  """Returns the score of an answer.

  The first of the letters A to E counts, be it an option or not. Where there
  is none, the original draws an option at random; see `scored.guess`.
  """
  letters.check_rule(rule)
  letter = letters.first(text, "ABCDE", _PREAMBLES)
  if not letter:
    return scored_lib.guess(question)
  return scored_lib.of_letter(question, letter)
