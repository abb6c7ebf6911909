"""The one row type of the package: a question about a video."""

import dataclasses
import hashlib
import re

MULTIPLE_CHOICE = "multiple choice"
NUMERICAL = "numerical"
OCR = "OCR"
FREE_FORM = "free-form"
REGRESSION = "regression"
PROBLEM_TYPES = (MULTIPLE_CHOICE, NUMERICAL, OCR, FREE_FORM, REGRESSION)

_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Question:
  """A question, its answer, and the clip that it is about."""

  id: str  # Unique within its source.
  video: str  # Path of the clip, relative to the media root.
  question: str  # Without options and without a hint.
  options: tuple[str, ...] = ()  # Without letters; empty if none are offered.
  answer: str  # The right letter for multiple choice, else the right text.
  problem_type: str = MULTIPLE_CHOICE  # One of `PROBLEM_TYPES`.
  # Group of the clip's length ("short", ...), if the source has one.
  duration: str | None = None
  category: str | None = None  # The kind of question, if the source has one.
  # Further groupings, as (facet, name), e.g. ("domain", "Knowledge").
  groups: tuple[tuple[str, str], ...] = ()
  source: str = ""  # Name of the data set.
  prompt: str = ""  # The user's text after the video, verbatim, with the hint.
  # The name that draws follow where it is not `id`: of a question that is
  # called otherwise here than in its benchmark.
  stream: str = ""

  @property
  def rng_id(self) -> str:
    """The name that everything drawn for this question is seeded by."""
    return self.stream or self.id

  @property
  def lettered(self) -> bool:
    """Whether the answer is the letter of an option."""
    return self.problem_type == MULTIPLE_CHOICE


def question_hash(question_id: str) -> int:
  """Returns the 32-bit blake2 of an id: the question's own random stream.

  Python's `hash` differs from run to run, so it must not seed anything.
  """
  digest = hashlib.blake2b(question_id.encode(), digest_size=4).digest()
  return int.from_bytes(digest, "little")


def extract_answer(text: str) -> str:
  """Returns the inside of the first <answer>...</answer>, else all of it."""
  match = _ANSWER.search(text)
  return match.group(1).strip() if match else text
