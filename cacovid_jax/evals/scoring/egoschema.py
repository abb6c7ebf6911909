"""EgoSchema: the option that is named first.

No table of the paper has EgoSchema: both rules are that of lmms-eval 0.7.3,
but for the guess, which is drawn by the question's id.
"""

from cacovid_jax.data import letters
from cacovid_jax.data import question as question_lib
from cacovid_jax.data import tokenizer as tokenizer_lib
from cacovid_jax.evals.scoring import mentions
from cacovid_jax.evals.scoring import scored as scored_lib

_FORMS = ("({})", "{} ", "{}.")


def extract(text: str, options) -> str:
  """Returns the letter of the option that is named first, "" if none is.

  The last mention of each form counts: of "(A) or (B) or (A)", B is first.

  Args:
    text: the answer.
    options: the choices, without their letters.
  """
  text = mentions.framed(text)
  named = question_lib.LETTERS[: len(options)]
  found = []
  for form in _FORMS:
    forms = {letter: form.format(letter) for letter in named}
    found += mentions.places(text, forms).items()
  if not found:
    # The released options carry their letters, and are looked for with them.
    lettered = tokenizer_lib.letter_options(
      [option.strip() for option in options]
    )
    quoted = dict(zip(named, lettered, strict=True))
    found = list(mentions.quoted(text, quoted).items())
  return min(found, key=lambda item: item[1])[0] if found else ""


def score(
  question: question_lib.Question, text: str, *, rule: str = "paper"
) -> scored_lib.Scored:
  """Returns the score of an answer; without a mention, that of a guess."""
  letters.check_rule(rule)
  letter = extract(text, question.options)
  if not letter:
    return scored_lib.guess(question)
  return scored_lib.of_letter(question, letter)
