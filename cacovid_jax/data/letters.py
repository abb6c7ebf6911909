"""Letters out of answers, as the tables of this field extract them.

`paper` is the rule behind CaCoVID's VideoMME table; `lmms-0.7.3` the shared
extractor of lmms-eval 0.7.3. Both return "" if no option is found, which is
wrong for every question.
"""

import re
from collections.abc import Callable

from cacovid_jax import errors
from cacovid_jax.data import question as question_lib

# Only these of the published list take effect: in the rest, missing commas
# glue neighbours into phrases that no answer contains.
PREAMBLES = (
  "The best answer is",
  "The correct answer is",
  "The answer is",
  "The answer",
)


def first(text: str, letters: str, preambles=PREAMBLES) -> str:
  """Returns the first of some letters anywhere in a text, "" if none is.

  Preambles are cut out before. A word such as "Answer" therefore reads as A.
  """
  text = text.strip()
  for preamble in preambles:
    text = text.replace(preamble, "")
  found = re.search(f"[{letters}]", text)
  return found.group(0) if found else ""


_NOUNS = ("answer", "best answer", "correct answer", "best option",
          "correct option", "choice", "correct choice")  # fmt: skip
# Where the shared extractor expects a letter to follow; the last three lines
# are "option", "the answer is" and "choose" in Korean, Chinese and Japanese.
_PHRASES = (
  tuple(f"{the}{noun} is" for the in ("the ", "") for noun in _NOUNS)
  + ("my answer is", "my choice is", "i choose", "i pick", "i select")
  + ("옵션", "정답은", "답은", "답:")
  + ("答案是", "答案为", "选")
  + ("答えは",)
)
# Marks that are taken off both ends, one kind after the other.
_MARKS = (",", ".", "!", "?", ";", ":", "'", '"')
# Forms of a mention, worst first; any occurrence at all is worse than those.
_FORMS = ("{} ", "{})", "{}:", "{}.", "({})")
_AFTER_PHRASE, _AT_END, _AT_START = 7, 9, 10


def extract_lmms(text: str, letters: str) -> str:
  """Returns the option letter of the best-formed mention.

  Forms, best first: a letter that opens the text, one that ends it, one after
  a phrase such as "the answer is", `(X)`, `X.`, `X:`, `X)`, `X `, any other
  occurrence. Of equal forms the later mention wins. After a phrase any capital
  counts, the first one of a word too, however far behind.
  """
  text = text.strip()
  for mark in _MARKS:
    text = text.strip(mark)
  inner, text = text.strip(), f" {text} "
  lowered = text.lower()
  found = []
  for letter in letters:
    for rank, form in enumerate(_FORMS, start=2):
      found.append((rank, text.rfind(form.format(letter)), letter))
    for phrase in _PHRASES:
      start = lowered.find(phrase)
      if start >= 0:
        place = text.find(letter, start + len(phrase))
        found.append((_AFTER_PHRASE, place, letter))
    if inner[:1] == letter and not inner[1:2].isalpha():
      found.append((_AT_START, 0, letter))
    if inner[-1:] == letter and not inner[-2:-1].isalpha():
      found.append((_AT_END, 0, letter))
    found.append((0, text.rfind(letter), letter))
  found = [mention for mention in found if mention[1] >= 0]
  return max(found)[2] if found else ""


EXTRACTORS: dict[str, Callable[..., str]] = {
  "paper": first,
  "lmms-0.7.3": extract_lmms,
}


def check_rule(rule: str) -> None:
  """Refuses what is not one of `EXTRACTORS`."""
  if rule not in EXTRACTORS:
    raise errors.UserError(
      f"unknown extraction rule {rule!r}; use {' or '.join(EXTRACTORS)}"
    )


def extract(text: str, *, num_options: int = 4, rule: str = "paper") -> str:
  """Returns the option letter in an answer by one of the `EXTRACTORS`."""
  check_rule(rule)
  return EXTRACTORS[rule](text, question_lib.LETTERS[: max(num_options, 1)])
