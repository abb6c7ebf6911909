"""Rows that the weight tables of both models share: dense layers, the decoder.

A row is source name -> (path, layout, layers), see
`llava_onevision_weights.table`.
"""


def dense(source, path, use_bias=True, layers=None, layout="transpose"):
  """Returns the rows of a linear layer."""
  rows = {f"{source}.weight": ((*path, "kernel"), layout, layers)}
  if use_bias:
    rows[f"{source}.bias"] = ((*path, "bias"), "same", layers)
  return rows


def decoder(config, source, lm_head):
  """Returns the rows of a Qwen2 decoder; its parameters are `language_model`.

  Args:
    config: `qwen2.Qwen2Config`.
    source: what the decoder's names begin with, without the dot.
    lm_head: name of the output table; unused with tied embeddings.
  """
  ours = ("language_model",)
  rows = {
    f"{source}.embed_tokens.weight": ((*ours, "embed_tokens"), "same", None),
    f"{source}.norm.weight": ((*ours, "norm", "scale"), "same", None),
  }
  if not config.tie_embeddings:
    rows[lm_head] = ((*ours, "lm_head"), "same", None)
  layers, layer = config.num_layers, f"{source}.layers.{{}}"
  for name in ("input_layernorm", "post_attention_layernorm"):
    path = (*ours, "layers", name, "scale")
    rows[f"{layer}.{name}.weight"] = (path, "same", layers)
  for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
    path = (*ours, "layers", name)
    use_bias = name != "o_proj"
    rows |= dense(f"{layer}.self_attn.{name}", path, use_bias, layers)
  for name in ("gate_proj", "up_proj", "down_proj"):
    path = (*ours, "layers", name)
    rows |= dense(f"{layer}.mlp.{name}", path, False, layers)
  return rows
