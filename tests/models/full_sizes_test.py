"""The released models: names, shapes and counts, without any weights.

Expected numbers are those of the released checkpoints' own files and cards.
"""

import math

import jax
import jax.numpy as jnp
import pytest

from cacovid_jax.models import (
  checkpoints,
  llava_onevision,
  qwen2_5_vl,
  qwen3_vl,
)

ONEVISION = llava_onevision.LlavaOnevisionConfig
QWEN = qwen2_5_vl.Qwen2_5VLConfig
CONFIGS = {
  "ov-0.5b": ONEVISION.llava_onevision_0_5b(),
  "ov-7b": ONEVISION.llava_onevision_7b(),
  "qvl-3b": QWEN.qwen2_5_vl_3b(),
  "qvl-7b": QWEN.qwen2_5_vl_7b(),
}
# (width, inner width, layers, kv width, vocabulary, tied).
TEXT = {
  "ov-0.5b": (896, 4864, 24, 128, 152000, True),
  "ov-7b": (3584, 18944, 28, 512, 152128, False),
  "qvl-3b": (2048, 11008, 36, 256, 151936, True),
  "qvl-7b": (3584, 18944, 28, 512, 152064, False),
}


def text_count(width, inner, layers, kv, vocab, tied):
  attention = 2 * width * width + 2 * width * kv + width + 2 * kv
  layer = attention + 3 * width * inner + 2 * width
  return layers * layer + width + (1 if tied else 2) * vocab * width


def onevision_count(width):
  block = 4 * (1152 * 1152 + 1152) + 2 * 1152 * 4304 + 4304 + 1152 + 4 * 1152
  tower = 26 * block + 14 * 14 * 3 * 1152 + 1152 + 729 * 1152
  projector = 1152 * width + width + width * width + width
  return tower + projector + width  # And the newline.


def qwen_count(width):
  inner = 3 * 1280 * 3420 + 2 * 3420 + 1280
  block = 3 * 1280 * 1280 + 3 * 1280 + 1280 * 1280 + 1280 + inner + 2 * 1280
  merger = 1280 + 5120 * 5120 + 5120 + 5120 * width + width
  return 32 * block + 1176 * 1280 + merger


@pytest.mark.parametrize("name", CONFIGS)
def test_every_value_is_counted(name):
  shapes = checkpoints.source_shapes(CONFIGS[name])
  tower = onevision_count if name.startswith("ov") else qwen_count
  expected = text_count(*TEXT[name]) + tower(TEXT[name][0])
  assert sum(map(math.prod, shapes.values())) == expected
  # The published totals of Qwen2.5-VL.
  published = {"qvl-3b": 3_754_622_976, "qvl-7b": 8_292_166_656}
  assert expected == published.get(name, expected)


_LAYER = {
  "input_layernorm.weight": "D",
  "post_attention_layernorm.weight": "D",
  "self_attn.q_proj.weight": "DD",
  "self_attn.q_proj.bias": "D",
  "self_attn.k_proj.weight": "KD",
  "self_attn.k_proj.bias": "K",
  "self_attn.v_proj.weight": "KD",
  "self_attn.v_proj.bias": "K",
  "self_attn.o_proj.weight": "DD",
  "mlp.gate_proj.weight": "ID",
  "mlp.up_proj.weight": "ID",
  "mlp.down_proj.weight": "DI",
}


def text_names(name, decoder, head):
  width, inner, layers, kv, vocab, tied = TEXT[name]
  sizes = {"D": width, "I": inner, "K": kv}
  expected = {
    f"{decoder}.embed_tokens.weight": (vocab, width),
    f"{decoder}.norm.weight": (width,),
  }
  if not tied:
    expected[head] = (vocab, width)
  for i in range(layers):
    for leaf, axes in _LAYER.items():
      shape = tuple(sizes[axis] for axis in axes)
      expected[f"{decoder}.layers.{i}.{leaf}"] = shape
  return expected


@pytest.mark.parametrize("name", ["ov-0.5b", "ov-7b"])
def test_names_and_shapes_of_onevision(name):
  width = TEXT[name][0]
  expected = text_names(
    name, "language_model.model", "language_model.lm_head.weight"
  )
  expected["image_newline"] = (width,)
  for i, source in ((1, 1152), (2, width)):
    linear = f"multi_modal_projector.linear_{i}"
    expected[f"{linear}.weight"] = (width, source)
    expected[f"{linear}.bias"] = (width,)
  tower = "vision_tower.vision_model"
  embeddings = f"{tower}.embeddings"
  expected[f"{embeddings}.patch_embedding.weight"] = (1152, 3, 14, 14)
  expected[f"{embeddings}.patch_embedding.bias"] = (1152,)
  expected[f"{embeddings}.position_embedding.weight"] = (729, 1152)
  for i in range(26):
    layer = f"{tower}.encoder.layers.{i}"
    for norm in ("layer_norm1", "layer_norm2"):
      expected[f"{layer}.{norm}.weight"] = (1152,)
      expected[f"{layer}.{norm}.bias"] = (1152,)
    for linear, shape in (
      *((f"self_attn.{part}_proj", (1152, 1152)) for part in "qkv"),
      ("self_attn.out_proj", (1152, 1152)),
      ("mlp.fc1", (4304, 1152)),
      ("mlp.fc2", (1152, 4304)),
    ):
      expected[f"{layer}.{linear}.weight"] = shape
      expected[f"{layer}.{linear}.bias"] = shape[:1]
  assert checkpoints.source_shapes(CONFIGS[name]) == expected


@pytest.mark.parametrize("name", ["qvl-3b", "qvl-7b"])
def test_names_and_shapes_of_qwen(name):
  width = TEXT[name][0]
  expected = text_names(name, "model", "lm_head.weight")
  expected["visual.patch_embed.proj.weight"] = (1280, 3, 2, 14, 14)
  for i in range(32):
    block = f"visual.blocks.{i}"
    expected[f"{block}.norm1.weight"] = (1280,)
    expected[f"{block}.norm2.weight"] = (1280,)
    for linear, shape in (
      ("attn.qkv", (3840, 1280)),
      ("attn.proj", (1280, 1280)),
      ("mlp.gate_proj", (3420, 1280)),
      ("mlp.up_proj", (3420, 1280)),
      ("mlp.down_proj", (1280, 3420)),
    ):
      expected[f"{block}.{linear}.weight"] = shape
      expected[f"{block}.{linear}.bias"] = shape[:1]
  merger = "visual.merger"
  expected[f"{merger}.ln_q.weight"] = (1280,)
  expected[f"{merger}.mlp.0.weight"] = (5120, 5120)
  expected[f"{merger}.mlp.0.bias"] = (5120,)
  expected[f"{merger}.mlp.2.weight"] = (width, 5120)
  expected[f"{merger}.mlp.2.bias"] = (width,)
  assert checkpoints.source_shapes(CONFIGS[name]) == expected


# Hidden, inner, layers, heads; of the tower hidden, inner, layers; tied.
QWEN3 = {
  "2b": (2048, 6144, 28, 16, 1024, 4096, 24, True),
  "4b": (2560, 9728, 36, 32, 1024, 4096, 24, True),
  "8b": (4096, 12288, 36, 32, 1152, 4304, 27, False),
  "32b": (5120, 25600, 64, 64, 1152, 4304, 27, False),
}


def qwen3_names(size):
  width, inner, layers, heads, tower, wide, depth, tied = QWEN3[size]
  vocab, text, visual = 151936, "model.language_model", "model.visual"
  expected = {
    f"{text}.embed_tokens.weight": (vocab, width),
    f"{text}.norm.weight": (width,),
    f"{visual}.patch_embed.proj.weight": (tower, 3, 2, 16, 16),
    f"{visual}.patch_embed.proj.bias": (tower,),
    f"{visual}.pos_embed.weight": (2304, tower),
  }
  if not tied:
    expected["lm_head.weight"] = (vocab, width)
  for i in range(layers):
    layer = f"{text}.layers.{i}"
    for leaf, shape in (
      ("input_layernorm", (width,)),
      ("post_attention_layernorm", (width,)),
      ("self_attn.q_proj", (heads * 128, width)),
      ("self_attn.k_proj", (1024, width)),
      ("self_attn.v_proj", (1024, width)),
      ("self_attn.o_proj", (width, heads * 128)),
      ("self_attn.q_norm", (128,)),
      ("self_attn.k_norm", (128,)),
      ("mlp.gate_proj", (inner, width)),
      ("mlp.up_proj", (inner, width)),
      ("mlp.down_proj", (width, inner)),
    ):
      expected[f"{layer}.{leaf}.weight"] = shape
  both = {}
  for i in range(depth):
    block = f"{visual}.blocks.{i}"
    both |= {f"{block}.norm{j}": (tower,) for j in (1, 2)}
    both[f"{block}.attn.qkv"] = (3 * tower, tower)
    both[f"{block}.attn.proj"] = (tower, tower)
    both[f"{block}.mlp.linear_fc1"] = (wide, tower)
    both[f"{block}.mlp.linear_fc2"] = (tower, wide)
  mergers = [f"{visual}.deepstack_merger_list.{j}" for j in range(3)]
  for merger in (f"{visual}.merger", *mergers):
    joined = merger in mergers
    both[f"{merger}.norm"] = (4 * tower if joined else tower,)
    both[f"{merger}.linear_fc1"] = (4 * tower, 4 * tower)
    both[f"{merger}.linear_fc2"] = (width, 4 * tower)
  for name, shape in both.items():
    expected |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
  return expected


@pytest.mark.parametrize("size", QWEN3)
def test_names_and_shapes_of_qwen3(size):
  config = qwen3_vl.Qwen3VLConfig.released(size)
  shapes, layers, depth = (qwen3_names(size), *QWEN3[size][2:7:4])
  assert checkpoints.source_shapes(config) == shapes
  untied = not QWEN3[size][-1]
  assert len(shapes) == 12 * depth + 27 + 11 * layers + 2 + untied
  count = jax.tree.leaves(checkpoints.param_shapes(config))
  assert sum(math.prod(leaf.shape) for leaf in count) == sum(
    map(math.prod, shapes.values())
  )
  assert type(config).from_hf(config.to_hf()) == config
  # As the hub's files of 4.57 and as 5.x writes them.
  newer = config.to_hf()
  text = newer["text_config"]
  rotary = text.pop("rope_scaling")
  text["rope_parameters"] = rotary | {"rope_theta": text.pop("rope_theta")}
  newer["vision_config"]["model_type"] = "qwen3_vl_vision"
  assert type(config).from_hf(newer) == config


@pytest.mark.parametrize("name", CONFIGS)
def test_every_parameter_of_the_model_comes_from_the_checkpoint(name):
  """What initialisation makes is what the tables fill, value for value."""
  config = CONFIGS[name]
  model = (
    llava_onevision.LlavaOnevisionModel(config, jnp.bfloat16)
    if name.startswith("ov")
    else qwen2_5_vl.Qwen2_5VLModel(config, jnp.bfloat16)
  )
  shapes = jax.eval_shape(model.init, jax.random.key(0))
  count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
  sources = checkpoints.source_shapes(config).values()
  assert count == sum(map(math.prod, sources))
  layers = shapes["language_model"]["layers"]
  width, inner, depth, kv, vocab, tied = TEXT[name]
  assert layers["k_proj"]["kernel"].shape == (depth, width, kv)
  assert layers["gate_proj"]["kernel"].shape == (depth, width, inner)
  assert shapes["language_model"]["embed_tokens"].shape == (vocab, width)
  assert ("lm_head" in shapes["language_model"]) == (not tied)


@pytest.mark.parametrize("name", CONFIGS)
def test_configs_survive_their_json(name):
  config = CONFIGS[name]
  assert type(config).from_hf(config.to_hf()) == config
