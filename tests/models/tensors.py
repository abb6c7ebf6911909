"""Reads the weights of checkpoint directories, for the tests."""

import numpy as np

from cacovid_jax.models import safetensors_io


def read(directory):
  """Returns {name: array} of all of a directory's tensors."""
  tensors = safetensors_io.list_directory(directory)
  return {tensor.name: np.array(tensor.view()) for tensor in tensors}
