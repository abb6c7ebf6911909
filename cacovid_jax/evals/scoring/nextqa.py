"""NExT-QA, multiple choice: the option that is named last.

No table of the paper has NExT-QA: both rules are that of lmms-eval 0.7.3, but
for the guess, which is drawn by the question's id.
"""

from cacovid_jax.data import letters
from cacovid_jax.data import question as question_lib
from cacovid_jax.evals.scoring import mentions
from cacovid_jax.evals.scoring import scored as scored_lib


def extract(text: str, options) -> str:
  """Returns the letter of the option that is named last, "" if none is.

  Forms are tried one after the other. Of several options in a form without
  parentheses, that counts which stands last between two spaces; if none does,
  the first letter of the alphabet.

  Args:
    text: the answer.
    options: the choices, without letters.
  """
  text = mentions.framed(text)
  named = question_lib.LETTERS[: len(options)]
  found = mentions.places(text, {letter: f"({letter})" for letter in named})
  for form in ("{} ", "{}."):
    if not found:
      forms = {letter: form.format(letter) for letter in named}
      found = {
        letter: text.rfind(f" {letter} ")
        for letter in mentions.places(text, forms)
      }
  if not found:
    words = {
      letter: option.strip()
      for letter, option in zip(named, options, strict=True)
    }
    found = mentions.quoted(text, words)
  return max(found, key=found.__getitem__) if found else ""


def score(
  question: question_lib.Question, text: str, *, rule: str = "paper"
) -> scored_lib.Scored:
  """Returns the score of an answer; without a mention, that of a guess."""
  letters.check_rule(rule)
  letter = extract(text, question.options)
  if not letter:
    return scored_lib.guess(question)
  return scored_lib.of_letter(question, letter)
