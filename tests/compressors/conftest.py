"""Compiles what these tests run outside of `quick.jit` in little time, too."""

import jax
import pytest

_OPTION = "jax_disable_most_optimizations"


@pytest.fixture(autouse=True, scope="package")
def _compile_quickly():
  before = jax.config.read(_OPTION)
  jax.config.update(_OPTION, jax.default_backend() == "cpu" or before)
  yield
  jax.config.update(_OPTION, before)
