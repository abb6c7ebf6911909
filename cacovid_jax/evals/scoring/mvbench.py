"""MVBench: the first letter that stands alone, upper or lower case.

No table of the paper has MVBench: both rules are that of lmms-eval 0.7.3.
Unlike there, an empty answer is counted, as wrong.
"""

import re

from cacovid_jax.data import letters
from cacovid_jax.data import question as question_lib
from cacovid_jax.evals.scoring import scored as scored_lib

_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_MAX_PERIODS = 32


def extract(text: str) -> str:
  """Returns the option letter of an answer, "" if there is none.

  "B." and then one line is B. Else punctuation goes, and the first word that is
  a letter from A to E counts, the article "a" as A.
  """
  text = text.strip()
  opening = re.match(r"([a-e])\.\s*.+\Z", text, re.IGNORECASE)
  if opening:
    return opening.group(1).upper()
  word = re.search(r"\b[A-E]\b", _without_marks(text), re.IGNORECASE)
  return word.group(0).upper() if word else ""


def _without_marks(text: str) -> str:
  """Returns the text with its marks dropped, or turned into spaces.

  A mark is dropped where it is next to a space anywhere in the text, and all of
  them are where a number has a comma in it. So "(A)/(B)" is two words and
  "it is (A)" has a letter of its own.
  """
  text = re.sub(r"[\n\t]", " ", text).strip()
  dropped = re.search(r"\d,\d", text) is not None
  out = text
  for mark in _MARKS:
    beside_space = f"{mark} " in text or f" {mark}" in text
    out = out.replace(mark, "" if dropped or beside_space else " ")
  # The period of a number stays.
  return re.sub(r"\.(?!\d)", "", out, count=_MAX_PERIODS)


def score(
  question: question_lib.Question, text: str, *, rule: str = "paper"
) -> scored_lib.Scored:
  """Returns the score of an answer; what holds no letter is wrong."""
  letters.check_rule(rule)
  return scored_lib.of_letter(question, extract(text))
