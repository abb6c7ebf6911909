r"""Trains the small base model of the embedded benchmark.

python -m cacovid_jax.pretrain --config configs/synthetic_base.py --workdir W

W/base_model becomes a complete Hugging Face checkpoint directory.
"""

from cacovid_jax import command, errors
from cacovid_jax.synthetic import pretraining

COMMAND = command.Command(
  __doc__,
  {"workdir": command.Flag("Folder of the run.")},
  config="required",
  # This config describes a base model, not a policy's training.
  sections=False,
)


def main(args):
  """Runs the pretraining that the command line describes."""
  errors.check(args.workdir, "give --workdir, the folder of the run")
  pretraining.pretrain(args.config, args.workdir)


if __name__ == "__main__":
  COMMAND.run(main)
