"""VideoMME: one of four letters, wherever it stands."""

from cacovid_jax.data import letters
from cacovid_jax.data import question as question_lib
from cacovid_jax.evals.scoring import scored as scored_lib


def score(
  question: question_lib.Question, text: str, *, rule: str = "paper"
) -> scored_lib.Scored:
  """Returns the score of an answer; what holds no letter is wrong."""
  return scored_lib.of_letter(question, letters.extract(text, rule=rule))
