"""EgoSchema (https://arxiv.org/abs/2308.09126), the subset with answers.

Subset/test-00000-of-00001.parquet and videos/<video_idx>.mp4. The other 4531
questions are scored on a public server only.
"""

from cacovid_jax.data import questions
from cacovid_jax.data.readers import rows as rows_lib

_COLUMNS = ("question_idx", "question", "video_idx", "option", "answer")


def read_egoschema(
  paths,
  root=None,
  *,
  on_bad_row: str = "raise",
  report: rows_lib.Report | None = None,
) -> list[questions.Question]:
  """Returns the questions of EgoSchema's subset.

  Args:
    paths: one path, several joined by commas, or a sequence of paths.
    root: media root; clips are looked for in `videos/` below it.
    on_bad_row: "raise" or "skip".
    report: filled with what was left out.
  """
  places = rows_lib.Places(
    root, "videos/{}.mp4", "videos/{}.MP4", "videos/{}.mkv", "{}.mp4"
  )

  def parse(entry, unused_name, unused_row):
    return _row(entry, places)

  return rows_lib.read_tables(
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


def _row(entry, places) -> questions.Question:
  question = rows_lib.text(entry, "question")
  given = rows_lib.choices(entry, "option", most=5)
  options = rows_lib.lettered(given, "option")
  clip = rows_lib.text(entry, "video_idx")
  return questions.Question(
    id=rows_lib.identity(entry, "question_idx"),
    video=places(clip, field="video_idx"),
    question=question,
    options=options,
    answer=rows_lib.letter_at(
      rows_lib.integer(entry, "answer"), len(options), "answer"
    ),
    source="egoschema",
    prompt=prompt(question, given),
  )
