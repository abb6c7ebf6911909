"""Which questions a benchmark asks, and where its clips lie."""

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping, Sequence

from cacovid_jax import errors
from cacovid_jax.data import questions as questions_lib
from cacovid_jax.data import readers


@dataclasses.dataclass(frozen=True, eq=False)
class Benchmark:
  """Questions of one split.

  Attributes:
    name: of the data set.
    split: "validation", "test", or another that the data has.
    root: folder that video paths are relative to.
    questions: in the order of the file.
    decisive: question id -> tokens of the grid that decide it; empty where
      that is not known.
    generator_hash: of the program that made the clips, None for real ones.
  """

  name: str
  split: str
  root: str
  questions: Sequence[questions_lib.Question]
  decisive: Mapping[str, Sequence[int]]
  generator_hash: str | None = None

  def limited(self, count: int) -> "Benchmark":
    """Returns the first `count` questions; all of them for 0 or less."""
    if count <= 0 or count >= len(self.questions):
      return self
    return dataclasses.replace(self, questions=self.questions[:count])


def load(
  directory, split: str, *, media: str = "", style: str = "video-r1"
) -> Benchmark:
  """Returns one split of a prepared directory.

  Args:
    directory: holds `validation.parquet`, `test.parquet`, ... in VideoMME's
      columns, the clips, and for synthetic clips `decisive.jsonl` and
      `manifest.json`.
    split: name of one of those files.
    media: folder of the clips, below `directory` or absolute.
    style: of the prompt: "video-r1" as in training, or "videomme".
  """
  directory = pathlib.Path(directory)
  if not directory.is_dir():
    raise errors.UserError(
      f"there is no data in {directory}; make it with `python -m"
      " cacovid_jax.prepare` or give another --data"
    )
  path = directory / f"{split}.parquet"
  if not path.is_file():
    found = sorted(path.stem for path in directory.glob("*.parquet"))
    listed = ", ".join(found) or "none"
    raise errors.UserError(
      f"{directory} has no {path.name}; its splits: {listed}"
    )
  root = os.path.join(directory, media)
  questions = readers.read_videomme(str(path), root, style)
  if not questions:
    raise errors.UserError(f"{path} asks no question")
  manifest = _read_manifest(directory / "manifest.json")
  return Benchmark(
    name=str(manifest.get("name") or manifest.get("variant") or directory.name),
    split=split,
    root=root,
    questions=questions,
    decisive=_read_decisive(directory / "decisive.jsonl", questions),
    generator_hash=manifest.get("generator_hash"),
  )


def _read_manifest(path: pathlib.Path) -> dict:
  if not path.is_file():
    return {}
  try:
    manifest = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(manifest, dict):
      raise ValueError("not an object")
  except (OSError, ValueError) as error:
    raise errors.UserError(
      f"{path} cannot be read ({errors.one_line(error)}); prepare the data"
      " again"
    ) from error
  return manifest


def _read_decisive(path: pathlib.Path, questions) -> dict[str, tuple[int, ...]]:
  """Returns the decisive tokens of the given questions."""
  if not os.path.isfile(path):
    return {}
  wanted = {question.id for question in questions}
  found = {}
  with open(path, encoding="utf-8") as f:
    for number, line in enumerate(f, start=1):
      try:
        row = json.loads(line)
        if row["question_id"] in wanted:
          found[row["question_id"]] = tuple(int(i) for i in row["tokens"])
      except (ValueError, KeyError, TypeError) as error:
        raise errors.UserError(
          f"{path} line {number} is damaged ({type(error).__name__}); prepare"
          " the data again"
        ) from error
  return found
