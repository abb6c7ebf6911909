"""Costs before a run, against what programs are made of.

The oracle of operations walks through the jaxpr of the real model and counts
every matrix product, loops as often as they turn.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cacovid_jax import compressors
from cacovid_jax.evals import cost
from cacovid_jax.models import (
  checkpoints,
  llava_onevision,
  qwen2_5_vl,
  qwen3_vl,
)
from cacovid_jax.parallel import mesh as mesh_lib
from cacovid_jax.policy import network
from tests.models import towers

LLAVA = llava_onevision.LlavaOnevisionConfig.tiny()
QWEN = qwen2_5_vl.Qwen2_5VLConfig.tiny()


def counted(function, *args):
  """Returns the operations of all matrix products of a function."""
  return walk(jax.make_jaxpr(function)(*args).jaxpr)


def walk(jaxpr):
  total = 0
  for equation in jaxpr.eqns:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
      (contracted, _), _ = params["dimension_numbers"]
      left = equation.invars[0].aval.shape
      inner = math.prod(left[axis] for axis in contracted)
      total += 2 * inner * math.prod(equation.outvars[0].aval.shape)
    elif name == "scan":
      total += params["length"] * walk(params["jaxpr"].jaxpr)
    elif name == "cond":
      # The dearer branch is the caller's business.
      total += max(walk(branch.jaxpr) for branch in params["branches"])
    else:
      for value in params.values():
        inner = getattr(value, "jaxpr", value)
        if hasattr(inner, "eqns"):
          total += walk(inner)
  return total


def shapes_of(config):
  model = checkpoints.make_model(config)
  return model, checkpoints.param_shapes(config)


def prompt(config, rows):
  return (
    jax.ShapeDtypeStruct((1, rows, config.text.hidden_size), jnp.float32),
    jnp.arange(rows)[None, None],
    jnp.array([rows]),
  )


@pytest.mark.parametrize("config", [LLAVA, QWEN], ids=["llava", "qwen"])
def test_a_prefill_is_its_matrix_products(config):
  model, params = shapes_of(config)
  x, positions, lengths = prompt(config, 100)
  positions = jnp.broadcast_to(positions, (1, model.num_position_rows, 100))

  def prefill(params, x):
    return model.prefill(params, x, positions, lengths, cache_length=100)[0]

  rows = [100] * config.text.num_layers
  # Angles are a product as well, of one value each.
  angles = counted(prefill, params, x) - cost.prefill_flops(config.text, rows)
  assert 0 <= angles <= 2 * 3 * 100 * config.text.head_dim


def test_one_more_token_reads_the_cache():
  model, params = shapes_of(LLAVA)
  cfg = LLAVA.text
  shape = (cfg.num_layers, 1, 41, cfg.num_kv_heads, cfg.head_dim)

  def step(params, keys):
    from cacovid_jax.models import qwen2

    cache = qwen2.Cache(keys, keys, jnp.array([40]))
    ids, where = jnp.array([3]), jnp.array([[40]])
    return model.decode_step(params, ids, where, cache)[0]

  found = counted(step, params, jax.ShapeDtypeStruct(shape, jnp.float32))
  expected = cost.decode_flops(cfg, [40] * cfg.num_layers)
  # The cache's rows and the token itself may be two products.
  assert abs(found - expected) <= 4 * cfg.num_layers * 32 * 2 + 2 * 8


def test_what_cannot_be_spared():
  """Of a prompt of three rows, six of nine pairs in each layer are visible;
  one more token reads all weights of the decoder but for the embeddings."""
  cfg = LLAVA.text
  whole = cost.prefill_flops(cfg, [3] * cfg.num_layers)
  spared = whole - cost.prefill_flops(cfg, [3] * cfg.num_layers, causal=True)
  heads = cfg.num_heads * cfg.head_dim
  assert spared == cfg.num_layers * (9 - 6) * 4 * heads
  _, params = shapes_of(LLAVA)
  count = sum(leaf.size for leaf in jax.tree.leaves(params["language_model"]))
  # Without biases and norms, too.
  count -= cfg.num_layers * (2 * heads + 2 * cfg.hidden_size) + cfg.hidden_size
  count -= cfg.vocab_size * cfg.hidden_size
  assert cost.decode_bytes(cfg, [0] * cfg.num_layers, "bfloat16") == 2 * count


def test_llava_tower_is_its_matrix_products():
  model, params = shapes_of(LLAVA)
  size = LLAVA.vision.image_size
  pixels = jax.ShapeDtypeStruct((3, size, size, 3), jnp.float32)
  found = counted(towers.features(model), params, pixels)
  grid = model.grid(3, size, size)
  assert found == cost.tower_flops(LLAVA, grid)  # Pooling has none.


def test_qwen_tower_is_its_matrix_products():
  model, params = shapes_of(QWEN)
  # Three windows a slice, the last one half as wide: padded to a whole one.
  grid = (2, 2, 5)
  layout = model.layout(grid)
  count = math.prod(grid) * QWEN.vision.patches_per_token
  patches = jax.ShapeDtypeStruct((count, QWEN.vision.patch_values), jnp.float32)
  found = counted(
    lambda p, x: towers.features(model)(p, x, layout), params, patches
  )
  # The walker takes the dearer branch, whole slices, in every layer.
  every = dataclasses.replace(
    QWEN, vision=dataclasses.replace(QWEN.vision, full_layers=(0, 1, 2))
  )
  rest = found - cost.tower_flops(every, grid)
  assert 0 <= rest <= 2 * 2 * count * QWEN.vision.head_dim
  # Windows: 6 of 2 x 2 tokens of 4 patches, instead of 2 slices of 10 tokens.
  saved = 4 * 32 * (2 * 40**2 - 6 * 16**2) * 2
  assert cost.tower_flops(every, grid) - cost.tower_flops(QWEN, grid) == saved


def test_a_policy_is_its_matrix_products():
  config = network.PolicyConfig(llm=LLAVA.text, num_halvings=2)
  policy, grid = network.Policy(config), (3, 2, 2)
  x = jax.ShapeDtypeStruct((30, 32), jnp.float32)
  args = jnp.arange(30)[None], 5 + jnp.arange(12), grid, 30
  params = jax.eval_shape(lambda x: policy.init(jax.random.key(0), x, *args), x)
  found = counted(lambda p, x: policy.apply(p, x, *args), params, x)
  expected = cost.policy_flops(config, 30, grid)
  # Means of frames may be products, too.
  assert 0 <= found - expected <= 2 * 30 * 8 + 2 * 3 * 12 * 32
  leaves = jax.tree.leaves(params)
  assert cost.policy_bytes(config) == 4 * sum(
    math.prod(leaf.shape) for leaf in leaves
  )
  # The ratio's map is of 4 channels, that of changes square.
  more = dict(budget_embedding=2, frame_residual=True)
  own = cost.policy_bytes(dataclasses.replace(config, **more))
  assert own - cost.policy_bytes(config) == 4 * (4 * 32 + 32 * 32)


def test_weights_are_those_on_each_device():
  params = jax.tree.map(
    lambda leaf: np.zeros(leaf.shape, leaf.dtype),
    checkpoints.param_shapes(LLAVA),
  )
  assert cost.weight_bytes(LLAVA, jnp.float32) == sum(
    leaf.nbytes for leaf in jax.tree.leaves(params)
  )
  mesh = mesh_lib.make_mesh(1, 2)
  placed = mesh_lib.shard_base_params(params, mesh)
  on_first = sum(
    shard.data.nbytes
    for leaf in jax.tree.leaves(placed)
    for shard in leaf.addressable_shards
    if shard.device == jax.devices()[0]
  )
  assert cost.weight_bytes(LLAVA, jnp.float32, 2) == on_first


def test_released_weights():
  """15.2 GiB and 6.99 GiB in bfloat16, of published parameter counts."""
  config = llava_onevision.LlavaOnevisionConfig.llava_onevision_7b()
  assert cost.weight_bytes(config, jnp.bfloat16) == pytest.approx(
    2 * 8.03e9, rel=0.01
  )
  config = qwen2_5_vl.Qwen2_5VLConfig.qwen2_5_vl_3b()
  assert cost.weight_bytes(config, jnp.bfloat16) == pytest.approx(
    2 * 3.75e9, rel=0.01
  )


def test_the_cache_is_what_a_prefill_returns():
  model, params = shapes_of(LLAVA)
  x, positions, lengths = prompt(LLAVA, 20)
  _, cache, _ = jax.eval_shape(
    lambda p, x: model.prefill(p, x, positions, lengths, cache_length=25),
    params, x,
  )  # fmt: skip
  expected = sum(
    math.prod(leaf.shape) * leaf.dtype.itemsize
    for leaf in (cache.keys, cache.values)
  )
  rows = [25] * LLAVA.text.num_layers
  assert cost.kv_bytes(LLAVA.text, rows, jnp.float32) == expected
  halved = cost.kv_bytes(LLAVA.text, rows, jnp.float32, model_shards=2)
  assert halved == expected // 2
  # Two heads cannot be shared by three.
  thirds = cost.kv_bytes(LLAVA.text, rows, jnp.float32, model_shards=3)
  assert thirds == expected


def test_a_compiled_prefill_needs_about_what_is_said():
  """Of a wider model: in a tiny one, constants outweigh activations."""
  text = dataclasses.replace(
    LLAVA.text, hidden_size=128, intermediate_size=512, head_dim=32
  )
  config = dataclasses.replace(LLAVA, text=text)
  model, params = shapes_of(config)
  x, positions, lengths = prompt(config, 256)

  def prefill(params, x):
    return model.prefill(params, x, positions, lengths, cache_length=264)

  found = jax.jit(prefill).lower(params, x).compile().memory_analysis()
  cache = cost.kv_bytes(text, [256] * text.num_layers, jnp.float32)
  expected = cost.prefill_bytes(text, 256, jnp.float32) + cache
  assert 0.5 * expected <= found.temp_size_in_bytes <= 2 * expected


def test_memory_adds_up():
  found = cost.memory(
    LLAVA,
    grid=(4, 4, 4),
    prompt_rows=80,
    new_tokens=3,
    batch=2,
    dtype=jnp.float32,
  )
  assert found.features == 2 * 64 * 32 * 4
  assert found.prompts == 2 * 80 * 32 * 4
  # 3 layers, 2 heads of 8 values, keys and values, 80 rows and 82.
  assert found.cache == 2 * 3 * 2 * 2 * 8 * 4 * (80 + 82)
  assert found.total == sum(tuple(found))


def test_tokens_by_layer():
  grid, rows = (4, 4, 4), cost.video_rows
  assert rows(None, 3, grid, 0.25) == [64, 64, 64]
  assert rows(compressors.get("uniform"), 3, grid, 0.1) == [6, 6, 6]
  # 96 of 192 tokens and layers: 64 in the first, the rest shared.
  assert rows(compressors.get("fastv"), 3, grid, 0.5) == [64, 16, 16]
  # Depends on the video; in the mean 28 tokens and layers of 192.
  assert rows(compressors.get("framefusion"), 3, grid, 0.15) == [10, 9, 9]


def test_masked_tokens_are_computed():
  grid, rows = (4, 4, 4), cost.computed_rows
  exact = compressors.get("framefusion")
  assert rows(exact, 3, grid, 0.15) == [64, 64, 64]
  bucketed = compressors.get("framefusion", mode="bucketed")
  assert rows(bucketed, 3, grid, 0.15) == [10, 9, 9]
  assert rows(compressors.get("fastv"), 3, grid, 0.5) == [64, 16, 16]


def test_features_on_disk():
  assert cost.feature_bytes(LLAVA, (4, 4, 4)) == 4 * 64 * 32
  # Attention and the mean key of a head of 8 values beside them.
  assert cost.feature_bytes(LLAVA, (4, 4, 4), True) == 4 * 64 * (32 + 1 + 8)
  # With two maps of the tower's layers.
  qwen3 = qwen3_vl.Qwen3VLConfig.tiny()
  assert cost.feature_bytes(qwen3, (4, 4, 4)) == 3 * 4 * 64 * 32


def test_time_is_work_over_speed():
  speed = cost.Speed(flops=1e12, bytes=1e9)
  assert speed.seconds(3e12) == 3.0
  assert speed.seconds(3e12, steps=10, step_bytes=2 * 10**8) == 5.0
  measured = cost.measure_speed(jnp.float32, size=64, repeats=2)
  assert np.isfinite(measured).all() and min(measured) > 0


@pytest.mark.parametrize("config", [LLAVA, QWEN], ids=["llava", "qwen"])
def test_a_compiled_tower_needs_about_what_is_said(config):
  """Of a wider tower, for the same reason."""
  vision = dataclasses.replace(
    config.vision, hidden_size=256, intermediate_size=1024, num_heads=4
  )
  config = dataclasses.replace(config, vision=vision)
  model, params = shapes_of(config)
  if hasattr(vision, "image_size"):
    shape = (8, vision.image_size, vision.image_size, 3)
    grid, more = model.grid(*shape[:3]), ()
  else:
    grid = (2, 8, 8)
    more = (model.layout(grid),)
    shape = (128 * vision.patches_per_token, vision.patch_values)
  pixels = jax.ShapeDtypeStruct(shape, jnp.float32)

  def encode(params, pixels):
    return towers.features(model)(params, pixels, *more)

  found = jax.jit(encode).lower(params, pixels).compile().memory_analysis()
  expected = cost.tower_bytes(config, grid, jnp.float32)
  needed = found.temp_size_in_bytes + 4 * math.prod(shape)
  assert 0.5 * expected <= needed <= 2 * expected
