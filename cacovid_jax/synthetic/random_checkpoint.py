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
# Last linear maps of the branches of decoder, SigLIP and Qwen2.5-VL's tower.
_INTO_RESIDUAL = ("o_proj", "down_proj", "out_proj", "fc2", "proj")
# Of the released models; in a smaller vocabulary, its last ids.
_EOS_ID, _PAD_ID = 151645, 151643


def write(directory, config, seed=0):
  """Writes a bfloat16 checkpoint of random weights, one tensor at a time.

  Values have any sign and sizes between 2^-7 and 2^-5, so that no layer fades
  or grows out of range at a width of some thousands. As in a trained model,
  what a residual stream holds is not lost among what its layers add: text
  embeddings and scales of norms lie between 1/2 and 1, video features come out
  as large, and projections back into a stream are 16 times smaller. (With equal
  sizes everywhere, bfloat16 moves logits by as much as the best two of 152 000
  are apart: two kernels of one library choose otherwise at one position in
  twenty-five.)

  Args:
    directory: made if it does not exist; earlier weights are replaced.
    config: of the model.
    seed: of the weights.
  """
  rng = np.random.default_rng(seed)
  dtype = np.dtype(ml_dtypes.bfloat16)

  def make(shape, kept, exponent):
    bits = np.frombuffer(rng.bytes(2 * math.prod(shape)), np.uint16)
    return ((bits & kept) | exponent).view(dtype).reshape(shape)

  shapes = checkpoints.source_shapes(config)
  tensors = {
    name: (dtype, shape, functools.partial(make, shape, *_bits(name)))
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


def _bits(name):
  """Returns (bits that are left as drawn, bits that are set) of a bfloat16.

  All or all but one bit of the exponent are set: no infinities.
  """
  module = name.rpartition(".weight")[0]
  last = module.rpartition(".")[2]
  if "norm" in last or last == "ln_q":
    return 0x007F, 0x3F00  # [1/2, 1).
  if last == "embed_tokens":
    return 0x807F, 0x3F00  # +-[1/2, 1).
  if last == "linear_2" or module.endswith("merger.mlp.2"):
    return 0x807F, 0x3E80  # +-[2^-2, 2^-1).
  if last in _INTO_RESIDUAL and not module.endswith("patch_embed.proj"):
    return 0x807F, 0x3A00  # +-[2^-11, 2^-10).
  return 0x80FF, 0x3C00  # +-[2^-7, 2^-5).
