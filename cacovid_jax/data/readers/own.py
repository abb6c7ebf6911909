"""One's own videos: a folder of clips, and questions.csv or questions.json.

Columns: `video` (a path below the folder), `question`, `answer` (the letter or
the text of an option; any text where there are no options) and one of `options`
(a JSON list, or texts separated by |) and `option_a`, `option_b`, ...; also
`split` (train, validation or test), `id`, `category` and `problem_type`.
Options may be numbers, and may carry letters of any script before their text.
Without `split`, a clip's name decides: all questions about a clip are on one
side, and a clip that is added moves no other.
"""

import bisect
import csv
import difflib
import hashlib
import io
import itertools
import json
import os
import pathlib

from cacovid_jax import errors
from cacovid_jax.data import question as question_lib
from cacovid_jax.data import wording
from cacovid_jax.data.readers import option_letters, tables, validation

FILES = ("questions.json", "questions.csv")
SPLITS = ("train", "validation", "test")
# Shares of the clips, of 100, where no column says which is which.
_SHARES = (80, 10, 10)

_REQUIRED = ("video", "question", "answer")
_OPTIONAL = ("options", "split", "id", "category", "problem_type")
_LETTERED = tuple(f"option_{letter.lower()}" for letter in question_lib.LETTERS)


def read_own(
  path, root=None, *, split: str = "", **options
) -> list[question_lib.Question]:
  """Returns the questions of a folder, or of one of its files.

  Args:
    path: the folder with one of `FILES`, or such a file, or a list of one.
    root: media root, must exist if given.
    split: one of `SPLITS`; "" is all of them.
    **options: `on_bad_row` and `report`, see `tables.collect`.
  """
  if split:
    errors.check_known("split", split, SPLITS)
  validation.check_root(root)
  path = find(path[0] if isinstance(path, list) else path)
  if path.endswith(".csv"):
    entries, columns = _load_csv(path)
  else:
    entries = tables.load_rows(path, "give a list of objects, one per question")
    keys = (key for row in entries if isinstance(row, dict) for key in row)
    columns = list(dict.fromkeys(keys))
  _check_columns(path, columns)
  splits = {}

  def parse(row):
    question = _question(row, columns)
    name = split_of(question.video)
    if "split" in columns:
      name = row.text("split").strip()
      validation.check_one_of(name, "split", SPLITS)
    splits[question.id] = name
    return question

  found = tables.collect([(path, entries)], parse, **options)
  chosen = [q for q in found if not split or splits[q.id] == split]
  if chosen:
    return chosen
  mend = "add clips, or a column `split` that says which row is which"
  if "split" in columns:
    mend = "give some rows this split"
  raise errors.UserError(
    f"{path}: none of the {len({q.video for q in found})} clips is in split"
    f" {split!r}; {mend}"
  )


def find(path) -> str:
  """Returns the one file of questions in a folder, or another file as it is."""
  path = os.fspath(path)
  if os.path.basename(path) in FILES:
    path = os.path.dirname(path) or "."
  elif not os.path.isdir(path):
    return path
  found = [name for name in FILES if os.path.isfile(os.path.join(path, name))]
  if len(found) != 1:
    what = " and ".join(found) or f"neither {' nor '.join(FILES)}"
    raise errors.UserError(f"{path} holds {what}; give it exactly one of them")
  return os.path.join(path, found[0])


def split_of(clip: str) -> str:
  """Returns the split of a clip, from a hash of its name alone."""
  digest = hashlib.blake2b(clip.encode(), digest_size=8).digest()
  place = int.from_bytes(digest, "little") % sum(_SHARES)
  return SPLITS[bisect.bisect(list(itertools.accumulate(_SHARES)), place)]


def _load_csv(path: str) -> tuple[list[dict], list[str]]:
  tables.check_size(path)
  data = pathlib.Path(path).read_bytes()
  try:
    text = data.decode("utf-8-sig")
  except UnicodeDecodeError as error:
    line = data.count(b"\n", 0, error.start) + 1
    raise errors.UserError(
      f"{path}: line {line} is not UTF-8 (byte {data[error.start]:#04x}); save"
      ' the table as "CSV UTF-8"'
    ) from None
  header = text.partition("\n")[0]
  # What spreadsheets write where the comma is the decimal mark.
  mark = ";" if header.count(";") > header.count(",") else ","
  lines = io.StringIO(text, newline="")
  try:
    reader = csv.DictReader(lines, delimiter=mark, strict=True)
    reader.fieldnames = [name.strip() for name in reader.fieldnames or ()]
    return list(reader), reader.fieldnames
  except csv.Error as error:
    raise errors.UserError(
      f"{path}: line {reader.line_num} is not CSV ({error}); save the table"
      " again"
    ) from None


def _check_columns(path: str, columns) -> None:
  twice = sorted({name for name in columns if columns.count(name) > 1})
  if twice:
    raise errors.UserError(f"{path}: column {twice[0]!r} occurs twice")
  known, faults = (*_REQUIRED, *_OPTIONAL, *_LETTERED), []
  if missing := [name for name in _REQUIRED if name not in columns]:
    faults.append(f"columns {missing} are missing")
  if unknown := [name for name in columns if name not in known]:
    near = difflib.get_close_matches(unknown[0], known, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    faults.append(f"columns {unknown} are not known{hint}")
  if faults:
    raise errors.UserError(
      f"{path}: {' and '.join(faults)}; rename or remove them. Known are"
      f" {', '.join((*_REQUIRED, *_OPTIONAL))}, option_a, option_b, ..."
    )


def _question(row: validation.Row, columns) -> question_lib.Question:
  if None in row.entry:
    raise validation.RowError("row", "has more cells than the first line")
  clip = row.clip("video")
  question = row.text("question").strip()
  options, _, marks = _options(row)
  kind = _optional(row, "problem_type")
  if not kind:
    kind = question_lib.MULTIPLE_CHOICE if options else question_lib.FREE_FORM
  validation.check_one_of(kind, "problem_type", question_lib.PROBLEM_TYPES)
  answer = row.identity("answer", (int, float)).strip()
  if kind == question_lib.MULTIPLE_CHOICE:
    if len(options) < 2:
      told = "a multiple choice question needs at least two"
      raise validation.RowError("options", told)
    answer = _letter(answer, options, marks)
  identity, shown = str(row.number), wording.letter_options(options)
  if "id" in columns:
    identity = row.identity("id", (int, float)).strip()
  return question_lib.Question(
    id=identity,
    video=clip,
    question=question,
    options=options,
    answer=answer,
    problem_type=kind,
    category=_optional(row, "category") or None,
    source="own",
    prompt=wording.training_prompt(question, shown, kind),
  )


def _optional(row: validation.Row, name: str) -> str:
  return row.text(name, required=False).strip()


def _options(row: validation.Row) -> option_letters.Lettered:
  """Returns the options of either form, without letters."""
  number = (int, float)
  own = [row.identity(x, number, required=False).strip() for x in _LETTERED]
  while own and not own[-1]:
    own.pop()
  given = row.entry.get("options")
  text = given.strip() if isinstance(given, str) else ""
  if text.startswith("["):
    try:
      given = json.loads(text)
    except (ValueError, RecursionError) as error:
      told = f"{text[:40]!r} is no JSON list ({error})"
      raise validation.RowError("options", told) from None
  elif isinstance(given, str):
    given = [part.strip() for part in text.split("|")] if text else []
  if own and given:
    raise validation.RowError("options", "and option_a, ... are both given")
  if "" in own:
    empty = _LETTERED[own.index("")]
    raise validation.RowError(empty, "empty, while a later option is not")
  found = option_letters.split_letters(validation.check_options(own or given))
  return found._replace(options=tuple(map(str.strip, found.options)))


def _letter(answer: str, options, marks) -> str:
  """Returns the letter of an answer, which is a letter or an option's text.

  The letter may be that of the option's own mark, such as Б or 2.
  """
  allowed = question_lib.LETTERS[: len(options)]
  both = (allowed, marks)
  same = [option_letters.place_of(answer, known, options) for known in both]
  same = list(dict.fromkeys(filter(None, same)))
  for name, option in zip(allowed, options, strict=True):
    if option.casefold() == answer.casefold() and name not in same:
      same.append(name)
  if len(same) == 1:
    return same[0]
  fault = f"stands for several options: {', '.join(same)}"
  if not same:
    fault = f"is neither one of the letters {allowed} nor the text of an option"
  raise validation.RowError("answer", f"{answer[:40]!r} {fault}")
