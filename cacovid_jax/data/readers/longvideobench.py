"""LongVideoBench (https://arxiv.org/abs/2407.15754), the validation split.

validation-00000-of-00001.parquet with `option0` to `option4`, or lvb_val.json
with `candidates`; and videos/<video_path>. The test split has no answers.
Subtitles are not used: a clip that has none is as good as another.
"""

from cacovid_jax.data import question as question_lib
from cacovid_jax.data import wording
from cacovid_jax.data.readers import tables, validation

DURATION_GROUPS = ("15", "60", "600", "3600")
_SLOTS = tuple(f"option{i}" for i in range(5))
_COMMON = (
  "id video_path question correct_choice duration_group question_category"
).split()
_UNUSED = "N/A"


def _question(row: validation.Row) -> question_lib.Question:
  question = row.text("question")
  listed = "candidates" in row.entry
  options = row.choices("candidates", most=5) if listed else _slots(row)
  if row.integer("correct_choice") < 0:
    told = "no answer; the validation split has them"
    raise validation.RowError("correct_choice", told)
  topic = row.text("topic_category", required=False)
  lettered = wording.letter_options(options)
  return question_lib.Question(
    id=row.text("id"),
    video=row.clip("video_path"),
    question=question,
    options=tuple(options),
    answer=row.letter_at("correct_choice", len(options)),
    duration=str(row.integer("duration_group")),
    category=row.text("question_category"),
    groups=(("topic_category", topic),) if topic else (),
    source="longvideobench",
    # Ends in a newline.
    prompt="\n".join([question, *lettered, wording.ANSWER_DIRECTLY, ""]),
  )


def _slots(row: validation.Row) -> list[str]:
  """Returns the options before the first unused slot."""
  given = [row.text(slot) for slot in _SLOTS]
  count = [*given, _UNUSED].index(_UNUSED)
  if set(given[count:]) - {_UNUSED}:
    # The letters of the prompt and those of the score would differ.
    told = "an unused option stands before one that is used"
    raise validation.RowError(f"option{count}", told)
  return validation.check_choices(given[:count], "option0", most=5)


read_longvideobench = tables.Reader(
  "LongVideoBench",
  lambda has: (*_COMMON, *(("candidates",) if "candidates" in has else _SLOTS)),
  ("videos/{}", "{}"),
  _question,
)
