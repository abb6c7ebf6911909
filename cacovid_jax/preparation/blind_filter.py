r"""Drops training questions that the base model answers without the video.

python -m cacovid_jax.preparation.blind_filter --model DIR \
    --train Video-R1-260k.json --media ROOT --out filtered.json

Asks every question of Video-R1's files as training asks it, with no video in
the prompt at all, and keeps those whose greedy answer is not right. Writes the
public trainer's filtered format to --out, beside it `*.answers.jsonl` (every
answer as it comes: a run that was stopped goes on when the same command is
given again) and `*.report.json`, rows per source and problem type.

A question that the model gets right from its text alone rewards every
combination of tokens alike, so it teaches a policy nothing.
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
import rich.table
from jax.sharding import Mesh

from cacovid_jax import command, config_limits, errors, files, terminal
from cacovid_jax import config as config_lib
from cacovid_jax import experiment as experiment_lib
from cacovid_jax import progress as progress_lib
from cacovid_jax.data import answer_log, wording
from cacovid_jax.data import question as question_lib
from cacovid_jax.data import rewards as rewards_lib
from cacovid_jax.inference import programs
from cacovid_jax.models import prompt_batch
from cacovid_jax.preparation import rows as rows_lib

COMMAND = command.Command(
  __doc__,
  {
    "model": command.Flag(
      "Base model: a Hugging Face checkpoint directory, or org/name of one in"
      " the local cache.",
      "model.path",
    ),
    "train": rows_lib.TRAIN,
    "media": command.Flag(
      "Folder of the clips; without it, none is looked for.", "data.media"
    ),
    "out": command.Flag("JSON file to write.", "blind.out"),
    "batch_size": command.Flag("Questions asked at once.", "blind.batch_size"),
    "dtype": command.Flag("Of weights and computation.", "model.dtype"),
    **command.aliases(
      "blind",
      max_new_tokens="Longest answer in tokens, as in training.",
      threshold="Reward of OCR, free-form and regression that is right.",
      num_questions=command.Flag(
        "First so many questions; 0 for all.", old=("limit",)
      ),
    ),
    "on_missing": rows_lib.ON_MISSING,
    "on_bad_row": rows_lib.ON_BAD_ROW,
  },
  defaults=rows_lib.DEFAULTS,
)

# Rows of an exact number earn a hair less than 1 by the trainer's formula.
_TOLERANCE = 1e-6
_SHORTEST_BUCKET = 32


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlindSettings:
  """How the questions are asked."""

  batch_size: int = 16  # B.
  # M at most; generation ends when a whole batch has ended.
  max_new_tokens: int = 768
  # Reward from which an answer of a graded type (OCR, free-form, regression)
  # counts as right. Letters and numbers earn 0 or 1.
  threshold: float = 1.0

  def __post_init__(self):
    config_limits.check({"blind": dataclasses.asdict(self)})


def ask(
  checkpoint: Any,
  questions: Sequence[question_lib.Question],
  settings: BlindSettings,
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
    progress: as `progress_lib.Progress`.
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
  keys = [answer_log.Key("text only", 0.0, 0, q.id) for q in questions]
  todo = [
    (bucket, rows)
    for bucket, rows in _batches(prompts, questions, settings.batch_size)
    if any(keys[i] not in answers for i in rows)
  ]
  done = len(questions) - sum(len(rows) for _, rows in todo)
  program = programs.Programs(checkpoint, settings.max_new_tokens, mesh)
  with progress(len(questions), start=done, description="asked blind") as bar:
    for bucket, rows in todo:
      ids = np.full((settings.batch_size, bucket), checkpoint.pad_id, np.int32)
      # The rows behind the last prompt repeat it, lest they go on for longer.
      padded = prompt_batch.pad_rows(len(rows), settings.batch_size)
      asked = [prompts[rows[place]] for place in padded]
      for row, prompt in zip(ids, asked, strict=True):
        row[: len(prompt)] = prompt
      lengths = np.array([len(prompt) for prompt in asked], np.int32)
      found = program.answer_text(checkpoint.params, ids, lengths)
      answers.add(
        (keys[i], {"text": tokenizer.decode(answer).strip()})
        for i, answer in zip(rows, np.asarray(found), strict=False)
      )
      done += len(rows)
      bar.update(done)
  return [answers[key]["text"] for key in keys]


def right(
  question: question_lib.Question,
  text: str,
  threshold: float = 1.0,
  rouge: str = rewards_lib.UNICODE,
) -> bool:
  """Returns whether an answer is the right text, or earns its reward.

  The trainer's formulas give some right texts less than 1: a free-form answer
  of one word has no pairs of words, and earns 2 / 3.
  """
  said = question_lib.extract_answer(text).strip()
  if said and said == question.answer:
    return True
  reward = rewards_lib.reward(
    question.problem_type, text, question.answer, rouge
  )
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

  `kept` are those of the questions asked that were not answered right; `images`
  counts image rows left out by (source, problem type); `unreachable` are left
  out because their clip is missing.
  """
  asked, stayed, missing = (
    collections.Counter((q.source, q.problem_type) for q in some)
    for some in (questions, kept, unreachable)
  )
  rows = []
  for group in sorted({*asked, *images, *missing}):
    counts = {
      "rows": asked[group] + missing[group] + images.get(group, 0),
      "images_skipped": images.get(group, 0),
      "clips_missing": missing[group],
      "right_without_video": asked[group] - stayed[group],
      "kept": stayed[group],
    }
    rows.append({"source": group[0], "problem_type": group[1]} | counts)
  total = {"source": "all", "problem_type": "all"}
  for name in (*rows[0],)[2:] if rows else ():
    total[name] = sum(entry[name] for entry in rows)
  return [*rows, total]


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
  for number, ids in enumerate(prompts):
    # Padded to a power of two, so that programs are few.
    bucket = max(1 << (len(ids) - 1).bit_length(), _SHORTEST_BUCKET)
    groups[bucket, not questions[number].lettered].append(number)
  for (bucket, _), rows in sorted(groups.items(), reverse=True):
    for start in range(0, len(rows), size):
      yield bucket, rows[start : start + size]


def main(args):
  """Filters what the command line names."""
  config, out = args.config, args.config.blind.out
  COMMAND.require(args, "model", "train", "out")
  stem = _stem(out, config_lib.train_files(config))
  with files.claim(out, hint="or give another --out"):
    _filter(config, stem)


def _filter(config, stem: str) -> None:
  """Filters rows; what is written besides --out begins by `stem`."""
  data, out = config.data, config.blind.out
  media = os.path.join(data.root, data.media) or None
  names = [field.name for field in dataclasses.fields(BlindSettings)]
  settings = BlindSettings(**{name: config.blind[name] for name in names})
  questions, unreachable, left_out = rows_lib.read(config, media)
  missing = sorted({question.video for question in unreachable})
  if missing:
    terminal.tell(
      f"left out {len(unreachable)} questions about {len(missing)} missing"
      f" clips, first: {', '.join(missing[:5])}"
    )
  if config.blind.num_questions > 0:
    questions = questions[: config.blind.num_questions]
  make = experiment_lib.Experiment.from_config
  experiment = make(config, split="blind.batch_size")
  checkpoint, log = experiment.loaded, f"{stem}.answers.jsonl"
  texts = ask(checkpoint, questions, settings, path=log, mesh=experiment.mesh)
  kept = [
    question
    for question, text in zip(questions, texts, strict=True)
    if not right(question, text, settings.threshold, config.rouge)
  ]
  write(out, kept)
  by_source = table(questions, kept, left_out.images, unreachable)
  report = {
    "by_source": by_source,
    "bad_rows": [str(bad) for bad in left_out.bad_rows],
    "missing_clips": missing,
    "threshold": settings.threshold,
    "rouge": config.rouge,
    "limit": config.blind.num_questions,
    "base_model": checkpoint.identity["sha256"],
  }
  files.write_json(f"{stem}.report.json", report)
  _show(by_source, len(left_out.bad_rows))
  for name in (out, f"{stem}.report.json", log):
    terminal.tell(name)


def _stem(out: str, train) -> str:
  """Returns --out without its ending; it must not be an input."""
  told = f"--out={out} is one of the files of --train; give another name"
  errors.check(os.path.abspath(out) not in map(os.path.abspath, train), told)
  folder = os.path.dirname(out) or "."
  if not os.path.isdir(folder):
    raise errors.UserError(f"--out={out}: no folder {folder}; make it first")
  files.check_writable(out, "--out")
  return os.path.splitext(out)[0]


def _show(rows, num_bad: int) -> None:
  console = terminal.Console()
  shown = rich.table.Table(title="questions by source")
  for name in rows[0]:
    side = "left" if name in ("source", "problem_type") else "right"
    shown.add_column(name.replace("_", " "), justify=side)
  for entry in rows:
    shown.add_row(*map(str, entry.values()))
  console.print(shown)
  if num_bad:
    console.print(f"{num_bad} malformed rows left out; the report lists them")


if __name__ == "__main__":
  COMMAND.run(main)
