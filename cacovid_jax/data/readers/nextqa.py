"""NExT-QA, multiple choice (https://arxiv.org/abs/2105.08276).

MC/test-00000-of-00001.parquet and NExTVideo/<video>.mp4. The prompt has no
instruction, as in lmms-eval.
"""

from cacovid_jax.data import question as question_lib
from cacovid_jax.data import wording
from cacovid_jax.data.readers import tables, validation

_SLOTS = tuple(f"a{i}" for i in range(5))
# "Previous" is counted with "next", as in the paper.
_FOLDED = {"TP": "TN"}
# Causal why and how; temporal next and current; descriptive location, count,
# others, yes or no.
_TYPES = ("CW", "CH", "TN", "TC", "DL", "DC", "DO", "DB", *_FOLDED)


def _question(row: validation.Row) -> question_lib.Question:
  question = row.text("question").strip()
  options = [row.text(slot).strip() for slot in _SLOTS]
  kind = validation.check_one_of(row.text("type"), "type", _TYPES)
  kind = _FOLDED.get(kind, kind)
  clip = row.identity("video")
  return question_lib.Question(
    id=f"{clip}_{row.identity('qid')}",
    video=row.clip("video", name=clip),
    question=question,
    options=tuple(options),
    answer=row.letter_at("answer", len(options)),
    category=kind[0],
    groups=(("type", kind),),
    source="nextqa",
    prompt="\n".join([question, *wording.letter_options(options)]),
  )


read_nextqa = tables.Reader(
  "NExT-QA",
  ("video", "question", "answer", "qid", "type", *_SLOTS),
  ("NExTVideo/{}.mp4", "videos/{}.mp4", "{}.mp4"),
  _question,
)
