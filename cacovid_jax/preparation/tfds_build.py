r"""Writes Video-R1's questions as a TFDS data set, without TensorFlow.

python -m cacovid_jax.preparation.tfds_build --train Video-R1-260k.json \
    --media ROOT --out DIR
python -m cacovid_jax.preparation.tfds_build --train filtered.json \
    --media ROOT --out DIR --name video_r1_filtered

`DIR/video_r1/1.1.0` then opens by `tfds.builder_from_directory`, and by name
with `tfds.data_source` once `cacovid_jax.data.tfds` is imported. Training
reads it with `--config.data.tfds=DIR`. With --embed the records hold the clips
themselves. The same command again writes nothing.
"""

import os

from absl import flags

from cacovid_jax import errors
from cacovid_jax import progress as progress_lib
from cacovid_jax.data import readers
from cacovid_jax.data import tfds as tfds_lib

_NAMES = ("video_r1", "video_r1_filtered")

_TRAIN = flags.DEFINE_list("train", [], "Files of Video-R1, comma-separated.")
_MEDIA = flags.DEFINE_string("media", None, "Folder of the clips.")
_OUT = flags.DEFINE_string("out", None, "Folder that the data set goes below.")
_NAME = flags.DEFINE_enum("name", _NAMES[0], _NAMES, "Of the data set.")
_SPLIT = flags.DEFINE_string("split", "train", "Name of the split.")
_EMBED = flags.DEFINE_bool("embed", False, "Store the clips in the records.")
_ON_BAD_ROW = flags.DEFINE_enum(
  "on_bad_row", "raise", ("raise", "skip"), "What to do with a malformed row."
)
_ON_MISSING = flags.DEFINE_enum(
  "on_missing", "raise", ("raise", "skip"), "What to do with a missing clip."
)


def main(argv):
  """Prepares what the flags name."""
  if len(argv) > 1:
    raise errors.UserError(
      f"unexpected argument {argv[1]!r}; flags start by --"
    )
  for flag in (_TRAIN, _MEDIA, _OUT):
    if not flag.value:
      raise errors.UserError(
        f"nothing says which {flag.name}: add --{flag.name}"
      )
  report = readers.Report()
  rows = readers.read_video_r1(
    _TRAIN.value, _MEDIA.value, on_bad_row=_ON_BAD_ROW.value, report=report
  )
  missing = readers.check_media(rows, _MEDIA.value)
  present = [row for row in rows if row.video not in missing]
  if missing and (_ON_MISSING.value == "raise" or not present):
    readers.require_media(
      rows, _MEDIA.value, mend="leave them out with --on_missing=skip"
    )
  with progress_lib.Progress(len(present), description="rows") as bar:
    builder = tfds_lib.prepare(
      {_SPLIT.value: present},
      _OUT.value,
      media_root=_MEDIA.value,
      embed=_EMBED.value,
      name=_NAME.value,
      on_row=bar.update,
    )
  print(
    f"{os.fspath(builder.data_dir)}: {len(present)} questions; left out"
    f" {report.num_images} image rows, {len(report.bad_rows)} malformed rows,"
    f" {len(rows) - len(present)} rows about {len(missing)} missing clips"
  )
  for bad in report.bad_rows[:10]:
    print(f"  {bad}")
  for name in list(missing)[:10]:
    print(f"  missing: {name}")


if __name__ == "__main__":
  errors.run(main)
