"""Programs of these tests are tiny: compiling them is all their time."""

import jax
import pytest


@pytest.fixture(autouse=True, scope="session")
def _quick_compilation():
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", False)
