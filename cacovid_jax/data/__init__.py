"""Questions, clips and prompts; imports no model."""

import os
import sys

# `python -m cacovid_jax.data.tfds_build` still finds the commands that have
# been in `cacovid_jax.preparation` since 0.2: "-m" stands here while it looks.
if sys.argv[:1] == ["-m"]:
  __path__.append(os.path.join(os.path.dirname(__path__[0]), "preparation"))
