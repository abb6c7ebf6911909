"""Reads the files of a data set: rows, bad rows, what was left out."""

import collections
import dataclasses
import functools
import os
from collections.abc import Callable, Iterable, Sequence

import pyarrow as pa
import pyarrow.parquet
from absl import logging

from cacovid_jax import errors, schema
from cacovid_jax.data import question as question_lib
from cacovid_jax.data.readers import validation

MAX_FILE_BYTES = 4 * 2**30
# Raised for columns that hold something else than they say.
_UNUSABLE = (ValueError, TypeError, OverflowError, MemoryError, RecursionError)


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

  num_rows: int = 0  # Read, of all kinds.
  num_images: int = 0  # Rows about pictures, which are outside the method.
  # (source, problem type) -> such rows, where rows tell it.
  images: collections.Counter[tuple[str, str]] = dataclasses.field(
    default_factory=collections.Counter
  )
  # Rows that are unfit, with `on_bad_row="skip"`.
  bad_rows: list[BadRow] = dataclasses.field(default_factory=list)
  # Kind of row that is no part of the benchmark's score -> rows.
  left_out: collections.Counter[str] = dataclasses.field(
    default_factory=collections.Counter
  )
  # What a benchmark has and the folder has not, by name.
  missing: list[str] = dataclasses.field(default_factory=list)


def collect(
  files: Iterable[tuple[str, Iterable]],
  parse: Callable[[validation.Row], question_lib.Question | None],
  places: Callable[..., str] | None = None,
  *,
  on_bad_row: str = "raise",
  report: Report | None = None,
) -> list[question_lib.Question]:
  """Returns the questions of some files; none at all is an error.

  Args:
    files: (path, rows).
    parse: makes a question of a row, None of one about a picture.
    places: see `validation.places`.
    on_bad_row: "raise" or "skip".
    report: filled with what was left out.
  """
  if on_bad_row not in ("raise", "skip"):
    raise errors.UserError(f"on_bad_row {on_bad_row!r}: give 'raise' or 'skip'")
  report, found, paths = Report() if report is None else report, {}, []
  for path, entries in files:
    paths.append(path)
    name = os.path.splitext(os.path.basename(path))[0]
    for number, entry in enumerate(entries, start=1):
      report.num_rows += 1
      try:
        if not isinstance(entry, dict):
          told = f"an object is needed, not {type(entry).__name__}"
          raise validation.RowError("row", told)
        question = parse(validation.Row(entry, name, number, places))
        if question is None:
          report.num_images += 1
          continue
        if question.id in found:
          raise validation.RowError("id", f"{question.id!r} occurs twice")
        found[question.id] = question
      except validation.LeftOutError as error:
        report.left_out[str(error)] += 1
      except validation.RowError as error:
        bad = BadRow(path, number, *error.args)
        if on_bad_row == "raise":
          raise errors.UserError(
            f"{bad}; correct the row, or pass on_bad_row=skip to leave it out"
          ) from None
        report.bad_rows.append(bad)
  _log(", ".join(paths), report)
  if not found:
    raise errors.UserError(
      f"{', '.join(paths)}: no usable row among {report.num_rows}; give a file"
      " with questions about videos"
    )
  return list(found.values())


def _log(what: str, report: Report) -> None:
  if report.num_images:
    logging.info("%s: left out %d image rows", what, report.num_images)
  for kind, count in sorted(report.left_out.items()):
    logging.info("%s: left out %d rows: %s", what, count, kind)
  if report.missing:
    logging.warning("%s: not there: %s", what, ", ".join(report.missing))
  if bad := report.bad_rows:
    logging.warning(
      "%s: left out %d bad rows, first: %s", what, len(bad), bad[0]
    )


@dataclasses.dataclass(frozen=True)
class Reader:
  """A function that reads the parquet or JSON files of a benchmark."""

  form: str  # Whose format it is, for errors.
  # That each file must have; or those, of the columns that it has.
  columns: Sequence[str] | Callable[[frozenset[str]], Sequence[str]]
  places: Sequence[str]  # Of clips, as in "data/{}.mp4", best first.
  parse: Callable[..., question_lib.Question | None]  # Of a row, with options.
  json_only: bool = False  # Whether files are JSON whatever their names.

  def __call__(
    self, paths, root=None, *, on_bad_row="raise", report=None, **options
  ) -> list[question_lib.Question]:
    """Returns the questions of files; `on_bad_row`, `report`: see `collect`.

    Args:
      paths: see `split_paths`; ".json" at a path's end tells JSON.
      root: media root that clips are looked for below; None looks nowhere.
      **options: of the format.
    """
    return collect(
      ((path, self._load(path)) for path in split_paths(paths)),
      functools.partial(self.parse, **options),
      validation.places(root, self.places),
      on_bad_row=on_bad_row,
      report=report,
    )

  def _load(self, path: str) -> list:
    if not (self.json_only or path.endswith(".json")):
      return self._load_parquet(path)
    entries = load_rows(path, f"give a file in {self.form}'s format")
    # A field that no row has is a file of another kind, not many bad rows.
    columns = frozenset().union(*(e for e in entries if isinstance(e, dict)))
    if columns:
      self._check_columns(path, columns)
    return entries

  def _check_columns(self, path: str, columns: frozenset[str]) -> None:
    required = self.columns(columns) if callable(self.columns) else self.columns
    if missing := [name for name in required if name not in columns]:
      raise errors.UserError(
        f"{path}: columns {missing} are missing (it has {sorted(columns)});"
        f" give a file in {self.form}'s format"
      )

  def _load_parquet(self, path: str) -> list[dict]:
    check_size(path)
    try:
      with pa.parquet.ParquetFile(path) as file:
        self._check_columns(path, frozenset(map(str, file.schema_arrow.names)))
        groups = range(file.metadata.num_row_groups)
        size = sum(file.metadata.row_group(i).total_byte_size for i in groups)
        if size > MAX_FILE_BYTES or file.metadata.num_rows > 10_000_000:
          raise errors.UserError(
            f"{path}: {file.metadata.num_rows} rows, {size} bytes; split it"
          )
        return file.read().to_pylist()
    except (pa.ArrowException, OSError, *_UNUSABLE) as error:
      text = " ".join(str(error).split())[:200]
      raise errors.UserError(
        f"{path}: not readable as parquet ({text}); download it again"
      ) from None


def split_paths(paths) -> list[str]:
  """Returns one path, several joined by commas, or a sequence, as a list."""
  if isinstance(paths, (str, os.PathLike)):
    text = os.fspath(paths)
    paths = [text] if os.path.isfile(text) else text.split(",")
  return [os.fspath(path) for path in paths if path]


def check_size(path: str) -> None:
  """Refuses a file that is missing, or above `MAX_FILE_BYTES`."""
  errors.check(os.path.isfile(path), f"{path}: no such file; correct the path")
  if (size := os.path.getsize(path)) > MAX_FILE_BYTES:
    raise errors.UserError(
      f"{path}: {size} bytes are above the limit of {MAX_FILE_BYTES}; split the"
      " file"
    )


def load_rows(path: str, mend: str) -> list:
  """Returns the list in a JSON file; `mend` ends the error of another value."""
  check_size(path)
  # Some writers know no null: NaN is the row's fault, where it is read at all.
  return schema.read(path, list, mend, MAX_FILE_BYTES, constant=float)
