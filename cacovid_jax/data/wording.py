"""What a user's turn says: clips, questions, lettered options, hints."""

import dataclasses
from collections.abc import Sequence

from cacovid_jax import errors
from cacovid_jax.data import question as question_lib

ANSWER_DIRECTLY = (
  "Answer with the option's letter from the given choices directly."
)
_NUMBER = " Please provide the numerical value (e.g., 42 or 3.14)."
# What the public trainer appends to a question, by problem type. Each begins
# with a space, as there.
HINTS = {
  question_lib.MULTIPLE_CHOICE: (
    " Please provide only the single option letter (e.g., A, B, C, D, etc.)."
  ),
  question_lib.NUMERICAL: _NUMBER,
  question_lib.OCR: (
    " Please transcribe text from the image/video clearly and provide your"
    " text answer."
  ),
  question_lib.FREE_FORM: " Please provide your text answer.",
  question_lib.REGRESSION: _NUMBER,
}


@dataclasses.dataclass(frozen=True)
class VideoStyle:
  """How a model's prompts hold a clip."""

  token: str  # The placeholder, repeated once for each video token.
  plain: str  # A clip before the question, in a message of plain text.
  newline_tokens: int  # Rows behind the N video tokens that have the same id.
  # Tokens before and after the clip; positions are counted from them.
  around: tuple[str, ...] = ()

  @property
  def tokens(self) -> tuple[str, ...]:
    return (self.token, *self.around)

  @property
  def block(self) -> str:
    """What a rendered turn has to hold."""
    return self.token.join(self.around) if self.around else self.token


LLAVA_ONEVISION = VideoStyle("<video>", "<video>\n", 1)
QWEN2_5_VL = VideoStyle(
  "<|video_pad|>",
  "<|vision_start|><|video_pad|><|vision_end|>",
  0,
  ("<|vision_start|>", "<|vision_end|>"),
)
STYLES = {
  "llava_onevision": LLAVA_ONEVISION,
  "qwen2_5_vl": QWEN2_5_VL,
  "qwen3_vl": QWEN2_5_VL,  # Once for each temporal patch.
}


def letter_options(options: Sequence[str], form: str = "{}. {}") -> list[str]:
  """Returns the options with their letters, "A. first", "B. second", ..."""
  if len(options) > len(question_lib.LETTERS):
    raise errors.UserError(
      f"{len(options)} options are more than there are letters; give at most"
      f" {len(question_lib.LETTERS)}"
    )
  return list(map(form.format, question_lib.LETTERS, options))


def training_prompt(
  problem: str, lettered_options: Sequence[str], problem_type: str
) -> str:
  """Returns problem, options (if any are missing in it), and the hint."""
  lines = [problem]
  if not all(option in problem for option in lettered_options):
    lines += lettered_options
  return "\n".join(lines) + "\n" + HINTS[problem_type]


def videomme_prompt(question: str, lettered_options: Sequence[str]) -> str:
  """Returns the official VideoMME text (which always names the subtitles)."""
  return (
    "Select the best answer to the following multiple-choice question based on"
    " the video and the subtitles. Respond with only the letter (A, B, C, or"
    " D) of the correct option.\n"
    + question
    + "\n"
    + "\n".join([*lettered_options, "", ANSWER_DIRECTLY])
  )
