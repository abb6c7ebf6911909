"""Names of LLaVA-OneVision's weights in a checkpoint, and where each one goes.

The hub's names (transformers up to 4.51) are the table's; `hub_name` turns the
other spellings into them.
"""

from cacovid_jax.models import qwen2_weights

# The norm behind SigLIP's last block is in every checkpoint and in no
# computation.
POST_NORM = "vision_tower.vision_model.post_layernorm."


def table(config):
  """Returns {source name, "{}" for the layer number: (path, layout, layers)}.

  `path` leads to a leaf of the parameters, `layout` is one of
  `placement.to_ours`. `layers` is the depth of a stack that the tensors of all
  layers fill, None for a single tensor.

  Args:
    config: `llava_onevision.LlavaOnevisionConfig`.
  """
  rows = {"image_newline": (("image_newline",), "same", None)}

  def dense(source, path, **options):
    rows.update(qwen2_weights.dense(source, path, **options))

  for name in ("linear_1", "linear_2"):
    dense(
      f"multi_modal_projector.{name}",
      ("projector", name),
      use_bias=config.projector_bias,
    )

  tower, ours = "vision_tower.vision_model", ("vision_tower",)
  dense(
    f"{tower}.embeddings.patch_embedding",
    (*ours, "patch_embedding"),
    layout="patches",
  )
  rows[f"{tower}.embeddings.position_embedding.weight"] = (
    (*ours, "position_embedding"),
    "same",
    None,
  )
  layers, layer = config.vision.num_layers, f"{tower}.encoder.layers.{{}}"
  for name in ("layer_norm1", "layer_norm2"):
    path = (*ours, "layers", name)
    rows[f"{layer}.{name}.weight"] = ((*path, "scale"), "same", layers)
    rows[f"{layer}.{name}.bias"] = ((*path, "bias"), "same", layers)
  for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
    dense(f"{layer}.self_attn.{name}", (*ours, "layers", name), layers=layers)
  for name in ("fc1", "fc2"):
    dense(f"{layer}.mlp.{name}", (*ours, "layers", name), layers=layers)

  rows |= qwen2_weights.decoder(
    config.text, "language_model.model", "language_model.lm_head.weight"
  )
  return rows


def hub_name(name):
  """Returns the hub's (4.x) name of a tensor in any of the known spellings."""
  stems = (
    "language_model.",
    "vision_tower.",
    "multi_modal_projector.",
    "image_newline",
  )
  if name.startswith("model.") and name[len("model.") :].startswith(stems):
    name = name[len("model.") :]
  head, _, rest = name.partition(".")
  if head == "lm_head":
    return f"language_model.{name}"
  if head == "vision_tower" and not rest.startswith("vision_model."):
    return f"vision_tower.vision_model.{rest}"
  if head == "language_model" and not rest.startswith(("model.", "lm_head.")):
    return f"language_model.model.{rest}"
  return name
