"""Rows of Video-R1's files, as the commands here read them."""

from cacovid_jax import command
from cacovid_jax import config as config_lib
from cacovid_jax.data import question as question_lib
from cacovid_jax.data import readers

TRAIN = command.Flag(
  "Files of Video-R1, comma-separated, below data.root or absolute.",
  "data.train_file",
)
ON_MISSING = command.Flag("What to do with a missing clip.", "data.on_missing")
ON_BAD_ROW = command.Flag("What to do with a malformed row.", "data.on_bad_row")
# Of `command.Command`: the files have to be named.
DEFAULTS = {"data.train_file": ""}


def read(
  config, media: str | None
) -> tuple[
  list[question_lib.Question], list[question_lib.Question], readers.Report
]:
  """Returns (rows whose clips are there, the others, the reader's report).

  Clips are looked for below `media`; None looks for none.
  """
  data, report = config.data, readers.Report()
  rows = readers.read_video_r1(
    config_lib.train_files(config),
    media,
    on_bad_row=data.on_bad_row,
    report=report,
  )
  missing = readers.find_missing(
    [] if media is None else [row.video for row in rows],
    media,
    on_missing=data.on_missing,
    mend="leave them out with --on_missing=skip",
  )
  found = [row for row in rows if row.video not in missing]
  return found, [row for row in rows if row.video in missing], report
