r"""Builds the embedded benchmark: clips, questions, array_record files.

python -m cacovid_jax.prepare --out data/synthetic --variants dense,sparse
python -m cacovid_jax.prepare --config configs/synthetic.py:size=quickstart

Skips what is there. Deterministic by --seed. With --tiny_models, checkpoints of
random weights as well, for the `:debug` forms of configs of released models.
"""

import os
import pathlib

from cacovid_jax import command, errors
from cacovid_jax import progress as progress_lib
from cacovid_jax.synthetic import build, tiny_checkpoint

COMMAND = command.Command(
  __doc__,
  {
    "out": command.Flag(
      "Folder; each variant is one below it. A config's is the one above its"
      " data.root."
    ),
    "variants": command.Flag("Variants to build.", "prepare.variants"),
    "seed": command.Flag("Seed of all clips and questions.", "prepare.seed"),
    "clips": command.Flag(
      "Clips of the splits train, validation, test and test_fresh.",
      "prepare.clips",
    ),
    "questions_per_clip": command.Flag(
      "At most.", "prepare.questions_per_clip"
    ),
    "tiny_models": command.Flag(
      f"Of {', '.join(tiny_checkpoint.FAMILIES)}: random checkpoints, each a"
      " folder of its name below --out.",
      "prepare.tiny_models",
    ),
    "decisive": command.Flag(
      "Whether to keep decisive.jsonl, the tokens that answers rest on: of the"
      " embedded base model's grid, so that other models refuse it.",
      "prepare.decisive",
    ),
    "num_workers": command.Flag(
      "Processes that draw and encode; 0 is one per core.",
      "prepare.num_workers",
    ),
  },
)


def main(args):
  """Builds what the command line describes."""
  config = args.config
  out = args.out or (config.data.root and os.path.dirname(config.data.root))
  if not out:
    raise errors.UserError("give --out, the folder to build in")
  for family in config.prepare.tiny_models:
    directory = os.path.join(out, family)
    if not os.path.exists(os.path.join(directory, "config.json")):
      tiny_checkpoint.write(directory, family)
    print(f"{directory}: ready")
  for variant in config.prepare.variants:
    directory = os.path.join(out, variant)
    draw(config, variant, directory)
    if not config.prepare.decisive:
      pathlib.Path(directory, "decisive.jsonl").unlink(missing_ok=True)
    print(f"{directory}: ready (generator {build.generator_hash()[:12]})")


def draw(config, variant, directory, num_workers=None):
  """Builds the clips and questions of a config's variant, if not there.

  Args:
    config: with a section `prepare`.
    variant: of `world.VARIANTS`.
    directory: of the variant.
    num_workers: processes, instead of the config's.
  """
  section = config.prepare
  if len(section.clips) != len(build.SPLITS):
    raise errors.UserError(
      f"--clips takes {len(build.SPLITS)} whole numbers, for"
      f" {', '.join(build.SPLITS)}"
    )
  wanted = build.BuildConfig(
    variant=variant,
    seed=section.seed,
    clips=tuple(section.clips),
    questions_per_clip=section.questions_per_clip,
  )
  title = f"{variant} clips"
  with progress_lib.Progress(sum(wanted.clips), description=title) as bar:
    build.build(
      wanted,
      directory,
      num_workers=num_workers or section.num_workers or os.cpu_count(),
      on_clip=lambda done, unused_total: bar.update(done, {}),
    )


if __name__ == "__main__":
  COMMAND.run(main)
