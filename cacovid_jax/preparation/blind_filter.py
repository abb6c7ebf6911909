r"""Drops training questions that the base model answers without the video.

python -m cacovid_jax.preparation.blind_filter --model DIR \
    --train Video-R1-260k.json --media ROOT --out filtered.json

Asks every question of Video-R1's files as training asks it, with no video in
the prompt at all, and keeps those whose greedy answer is not right. Writes the
public trainer's filtered format to --out, beside it `*.answers.jsonl` (every
answer as it comes: a run that was stopped goes on when the same command is
given again) and `*.report.json`, rows per source and problem type.
"""

import os

import rich.console
import rich.table

from cacovid_jax import command, errors
from cacovid_jax import config as config_lib
from cacovid_jax import experiment as experiment_lib
from cacovid_jax.data import readers
from cacovid_jax.preparation import blind

COMMAND = command.Command(
  __doc__,
  {
    "model": command.Flag(
      "Base model: a Hugging Face checkpoint directory.", "model.path"
    ),
    "train": command.Flag(
      "Files of Video-R1, comma-separated, below data.root or absolute.",
      "data.train_file",
    ),
    "media": command.Flag(
      "Folder of the clips; without it, none is looked for.", "data.media"
    ),
    "out": command.Flag("JSON file to write.", "blind.out"),
    "batch_size": command.Flag("Questions asked at once.", "blind.batch_size"),
    "dtype": command.Flag(
      "Of weights and computation.",
      "model.dtype",
      choices=("bfloat16", "float32"),
    ),
    "max_new_tokens": command.Flag(
      "Longest answer in tokens, as in training.", "blind.max_new_tokens"
    ),
    "threshold": command.Flag(
      "Reward of OCR, free-form and regression that is right.",
      "blind.threshold",
    ),
    "num_questions": command.Flag(
      "First so many questions; 0 for all.",
      "blind.num_questions",
      old=("limit",),
    ),
    "on_missing": command.Flag(
      "What to do with a missing clip.",
      "data.on_missing",
      choices=("raise", "skip"),
    ),
    "on_bad_row": command.Flag(
      "What to do with a malformed row.",
      "data.on_bad_row",
      choices=("raise", "skip"),
    ),
  },
  defaults={"data.train_file": ""},
)


def main(args):
  """Filters what the command line names."""
  config, data, out = args.config, args.config.data, args.config.blind.out
  COMMAND.require(config, "model", "train", "out")
  train = config_lib.train_files(config)
  media = os.path.join(data.root, data.media) or None
  stem = _stem(out, train)
  settings = blind.Settings(
    batch_size=config.blind.batch_size,
    max_new_tokens=config.blind.max_new_tokens,
    threshold=config.blind.threshold,
  )
  left_out = readers.Report()
  questions = readers.read_video_r1(
    train, media, on_bad_row=data.on_bad_row, report=left_out
  )
  questions, unreachable = _with_clips(questions, media, data.on_missing)
  if config.blind.num_questions > 0:
    questions = questions[: config.blind.num_questions]
  experiment = experiment_lib.Experiment.from_config(
    config, split="blind.batch_size"
  )
  checkpoint = experiment.loaded
  texts = blind.ask(
    checkpoint,
    questions,
    settings,
    path=f"{stem}.answers.jsonl",
    mesh=experiment.mesh,
  )
  kept = [
    question
    for question, text in zip(questions, texts, strict=True)
    if not blind.right(question, text, settings.threshold)
  ]
  blind.write(out, kept)
  rows = blind.table(questions, kept, left_out.images, unreachable)
  blind.write_report(
    f"{stem}.report.json",
    {
      "by_source": rows,
      "bad_rows": [str(bad) for bad in left_out.bad_rows],
      "missing_clips": sorted({question.video for question in unreachable}),
      "threshold": settings.threshold,
      "limit": config.blind.num_questions,
      "base_model": checkpoint.identity["sha256"],
    },
  )
  _show(rows, len(left_out.bad_rows))
  for name in (out, f"{stem}.report.json", f"{stem}.answers.jsonl"):
    print(name)


def _stem(out: str, train) -> str:
  """Returns --out without its ending; it must not be an input."""
  if any(os.path.abspath(out) == os.path.abspath(path) for path in train):
    raise errors.UserError(
      f"--out={out} is one of the files of --train; give another name"
    )
  folder = os.path.dirname(out) or "."
  if not os.path.isdir(folder):
    raise errors.UserError(f"--out={out}: no folder {folder}; make it first")
  return os.path.splitext(out)[0]


def _with_clips(questions, media, on_missing):
  """Returns (the questions whose clips are there, the others)."""
  if media is None:
    return questions, []
  missing = readers.check_media(questions, media)
  found = [question for question in questions if question.video not in missing]
  if missing and (on_missing == "raise" or not found):
    readers.require_media(
      questions, media, mend="leave them out with --on_missing=skip"
    )
  if missing:
    print(
      f"left out {len(questions) - len(found)} questions about {len(missing)}"
      f" missing clips, first: {', '.join(list(missing)[:5])}",
      flush=True,
    )
  return found, [q for q in questions if q.video in missing]


def _show(rows, num_bad: int) -> None:
  console = rich.console.Console()
  if not console.is_terminal:
    console = rich.console.Console(width=120)
  table = rich.table.Table(title="questions by source")
  for name in rows[0]:
    table.add_column(
      name.replace("_", " "),
      justify="left" if name in ("source", "problem_type") else "right",
    )
  for entry in rows:
    table.add_row(*(str(value) for value in entry.values()))
  console.print(table)
  if num_bad:
    console.print(f"{num_bad} malformed rows left out; the report lists them")


if __name__ == "__main__":
  COMMAND.run(main)
