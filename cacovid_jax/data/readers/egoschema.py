"""EgoSchema (https://arxiv.org/abs/2308.09126), the subset with answers.

Subset/test-00000-of-00001.parquet and videos/<video_idx>.mp4. The other 4531
questions are scored on a public server only.
"""

from cacovid_jax.data import question as question_lib
from cacovid_jax.data import wording
from cacovid_jax.data.readers import option_letters, tables, validation


def _question(row: validation.Row) -> question_lib.Question:
  question = row.text("question")
  given = row.choices("option", most=5)
  options = option_letters.lettered(given, "option")
  return question_lib.Question(
    id=row.identity("question_idx"),
    video=row.clip("video_idx"),
    question=question,
    options=options,
    answer=row.letter_at("answer", len(options)),
    source="egoschema",
    prompt="\n".join([question, *given, wording.ANSWER_DIRECTLY]),
  )


read_egoschema = tables.Reader(
  "EgoSchema",
  ("question_idx", "question", "video_idx", "option", "answer"),
  ("videos/{}.mp4", "videos/{}.MP4", "videos/{}.mkv", "{}.mp4"),
  _question,
)
