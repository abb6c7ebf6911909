"""Letters and numbers that options carry, and answers that name them."""

import re
import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

from cacovid_jax.data import question as question_lib
from cacovid_jax.data import wording
from cacovid_jax.data.readers import validation

# "A. text", "A) text", "(A) text", "A: text" at the start of an option.
_LETTER = re.compile(r"^\s*\(?([A-Z])[.):]\s*")
# The same in NFKC and with letters or numbers of other scripts.
_MARK = re.compile(
  r"\s*[(\[【「]?\s*(\d{1,2}|[^\W\d_]{1,4})\s*[.):\]】」、。،]\s*"
)
# By which options are told apart, first to last; numbers need no list.
_ALPHABETS = [
  tuple(unicodedata.normalize("NFKC", letters))
  for letters in (
    question_lib.LETTERS,
    "АБВГДЕЖЗИК", "АБВГҐДЕЄЖЗ", "ΑΒΓΔΕΖΗΘΙΚ", "אבגדהוזחטי",
    "أبجدهوزحطي", "ابجدهوزحطي", "कखगघङचछजझञ", "কখগঘঙচছজঝঞ", "กขคงจฉชซ",
    "가나다라마바사아자차카타파하", "ㄱㄴㄷㄹㅁㅂㅅㅇㅈㅊ",
    "アイウエオカキクケコ", "イロハニホヘトチリヌ", "甲乙丙丁戊己庚辛壬癸",
  )
] + [tuple("I II III IV V VI VII VIII IX X".split())]  # fmt: skip
# The same in running text, of one letter.
_INLINE = r"(?:(?<=\s)|^)\(?{}[.):]\s*"
# "B", "(B)", "B." or "B)", and then perhaps the option itself.
_ANSWER = re.compile(
  r"(?:\(([A-Z])\)|([A-Z])(?:[.)]|(?![^\W_])))\s*(.*)", re.DOTALL
)


class Lettered(NamedTuple):
  """Options, and the letters or numbers that they came with."""

  options: tuple[str, ...]  # Without letters.
  lines: list[str]  # As a prompt shows them: "A. first", "B. second", ...
  marks: tuple[str, ...] = ()  # "A", "B", ...; "Б", "2", ...; () if none.


def split_letters(given: Sequence[str]) -> Lettered:
  """Returns the options apart from "A. ", "B. ", ... if all carry theirs.

  Letters may be of any of some scripts, in full width or circles, or numbers;
  a prompt shows Latin ones.
  """
  if bare := _without_latin(given):
    marks = tuple(question_lib.LETTERS[: len(given)])
    return Lettered(bare, list(given), marks)
  found = [_mark(option) for option in given]
  marks = tuple(mark for mark, _ in found)
  numbers = tuple(str(place) for place in range(1, len(marks) + 1))
  bare = tuple(rest for _, rest in found)
  if not all(bare) or marks not in [
    known[: len(marks)] for known in (*_ALPHABETS, numbers) if marks
  ]:
    return Lettered(tuple(given), wording.letter_options(given))
  return Lettered(bare, wording.letter_options(bare), marks)


def _mark(option: str) -> tuple[str, str]:
  """Returns what an option is marked by, "" if by nothing, and the rest."""
  for end in range(min(len(option), 12), 0, -1):
    head, rest = option[:end], option[end:]
    match = _MARK.fullmatch(unicodedata.normalize("NFKC", head))
    if end == 1 and unicodedata.decomposition(head).startswith("<circle>"):
      mark = unicodedata.normalize("NFKC", head)
    elif match and not (match.group(1).isdecimal() and rest[:1].isdecimal()):
      mark = match.group(1)  # "1. a" is marked, "1.5" is not.
    else:
      continue
    return _plain_mark(mark), rest.lstrip()
  return "", option


def _plain_mark(mark: str) -> str:
  """Returns a letter or number in the form that `_ALPHABETS` has."""
  mark = unicodedata.normalize("NFKC", mark).strip(" .():[]").upper()
  return str(int(mark)) if re.fullmatch(r"\d{1,2}", mark) else mark


def place_of(
  answer: str, marks: Sequence[str], options: Sequence[str] = ()
) -> str:
  """Returns A, B, ... for one of the options' own marks; "" for others.

  The option's own text may stand behind it.
  """
  known = dict(zip(marks, question_lib.LETTERS, strict=False))
  if found := known.get(_plain_mark(answer)):
    return found
  mark, rest = _mark(answer)
  named = dict(zip(marks, options, strict=False)).get(mark)
  return known[mark] if named and _plain(rest) == _plain(named) else ""


def _without_latin(options: Sequence[str]) -> tuple[str, ...]:
  """Returns the options without A., B., ...; () unless all carry theirs."""
  bare = []
  for letter, option in zip(question_lib.LETTERS, options, strict=False):
    match = _LETTER.match(option)
    if match is None or match.group(1) != letter:
      return ()
    bare.append(option[match.end() :])
  return tuple(bare)


def lettered(given: Sequence[str], field: str) -> tuple[str, ...]:
  """Returns the options without their Latin letters, which all must carry."""
  found = _without_latin(given)
  if not found:
    starts = ", ".join(repr(option[:12]) for option in given)
    raise validation.RowError(
      field,
      f"the options must begin by A., B., C., ... without a hole, not {starts}",
    )
  return found


def inline_options(problem: str) -> list[str]:
  """Returns the options that stand in the text itself, one after the other."""
  marks, position = [], 0
  for letter in question_lib.LETTERS:
    mark = re.compile(_INLINE.format(letter)).search(problem, position)
    if mark is None:
      break
    marks.append(mark)
    position = mark.end()
  starts = [mark.start() for mark in marks]
  return [
    problem[mark.end() : end].strip()
    for mark, end in zip(marks, [*starts[1:], len(problem)], strict=False)
  ]


def letter(
  answer: str, options: Sequence[str], field: str, marks: Sequence[str] = ()
) -> str:
  """Returns the letter of an answer "B", "(B)", "B." or "B)".

  Or of the options' own mark, where they had others than A, B, ...
  The option's own text may stand behind it, as in "B. A rope"; any other text
  is no answer, so that "Banana" is not taken for B.
  """
  if marks[:1] != ("A",) and (found := place_of(answer, marks, options)):
    return found
  match, shown = _ANSWER.fullmatch(_width(answer).strip()), repr(answer[:40])
  found = match and (match.group(1) or match.group(2))
  allowed = question_lib.LETTERS[: len(options)]
  if not found or found not in allowed:
    raise validation.RowError(
      field, f"{shown} is not one of the letters {allowed}"
    )
  option, rest = options[allowed.index(found)], match.group(3)
  if rest and _plain(rest) != _plain(option):
    told = f"{shown} is not {found} with its option {option[:40]!r}"
    raise validation.RowError(field, told)
  return found


def _plain(text: str) -> str:
  return " ".join(_width(text).split()).rstrip(". ").casefold()


def _width(text: str) -> str:
  """Returns a text with full-width forms as plain ones."""
  return unicodedata.normalize("NFKC", text)


def letter_of(answer: str, options: Sequence[str], field: str) -> str:
  """Returns the letter of the first option that reads as the answer."""
  if answer not in options:
    raise validation.RowError(field, f"{answer[:40]!r} is none of the options")
  return question_lib.LETTERS[list(options).index(answer)]
