"""Training questions in both formats of Video-R1."""

import os

from cacovid_jax import errors
from cacovid_jax.data import question as question_lib
from cacovid_jax.data import tokenizer as tokenizer_lib
from cacovid_jax.data.readers import validation

# Of rows that name none.
SOURCE = "video-r1"


def read_video_r1(
  paths,
  root=None,
  *,
  on_bad_row: str = "raise",
  report: validation.Report | None = None,
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
  rows = validation.Rows(on_bad_row, report)
  paths = validation.split_paths(paths)
  for path in paths:
    entries = validation.load_json(path)
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


def _video_r1_row(
  entry, name: str, prefix: str
) -> question_lib.Question | None:
  if not isinstance(entry, dict):
    raise validation.RowError(
      "row", f"an object is needed, not {type(entry).__name__}"
    )
  field = "modality_type" if "modality_type" in entry else "data_type"
  modality = validation.text(entry, field)
  if modality == "image":
    return None
  if modality != "video":
    raise validation.RowError(
      field, f"{modality[:40]!r} is neither video nor image"
    )
  problem = validation.text(entry, "problem")
  problem_type = validation.text(entry, "problem_type")
  if problem_type not in question_lib.PROBLEM_TYPES:
    raise validation.RowError(
      "problem_type",
      f"{problem_type[:40]!r} is none of"
      f" {', '.join(question_lib.PROBLEM_TYPES)}",
    )
  path_field = "video" if "video" in entry else "path"
  path = validation.relative(validation.text(entry, path_field), path_field)
  answer = question_lib.extract_answer(
    validation.text(entry, "solution")
  ).strip()
  if not answer:
    raise validation.RowError("solution", "the answer is empty")
  given = validation.options(entry)
  options, lettered = validation.strip_letters(given), given
  if problem_type == question_lib.MULTIPLE_CHOICE:
    options = options or validation.inline_options(problem)
    if len(options) < 2:
      raise validation.RowError(
        "options", "a multiple choice question without options"
      )
    answer = validation.letter(answer, options, "solution")
    if given and options == tuple(given):
      lettered = tokenizer_lib.letter_options(given)
  identity = entry.get("problem_id", name)
  if not isinstance(identity, (int, str)) or isinstance(identity, bool):
    raise validation.RowError(
      "problem_id", f"{identity!r} is neither number nor text"
    )
  validation.check_unicode(str(identity), "problem_id")
  # Some sources give seconds here, which are no group.
  duration = entry.get("duration")
  return question_lib.Question(
    id=f"{prefix}{identity}",
    video=path,
    question=problem,
    options=tuple(options),
    answer=answer,
    problem_type=problem_type,
    duration=duration if isinstance(duration, str) else None,
    category=validation.text(entry, "category", required=False) or None,
    source=validation.text(entry, "data_source", required=False) or SOURCE,
    prompt=tokenizer_lib.training_prompt(problem, lettered, problem_type),
  )
