"""Rewards of generated answers, for the five problem types.

Follows the public trainer's `accuracy`: what it scores, this scores the same.
There are two differences. A guard: there, two empty texts match as option
letters. And words: ROUGE as published sees none outside a-z and 0-9, so that an
answer in Chinese earns 0 against itself; here letters and digits of all scripts
make words, unless the public words are asked for. Of ASCII texts both are one.
Anything that cannot be parsed scores 0 and never raises, since a policy's
early answers are arbitrary text.
"""

import functools
import math
import unicodedata
from collections.abc import Callable, Sequence

import numpy as np
import regex

from cacovid_jax import config_limits
from cacovid_jax.data import question as question_lib

_EPSILON = 1e-9
_ROUGE = ("rouge1", "rouge2", "rougeL")
UNICODE, PUBLIC = config_limits.ROUGE
# Scripts without spaces between words: each letter, with its marks, is one.
_DENSE = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
_WORD = regex.compile(
  rf"(?V1)[{_DENSE}]\p{{M}}*|[[\p{{L}}\p{{M}}\p{{N}}]--[{_DENSE}]]+"
)


def words_of(text: str) -> list[str]:
  """Returns the words of a text of any script, in lower case.

  Full-width and composed forms are the same letters as plain ones.
  """
  text = unicodedata.normalize("NFKC", text).casefold()
  return _WORD.findall(unicodedata.normalize("NFKC", text))


def reward(
  problem_type: str, completion: str, solution: str, words: str = UNICODE
) -> float:
  """Returns the reward in [0, 1] of one answer, 0 for an unknown problem type.

  Of both texts, what stands inside `<answer>...</answer>` counts alone. `words`
  is what ROUGE counts in free-form answers, one of `config_limits.ROUGE`.
  """
  score = _SCORES.get(problem_type)
  if score is None:
    return 0.0
  answer = question_lib.extract_answer(completion)
  gold = question_lib.extract_answer(solution)
  try:
    value = float(score(answer, gold, completion, words))
  except (ValueError, OverflowError, ZeroDivisionError):
    return 0.0
  return value if math.isfinite(value) else 0.0


def rewards(
  problem_type: str,
  completions: Sequence[str],
  solution: str,
  words: str = UNICODE,
) -> np.ndarray:
  """Returns float32[G]: the rewards of G answers to one question."""
  # Equal texts are the rule among G combinations of one clip.
  values = {
    text: reward(problem_type, text, solution, words)
    for text in set(completions)
  }
  return np.array([values[text] for text in completions], np.float32)


def _first_letter(text: str) -> str:
  return text.strip().strip(".")[:1].strip()


def _multiple_choice(answer: str, gold: str, completion: str, *_) -> float:
  letter = _first_letter(gold)
  return bool(letter) and letter in map(_first_letter, (answer, completion))


def _number(text: str) -> float:
  """Returns the finite number that `text` spells, or raises ValueError."""
  value = float(text.replace(",", ""))
  if not math.isfinite(value):
    raise ValueError(f"{text!r} is not finite")
  return value


def _numerical(answer: str, gold: str, *_) -> float:
  marked, should_be = (any(m in text for m in ".,") for text in (answer, gold))
  if marked != should_be:
    return 0.0
  return round(_number(answer), 2) == round(_number(gold), 2)


def edit_distance(first: Sequence[str], second: Sequence[str]) -> int:
  """Returns the fewest insertions, deletions and exchanges between lists."""
  if len(first) < len(second):
    first, second = second, first
  row = list(range(len(second) + 1))
  for i, item in enumerate(first, start=1):
    diagonal, row[0] = row[0], i
    for j, other in enumerate(second, start=1):
      best = min(row[j] + 1, row[j - 1] + 1, diagonal + (item != other))
      diagonal, row[j] = row[j], best
  return row[-1]


def _ocr(answer: str, gold: str, *_) -> float:
  words = gold.split()
  error_rate = edit_distance(answer.split(), words) / max(1, len(words))
  return max(0.0, 1.0 - error_rate)


class _Words:
  """Cuts a text of any script into words; ASCII ones by `cut_ascii`."""

  def __init__(self, cut_ascii: Callable[[str], list[str]]):
    self._cut_ascii = cut_ascii

  def tokenize(self, text: str) -> list[str]:
    found = []
    for word in words_of(text):
      found.extend(self._cut_ascii(word) if word.isascii() else [word])
    return found


@functools.cache
def _rouge(words: str):
  # It brings all of NLTK, and few runs score free text.
  from rouge_score import rouge_scorer, tokenizers

  tokenizer = None
  if words == UNICODE:
    tokenizer = _Words(tokenizers.DefaultTokenizer(use_stemmer=True).tokenize)
  return rouge_scorer.RougeScorer(_ROUGE, use_stemmer=True, tokenizer=tokenizer)


def _free_form(answer: str, gold: str, _, words: str) -> float:
  scores = _rouge(words).score(gold, answer)
  return sum(scores[name].fmeasure for name in _ROUGE) / len(_ROUGE)


def _regression(answer: str, gold: str, *_) -> float:
  right = _number(gold)
  error = abs(_number(answer) - right)
  return 1.0 - min(1.0, (error + _EPSILON) / (abs(right) + _EPSILON))


_SCORES = {
  question_lib.MULTIPLE_CHOICE: _multiple_choice,
  question_lib.NUMERICAL: _numerical,
  question_lib.OCR: _ocr,
  question_lib.FREE_FORM: _free_form,
  question_lib.REGRESSION: _regression,
}
