"""MLVU, dev and test (https://arxiv.org/abs/2406.04264).

Two layouts. The parquet of lmms-eval: (mlvu/)test-00000-of-00001.parquet and
<video_name>; its questions hold their options and are shown as they are. The
original: json/<number>_<task>.json and video/<number>_<task>/<video>, whose
questions get theirs here. Generation tasks are no part of M-Avg: their rows
are left out and counted.
"""

import re

from cacovid_jax.data import question as question_lib
from cacovid_jax.data import wording
from cacovid_jax.data.readers import option_letters, tables, validation

DEV_TYPES = tuple(
  "plotQA needle ego count order anomaly_reco topic_reasoning".split()
)
TEST_TYPES = tuple(
  "topic_reasoning anomaly_reco needleQA ego plotQA sportsQA order count"
  " tutorialQA".split()
)
# The two layouts name one task differently.
_RENAMED = {"findNeedle": "needle"}
_GENERATION = frozenset({"subPlot", "sub_scene", "summary"})
_LMMS = ("video_name", "question", "answer", "task_type")
_ORIGINAL = ("video", "question", "question_type")
_FIRST_OPTION = re.compile(r"\s*\(A\)")


def _columns(columns) -> tuple[str, ...]:
  if "video_name" in columns:
    return _LMMS
  # The files of generation tasks have no candidates.
  more = ("candidates", "answer") if "candidates" in columns else ()
  return (*_ORIGINAL, *more)


def _question(
  row: validation.Row, types=DEV_TYPES, most_options: int = 4
) -> question_lib.Question:
  """Returns the question of a row of either layout.

  Of dev by default; test has `TEST_TYPES` and 6 options at most.
  """
  original = "video_name" not in row.entry
  field = "question_type" if original else "task_type"
  kind = row.text(field)
  kind = _RENAMED.get(kind, kind)
  if kind in _GENERATION:
    raise validation.LeftOutError("generation tasks")
  validation.check_one_of(kind, field, types)
  question = shown = row.text("question")
  if original:
    options = row.choices("candidates", most=most_options)
    lines = wording.letter_options(options, "({}) {}")
    shown = "\n".join([question, *lines])
    folders = (row.file, row.file.partition("_")[2] or row.file)
    place = row.clip("video", *(f"video/{name}/{{}}" for name in folders))
  else:  # The question holds its options.
    options, field = row.entry.get("candidates"), "candidates"
    if not isinstance(options, list):
      options, field = option_letters.inline_options(shown), "question"
    options = validation.check_choices(options, field, most_options)
    question = _FIRST_OPTION.split(shown, maxsplit=1)[0]
    place = row.clip("video_name")
  identity = f"{row.file}:{row.number}"
  if row.entry.get("question_id") is not None:
    identity = row.identity("question_id")
  return question_lib.Question(
    id=identity,
    video=place,
    question=question,
    options=tuple(options),
    answer=_answer(row.text("answer"), options, by_text=original),
    category=kind,
    source="mlvu",
    prompt=shown + "\nOnly give the best option.\nBest option: (",
  )


def _answer(answer: str, options, *, by_text: bool) -> str:
  """Returns the letter of an answer that is a letter, or an option's text."""
  if by_text and answer in options:
    return option_letters.letter_of(answer, options, "answer")
  if len(answer.strip().strip("().")) == 1:
    return option_letters.letter(answer, options, "answer")
  raise validation.RowError("answer", f"{answer[:40]!r} is none of the options")


read_mlvu = tables.Reader(
  "MLVU", _columns, ("{}", "video/{}", "videos/{}"), _question
)
