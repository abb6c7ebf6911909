r"""Builds the embedded benchmark: clips, questions, array_record files.

python -m cacovid_jax.prepare --out data/synthetic --variants dense,sparse

Skips what is there. Deterministic by --seed. With --tiny_models, checkpoints of
random weights as well, for the `:debug` forms of configs of released models.
"""

import os
import pathlib

from absl import flags

from cacovid_jax import errors
from cacovid_jax import progress as progress_lib
from cacovid_jax.synthetic import build, tiny_checkpoints

_OUT = flags.DEFINE_string("out", None, "Folder; each variant is one below it.")
_VARIANTS = flags.DEFINE_list("variants", ["dense"], "Variants to build.")
_SEED = flags.DEFINE_integer("seed", 0, "Seed of all clips and questions.")
_CLIPS = flags.DEFINE_list(
  "clips",
  ["240", "40", "160", "0"],
  "Clips of the splits train, validation, test and test_fresh.",
)
_QUESTIONS = flags.DEFINE_integer("questions_per_clip", 4, "At most.")
_TINY_MODELS = flags.DEFINE_list(
  "tiny_models",
  [],
  f"Of {', '.join(tiny_checkpoints.FAMILIES)}: random checkpoints, each a"
  " folder of its name below --out.",
)
_DECISIVE = flags.DEFINE_bool(
  "decisive",
  True,
  "Whether to keep decisive.jsonl, the tokens that answers rest on: of the"
  " embedded base model's grid, so that other models refuse it.",
)
_NUM_WORKERS = flags.DEFINE_integer(
  "num_workers", os.cpu_count(), "Processes that draw and encode."
)


def main(argv):
  """Builds what the flags describe."""
  if len(argv) > 1:
    raise errors.UserError(f"unknown argument {argv[1]!r}; flags begin with --")
  if not _OUT.value:
    raise errors.UserError("give --out, the folder to build in")
  try:
    clips = tuple(int(count) for count in _CLIPS.value)
  except ValueError:
    clips = ()
  if len(clips) != len(build.SPLITS):
    raise errors.UserError(
      f"--clips takes {len(build.SPLITS)} whole numbers, for"
      f" {', '.join(build.SPLITS)}"
    )
  for family in _TINY_MODELS.value:
    directory = os.path.join(_OUT.value, family)
    if not os.path.exists(os.path.join(directory, "config.json")):
      tiny_checkpoints.write_tiny(directory, family)
    print(f"{directory}: ready")
  for variant in _VARIANTS.value:
    config = build.BuildConfig(
      variant=variant,
      seed=_SEED.value,
      clips=clips,
      questions_per_clip=_QUESTIONS.value,
    )
    directory = os.path.join(_OUT.value, variant)
    with progress_lib.Progress(
      sum(clips), description=f"{variant} clips"
    ) as bar:
      build.build(
        config,
        directory,
        num_workers=_NUM_WORKERS.value,
        on_clip=lambda done, unused_total: bar.update(done, {}),
      )
    if not _DECISIVE.value:
      pathlib.Path(directory, "decisive.jsonl").unlink(missing_ok=True)
    print(f"{directory}: ready (generator {build.generator_hash()[:12]})")


if __name__ == "__main__":
  errors.run(main)
