"""Checks that all readers share, and what they left out.

A reader turns one row of a file into one `questions.Question` and raises
`RowError` where a field is unfit, `LeftOutError` where the row is outside what
is read. `Rows` decides what becomes of it.
"""

import collections
import dataclasses
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet
from absl import logging

from cacovid_jax import errors
from cacovid_jax.data import question as question_lib
from cacovid_jax.data import video

MAX_JSON_BYTES = 4 * 2**30
MAX_TABLE_BYTES = 4 * 2**30
MAX_TEXT = 100_000

# "A. text", "A) text", "(A) text", "A: text" at the start of an option.
_LETTER = re.compile(r"^\s*\(?([A-Z])[.):]\s*")
# "B", "(B)", "B." or "B)", and then perhaps the option itself.
_ANSWER = re.compile(
  r"(?:\(([A-Z])\)|([A-Z])(?:[.)]|(?![^\W_])))\s*(.*)", re.DOTALL
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
  """What a reader left out; pass one in to receive it.

  Attributes:
    num_rows: read, of all kinds.
    num_images: rows about pictures, which are outside the method.
    images: (source, problem type) -> such rows, where rows tell it.
    bad_rows: rows that are unfit, with `on_bad_row="skip"`.
    left_out: kind of row that is no part of the benchmark's score -> rows.
    missing: what a benchmark has and the folder has not, by name.
  """

  num_rows: int = 0
  num_images: int = 0
  images: collections.Counter[tuple[str, str]] = dataclasses.field(
    default_factory=collections.Counter
  )
  bad_rows: list[BadRow] = dataclasses.field(default_factory=list)
  left_out: collections.Counter[str] = dataclasses.field(
    default_factory=collections.Counter
  )
  missing: list[str] = dataclasses.field(default_factory=list)


class RowError(Exception):
  """A row is unfit; names the field."""

  def __init__(self, field: str, reason: str):
    self.field, self.reason = field, reason
    super().__init__(field, reason)


class LeftOutError(Exception):
  """A row is sound, and not among what is read; the text names its kind."""


class Rows:
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
    """Adds what `parse(entry)` returns; None marks a row about a picture."""
    self.report.num_rows += 1
    try:
      question = parse(entry)
      if question is None:
        self.report.num_images += 1
        return
      if question.id in self._ids:
        raise RowError("id", f"{question.id!r} occurs twice")
    except LeftOutError as error:
      self.report.left_out[str(error)] += 1
      return
    except RowError as error:
      bad = BadRow(file, row, error.field, error.reason)
      if not self._skip:
        raise errors.UserError(
          f"{bad}; correct the row, or pass on_bad_row=skip to leave it out"
        ) from None
      self.report.bad_rows.append(bad)
      return
    self._ids.add(question.id)
    self.questions.append(question)

  def finish(self, what: str) -> list[question_lib.Question]:
    """Returns the questions; none at all is an error."""
    report = self.report
    if report.num_images:
      logging.info("%s: left out %d image rows", what, report.num_images)
    for kind, count in sorted(report.left_out.items()):
      logging.info("%s: left out %d rows: %s", what, count, kind)
    if report.missing:
      logging.warning("%s: not there: %s", what, ", ".join(report.missing))
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


def read_tables(
  paths,
  required: Sequence[str] | Callable[[frozenset[str]], Sequence[str]],
  form: str,
  parse: Callable[[dict[str, Any], str, int], question_lib.Question],
  *,
  on_bad_row: str,
  report: Report | None,
) -> list[question_lib.Question]:
  """Returns the questions of parquet or JSON files.

  Args:
    paths: of the files, in order; as `split_paths` takes them.
    required: columns that each must have; or that, of the columns it has.
    form: whose format it is, for errors.
    parse: (row, name of the file without ending, number of the row) -> its
      question.
    on_bad_row: "raise" or "skip".
    report: filled with what was left out.
  """
  rows = Rows(on_bad_row, report)
  paths = split_paths(paths)
  for path in paths:
    name = os.path.splitext(os.path.basename(path))[0]
    for row, entry in enumerate(load_table(path, required, form), start=1):

      def checked(entry, name=name, row=row):
        if not isinstance(entry, dict):
          raise RowError(
            "row", f"an object is needed, not {type(entry).__name__}"
          )
        return parse(entry, name, row)

      rows.add(path, row, checked, entry)
  return rows.finish(", ".join(paths))


def check_media(rows: Iterable[question_lib.Question], root) -> dict[str, int]:
  """Returns the clips that are missing below `root`: path -> questions lost."""
  return find_missing((question.video for question in rows), root)


def find_missing(names: Iterable[str], root) -> dict[str, int]:
  """Returns the same of the clips' names, one for each question."""
  counts = collections.Counter(names)
  missing = {}
  for path, count in sorted(counts.items()):
    try:
      found = os.path.isfile(video.safe_path(root, path))
    except video.VideoError:
      found = False
    if not found:
      missing[path] = count
  return missing


def require_media(
  rows: Sequence[question_lib.Question],
  root,
  *,
  mend: str = "count them as wrong with on_missing=count",
) -> None:
  """Raises `UserError` with counts and examples if clips are missing.

  Args:
    rows: questions.
    root: media root.
    mend: what else the command can do, by its own flags.
  """
  names = [question.video for question in rows]
  missing = find_missing(names, root)
  if missing:
    raise missing_error(names, root, missing, mend)


def missing_error(
  names: Sequence[str], root, missing: Mapping[str, int], mend: str
) -> errors.UserError:
  """Returns the error of clips that `find_missing` found."""
  shown = ", ".join(list(missing)[:5])
  return errors.UserError(
    f"{root}: {len(missing)} of {len(set(names))} clips are missing"
    f" ({sum(missing.values())} of {len(names)} questions), first: {shown};"
    f" download them, correct the media root, or {mend}"
  )


class Places:
  """Where clips lie below a media root; each name is looked for once."""

  def __init__(self, root, *patterns: str):
    """Checks the root.

    Args:
      root: media root; None looks nowhere and takes the first pattern.
      *patterns: places as in "data/{}.mp4", best first.
    """
    check_root(root)
    self._root, self._patterns = root, patterns
    self._found = {}

  def __call__(self, name: str, *patterns: str, field: str) -> str:
    """Returns the clip's place below the root, else its official one.

    Args:
      name: what stands in the row.
      *patterns: places to look in before the common ones.
      field: of the row, for errors.
    """
    key = name, patterns
    if key not in self._found:
      clean = relative(name, field)
      every = (*patterns, *self._patterns)
      places = [pattern.replace("{}", clean) for pattern in every]
      there = (
        place
        for place in places
        if self._root is not None
        and os.path.isfile(os.path.join(self._root, place))
      )
      self._found[key] = next(there, places[0])
    return self._found[key]


def split_paths(paths) -> list[str]:
  """Returns one path, several joined by commas, or a sequence, as a list."""
  if isinstance(paths, (str, os.PathLike)):
    text = os.fspath(paths)
    paths = [text] if os.path.isfile(text) else text.split(",")
  return [os.fspath(path) for path in paths if path]


def check_root(root):
  """Refuses a media root that is no folder; None is none."""
  if root is not None and not os.path.isdir(root):
    raise errors.UserError(
      f"{root}: no such folder; give the media root that holds the clips"
    )


def check_size(path: str, limit: int):
  """Refuses a file that is missing, or above `limit` bytes."""
  if not os.path.isfile(path):
    raise errors.UserError(f"{path}: no such file; correct the path")
  size = os.path.getsize(path)
  if size > limit:
    raise errors.UserError(
      f"{path}: {size} bytes are above the limit of {limit}; split the file"
    )


def load_json(path: str):
  """Returns what a JSON file holds."""
  check_size(path, MAX_JSON_BYTES)
  try:
    with open(path, encoding="utf-8") as f:
      return json.load(f)
  except (OSError, ValueError, RecursionError) as error:
    raise errors.UserError(
      f"{path}: not readable as JSON ({error}); download it again"
    ) from None


def load_table(path: str, required, form: str) -> list:
  """Returns the rows of a parquet file, or of a JSON list.

  Args:
    path: of the file; ".json" at its end tells JSON.
    required: columns, or of the columns that there are, those it must have.
    form: whose format it is, for errors.
  """
  path = os.fspath(path)
  if not path.endswith(".json"):
    return _load_parquet(path, required, form)
  entries = load_json(path)
  if not isinstance(entries, list):
    raise errors.UserError(
      f"{path}: holds no JSON list; give a file in {form}'s format"
    )
  # A field that no row has is a file of another kind, not many bad rows.
  columns = frozenset().union(*(e for e in entries if isinstance(e, dict)))
  if columns:
    _check_columns(path, columns, required, form)
  return entries


def _check_columns(path, columns: frozenset[str], required, form: str):
  required = required(columns) if callable(required) else required
  missing = [name for name in required if name not in columns]
  if missing:
    raise errors.UserError(
      f"{path}: columns {missing} are missing (it has {sorted(columns)}); give"
      f" a file in {form}'s format"
    )


def _load_parquet(path: str, required, form: str) -> list[dict]:
  check_size(path, MAX_TABLE_BYTES)
  try:
    with pa.parquet.ParquetFile(path) as file:
      columns = frozenset(map(str, file.schema_arrow.names))
      _check_columns(path, columns, required, form)
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


def text(entry: dict, field: str, *, required: bool = True) -> str:
  """Returns a text field; "" where an optional one is missing."""
  value = entry.get(field)
  if value is None and not required:
    return ""
  if value is None:
    raise RowError(field, "missing")
  if not isinstance(value, str):
    raise RowError(field, f"a text is needed, not {type(value).__name__}")
  if required and not value.strip():
    raise RowError(field, "empty")
  if len(value) > MAX_TEXT:
    raise RowError(field, f"above {MAX_TEXT} characters")
  check_unicode(value, field)
  return value


def identity(entry: dict, field: str) -> str:
  """Returns a name, which may be written as a number."""
  value = entry.get(field)
  if isinstance(value, int) and not isinstance(value, bool):
    return str(value)
  return text(entry, field)


def integer(entry: dict, field: str) -> int:
  """Returns a whole number; a text or float that spells one will do."""
  value = entry.get(field)
  if value is None:
    raise RowError(field, "missing")
  try:
    if isinstance(value, bool) or int(value) != float(value):
      raise ValueError
    return int(value)
  except (TypeError, ValueError, OverflowError):
    raise RowError(
      field, f"{str(value)[:40]!r} is not a whole number"
    ) from None


def check_unicode(value: str, field: str):
  # JSON can spell half a surrogate pair, which no tokenizer takes.
  try:
    value.encode()
  except UnicodeEncodeError:
    raise RowError(field, "holds half a surrogate pair") from None


def options(entry: dict, field: str = "options") -> list[str]:
  """Returns a list of texts; an empty one where the field is missing."""
  value = entry.get(field)
  if value is None:
    return []
  if not isinstance(value, (list, tuple)):
    raise RowError(field, f"a list is needed, not {type(value).__name__}")
  for option in value:
    if not isinstance(option, str) or not option.strip():
      raise RowError(field, f"{option!r} is not a text")
    check_unicode(option, field)
  if len(value) > len(question_lib.LETTERS):
    raise RowError(field, f"{len(value)} are more than there are letters")
  return list(value)


def choices(entry: dict, field: str, *, most: int) -> list[str]:
  """Returns the options of a multiple choice question, 2 to `most` texts."""
  found = options(entry, field)
  if len(found) < 2:
    raise RowError(field, "a multiple choice question without options")
  if len(found) > most:
    raise RowError(
      field, f"{len(found)} options; the benchmark has {most} at most"
    )
  return found


def strip_letters(options: Sequence[str]) -> tuple[str, ...]:
  """Returns the options without "A. ", "B. ", ... if all carry theirs."""
  matches = [_LETTER.match(option) for option in options]
  letters = "".join(match.group(1) if match else "?" for match in matches)
  if letters != question_lib.LETTERS[: len(options)]:
    return tuple(options)
  return tuple(
    option[match.end() :]
    for option, match in zip(options, matches, strict=True)
  )


def lettered(given: Sequence[str], field: str) -> tuple[str, ...]:
  """Returns the options without their letters, which all must carry."""
  found = strip_letters(given)
  if found == tuple(given):
    starts = ", ".join(repr(option[:12]) for option in given)
    raise RowError(
      field,
      f"the options must begin by A., B., C., ... without a hole, not {starts}",
    )
  return found


def inline_options(problem: str) -> tuple[str, ...]:
  """Returns the options that stand in the text itself, one after the other."""
  marks, position = [], 0
  for letter in question_lib.LETTERS:
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


def letter(answer: str, options: Sequence[str], field: str) -> str:
  """Returns the letter of an answer "B", "(B)", "B." or "B)".

  The option's own text may stand behind it, as in "B. A rope"; any other text
  is no answer, so that "Banana" is not taken for B.
  """
  match = _ANSWER.fullmatch(answer.strip())
  found = match and (match.group(1) or match.group(2))
  allowed = question_lib.LETTERS[: len(options)]
  if not found or found not in allowed:
    raise RowError(
      field, f"{answer[:40]!r} is not one of the letters {allowed}"
    )
  option = options[allowed.index(found)]
  if match.group(3) and _plain(match.group(3)) != _plain(option):
    raise RowError(
      field, f"{answer[:40]!r} is not {found} with its option {option[:40]!r}"
    )
  return found


def _plain(text: str) -> str:
  """Returns a text without its case, spaces and full stop at the end."""
  return " ".join(text.split()).rstrip(". ").casefold()


def letter_at(index: int, num_options: int, field: str) -> str:
  """Returns the letter of an option counted from 0."""
  if not 0 <= index < num_options:
    raise RowError(
      field, f"{index} is not one of the {num_options} options, from 0"
    )
  return question_lib.LETTERS[index]


def letter_of(answer: str, options: Sequence[str], field: str) -> str:
  """Returns the letter of the first option that reads as the answer."""
  if answer not in options:
    raise RowError(field, f"{answer[:40]!r} is none of the options")
  return question_lib.LETTERS[list(options).index(answer)]


def relative(value: str, field: str) -> str:
  """Returns the media path without "./"; refuses what leaves the root."""
  path = value.strip()
  while path.startswith("./"):
    path = path[2:]
  reason = video.unsafe(path)
  if reason:
    raise RowError(field, f"{value[:80]!r}: {reason}")
  return path
