"""NExT-QA, multiple choice (https://arxiv.org/abs/2105.08276).

MC/test-00000-of-00001.parquet and NExTVideo/<video>.mp4. The prompt has no
instruction, as in lmms-eval.
"""

from cacovid_jax.data import question as question_lib
from cacovid_jax.data import tokenizer as tokenizer_lib
from cacovid_jax.data.readers import validation

_SLOTS = tuple(f"a{i}" for i in range(5))
_COLUMNS = ("video", "question", "answer", "qid", "type", *_SLOTS)
# Causal why and how; temporal next and current; descriptive location, count,
# others, yes or no. "Previous" is counted with "next", as in the paper.
_TYPES = ("CW", "CH", "TN", "TC", "DL", "DC", "DO", "DB")
_FOLDED = {"TP": "TN"}


def read_nextqa(
  paths,
  root=None,
  *,
  on_bad_row: str = "raise",
  report: validation.Report | None = None,
) -> list[question_lib.Question]:
  """Returns the multiple choice questions of NExT-QA.

  Args:
    paths: one path, several joined by commas, or a sequence of paths.
    root: media root; clips are looked for in `NExTVideo/` below it.
    on_bad_row: "raise" or "skip".
    report: filled with what was left out.
  """
  places = validation.Places(
    root, "NExTVideo/{}.mp4", "videos/{}.mp4", "{}.mp4"
  )

  def parse(entry, unused_name, unused_row):
    return _row(entry, places)

  return validation.read_tables(
    paths,
    _COLUMNS,
    "NExT-QA",
    parse,
    on_bad_row=on_bad_row,
    report=report,
  )


def prompt(question: str, lettered_options) -> str:
  """Returns the user's text: the question and its options, nothing else."""
  return question + "\n" + "\n".join(lettered_options)


def _row(entry, places) -> question_lib.Question:
  question = validation.text(entry, "question").strip()
  options = [validation.text(entry, slot).strip() for slot in _SLOTS]
  kind = validation.text(entry, "type")
  kind = _FOLDED.get(kind, kind)
  if kind not in _TYPES:
    raise validation.RowError(
      "type", f"{kind[:40]!r} is none of {', '.join((*_TYPES, *_FOLDED))}"
    )
  clip = validation.identity(entry, "video")
  return question_lib.Question(
    id=f"{clip}_{validation.identity(entry, 'qid')}",
    video=places(clip, field="video"),
    question=question,
    options=tuple(options),
    answer=validation.letter_at(
      validation.integer(entry, "answer"), len(options), "answer"
    ),
    category=kind[0],
    groups=(("type", kind),),
    source="nextqa",
    prompt=prompt(question, tokenizer_lib.letter_options(options)),
  )
