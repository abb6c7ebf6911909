"""The embedded benchmark as experiments use it."""

from cacovid_jax import prepare as prepare_command


def prepare(config, num_workers=None):
  """Builds the clips and questions of config.data.root, if not there."""
  (variant,) = config.prepare.variants
  prepare_command.draw(config, variant, config.data.root, num_workers)
