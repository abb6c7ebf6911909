"""VideoMME (https://arxiv.org/abs/2405.21075), and data in its columns.

videomme/test-00000-of-00001.parquet, data/<videoID>.mp4. Subtitles are not
used, though the prompt names them.
"""

from cacovid_jax import errors
from cacovid_jax.data import question as question_lib
from cacovid_jax.data import tokenizer as tokenizer_lib
from cacovid_jax.data.readers import validation

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
  report: validation.Report | None = None,
) -> list[question_lib.Question]:
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
  places = validation.Places(root, *_PLACES)

  def parse(entry, unused_name, unused_row):
    return _row(entry, style, places, released)

  return validation.read_tables(
    paths,
    _COLUMNS,
    "VideoMME",
    parse,
    on_bad_row=on_bad_row,
    report=report,
  )


def _row(entry, style, places, released) -> question_lib.Question:
  identity = validation.text(entry, "question_id")
  clip = validation.text(entry, "videoID")
  question = validation.text(entry, "question")
  most = 4 if released else len(question_lib.LETTERS)
  given = validation.choices(entry, "options", most=most)
  if released:
    options, shown = validation.lettered(given, "options"), given
  else:
    options = validation.strip_letters(given)
    shown = (
      tokenizer_lib.letter_options(given) if options == tuple(given) else given
    )
  place = places(clip, field="videoID")
  if style == "videomme":
    prompt = tokenizer_lib.videomme_prompt(question, shown)
  else:
    prompt = tokenizer_lib.training_prompt(
      question, shown, question_lib.MULTIPLE_CHOICE
    )
  groups = {
    facet: validation.text(entry, facet, required=False) for facet in _GROUPS
  }
  return question_lib.Question(
    id=identity,
    video=place,
    question=question,
    options=options,
    answer=validation.letter(
      validation.text(entry, "answer"), options, "answer"
    ),
    problem_type=question_lib.MULTIPLE_CHOICE,
    duration=validation.text(entry, "duration", required=False) or None,
    category=validation.text(entry, "task_type", required=False) or None,
    groups=tuple((facet, name) for facet, name in groups.items() if name),
    source="videomme",
    prompt=prompt,
  )
