"""Reads training and benchmark files into `Question` rows.

Every fault names the file, the row (counted from 1), the field and the reason.
`on_bad_row="skip"` leaves such rows out, counts and lists them in the report.
Pictures are outside the method: image rows of Video-R1 are left out and
counted.
"""

import collections
import dataclasses
import json
import os
import re
from collections.abc import Iterable, Sequence

import pyarrow as pa
import pyarrow.parquet
from absl import logging

from cacovid_jax import errors
from cacovid_jax.data import prompts, questions, video

MAX_JSON_BYTES = 4 * 2**30
MAX_TABLE_BYTES = 4 * 2**30
MAX_TEXT = 100_000

# "A. text", "A) text", "(A) text", "A: text" at the start of an option.
_LETTER = re.compile(r"^\s*\(?([A-Z])[.):]\s*")
_VIDEOMME_COLUMNS = ("question_id", "videoID", "question", "options", "answer")
_VIDEOMME_PLACES = (
  "data/{}.mp4",
  "data/{}.MP4",
  "data/{}.mkv",
  "videos/{}.mp4",
  "{}.mp4",
)


@dataclasses.dataclass(frozen=True)
class BadRow:
  """A row that was left out, and why."""

  file: str
  row: int
  field: str
  reason: str

  def __str__(self):
    return f"{self.file}: row {self.row}, field {self.field!r}: {self.reason}"


@dataclasses.dataclass
class Report:
  """What a reader left out; pass one in to receive it."""

  num_rows: int = 0
  num_images: int = 0
  bad_rows: list[BadRow] = dataclasses.field(default_factory=list)


class _RowError(Exception):
  def __init__(self, field: str, reason: str):
    self.field, self.reason = field, reason
    super().__init__(field, reason)


class _Rows:
  """Collects the questions of some files under one policy for bad rows."""

  def __init__(self, on_bad_row: str, report: Report | None):
    if on_bad_row not in ("raise", "skip"):
      raise errors.UserError(
        f"on_bad_row {on_bad_row!r}: give 'raise' or 'skip'"
      )
    self._skip = on_bad_row == "skip"
    self.report = Report() if report is None else report
    self.questions = []
    self._ids = set()

  def add(self, file: str, row: int, parse, entry):
    """Adds what `parse(entry)` returns; None marks a row outside the method."""
    self.report.num_rows += 1
    try:
      question = parse(entry)
      if question is None:
        self.report.num_images += 1
        return
      if question.id in self._ids:
        raise _RowError("id", f"{question.id!r} occurs twice")
    except _RowError as error:
      bad = BadRow(file, row, error.field, error.reason)
      if not self._skip:
        raise errors.UserError(
          f"{bad}; correct the row, or pass on_bad_row=skip to leave it out"
        ) from None
      self.report.bad_rows.append(bad)
      return
    self._ids.add(question.id)
    self.questions.append(question)

  def finish(self, what: str) -> list[questions.Question]:
    """Returns the questions; none at all is an error."""
    report = self.report
    if report.num_images:
      logging.info("%s: left out %d image rows", what, report.num_images)
    if report.bad_rows:
      logging.warning(
        "%s: left out %d bad rows, first: %s",
        what,
        len(report.bad_rows),
        report.bad_rows[0],
      )
    if not self.questions:
      raise errors.UserError(
        f"{what}: no usable row among {report.num_rows}; give a file with"
        " questions about videos"
      )
    return self.questions


def read_video_r1(
  paths,
  root=None,
  *,
  on_bad_row: str = "raise",
  report: Report | None = None,
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
  _check_root(root)
  rows = _Rows(on_bad_row, report)
  paths = _split(paths)
  for path in paths:
    entries = _load_json(path)
    if not isinstance(entries, list):
      raise errors.UserError(
        f"{path}: holds no JSON list; give a file in Video-R1's format"
      )
    # Files may number their rows alike: the name keeps ids apart.
    stem = os.path.splitext(os.path.basename(path))[0]
    prefix = f"{stem}/" if len(paths) > 1 else ""
    for row, entry in enumerate(entries, start=1):

      def parse(entry, row=row, stem=stem, prefix=prefix):
        return _video_r1_row(entry, f"{stem}:{row}", prefix)

      rows.add(path, row, parse, entry)
  return rows.finish(", ".join(paths))


def read_videomme(
  path,
  root=None,
  style: str = "videomme",
  *,
  on_bad_row: str = "raise",
  report: Report | None = None,
) -> list[questions.Question]:
  """Returns the questions of a VideoMME-format parquet file.

  Args:
    path: the parquet file.
    root: media root; clips are looked for in `data/` and `videos/` below it.
    style: "videomme" for the benchmark's prompt, or "video-r1" for the text
      that the trainer shows: question, lettered options, hint.
    on_bad_row: "raise" or "skip".
    report: filled with what was left out.
  """
  if style not in ("videomme", "video-r1"):
    raise errors.UserError(
      f"prompt style {style!r}: give 'videomme' or 'video-r1'"
    )
  _check_root(root)
  path = os.fspath(path)
  rows = _Rows(on_bad_row, report)
  table = _load_parquet(path, _VIDEOMME_COLUMNS)
  places = {}
  for row, entry in enumerate(table, start=1):

    def parse(entry):
      return _videomme_row(entry, root, style, places)

    rows.add(path, row, parse, entry)
  return rows.finish(path)


def check_media(rows: Iterable[questions.Question], root) -> dict[str, int]:
  """Returns the clips that are missing below `root`: path -> questions lost."""
  counts = collections.Counter(question.video for question in rows)
  missing = {}
  for path, count in sorted(counts.items()):
    try:
      found = os.path.isfile(video.safe_path(root, path))
    except video.VideoError:
      found = False
    if not found:
      missing[path] = count
  return missing


def require_media(rows: Sequence[questions.Question], root) -> None:
  """Raises `UserError` with counts and examples if clips are missing."""
  missing = check_media(rows, root)
  if missing:
    num_clips = len({question.video for question in rows})
    shown = ", ".join(list(missing)[:5])
    raise errors.UserError(
      f"{root}: {len(missing)} of {num_clips} clips are missing"
      f" ({sum(missing.values())} of {len(rows)} questions), first: {shown};"
      " download them or correct the media root"
    )


def _split(paths) -> list[str]:
  if isinstance(paths, (str, os.PathLike)):
    text = os.fspath(paths)
    paths = [text] if os.path.isfile(text) else text.split(",")
  return [os.fspath(path) for path in paths if path]


def _check_root(root):
  if root is not None and not os.path.isdir(root):
    raise errors.UserError(
      f"{root}: no such folder; give the media root that holds the clips"
    )


def _check_size(path: str, limit: int):
  if not os.path.isfile(path):
    raise errors.UserError(f"{path}: no such file; correct the path")
  size = os.path.getsize(path)
  if size > limit:
    raise errors.UserError(
      f"{path}: {size} bytes are above the limit of {limit}; split the file"
    )


def _load_json(path: str):
  _check_size(path, MAX_JSON_BYTES)
  try:
    with open(path, encoding="utf-8") as f:
      return json.load(f)
  except (OSError, ValueError, RecursionError) as error:
    raise errors.UserError(
      f"{path}: not readable as JSON ({error}); download it again"
    ) from None


def _load_parquet(path: str, columns) -> list[dict]:
  _check_size(path, MAX_TABLE_BYTES)
  try:
    with pa.parquet.ParquetFile(path) as file:
      names = set(file.schema_arrow.names)
      missing = [name for name in columns if name not in names]
      if missing:
        raise errors.UserError(
          f"{path}: columns {missing} are missing; give a parquet file in"
          " VideoMME's format"
        )
      groups = range(file.metadata.num_row_groups)
      size = sum(file.metadata.row_group(i).total_byte_size for i in groups)
      if size > MAX_TABLE_BYTES or file.metadata.num_rows > 10_000_000:
        raise errors.UserError(
          f"{path}: {file.metadata.num_rows} rows, {size} bytes; split it"
        )
      return file.read().to_pylist()
  except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
    text = " ".join(str(error).split())[:200]
    raise errors.UserError(
      f"{path}: not readable as parquet ({text}); download it again"
    ) from None


def _text(entry: dict, field: str, *, required: bool = True) -> str:
  value = entry.get(field)
  if value is None and not required:
    return ""
  if value is None:
    raise _RowError(field, "missing")
  if not isinstance(value, str):
    raise _RowError(field, f"a text is needed, not {type(value).__name__}")
  if required and not value.strip():
    raise _RowError(field, "empty")
  if len(value) > MAX_TEXT:
    raise _RowError(field, f"above {MAX_TEXT} characters")
  _check_unicode(value, field)
  return value


def _check_unicode(value: str, field: str):
  # JSON can spell half a surrogate pair, which no tokenizer takes.
  try:
    value.encode()
  except UnicodeEncodeError:
    raise _RowError(field, "holds half a surrogate pair") from None


def _options(entry: dict) -> list[str]:
  value = entry.get("options")
  if value is None:
    return []
  if not isinstance(value, (list, tuple)):
    raise _RowError("options", f"a list is needed, not {type(value).__name__}")
  for option in value:
    if not isinstance(option, str) or not option.strip():
      raise _RowError("options", f"{option!r} is not a text")
    _check_unicode(option, "options")
  if len(value) > len(questions.LETTERS):
    raise _RowError("options", f"{len(value)} are more than there are letters")
  return list(value)


def _strip_letters(options: Sequence[str]) -> tuple[str, ...]:
  """Returns the options without "A. ", "B. ", ... if all carry theirs."""
  matches = [_LETTER.match(option) for option in options]
  letters = "".join(match.group(1) if match else "?" for match in matches)
  if letters != questions.LETTERS[: len(options)]:
    return tuple(options)
  return tuple(
    option[match.end() :]
    for option, match in zip(options, matches, strict=True)
  )


def _inline_options(problem: str) -> tuple[str, ...]:
  """Returns the options that stand in the text itself, one after the other."""
  marks, position = [], 0
  for letter in questions.LETTERS:
    mark = re.compile(rf"(?:(?<=\s)|^)\(?{letter}[.):]\s*").search(
      problem, position
    )
    if mark is None:
      break
    marks.append(mark)
    position = mark.end()
  ends = [mark.start() for mark in marks[1:]] + [len(problem)][: len(marks)]
  return tuple(
    problem[mark.end() : end].strip()
    for mark, end in zip(marks, ends, strict=True)
  )


def _letter(answer: str, num_options: int, field: str) -> str:
  letter = answer.strip().strip(".()")[:1]
  allowed = questions.LETTERS[:num_options]
  if not letter or letter not in allowed:
    raise _RowError(
      field, f"{answer[:40]!r} is not one of the letters {allowed}"
    )
  return letter


def _relative(value: str, field: str) -> str:
  """Returns the media path without "./"; refuses what leaves the root."""
  path = value.strip()
  while path.startswith("./"):
    path = path[2:]
  reason = video.unsafe(path)
  if reason:
    raise _RowError(field, f"{value[:80]!r}: {reason}")
  return path


def _video_r1_row(entry, name: str, prefix: str) -> questions.Question | None:
  if not isinstance(entry, dict):
    raise _RowError("row", f"an object is needed, not {type(entry).__name__}")
  field = "modality_type" if "modality_type" in entry else "data_type"
  modality = _text(entry, field)
  if modality == "image":
    return None
  if modality != "video":
    raise _RowError(field, f"{modality[:40]!r} is neither video nor image")
  problem = _text(entry, "problem")
  problem_type = _text(entry, "problem_type")
  if problem_type not in questions.PROBLEM_TYPES:
    raise _RowError(
      "problem_type",
      f"{problem_type[:40]!r} is none of {', '.join(questions.PROBLEM_TYPES)}",
    )
  path_field = "video" if "video" in entry else "path"
  path = _relative(_text(entry, path_field), path_field)
  answer = questions.extract_answer(_text(entry, "solution")).strip()
  if not answer:
    raise _RowError("solution", "the answer is empty")
  given = _options(entry)
  options, lettered = _strip_letters(given), given
  if problem_type == questions.MULTIPLE_CHOICE:
    options = options or _inline_options(problem)
    if len(options) < 2:
      raise _RowError("options", "a multiple choice question without options")
    answer = _letter(answer, len(options), "solution")
    if given and options == tuple(given):
      lettered = prompts.letter_options(given)
  identity = entry.get("problem_id", name)
  if not isinstance(identity, (int, str)) or isinstance(identity, bool):
    raise _RowError("problem_id", f"{identity!r} is neither number nor text")
  _check_unicode(str(identity), "problem_id")
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
    category=_text(entry, "category", required=False) or None,
    source=_text(entry, "data_source", required=False) or "video-r1",
    prompt=prompts.training_prompt(problem, lettered, problem_type),
  )


def _videomme_row(entry, root, style, places) -> questions.Question:
  identity = _text(entry, "question_id")
  clip = _text(entry, "videoID")
  question = _text(entry, "question")
  given = _options(entry)
  if len(given) < 2:
    raise _RowError("options", "a multiple choice question without options")
  options = _strip_letters(given)
  lettered = prompts.letter_options(given) if options == tuple(given) else given
  if clip not in places:
    places[clip] = _place(_relative(clip, "videoID"), root)
  if style == "videomme":
    prompt = prompts.videomme_prompt(question, lettered)
  else:
    prompt = prompts.training_prompt(
      question, lettered, questions.MULTIPLE_CHOICE
    )
  return questions.Question(
    id=identity,
    video=places[clip],
    question=question,
    options=options,
    answer=_letter(_text(entry, "answer"), len(options), "answer"),
    problem_type=questions.MULTIPLE_CHOICE,
    duration=_text(entry, "duration", required=False) or None,
    category=_text(entry, "task_type", required=False) or None,
    source="videomme",
    prompt=prompt,
  )


def _place(clip: str, root) -> str:
  """Returns where the clip lies below the root, else its official place."""
  places = [place.format(clip) for place in _VIDEOMME_PLACES]
  if root is not None:
    for place in places:
      if os.path.isfile(os.path.join(root, place)):
        return place
  return places[0]
