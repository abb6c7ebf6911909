r"""Builds the embedded benchmark: clips, questions, array_record files.

python -m cacovid_jax.prepare --out data/synthetic --variants dense,sparse
python -m cacovid_jax.prepare --config configs/synthetic.py:size=quickstart
python -m cacovid_jax.prepare --out data/synthetic --variants full,plain

Skips what is there. Deterministic by --seed. With --tiny_models, checkpoints of
random weights as well, for the `:debug` forms of configs of released models.
"""

import os
import pathlib

from cacovid_jax import command, errors, files, terminal
from cacovid_jax.models import safetensors_io
from cacovid_jax.synthetic import build, tiny_checkpoints, world

COMMAND = command.Command(
  __doc__,
  {
    "out": command.Flag(
      "Folder; each variant is one below it. A config's is the one above its"
      " data.root."
    ),
    **command.aliases(
      "prepare",
      variants="Variants to build.",
      seed="Seed of all clips and questions.",
      clips="Clips of the splits train, validation, test and test_fresh.",
      questions_per_clip="At most.",
      tiny_models=f"Of {', '.join(tiny_checkpoints.FAMILIES)}: random"
      " checkpoints, each a folder of its name below --out.",
      decisive="Whether to keep decisive.jsonl, the tokens that answers rest"
      " on: of the embedded base model's grid, so that other models refuse it.",
      num_workers="Processes that draw and encode; 0 is one per core.",
    ),
  },
)


def main(args):
  """Builds what the command line describes."""
  config = args.config
  out = args.out or (config.data.root and os.path.dirname(config.data.root))
  errors.check(out, "give --out, the folder to build in")
  names = config.prepare.variants or config.prepare.tiny_models
  errors.check(names, "nothing to build: add --variants or --tiny_models")
  for family in config.prepare.tiny_models:
    directory = os.path.join(out, family)
    # Weights are written last.
    if not os.path.exists(os.path.join(directory, safetensors_io.WEIGHTS)):
      with files.claim(directory, hint="or give another --out"):
        tiny_checkpoints.write_tiny(directory, family)
    terminal.tell(f"{directory}: ready")
  for variant in config.prepare.variants:
    directory = os.path.join(out, variant)
    build.prepare(config, variant=variant, directory=directory)
    if not config.prepare.decisive:
      pathlib.Path(directory, "decisive.jsonl").unlink(missing_ok=True)
    stage = world.VARIANTS[variant].stage
    generator = build.generator_hash(stage)[:12]
    terminal.tell(f"{directory}: ready (generator {generator})")


if __name__ == "__main__":
  COMMAND.run(main)
