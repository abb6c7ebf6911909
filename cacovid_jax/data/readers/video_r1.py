"""Training questions in both formats of Video-R1."""

import os

from cacovid_jax import errors
from cacovid_jax.data import prompts, questions
from cacovid_jax.data.readers import rows as rows_lib

# Of rows that name none.
SOURCE = "video-r1"


def read_video_r1(
  paths,
  root=None,
  *,
  on_bad_row: str = "raise",
  report: rows_lib.Report | None = None,
) -> list[questions.Question]:
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
  rows_lib.check_root(root)
  rows = rows_lib.Rows(on_bad_row, report)
  paths = rows_lib.split_paths(paths)
  for path in paths:
    entries = rows_lib.load_json(path)
    if not isinstance(entries, list):
      raise errors.UserError(
        f"{path}: holds no JSON list; give a file in Video-R1's format"
      )
    # Files may number their rows alike: the name keeps ids apart.
    stem = os.path.splitext(os.path.basename(path))[0]
    prefix = f"{stem}/" if len(paths) > 1 else ""
    for row, entry in enumerate(entries, start=1):

      def parse(entry, row=row, stem=stem, prefix=prefix):
        question = _video_r1_row(entry, f"{stem}:{row}", prefix)
        if question is None:
          group = entry.get("data_source") or SOURCE, entry.get("problem_type")
          rows.report.images[tuple(map(str, group))] += 1
        return question

      rows.add(path, row, parse, entry)
  return rows.finish(", ".join(paths))


def _video_r1_row(entry, name: str, prefix: str) -> questions.Question | None:
  if not isinstance(entry, dict):
    raise rows_lib.RowError(
      "row", f"an object is needed, not {type(entry).__name__}"
    )
  field = "modality_type" if "modality_type" in entry else "data_type"
  modality = rows_lib.text(entry, field)
  if modality == "image":
    return None
  if modality != "video":
    raise rows_lib.RowError(
      field, f"{modality[:40]!r} is neither video nor image"
    )
  problem = rows_lib.text(entry, "problem")
  problem_type = rows_lib.text(entry, "problem_type")
  if problem_type not in questions.PROBLEM_TYPES:
    raise rows_lib.RowError(
      "problem_type",
      f"{problem_type[:40]!r} is none of {', '.join(questions.PROBLEM_TYPES)}",
    )
  path_field = "video" if "video" in entry else "path"
  path = rows_lib.relative(rows_lib.text(entry, path_field), path_field)
  answer = questions.extract_answer(rows_lib.text(entry, "solution")).strip()
  if not answer:
    raise rows_lib.RowError("solution", "the answer is empty")
  given = rows_lib.options(entry)
  options, lettered = rows_lib.strip_letters(given), given
  if problem_type == questions.MULTIPLE_CHOICE:
    options = options or rows_lib.inline_options(problem)
    if len(options) < 2:
      raise rows_lib.RowError(
        "options", "a multiple choice question without options"
      )
    answer = rows_lib.letter(answer, options, "solution")
    if given and options == tuple(given):
      lettered = prompts.letter_options(given)
  identity = entry.get("problem_id", name)
  if not isinstance(identity, (int, str)) or isinstance(identity, bool):
    raise rows_lib.RowError(
      "problem_id", f"{identity!r} is neither number nor text"
    )
  rows_lib.check_unicode(str(identity), "problem_id")
  # Some sources give seconds here, which are no group.
  duration = entry.get("duration")
  return questions.Question(
    id=f"{prefix}{identity}",
    video=path,
    question=problem,
    options=tuple(options),
    answer=answer,
    problem_type=problem_type,
    duration=duration if isinstance(duration, str) else None,
    category=rows_lib.text(entry, "category", required=False) or None,
    source=rows_lib.text(entry, "data_source", required=False) or SOURCE,
    prompt=prompts.training_prompt(problem, lettered, problem_type),
  )
