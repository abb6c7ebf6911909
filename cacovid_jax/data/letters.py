"""Letters out of answers, as the tables of this field extract them.

`paper` is the rule behind CaCoVID's VideoMME table; `lmms-0.7.3` the shared
extractor of lmms-eval 0.7.3; `own` reads answers about one's own videos, where
no table is to be met. All return "" if no option is found, which is wrong for
every question.
"""

import re
import unicodedata
from collections.abc import Callable, Sequence

from cacovid_jax import config_limits, errors
from cacovid_jax.data import question as question_lib
from cacovid_jax.data import rewards

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


OWN = "own"
# "Answer: B", "The correct option is (b)."; in some languages more.
_NAMED = re.compile(
  r"(?:answer|option|choice|antwort|réponse|respuesta|resposta|risposta|ответ"
  r"|вариант|الإجابة|الجواب|उत्तर|答案|选项?|答え|정답|답)"
  r"(?:\s+(?:is|ist|est|es|é|è)\b|是|为|は|은)?\W{0,4}([a-z])(?!\w)(.?)",
  re.IGNORECASE,
)
# A letter that stands alone; "A cat" and "I see" are words.
_ALONE = re.compile(r"(?<!\w)(?![AI]\s+(?!or\b|and\b)[a-z])([A-Z])(?![\w'’])")

# What denies an option behind it, or before it.
_NOT = (
  r"(?i:\b(?:not|cannot|\w+n['’]t|nor|neither|nicht|pas|rather than|instead of"
  r"|other than|except|all but)\s+(?:(?:the|be|choose|pick|select|take|option"
  r"|answer|choice)\s+)*|不是|不选)"
)
_WRONG = r"(?:not|wrong|incorrect|false|untrue|ruled out|excluded|impossible)\b"


def _affirmed(text: str, options: Sequence[str]) -> str:
  """Returns a text without the letters and options that it denies."""

  def any_of(names):
    names = "|".join(map(re.escape, sorted(names, key=len, reverse=True)))
    return f"(?i:{names})" if names else "(?!)"

  options = {option.strip() for option in options} - {""}
  # An option such as "not red" means what it says.
  own = any_of(x for x in options if re.search(rf"{_NOT}|(?i:{_WRONG})", x))
  one = rf"\W?(?<!\w)(?:[A-Z]|{any_of(options)})(?!\w)[)\"'’*]*"
  some = rf"{one}(?:\s+(?:or|and|nor)\s+{one}){{0,8}}"
  right = rf"{own}|not\s+(?!not){_WRONG}"
  is_wrong = rf"(?i:(?:is|was|are|were)(?:n['’]t\b|\s+(?!{right}){_WRONG}))"
  denied = rf"(?P<own>{own})|{_NOT}{some}|{some}\s+(?:{is_wrong}|cannot\b)"
  return re.sub(denied, lambda found: found["own"] or " ", text)


def read_own(
  text: str, letters: str, options: Sequence[str] = ()
) -> tuple[str, str]:
  """Returns (the letter of the option that is meant, by what it was told).

  The second is, in this order of trial: "letter" (the text is one: "b", "(B)",
  full-width forms too), "lettered" ("B. red"), "named" ("Answer: B"; the last
  one), "option" (the words of exactly one option, or of the longest), "alone"
  (one capital standing by itself), or "" with an empty letter.
  """
  text = question_lib.extract_answer(text)
  text = unicodedata.normalize("NFKC", text).strip()
  text, found = _affirmed(text, options).strip(), {}
  if match := re.fullmatch(r"[\W_]*([A-Za-z])[\W_]*", text):
    found["letter"] = match.group(1)
  elif match := re.match(r"[\W_]*([A-Za-z])[.):]\s*\S", text):
    found["lettered"] = match.group(1)
  for match in _NAMED.finditer(text):
    # "The answer is a cat" names no letter.
    if match.group(1).isupper() or not match.group(2).strip(".):,;!*"):
      if match.group(2) != " " or match.group(1) not in "AaIi":
        found["named"] = match.group(1)
  found["option"] = _by_words(text, letters, options)
  if len(alone := set(_ALONE.findall(text))) == 1:
    (found["alone"],) = alone
  for how in ("letter", "lettered", "named", "option", "alone"):
    if (letter := found.get(how, "").upper()) and letter in letters:
      return letter, how
  return "", ""


def _by_words(text: str, letters: str, options: Sequence[str]) -> str:
  """Returns the letter of the one option whose words stand in the text."""

  def joined(of):
    return f"\0{chr(0).join(rewards.words_of(of))}\0"

  said, there = joined(text), {}
  for letter, option in zip(letters, options, strict=False):
    bare = joined(option)
    # Without words, such as "+", it must be the whole text.
    if option.strip() == text or (len(bare) > 2 and bare in said):
      there[letter] = bare
  # "red" is not meant where "dark red" is said.
  whole = [
    letter
    for letter, bare in there.items()
    if not any(bare in x and bare != x for x in there.values())
  ]
  return whole[0] if len(whole) == 1 else ""


def extract_own(text: str, letters: str, options: Sequence[str] = ()) -> str:
  """Returns the letter alone that `read_own` finds."""
  return read_own(text, letters, options)[0]


EXTRACTORS: dict[str, Callable[..., str]] = dict(
  zip(config_limits.RULES, (first, extract_lmms, extract_own), strict=True)
)


def check_rule(rule: str) -> None:
  """Refuses what is not one of `EXTRACTORS`."""
  told = f"unknown extraction rule {rule!r}; use {' or '.join(EXTRACTORS)}"
  errors.check(rule in EXTRACTORS, told)


def extract(
  text: str,
  *,
  num_options: int = 4,
  rule: str = "paper",
  options: Sequence[str] = (),
) -> str:
  """Returns the option letter in an answer by one of the `EXTRACTORS`.

  The texts of the `options` are read by the rule `own` alone.
  """
  check_rule(rule)
  letters = question_lib.LETTERS[: max(num_options, 1)]
  if rule == OWN:
    return extract_own(text, letters, options)
  return EXTRACTORS[rule](text, letters)
