"""Letters out of answers, as the tables of this field extract them.

`paper` is the rule behind CaCoVID's VideoMME table; `lmms-0.7.3` the shared
extractor of lmms-eval 0.7.3. Both return "" if no option is found, which is
wrong for every question.
"""

import re
from collections.abc import Callable

from cacovid_jax import errors

_LETTERS = "ABCD"

# Only these of the published list take effect: in the rest, missing commas
# glue neighbours into phrases that no answer contains.
_PREAMBLES = (
  "The best answer is",
  "The correct answer is",
  "The answer is",
  "The answer",
)


def extract_paper(text: str, letters: str = _LETTERS) -> str:
  """Returns the first option letter found anywhere in `text`.

  A word such as "Answer" therefore reads as A. An answer of more than ten
  words without any option letter gives "".
  """
  text = text.strip()
  for preamble in _PREAMBLES:
    text = text.replace(preamble, "")
  found = re.search(f"[{letters}]", text)
  return found.group(0) if found else ""


_ANSWER_PHRASES = (
  "the best answer is",
  "the correct answer is",
  "the answer is",
  "the best option is",
  "the correct option is",
  "best answer:",
  "best option:",
  "answer is",
  "answer:",
)


def extract_lmms(text: str, letters: str = _LETTERS) -> str:
  """Returns the option letter of the best-formed mention.

  Forms, best first: a letter that opens the text, one that ends it, one after
  a phrase such as "the answer is", `(X)`, `X.`, `X:`, `X)`, `X `, any other
  occurrence. Of equal forms the later mention wins.
  """
  text = text.strip().strip(",.!?;:'\"").strip()
  if not text:
    return ""
  padded = f" {text} "
  lowered = padded.lower()
  found = []
  for letter in letters:
    if re.match(rf"{letter}(?![A-Za-z])", text):
      found.append((10, 0, letter))
    if re.search(rf"(?<![A-Za-z]){letter}$", text):
      found.append((9, len(padded), letter))
    for phrase in _ANSWER_PHRASES:
      pattern = rf"{re.escape(phrase)}\s*\(?{letter.lower()}(?![a-z])"
      found += [(7, m.start(), letter) for m in re.finditer(pattern, lowered)]
    for priority, form in [
      (6, f"({letter})"),
      (5, f"{letter}."),
      (4, f"{letter}:"),
      (3, f"{letter})"),
      (2, f"{letter} "),
      (0, letter),
    ]:
      position = padded.rfind(form)
      if position >= 0:
        found.append((priority, position, letter))
  return max(found)[2] if found else ""


EXTRACTORS: dict[str, Callable[..., str]] = {
  "paper": extract_paper,
  "lmms-0.7.3": extract_lmms,
}


def check_rule(rule: str) -> None:
  """Refuses what is not one of `EXTRACTORS`."""
  if rule not in EXTRACTORS:
    raise errors.UserError(
      f"unknown extraction rule {rule!r}; use {' or '.join(EXTRACTORS)}"
    )


def extract(text: str, *, num_options: int = 4, rule: str = "paper") -> str:
  """Returns the option letter in `text`, "" if there is none.

  Args:
    text: the model's answer.
    num_options: how many letters, from A, are options.
    rule: one of `EXTRACTORS`.
  """
  check_rule(rule)
  letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[: max(num_options, 1)]
  return EXTRACTORS[rule](text, letters)


def is_correct(text: str, answer: str, **options) -> bool:
  """True if `text` gives the option letter `answer`."""
  return bool(answer) and extract(text, **options) == answer.strip().upper()
