"""What a base model answers without seeing: questions that need no video.

A training question that the model gets right from its text alone rewards every
combination of tokens alike, so it teaches a policy nothing. `ask` collects
greedy answers to the text alone, `sort_out` drops the questions answered right,
and `write` stores the others in the public trainer's filtered format.

Letters: B batch, L prompt tokens, P position rows, M generated tokens.
"""

import collections
import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from cacovid_jax import errors, files
from cacovid_jax import progress as progress_lib
from cacovid_jax.data import answer_log, wording
from cacovid_jax.data import question as question_lib
from cacovid_jax.data import rewards as rewards_lib
from cacovid_jax.inference import programs
from cacovid_jax.models import prompt_batch

# Rows of an exact number earn a hair less than 1 by the trainer's formula.
_TOLERANCE = 1e-6
_SHORTEST_BUCKET = 32


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
  """How the questions are asked.

  Attributes:
    batch_size: B.
    max_new_tokens: M at most; generation ends when a whole batch has ended.
    threshold: reward from which an answer of a graded type (OCR, free-form,
      regression) counts as right. Letters and numbers earn 0 or 1.
  """

  batch_size: int = 16
  max_new_tokens: int = 768
  threshold: float = 1.0

  def __post_init__(self):
    for name in ("batch_size", "max_new_tokens"):
      if getattr(self, name) < 1:
        raise errors.UserError(f"{name}={getattr(self, name)}: give at least 1")
    if not 0 < self.threshold <= 1:
      raise errors.UserError(
        f"threshold={self.threshold}: give a reward above 0, at most 1"
      )


def ask(
  checkpoint: Any,
  questions: Sequence[question_lib.Question],
  settings: Settings,
  *,
  path: str | os.PathLike | None = None,
  mesh: Mesh | None = None,
  progress: Callable[..., Any] = progress_lib.Progress,
) -> list[str]:
  """Returns the greedy answer to each question's text.

  Which questions share a batch depends on the questions alone, so that answers
  do not depend on where an earlier run was stopped.

  Args:
    checkpoint: `models.checkpoints.Checkpoint` with a tokenizer.
    questions: with distinct ids.
    settings: how they are asked.
    path: JSON lines of the answers so far, which grow; None keeps none.
    mesh: whose `data` axis shares a batch; None is one device.
    progress: shows how far it is, made as `progress_lib.Progress` is.
  """
  tokenizer = checkpoint.tokenizer
  if tokenizer is None:
    raise errors.UserError(
      f"{checkpoint.identity['path']}: no tokenizer.json; give a complete"
      " checkpoint directory"
    )
  prompts = [tokenizer.encode_blind(question.prompt) for question in questions]
  answers = answer_log.AnswerLog(
    path, _identity(checkpoint, prompts, settings), mend="or use another file"
  )
  batches = _batches(prompts, questions, settings.batch_size)
  keys = [_key(question) for question in questions]
  todo = [
    (bucket, rows)
    for bucket, rows in batches
    if any(keys[i] not in answers for i in rows)
  ]
  done = len(questions) - sum(len(rows) for _, rows in todo)
  program = programs.Programs(checkpoint, settings.max_new_tokens, mesh)
  with progress(len(questions), start=done, description="asked blind") as bar:
    for bucket, rows in todo:
      ids, lengths = _padded(
        [prompts[i] for i in rows],
        bucket,
        settings.batch_size,
        checkpoint.pad_id,
      )
      found = program.answer_text(checkpoint.params, ids, lengths)
      answers.add(
        (keys[i], {"text": tokenizer.decode(answer).strip()})
        for i, answer in zip(rows, np.asarray(found), strict=False)
      )
      done += len(rows)
      bar.update(done)
  return [answers[key]["text"] for key in keys]


def right(
  question: question_lib.Question, text: str, threshold: float = 1.0
) -> bool:
  """Returns whether an answer is the right text, or earns its reward.

  The trainer's formulas give some right texts less than 1: a free-form answer
  of one word has no pairs of words, and earns 2 / 3.
  """
  said = question_lib.extract_answer(text).strip()
  if said and said == question.answer:
    return True
  reward = rewards_lib.reward(question.problem_type, text, question.answer)
  return reward >= threshold - _TOLERANCE


def row(question: question_lib.Question) -> dict[str, Any]:
  """Returns the entry of the filtered format that reads as the question.

  The public trainer wants `problem` with the options inside, and the keys
  `solution`, `modality_type`, `problem_type` and `video`; it ignores others.
  """
  hint = "\n" + wording.HINTS[question.problem_type]
  if not question.prompt.endswith(hint):
    raise errors.UserError(
      f"question {question.id}: its prompt does not end in the hint of"
      f" {question.problem_type!r}; read the rows as training reads them"
    )
  number = question.id.isdecimal() and str(int(question.id)) == question.id
  entry = {
    "problem_id": int(question.id) if number else question.id,
    "problem": question.prompt.removesuffix(hint),
    "solution": f"<answer>{question.answer}</answer>",
    "modality_type": "video",
    "problem_type": question.problem_type,
    "video": question.video,
    "data_source": question.source,
  }
  lettered = wording.letter_options(question.options)
  # Told apart from the text where they stand in it just so; elsewhere they
  # would be appended to it once more when it is read.
  if lettered and all(option in entry["problem"] for option in lettered):
    entry["options"] = lettered
  for name in ("category", "duration"):
    if getattr(question, name) is not None:
      entry[name] = getattr(question, name)
  return entry


def write(
  path: str | os.PathLike, questions: Sequence[question_lib.Question]
) -> None:
  """Writes the questions in the filtered format, all or nothing."""
  lines = [json.dumps(row(question)) for question in questions]
  files.write(path, "[\n" + ",\n".join(lines) + "\n]\n")


def table(
  questions: Sequence[question_lib.Question],
  kept: Sequence[question_lib.Question],
  images: Mapping[tuple[str, str], int],
  unreachable: Sequence[question_lib.Question] = (),
) -> list[dict[str, Any]]:
  """Returns one dict per source and problem type, and one of all.

  Args:
    questions: that were asked.
    kept: of these, those not answered right.
    images: (source, problem type) -> image rows left out.
    unreachable: questions left out because their clip is missing.
  """
  asked = collections.Counter(map(_group, questions))
  stayed = collections.Counter(map(_group, kept))
  missing = collections.Counter(map(_group, unreachable))
  rows = []
  for source, kind in sorted({*asked, *images, *missing}):
    group = source, kind
    rows.append(
      {
        "source": source,
        "problem_type": kind,
        "rows": asked[group] + missing[group] + images.get(group, 0),
        "images_skipped": images.get(group, 0),
        "clips_missing": missing[group],
        "right_without_video": asked[group] - stayed[group],
        "kept": stayed[group],
      }
    )
  total = {"source": "all", "problem_type": "all"}
  for name in (*rows[0],)[2:] if rows else ():
    total[name] = sum(entry[name] for entry in rows)
  return [*rows, total]


def write_report(path: str | os.PathLike, report: Mapping[str, Any]) -> None:
  """Writes what `table` returns, and more, as JSON."""
  files.write(path, json.dumps(report, indent=2, sort_keys=True) + "\n")


def _group(question) -> tuple[str, str]:
  return question.source, question.problem_type


def _key(question) -> answer_log.Key:
  return answer_log.Key("text only", 0.0, 0, question.id)


def _identity(checkpoint, prompts, settings) -> dict[str, Any]:
  """Returns what answers depend on."""
  digest = hashlib.sha256()
  for ids in prompts:
    digest.update(np.int32(len(ids)).tobytes() + ids.tobytes())
  return {
    "what": "answers without video",
    "base_model": checkpoint.identity["sha256"],
    "dtype": jnp.dtype(checkpoint.model.dtype).name,
    "prompts": digest.hexdigest(),
    "batch_size": settings.batch_size,
    "max_new_tokens": settings.max_new_tokens,
  }


def _batches(prompts, questions, size: int) -> Iterator[tuple[int, list[int]]]:
  """Yields (padded length, rows) of batches of like length, longest first.

  What does not fit into memory then fails at once. Questions with letters have
  batches of their own, since a batch takes as long as its longest answer.
  """
  groups = collections.defaultdict(list)
  for number, (ids, question) in enumerate(
    zip(prompts, questions, strict=True)
  ):
    # Padded to a power of two, so that programs are few.
    bucket = max(1 << (len(ids) - 1).bit_length(), _SHORTEST_BUCKET)
    groups[bucket, not question.lettered].append(number)
  for bucket, wordy in sorted(groups, reverse=True):
    rows = groups[bucket, wordy]
    for start in range(0, len(rows), size):
      yield bucket, rows[start : start + size]


def _padded(prompts, bucket: int, size: int, pad_id: int):
  """Returns (ids int32[B, L], lengths int32[B]) of at most B prompts."""
  # The rows behind the last prompt repeat it, lest they go on for longer.
  prompts = [prompts[row] for row in prompt_batch.pad_rows(len(prompts), size)]
  ids = np.full((size, bucket), pad_id, np.int32)
  for row, prompt in zip(ids, prompts, strict=True):
    row[: len(prompt)] = prompt
  return ids, np.array([len(prompt) for prompt in prompts], np.int32)
