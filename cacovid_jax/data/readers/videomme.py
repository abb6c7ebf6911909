"""VideoMME (https://arxiv.org/abs/2405.21075), and data in its columns.

videomme/test-00000-of-00001.parquet, data/<videoID>.mp4. Subtitles are not
used, though the prompt names them.
"""

from cacovid_jax import errors
from cacovid_jax.data import question as question_lib
from cacovid_jax.data import wording
from cacovid_jax.data.readers import option_letters, tables, validation

_PLACES = (
  "data/{}.mp4",
  "data/{}.MP4",
  "data/{}.mkv",
  "videos/{}.mp4",
  "{}.mp4",
)
_GROUPS = ("domain", "sub_category")


def read_videomme(
  paths, root=None, style: str = "videomme", **options
) -> list[question_lib.Question]:
  """Returns the questions of VideoMME-format parquet files.

  Args:
    paths: see `tables.Reader`.
    root: media root; clips are looked for in `data/` and `videos/` below it.
    style: "videomme" for the benchmark's prompt, or "video-r1" for the text
      that the trainer shows: question, lettered options, hint.
    **options: see `tables.Reader`; and `released`, whether the rows must be as
      VideoMME's own, four options at most that carry their letters.
  """
  told = f"prompt style {style!r}: give 'videomme' or 'video-r1'"
  errors.check(style in ("videomme", "video-r1"), told)
  return _READER(paths, root, style=style, **options)


def _question(
  row: validation.Row, *, style: str, released: bool = False
) -> question_lib.Question:
  identity = row.text("question_id")
  question = row.text("question")
  most = 4 if released else len(question_lib.LETTERS)
  given = row.choices("options", most=most)
  options, shown, marks = option_letters.split_letters(given)
  if released:
    options, marks = option_letters.lettered(given, "options"), ()
  place, kind = row.clip("videoID"), question_lib.MULTIPLE_CHOICE
  prompt = wording.training_prompt(question, shown, kind)
  if style == "videomme":
    prompt = wording.videomme_prompt(question, shown)
  groups = {facet: row.text(facet, required=False) for facet in _GROUPS}
  return question_lib.Question(
    id=identity,
    video=place,
    question=question,
    options=options,
    answer=option_letters.letter(row.text("answer"), options, "answer", marks),
    duration=row.text("duration", required=False) or None,
    category=row.text("task_type", required=False) or None,
    groups=tuple((facet, name) for facet, name in groups.items() if name),
    source="videomme",
    prompt=prompt,
  )


_READER = tables.Reader(
  "VideoMME",
  ("question_id", "videoID", "question", "options", "answer"),
  _PLACES,
  _question,
)
