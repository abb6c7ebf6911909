"""EgoSchema (https://arxiv.org/abs/2308.09126), the subset with answers.

Subset/test-00000-of-00001.parquet and videos/<video_idx>.mp4. The other 4531
questions are scored on a public server only.
"""

from cacovid_jax.data import question as question_lib
from cacovid_jax.data.readers import validation

_COLUMNS = ("question_idx", "question", "video_idx", "option", "answer")


def read_egoschema(
  paths,
  root=None,
  *,
  on_bad_row: str = "raise",
  report: validation.Report | None = None,
) -> list[question_lib.Question]:
  """Returns the questions of EgoSchema's subset.

  Args:
    paths: one path, several joined by commas, or a sequence of paths.
    root: media root; clips are looked for in `videos/` below it.
    on_bad_row: "raise" or "skip".
    report: filled with what was left out.
  """
  places = validation.Places(
    root, "videos/{}.mp4", "videos/{}.MP4", "videos/{}.mkv", "{}.mp4"
  )

  def parse(entry, unused_name, unused_row):
    return _row(entry, places)

  return validation.read_tables(
    paths,
    _COLUMNS,
    "EgoSchema",
    parse,
    on_bad_row=on_bad_row,
    report=report,
  )


def prompt(question: str, lettered_options) -> str:
  """Returns the user's text."""
  return (
    question
    + "\n"
    + "\n".join(lettered_options)
    + "\nAnswer with the option's letter from the given choices directly."
  )


def _row(entry, places) -> question_lib.Question:
  question = validation.text(entry, "question")
  given = validation.choices(entry, "option", most=5)
  options = validation.lettered(given, "option")
  clip = validation.text(entry, "video_idx")
  return question_lib.Question(
    id=validation.identity(entry, "question_idx"),
    video=places(clip, field="video_idx"),
    question=question,
    options=options,
    answer=validation.letter_at(
      validation.integer(entry, "answer"), len(options), "answer"
    ),
    source="egoschema",
    prompt=prompt(question, given),
  )
