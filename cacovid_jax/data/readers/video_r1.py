"""Training questions in both formats of Video-R1."""

import functools
import os

from cacovid_jax.data import question as question_lib
from cacovid_jax.data import wording
from cacovid_jax.data.readers import tables, validation

# Of rows that name none.
SOURCE = "video-r1"


def read_video_r1(
  paths,
  root=None,
  *,
  on_bad_row: str = "raise",
  report: tables.Report | None = None,
) -> list[question_lib.Question]:
  """Returns the video questions of Video-R1 JSON files.

  Both key sets are read: that of Video-R1-260k (`data_type`, `path`,
  `options`) and that of the public trainer's filtered subset
  (`modality_type`, `video`, options inside `problem`). The user's text is
  problem, one line per option where the problem does not hold them yet, and the
  hint of the problem type. (Video-R1's own reader puts "Options:" before them;
  the trainer of this method does not read `options` at all.)

  Args:
    paths: one path, several joined by commas, or a sequence of paths.
    root: media root, must exist if given; see `check_media` for the clips.
    on_bad_row: "raise" or "skip".
    report: filled with what was left out.
  """
  validation.check_root(root)
  questions = tables.Questions(on_bad_row, report)
  paths = tables.split_paths(paths)
  for path in paths:
    entries = tables.load_rows(path, "give a file in Video-R1's format")
    # Files may number their rows alike: the name keeps ids apart.
    stem = os.path.splitext(os.path.basename(path))[0]
    prefix = f"{stem}/" if len(paths) > 1 else ""
    parse = functools.partial(_question, questions.report, prefix)
    questions.read(path, entries, parse)
  return questions.finish(", ".join(paths))


def _question(
  report: tables.Report, prefix: str, row: validation.Row
) -> question_lib.Question | None:
  """Returns the question of a row, None of one about a picture."""
  entry = row.entry
  field = "modality_type" if "modality_type" in entry else "data_type"
  modality = row.text(field)
  if modality == "image":
    group = entry.get("data_source") or SOURCE, entry.get("problem_type")
    report.images[tuple(map(str, group))] += 1
    return None
  if modality != "video":
    raise validation.RowError(
      field, f"{modality[:40]!r} is neither video nor image"
    )
  problem, kind = row.text("problem"), row.text("problem_type")
  validation.check_one_of(kind, "problem_type", question_lib.PROBLEM_TYPES)
  path = row.clip("video" if "video" in entry else "path")
  answer = question_lib.extract_answer(row.text("solution"))
  if not answer.strip():
    raise validation.RowError("solution", "the answer is empty")
  given = validation.check_options(entry.get("options"))
  options, lettered = validation.strip_letters(given), given
  if kind == question_lib.MULTIPLE_CHOICE:
    options = options or tuple(validation.inline_options(problem))
    if len(options) < 2:
      raise validation.RowError(
        "options", "a multiple choice question without options"
      )
    answer = validation.letter(answer, options, "solution")
    if given and options == tuple(given):
      lettered = wording.letter_options(given)
  name = entry.get("problem_id", f"{row.file}:{row.number}")
  if not isinstance(name, (int, str)) or isinstance(name, bool):
    what = f"{name!r} is neither number nor text"
    raise validation.RowError("problem_id", what)
  validation.check_unicode(str(name), "problem_id")
  duration = entry.get("duration")
  return question_lib.Question(
    id=f"{prefix}{name}",
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
