"""LongVideoBench (https://arxiv.org/abs/2407.15754), the validation split.

validation-00000-of-00001.parquet or lvb_val.json, and videos/<video_path>. The
test split has no answers. Subtitles are not used: a clip that has none is as
good as another.
"""

from cacovid_jax.data import question as question_lib
from cacovid_jax.data import tokenizer as tokenizer_lib
from cacovid_jax.data.readers import validation

DURATION_GROUPS = ("15", "60", "600", "3600")
_SLOTS = tuple(f"option{i}" for i in range(5))
_COMMON = (
  "id",
  "video_path",
  "question",
  "correct_choice",
  "duration_group",
  "question_category",
)
_UNUSED = "N/A"


def read_longvideobench(
  paths,
  root=None,
  *,
  on_bad_row: str = "raise",
  report: validation.Report | None = None,
) -> list[question_lib.Question]:
  """Returns the questions of LongVideoBench files.

  Args:
    paths: one path, several joined by commas, or a sequence of paths; parquet
      with `option0` to `option4`, or JSON with `candidates`.
    root: media root; clips are looked for in `videos/` below it.
    on_bad_row: "raise" or "skip".
    report: filled with what was left out.
  """
  places = validation.Places(root, "videos/{}", "{}")

  def parse(entry, unused_name, unused_row):
    return _row(entry, places)

  return validation.read_tables(
    paths,
    lambda columns: (
      (*_COMMON, "candidates")
      if "candidates" in columns
      else (*_COMMON, *_SLOTS)
    ),
    "LongVideoBench",
    parse,
    on_bad_row=on_bad_row,
    report=report,
  )


def prompt(question: str, lettered_options) -> str:
  """Returns the user's text, which ends in a newline."""
  return (
    question
    + "\n"
    + "\n".join(lettered_options)
    + "\nAnswer with the option's letter from the given choices directly.\n"
  )


def _row(entry, places) -> question_lib.Question:
  question = validation.text(entry, "question")
  if "candidates" in entry:
    options = validation.choices(entry, "candidates", most=5)
  else:
    options = _slots(entry)
  choice = validation.integer(entry, "correct_choice")
  if choice < 0:
    raise validation.RowError(
      "correct_choice", "no answer; the validation split has them"
    )
  topic = validation.text(entry, "topic_category", required=False)
  return question_lib.Question(
    id=validation.text(entry, "id"),
    video=places(validation.text(entry, "video_path"), field="video_path"),
    question=question,
    options=tuple(options),
    answer=validation.letter_at(choice, len(options), "correct_choice"),
    duration=str(validation.integer(entry, "duration_group")),
    category=validation.text(entry, "question_category"),
    groups=(("topic_category", topic),) if topic else (),
    source="longvideobench",
    prompt=prompt(question, tokenizer_lib.letter_options(options)),
  )


def _slots(entry) -> list[str]:
  """Returns the options before the first unused slot."""
  given = [validation.text(entry, slot) for slot in _SLOTS]
  used = [option != _UNUSED for option in given]
  count = used.index(False) if False in used else len(used)
  if any(used[count:]):
    # The letters of the prompt and those of the score would differ.
    raise validation.RowError(
      f"option{count}", "an unused option stands before one that is used"
    )
  return validation.choices({"option0": given[:count]}, "option0", most=5)
