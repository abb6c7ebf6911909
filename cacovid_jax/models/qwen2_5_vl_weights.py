"""Names of Qwen2.5-VL's weights in a checkpoint, and where each one goes.

The hub's names (transformers up to 4.51, and what 5.x saves) are the table's;
`hub_name` turns the other spellings into them.
"""

import numpy as np


def table(config):
  """Returns {source name, "{}" for the layer number: (path, layout, layers)}.

  `path` leads to a leaf of the parameters. `layout` is "same", "transpose"
  ((out, in) -> (in, out)) or "conv3d" (see `kernel_of_conv3d`). `layers` is
  the depth of a stack that the tensors of all layers fill, None for a single
  tensor.

  Args:
    config: `qwen2_5_vl.Qwen2_5VLConfig`.
  """
  rows = {}

  def dense(source, path, use_bias=True, layers=None):
    rows[f"{source}.weight"] = ((*path, "kernel"), "transpose", layers)
    if use_bias:
      rows[f"{source}.bias"] = ((*path, "bias"), "same", layers)

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

  ours = ("language_model",)
  rows["model.embed_tokens.weight"] = ((*ours, "embed_tokens"), "same", None)
  norm("model.norm", (*ours, "norm"))
  if not config.text.tie_embeddings:
    rows["lm_head.weight"] = ((*ours, "lm_head"), "same", None)
  layers, layer = config.text.num_layers, "model.layers.{}"
  for name in ("input_layernorm", "post_attention_layernorm"):
    norm(f"{layer}.{name}", (*ours, "layers", name), layers)
  for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
    dense(
      f"{layer}.self_attn.{name}",
      (*ours, "layers", name),
      use_bias=name != "o_proj",
      layers=layers,
    )
  for name in ("gate_proj", "up_proj", "down_proj"):
    dense(
      f"{layer}.mlp.{name}",
      (*ours, "layers", name),
      use_bias=False,
      layers=layers,
    )
  return rows


def hub_name(name):
  """Returns the hub's name of a tensor in any of the known spellings."""
  if name.startswith("model.visual."):
    return name.removeprefix("model.")
  if name.startswith("model.language_model."):
    return "model." + name.removeprefix("model.language_model.")
  return name


def kernel_of_conv3d(weight):
  """Returns [C * t * p * p, D] of a weight [D, C, t, p, p].

  The rows are in the order of a patch's values, so that the convolution over
  one patch is a matrix product.
  """
  return np.reshape(weight, (weight.shape[0], -1)).T


def conv3d_of_kernel(kernel, vision):
  """Returns [D, C, t, p, p] of a kernel [C * t * p * p, D].

  Args:
    kernel: of the patch embedding.
    vision: `qwen2_5_vl_vision.VisionConfig`.
  """
  patch = (vision.temporal_patch_size, vision.patch_size, vision.patch_size)
  return np.reshape(kernel.T, (kernel.shape[-1], -1, *patch))
