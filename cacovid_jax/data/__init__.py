"""Questions, clips and prompts; imports no model."""

import os

# Commands of `cacovid_jax.preparation` are also found here, where they were
# until 0.2: `python -m cacovid_jax.data.tfds_build`.
__path__.append(os.path.join(os.path.dirname(__path__[0]), "preparation"))
