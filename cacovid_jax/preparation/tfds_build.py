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

from cacovid_jax import command, terminal
from cacovid_jax import progress as progress_lib
from cacovid_jax.data import tfds as tfds_lib
from cacovid_jax.preparation import rows as rows_lib

COMMAND = command.Command(
  __doc__,
  {
    "train": rows_lib.TRAIN,
    "media": command.Flag("Folder of the clips.", "data.media"),
    "out": command.Flag("Folder that the data set goes below.", "tfds.out"),
    "name": command.Flag("video_r1 or video_r1_filtered.", "tfds.name"),
    "split": command.Flag("Name of the split.", "data.train_split"),
    "embed": command.Flag("Store the clips in the records.", "tfds.embed"),
    "on_bad_row": rows_lib.ON_BAD_ROW,
    "on_missing": rows_lib.ON_MISSING,
  },
  defaults=rows_lib.DEFAULTS,
)


def main(args):
  """Prepares what the command line names."""
  config, data = args.config, args.config.data
  COMMAND.require(args, "train", "media", "out")
  media = os.path.join(data.root, data.media)
  present, others, report = rows_lib.read(config, media)
  with progress_lib.Progress(len(present), description="rows") as bar:
    builder = tfds_lib.prepare(
      {data.train_split: present},
      config.tfds.out,
      media_root=media,
      embed=config.tfds.embed,
      name=config.tfds.name,
      on_row=bar.update,
    )
  missing = sorted({row.video for row in others})
  terminal.tell(
    f"{os.fspath(builder.data_dir)}: {len(present)} questions; left out"
    f" {report.num_images} image rows, {len(report.bad_rows)} malformed rows,"
    f" {len(others)} rows about {len(missing)} missing clips"
  )
  for bad in report.bad_rows[:10]:
    terminal.tell(f"  {bad}")
  for name in missing[:10]:
    terminal.tell(f"  missing: {name}")


if __name__ == "__main__":
  COMMAND.run(main)
