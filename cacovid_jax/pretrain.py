r"""Trains the small base model of the embedded benchmark.

python -m cacovid_jax.pretrain --config configs/synthetic_base.py --workdir W

W/base_model becomes a complete Hugging Face checkpoint directory.
"""

from absl import flags

from cacovid_jax import config as config_lib
from cacovid_jax import errors
from cacovid_jax.synthetic import pretraining

config_lib.define_flag()
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.")


def main(argv):
  """Runs the pretraining that the flags describe."""
  if len(argv) > 1:
    raise errors.UserError(f"unknown argument {argv[1]!r}; flags begin with --")
  if not _WORKDIR.value:
    raise errors.UserError("give --workdir, the folder of the run")
  pretraining.pretrain(config_lib.from_flags(), _WORKDIR.value)


if __name__ == "__main__":
  errors.run(main)
