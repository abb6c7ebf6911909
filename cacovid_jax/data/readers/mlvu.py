"""MLVU, dev and test (https://arxiv.org/abs/2406.04264).

Two layouts. The parquet of lmms-eval: (mlvu/)test-00000-of-00001.parquet and
<video_name>; its questions hold their options and are shown as they are. The
original: json/<number>_<task>.json and video/<number>_<task>/<video>, whose
questions get theirs here. Generation tasks are no part of M-Avg: their rows
are left out and counted.
"""

import re

from cacovid_jax.data import question as question_lib
from cacovid_jax.data.readers import validation

DEV_TYPES = (
  "plotQA",
  "needle",
  "ego",
  "count",
  "order",
  "anomaly_reco",
  "topic_reasoning",
)
TEST_TYPES = (
  "topic_reasoning",
  "anomaly_reco",
  "needleQA",
  "ego",
  "plotQA",
  "sportsQA",
  "order",
  "count",
  "tutorialQA",
)
# The two layouts name one task differently.
_RENAMED = {"findNeedle": "needle"}
_GENERATION = frozenset({"subPlot", "sub_scene", "summary"})
_LMMS = ("video_name", "question", "answer", "task_type")
_ORIGINAL = ("video", "question", "question_type")
_FIRST_OPTION = re.compile(r"\s*\(A\)")


def read_mlvu(
  paths,
  root=None,
  *,
  types=DEV_TYPES,
  most_options: int = 4,
  on_bad_row: str = "raise",
  report: validation.Report | None = None,
) -> list[question_lib.Question]:
  """Returns the multiple choice questions of MLVU files of either layout.

  Args:
    paths: one path, several joined by commas, or a sequence of paths.
    root: media root; clips are looked for below it, in `video/`, and in
      `video/` by the name of the JSON file.
    types: the tasks that there are, `DEV_TYPES` or `TEST_TYPES`.
    most_options: 4 in dev, 6 in test.
    on_bad_row: "raise" or "skip".
    report: filled with what was left out.
  """
  places = validation.Places(root, "{}", "video/{}", "videos/{}")

  def parse(entry, name, row):
    return _row(entry, name, row, places, types, most_options)

  return validation.read_tables(
    paths,
    _required,
    "MLVU",
    parse,
    on_bad_row=on_bad_row,
    report=report,
  )


def prompt(question: str) -> str:
  """Returns the user's text of a question that holds its options."""
  return question + "\nOnly give the best option.\nBest option: ("


def _required(columns) -> tuple[str, ...]:
  if "video_name" in columns:
    return _LMMS
  # The files of generation tasks have no candidates.
  more = ("candidates", "answer") if "candidates" in columns else ()
  return (*_ORIGINAL, *more)


def _row(entry, name, row, places, types, most) -> question_lib.Question:
  original = "video_name" not in entry
  field = "question_type" if original else "task_type"
  kind = validation.text(entry, field)
  kind = _RENAMED.get(kind, kind)
  if kind in _GENERATION:
    raise validation.LeftOutError("generation tasks")
  if kind not in types:
    raise validation.RowError(
      field, f"{kind[:40]!r} is none of {', '.join(types)}"
    )
  parse = _original if original else _lmms
  question, shown, options = parse(entry, most)
  if original:
    folders = (name, name.partition("_")[2] or name)
    place = places(
      validation.text(entry, "video"),
      *(f"video/{folder}/{{}}" for folder in folders),
      field="video",
    )
  else:
    place = places(validation.text(entry, "video_name"), field="video_name")
  identity = f"{name}:{row}"
  if entry.get("question_id") is not None:
    identity = validation.identity(entry, "question_id")
  return question_lib.Question(
    id=identity,
    video=place,
    question=question,
    options=tuple(options),
    answer=_answer(validation.text(entry, "answer"), options, by_text=original),
    category=kind,
    source="mlvu",
    prompt=prompt(shown),
  )


def _original(entry, most) -> tuple[str, str, list[str]]:
  """Returns (question, the same with its options, options)."""
  question = validation.text(entry, "question")
  options = validation.choices(entry, "candidates", most=most)
  lines = [
    f"({letter}) {option}"
    for letter, option in zip(question_lib.LETTERS, options, strict=False)
  ]
  return question, "\n".join([question, *lines]), options


def _lmms(entry, most) -> tuple[str, str, list[str]]:
  """As `_original`, of a question that holds its options."""
  shown = validation.text(entry, "question")
  if isinstance(entry.get("candidates"), list):
    options = validation.choices(entry, "candidates", most=most)
  else:
    found = {"question": list(validation.inline_options(shown))}
    options = validation.choices(found, "question", most=most)
  start = _FIRST_OPTION.search(shown)
  return shown[: start.start()] if start else shown, shown, options


def _answer(answer: str, options, *, by_text: bool) -> str:
  """Returns the letter of an answer that is a letter, or an option's text."""
  if by_text and answer in options:
    return validation.letter_of(answer, options, "answer")
  if len(answer.strip().strip("().")) == 1:
    return validation.letter(answer, options, "answer")
  raise validation.RowError("answer", f"{answer[:40]!r} is none of the options")
