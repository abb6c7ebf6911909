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

import jax.numpy as jnp
import rich.console
import rich.table
from absl import flags

from cacovid_jax import errors
from cacovid_jax.data import readers
from cacovid_jax.models import checkpoints
from cacovid_jax.preparation import blind

_MODEL = flags.DEFINE_string(
  "model", None, "Base model: a Hugging Face checkpoint directory."
)
_TRAIN = flags.DEFINE_list("train", [], "Files of Video-R1, comma-separated.")
_MEDIA = flags.DEFINE_string(
  "media", None, "Folder of the clips; without it, none is looked for."
)
_OUT = flags.DEFINE_string("out", None, "JSON file to write.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 16, "Questions asked at once.")
_DTYPE = flags.DEFINE_enum(
  "dtype", "bfloat16", ("bfloat16", "float32"), "Of weights and computation."
)
_MAX_NEW_TOKENS = flags.DEFINE_integer(
  "max_new_tokens", 768, "Longest answer in tokens, as in training."
)
_THRESHOLD = flags.DEFINE_float(
  "threshold", 1.0, "Reward of OCR, free-form and regression that is right."
)
_LIMIT = flags.DEFINE_integer("limit", 0, "First so many questions; 0 for all.")
_ON_MISSING = flags.DEFINE_enum(
  "on_missing", "raise", ("raise", "skip"), "What to do with a missing clip."
)
_ON_BAD_ROW = flags.DEFINE_enum(
  "on_bad_row", "raise", ("raise", "skip"), "What to do with a malformed row."
)


def main(argv):
  """Filters what the flags name."""
  if len(argv) > 1:
    raise errors.UserError(
      f"unexpected argument {argv[1]!r}; flags start by --"
    )
  for flag in (_MODEL, _TRAIN, _OUT):
    if not flag.value:
      raise errors.UserError(
        f"nothing says which {flag.name}: add --{flag.name}"
      )
  stem = _stem(_OUT.value, _TRAIN.value)
  settings = blind.Settings(
    batch_size=_BATCH_SIZE.value,
    max_new_tokens=_MAX_NEW_TOKENS.value,
    threshold=_THRESHOLD.value,
  )
  left_out = readers.Report()
  questions = readers.read_video_r1(
    _TRAIN.value, _MEDIA.value, on_bad_row=_ON_BAD_ROW.value, report=left_out
  )
  questions, unreachable = _with_clips(questions, _MEDIA.value)
  if _LIMIT.value > 0:
    questions = questions[: _LIMIT.value]
  checkpoint = checkpoints.load(_MODEL.value, jnp.dtype(_DTYPE.value))
  texts = blind.ask(
    checkpoint, questions, settings, path=f"{stem}.answers.jsonl"
  )
  kept = [
    question
    for question, text in zip(questions, texts, strict=True)
    if not blind.right(question, text, settings.threshold)
  ]
  blind.write(_OUT.value, kept)
  rows = blind.table(questions, kept, left_out.images, unreachable)
  blind.write_report(
    f"{stem}.report.json",
    {
      "by_source": rows,
      "bad_rows": [str(bad) for bad in left_out.bad_rows],
      "missing_clips": sorted({question.video for question in unreachable}),
      "threshold": settings.threshold,
      "limit": _LIMIT.value,
      "base_model": checkpoint.identity["sha256"],
    },
  )
  _show(rows, len(left_out.bad_rows))
  for name in (_OUT.value, f"{stem}.report.json", f"{stem}.answers.jsonl"):
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


def _with_clips(questions, media):
  """Returns (the questions whose clips are there, the others)."""
  if media is None:
    return questions, []
  missing = readers.check_media(questions, media)
  found = [question for question in questions if question.video not in missing]
  if missing and (_ON_MISSING.value == "raise" or not found):
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
  errors.run(main)
