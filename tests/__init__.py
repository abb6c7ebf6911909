"""Tests of cacovid_jax; what all of their processes share."""

import os


def xla_flags(num_devices: int = 1) -> str:
  """Returns XLA_FLAGS of a process that a test starts, compiled as here."""
  flags, _, _ = os.environ["XLA_FLAGS"].partition("--xla_force_host")
  return f"{flags}--xla_force_host_platform_device_count={num_devices}"
