"""Scores of prepared data: its questions may be of any problem type."""

from cacovid_jax.data import letters
from cacovid_jax.data import question as question_lib
from cacovid_jax.data import rewards as rewards_lib
from cacovid_jax.evals.scoring import scored as scored_lib


def score(
  question: question_lib.Question, text: str, *, rule: str = "paper"
) -> scored_lib.Scored:
  """Returns the score of an answer; that of an empty one is 0.

  Multiple choice by its letter; other problem types as in training, where
  their rewards are the benchmarks' own measures.
  """
  if not question.lettered:
    return scored_lib.Scored(
      rewards_lib.reward(question.problem_type, text, question.answer)
    )
  num_options = len(question.options) or 4
  letter = letters.extract(text, num_options=num_options, rule=rule)
  return scored_lib.of_letter(question, letter)
