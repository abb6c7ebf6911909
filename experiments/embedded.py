"""The embedded benchmark as experiments use it."""

import os

from cacovid_jax import config as config_lib
from cacovid_jax import progress as progress_lib
from cacovid_jax.synthetic import build


def prepare(config, num_workers=None):
  """Builds the clips and questions of config.data.root, if not there."""
  wanted = config_lib.to_dict(config.prepare)
  wanted = build.BuildConfig(**wanted | {"clips": tuple(wanted["clips"])})
  with progress_lib.Progress(
    sum(wanted.clips), description="clips"
  ) as progress:
    build.build(
      wanted,
      config.data.root,
      num_workers=num_workers or os.cpu_count(),
      on_clip=lambda done, unused_total: progress.update(done),
    )
