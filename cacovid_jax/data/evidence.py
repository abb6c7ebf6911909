"""decisive.jsonl: the video tokens that answers about drawn clips rest on."""

import msgspec

from cacovid_jax import schema


class _Row(msgspec.Struct):
  question_id: str
  tokens: tuple[schema.Size, ...]


def read(path, mend: str) -> dict[str, tuple[int, ...]]:
  """Returns {question id: tokens}; `mend` ends the error of a bad line."""
  rows = schema.lines(path, _Row, mend)
  return {row.question_id: row.tokens for row in rows}
