"""Runs `cacovid_jax.preparation.tfds_build`, its place since 0.2."""

import runpy

if __name__ == "__main__":
  runpy.run_module("cacovid_jax.preparation.tfds_build", run_name="__main__")
