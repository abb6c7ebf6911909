r"""Fills a config's cache of video features before training.

python -m cacovid_jax.preparation.encode_features --config configs/x.py
python -m cacovid_jax.preparation.encode_features --config configs/x.py \
    --shard=0/8

Decodes every clip of the training questions and runs the vision tower over it
once, into `config.data.feature_cache`, where training with the same config
finds it. Several processes (one per accelerator, say) share the work by
--shard, and a run that was stopped goes on when it is given again. Clips that
cannot be used are listed in the cache's `quarantine.jsonl`, rows that are left
out in its `left_out.json`.
"""

import os

from cacovid_jax import command, errors
from cacovid_jax import experiment as experiment_lib
from cacovid_jax.data import rejected_clips
from cacovid_jax.evals import shards
from cacovid_jax.preparation import encoding
from cacovid_jax.training import run as run_lib

COMMAND = command.Command(
  __doc__,
  {
    "feature_cache": command.Flag("Folder to fill.", "data.feature_cache"),
    "shard": command.Flag(
      "i/n: this process takes every n-th clip, from the i-th.", default="0/1"
    ),
  },
  config="required",
)


def main(args):
  """Encodes the clips that the command line names."""
  shard, config = shards.Shard.parse(args.shard), args.config
  directory = config.data.feature_cache
  if not directory:
    raise errors.UserError(
      "config.data.feature_cache is empty, so there is no cache to fill; add"
      " --config.data.feature_cache=FOLDER"
    )
  # A cache may serve several configs: what was left out is that of the last.
  questions = experiment_lib.read_questions(config, directory, resumes=False)
  experiment = experiment_lib.Experiment.from_config(
    config, directory, split="videos_per_step"
  )
  run = run_lib.make(experiment, questions=questions)
  report = encoding.encode(
    run.source,
    run.questions,
    directory,
    shard=shard,
    num_threads=config.data.num_threads,
    quarantine=rejected_clips.RejectedClips(
      os.path.join(directory, "quarantine.jsonl")
    ),
  )
  print(
    f"{directory}: {report.num_clips} clips, {report.num_present} were there,"
    f" {report.num_encoded} encoded, {len(report.failed)} cannot be used"
  )
  for name, reason in list(report.failed.items())[:10]:
    print(f"  {name}: {reason.replace('_', ' ')}")


if __name__ == "__main__":
  COMMAND.run(main)
