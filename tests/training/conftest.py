"""Programs of these tests are tiny: compiling them is all their time."""

import jax
import pytest


@pytest.fixture(autouse=True, scope="session")
def _quick_compilation(tmp_path_factory):
  folder = str(tmp_path_factory.mktemp("compiled"))
  jax.config.update("jax_disable_most_optimizations", True)
  # Several runs of one config compile once.
  jax.config.update("jax_compilation_cache_dir", folder)
  yield
  jax.config.update("jax_disable_most_optimizations", False)
  jax.config.update("jax_compilation_cache_dir", None)
