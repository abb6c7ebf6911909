"""Names of Qwen2.5-VL's weights in a checkpoint, and where each one goes.

The hub's names (transformers up to 4.51, and what 5.x saves) are the table's;
`hub_name` turns the other spellings into them.
"""

from cacovid_jax.models import qwen2_weights


def table(config):
  """Returns {source name, "{}" for the layer number: (path, layout, layers)}.

  `path` leads to a leaf of the parameters, `layout` is one of
  `placement.to_ours`. `layers` is the depth of a stack that the tensors of all
  layers fill, None for a single tensor.

  Args:
    config: `qwen2_5_vl.Qwen2_5VLConfig`.
  """
  rows = {}

  def dense(source, path, layers=None):
    rows.update(qwen2_weights.dense(source, path, layers=layers))

  def norm(source, path, layers=None):
    rows[f"{source}.weight"] = ((*path, "scale"), "same", layers)

  ours = ("visual",)
  rows["visual.patch_embed.proj.weight"] = (
    (*ours, "patch_embed", "kernel"),
    "conv3d",
    None,
  )
  layers, block = config.vision.num_layers, "visual.blocks.{}"
  for name in ("norm1", "norm2"):
    norm(f"{block}.{name}", (*ours, "blocks", name), layers)
  for name in ("qkv", "proj"):
    dense(f"{block}.attn.{name}", (*ours, "blocks", name), layers=layers)
  for name in ("gate_proj", "up_proj", "down_proj"):
    dense(f"{block}.mlp.{name}", (*ours, "blocks", name), layers=layers)
  norm("visual.merger.ln_q", (*ours, "merger", "ln_q"))
  # The entries of a Sequential; number 1 is the activation.
  dense("visual.merger.mlp.0", (*ours, "merger", "linear_1"))
  dense("visual.merger.mlp.2", (*ours, "merger", "linear_2"))

  rows |= qwen2_weights.decoder(config.text, "model", "lm_head.weight")
  return rows


def hub_name(name):
  """Returns the hub's name of a tensor in any of the known spellings."""
  if name.startswith("model.visual."):
    return name.removeprefix("model.")
  if name.startswith("model.language_model."):
    return "model." + name.removeprefix("model.language_model.")
  return name
