"""Tokens that the prompt's last token attends to, in one decoder layer.

The signal behind FastV (https://arxiv.org/abs/2403.06764), used here before
the language model: a first, uncompressed prefill tells which video tokens the
question looks at, a second one answers from those alone. It costs more than
it saves; it is a strong rule to compare with, not a way to save time.
"""

from cacovid_jax import errors
from cacovid_jax.compressors import base


def compress(
  features, *, grid, num_keep, text=None, aux=None, rng=None, layer=2
):
  """Returns the tokens with the largest attention weight of `layer`.

  Args:
    features: float[N, D] video tokens.
    grid: static (T, H, W).
    num_keep: K, static.
    text: unused.
    aux: with `attention` float32[layers, N].
    rng: unused.
    layer: decoder layer, from 0; negative counts from the last one.
  """
  del grid, text, rng
  num_layers = aux.attention.shape[0]
  if not -num_layers <= layer < num_layers:
    raise errors.UserError(
      f"last_query: layer {layer} does not exist; the model has layers 0 to"
      f" {num_layers - 1}"
    )
  return base.take_top(features, aux.attention[layer], num_keep)


COMPRESSOR = base.Compressor(
  name="last_query", function=compress, needs=frozenset(["attention"])
)
