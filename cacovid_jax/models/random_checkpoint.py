"""Checkpoints of random weights in released sizes, to measure and compare with.

Weights of a released model cannot travel with the code; what can be said of
its sizes without them is said of such a directory.
"""

import functools
import math
import os

import ml_dtypes
import numpy as np

from cacovid_jax.models import checkpoints, safetensors_io

_SHARD_BYTES = 4 * 10**9
# Of the released models; in a smaller vocabulary, its last ids.
_EOS_ID, _PAD_ID = 151645, 151643


def write(directory, config, seed=0):
  """Writes a bfloat16 checkpoint of random weights, one tensor at a time.

  Every value has any sign and a size between 2^-7 and 2^-5, so that no layer
  fades or grows out of range at a width of some thousands; scales of norms lie
  between 0.5 and 1.

  Args:
    directory: made if it does not exist; earlier weights are replaced.
    config: of the model.
    seed: of the weights.
  """
  rng = np.random.default_rng(seed)
  dtype = np.dtype(ml_dtypes.bfloat16)

  def make(shape, is_scale):
    bits = np.frombuffer(rng.bytes(2 * math.prod(shape)), np.uint16)
    # Exponents are set, the rest is left as drawn: no infinities.
    bits = (bits & 0x007F) | 0x3F00 if is_scale else (bits & 0x80FF) | 0x3C00
    return bits.view(dtype).reshape(shape)

  shapes = checkpoints.source_shapes(config)
  tensors = {
    name: (dtype, shape, functools.partial(make, shape, _is_scale(name)))
    for name, shape in shapes.items()
  }
  for name, array in checkpoints.unused_tensors(config).items():
    make_given = functools.partial(np.asarray, array, dtype)
    tensors[name] = (dtype, array.shape, make_given)
  last = config.text.vocab_size - 1
  eos_id, pad_id = min(_EOS_ID, last), min(_PAD_ID, last - 1)
  os.makedirs(directory, exist_ok=True)
  checkpoints.write_config(
    directory, config, eos_ids=[eos_id, pad_id], pad_id=pad_id, dtype=dtype
  )
  safetensors_io.write_directory(directory, tensors, _SHARD_BYTES)


def _is_scale(name):
  module = name.rpartition(".weight")[0].rpartition(".")[2]
  return "norm" in module or module == "ln_q"
