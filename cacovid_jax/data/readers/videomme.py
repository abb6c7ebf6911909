"""VideoMME (https://arxiv.org/abs/2405.21075), and data in its columns.

videomme/test-00000-of-00001.parquet, data/<videoID>.mp4. Subtitles are not
used, though the prompt names them.
"""

from cacovid_jax import errors
from cacovid_jax.data import prompts, questions
from cacovid_jax.data.readers import rows as rows_lib

_COLUMNS = ("question_id", "videoID", "question", "options", "answer")
_PLACES = (
  "data/{}.mp4",
  "data/{}.MP4",
  "data/{}.mkv",
  "videos/{}.mp4",
  "{}.mp4",
)
_GROUPS = ("domain", "sub_category")


def read_videomme(
  paths,
  root=None,
  style: str = "videomme",
  *,
  released: bool = False,
  on_bad_row: str = "raise",
  report: rows_lib.Report | None = None,
) -> list[questions.Question]:
  """Returns the questions of VideoMME-format parquet files.

  Args:
    paths: one path, several joined by commas, or a sequence of paths.
    root: media root; clips are looked for in `data/` and `videos/` below it.
    style: "videomme" for the benchmark's prompt, or "video-r1" for the text
      that the trainer shows: question, lettered options, hint.
    released: whether the rows must be as VideoMME's own, four options at most
      that carry their letters.
    on_bad_row: "raise" or "skip".
    report: filled with what was left out.
  """
  if style not in ("videomme", "video-r1"):
    raise errors.UserError(
      f"prompt style {style!r}: give 'videomme' or 'video-r1'"
    )
  places = rows_lib.Places(root, *_PLACES)

  def parse(entry, unused_name, unused_row):
    return _row(entry, style, places, released)

  return rows_lib.read_tables(
    paths,
    _COLUMNS,
    "VideoMME",
    parse,
    on_bad_row=on_bad_row,
    report=report,
  )


def _row(entry, style, places, released) -> questions.Question:
  identity = rows_lib.text(entry, "question_id")
  clip = rows_lib.text(entry, "videoID")
  question = rows_lib.text(entry, "question")
  most = 4 if released else len(questions.LETTERS)
  given = rows_lib.choices(entry, "options", most=most)
  if released:
    options, shown = rows_lib.lettered(given, "options"), given
  else:
    options = rows_lib.strip_letters(given)
    shown = prompts.letter_options(given) if options == tuple(given) else given
  place = places(clip, field="videoID")
  if style == "videomme":
    prompt = prompts.videomme_prompt(question, shown)
  else:
    prompt = prompts.training_prompt(question, shown, questions.MULTIPLE_CHOICE)
  groups = {
    facet: rows_lib.text(entry, facet, required=False) for facet in _GROUPS
  }
  return questions.Question(
    id=identity,
    video=place,
    question=question,
    options=options,
    answer=rows_lib.letter(rows_lib.text(entry, "answer"), options, "answer"),
    problem_type=questions.MULTIPLE_CHOICE,
    duration=rows_lib.text(entry, "duration", required=False) or None,
    category=rows_lib.text(entry, "task_type", required=False) or None,
    groups=tuple((facet, name) for facet, name in groups.items() if name),
    source="videomme",
    prompt=prompt,
  )
