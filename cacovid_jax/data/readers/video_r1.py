"""Training questions in both formats of Video-R1.

Both key sets are read: that of Video-R1-260k (`data_type`, `path`, `options`)
and that of the public trainer's filtered subset (`modality_type`, `video`,
options inside `problem`). The user's text is problem, one line per option where
the problem does not hold them yet, and the hint of the problem type.
(Video-R1's own reader puts "Options:" before them; the trainer of this method
does not read `options` at all.)
"""

from collections.abc import Mapping

from cacovid_jax.data import question as question_lib
from cacovid_jax.data import wording
from cacovid_jax.data.readers import option_letters, tables, validation

# Of rows that name none.
SOURCE = "video-r1"


def read_video_r1(
  paths, root=None, *, report: tables.Report | None = None, **options
) -> list[question_lib.Question]:
  """Returns the video questions of Video-R1 JSON files; see `tables.Reader`."""
  paths = tables.split_paths(paths)
  report = tables.Report() if report is None else report
  # Files may number their rows alike: the name keeps ids apart.
  known = {"apart": len(paths) > 1, "images": report.images}
  return _READER(paths, root, report=report, **known, **options)


def _question(
  row: validation.Row, *, apart: bool, images: Mapping[tuple[str, str], int]
) -> question_lib.Question | None:
  """Returns the question of a row; one about a picture is counted."""
  entry = row.entry
  field = "modality_type" if "modality_type" in entry else "data_type"
  modality = row.text(field)
  if modality == "image":
    group = entry.get("data_source") or SOURCE, entry.get("problem_type")
    images[tuple(map(str, group))] += 1
    return None
  if modality != "video":
    told = f"{modality[:40]!r} is neither video nor image"
    raise validation.RowError(field, told)
  problem, kind = row.text("problem"), row.text("problem_type")
  validation.check_one_of(kind, "problem_type", question_lib.PROBLEM_TYPES)
  path = row.clip("video" if "video" in entry else "path")
  answer = question_lib.extract_answer(row.text("solution"))
  if not answer.strip():
    raise validation.RowError("solution", "the answer is empty")
  given = validation.check_options(entry.get("options"))
  options, lettered, marks = option_letters.split_letters(given)
  if kind == question_lib.MULTIPLE_CHOICE:
    options = options or tuple(option_letters.inline_options(problem))
    if len(options) < 2:
      raise validation.RowError("options", validation.NO_OPTIONS)
    answer = option_letters.letter(answer, options, "solution", marks)
  else:
    lettered = given
  name = entry.get("problem_id", f"{row.file}:{row.number}")
  if not isinstance(name, (int, str)) or isinstance(name, bool):
    what = f"{name!r} is neither number nor text"
    raise validation.RowError("problem_id", what)
  validation.check_unicode(str(name), "problem_id")
  duration = entry.get("duration")
  return question_lib.Question(
    id=f"{row.file}/{name}" if apart else str(name),
    video=path,
    question=problem,
    options=options,
    answer=answer.strip(),
    problem_type=kind,
    # Some sources give seconds here, which are no group.
    duration=duration if isinstance(duration, str) else None,
    category=row.text("category", required=False) or None,
    source=row.text("data_source", required=False) or SOURCE,
    prompt=wording.training_prompt(problem, lettered, kind),
  )


_READER = tables.Reader("Video-R1", (), ("{}",), _question, json_only=True)
