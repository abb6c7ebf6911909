"""Rewards of generated answers, for the five problem types.

Follows the public trainer's `accuracy`: what it scores, this scores the same.
The one difference is a guard: there, two empty texts match as option letters.
Anything that cannot be parsed scores 0 and never raises, since a policy's
early answers are arbitrary text.
"""

import functools
import math
from collections.abc import Sequence

import numpy as np
from rouge_score import rouge_scorer

from cacovid_jax.data import question as question_lib

_EPSILON = 1e-9
_ROUGE = ("rouge1", "rouge2", "rougeL")


def reward(problem_type: str, completion: str, solution: str) -> float:
  """Returns the reward in [0, 1] of one answer, 0 for an unknown problem type.

  Of both texts, what stands inside `<answer>...</answer>` counts alone.
  """
  score = _SCORES.get(problem_type)
  if score is None:
    return 0.0
  answer = question_lib.extract_answer(completion)
  gold = question_lib.extract_answer(solution)
  try:
    value = float(score(answer, gold, completion))
  except (ValueError, OverflowError, ZeroDivisionError):
    return 0.0
  return value if math.isfinite(value) else 0.0


def rewards(
  problem_type: str, completions: Sequence[str], solution: str
) -> np.ndarray:
  """Returns float32[G]: the rewards of G answers to one question."""
  # Equal texts are the rule among G combinations of one clip.
  values = {
    text: reward(problem_type, text, solution) for text in set(completions)
  }
  return np.array([values[text] for text in completions], np.float32)


def _first_letter(text: str) -> str:
  return text.strip().strip(".")[:1].strip()


def _multiple_choice(answer: str, gold: str, completion: str) -> float:
  letter = _first_letter(gold)
  return bool(letter) and letter in map(_first_letter, (answer, completion))


def _number(text: str) -> float:
  """Returns the finite number that `text` spells, or raises ValueError."""
  value = float(text.replace(",", ""))
  if not math.isfinite(value):
    raise ValueError(f"{text!r} is not finite")
  return value


def _numerical(answer: str, gold: str, unused_completion: str) -> float:
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


def _ocr(answer: str, gold: str, unused_completion: str) -> float:
  words = gold.split()
  error_rate = edit_distance(answer.split(), words) / max(1, len(words))
  return max(0.0, 1.0 - error_rate)


@functools.cache
def _rouge() -> rouge_scorer.RougeScorer:
  return rouge_scorer.RougeScorer(_ROUGE, use_stemmer=True)


def _free_form(answer: str, gold: str, unused_completion: str) -> float:
  scores = _rouge().score(gold, answer)
  return sum(scores[name].fmeasure for name in _ROUGE) / len(_ROUGE)


def _regression(answer: str, gold: str, unused_completion: str) -> float:
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
