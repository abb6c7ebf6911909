"""What a model costs before it runs: operations, bytes, expected time.

Counted from sizes alone. An operation is one multiplication or one addition of
a matrix product (norms, activations, rotations and the choice of tokens are
left out, below one per cent at the released sizes).

A decoder layer over R rows, of which each sees P:
  2 R D (N H + 2 K H)   queries, keys, values
  2 R N H D             output
  2 R 3 D F             gated MLP
  2 R P 2 N H           attention, both products
A whole prompt has P = R: pairs above the diagonal are counted, as the field
counts them; a kernel that skips them does half of the attention. The head is
2 D V for each row that logits are wanted of, one per prompt.

Axes: R rows of a prompt, D width, F width of the MLP, N heads, K kv heads,
H head dimension, V vocabulary, B batch, T frames.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from cacovid_jax.evals import timing
from cacovid_jax.models import checkpoints, qwen2
from cacovid_jax.parallel import mesh as mesh_lib
from cacovid_jax.policy import network

Grid = tuple[int, int, int]  # (T, H, W)


def _layer_flops(text, rows: int, seen: int) -> int:
  heads, kv_heads = _widths(text)
  weights = text.hidden_size * (
    2 * heads + 2 * kv_heads + 3 * text.intermediate_size
  )
  return 2 * rows * weights + 4 * rows * seen * heads


def _widths(text) -> tuple[int, int]:
  """Returns (N H, K H)."""
  return text.num_heads * text.head_dim, text.num_kv_heads * text.head_dim


def prefill_flops(
  text: qwen2.Qwen2Config, rows: Sequence[int], *, causal: bool = False
) -> int:
  """Returns the operations to the first logits, of `rows` in each layer.

  Those that cannot be spared are fewer: `causal` counts visible pairs alone.
  """
  layers = sum(_layer_flops(text, count, count) for count in rows)
  if causal:
    heads, _ = _widths(text)
    layers -= sum(2 * count * (count - 1) * heads for count in rows)
  return layers + 2 * text.hidden_size * text.vocab_size


def decode_flops(text: qwen2.Qwen2Config, rows: Sequence[int]) -> int:
  """Returns the operations of one more token behind `rows` in each layer."""
  layers = sum(_layer_flops(text, 1, count + 1) for count in rows)
  return layers + 2 * text.hidden_size * text.vocab_size


def decode_bytes(
  text: qwen2.Qwen2Config, rows: Sequence[int], dtype: Any
) -> int:
  """Returns the bytes that one more token reads: each weight once, the cache.

  Of the embeddings it reads one row, which is left out.
  """
  weights = text.num_layers * _layer_flops(text, 1, 0) // 2
  weights += text.hidden_size * text.vocab_size
  return weights * jnp.dtype(dtype).itemsize + kv_bytes(text, rows, dtype)


def policy_flops(config: network.PolicyConfig, rows: int, grid: Grid) -> int:
  """Returns the operations of scoring one prompt of `rows` rows."""
  # A decoder layer, and by video token and frame an MLP that halves the width.
  width, mlp = config.llm.hidden_size, 0
  for _ in range(config.num_halvings):
    mlp += 2 * width * (width // 2)
    width //= 2
  mlp += 2 * width * 2
  count = math.prod(grid) + grid[0]
  return _layer_flops(config.llm, rows, rows) + count * mlp


def tower_flops(config: Any, grid: Grid) -> int:
  """Returns the operations from one video's pixels to its features."""
  return config.vision.flops(grid, config.text.hidden_size)


def video_rows(
  compressor: Any, num_layers: int, grid: Grid, ratio: float
) -> list[int]:
  """Returns how many video tokens each layer of the language model sees.

  Where it depends on the video (FrameFusion) it is the mean that the ratio
  stands for. A compressor of None keeps every token.
  """
  if compressor is None:
    return [math.prod(grid)] * num_layers
  return compressor.rows_per_layer(num_layers, grid, ratio)


def computed_rows(
  compressor: Any, num_layers: int, grid: Grid, ratio: float
) -> list[int]:
  """Returns how many video tokens each layer computes, masked ones included."""
  if compressor is None:
    return [math.prod(grid)] * num_layers
  return compressor.computed_rows(num_layers, grid, ratio)


def kv_bytes(
  text: qwen2.Qwen2Config,
  rows: Sequence[int],
  dtype: Any,
  *,
  batch: int = 1,
  model_shards: int = 1,
) -> int:
  """Returns the bytes on each device of keys and values of `rows` by layer.

  Heads that `model_shards` devices cannot share evenly are on each of them.
  """
  heads = text.num_kv_heads
  if heads % model_shards == 0:
    heads //= model_shards
  per_row = 2 * heads * text.head_dim * jnp.dtype(dtype).itemsize
  return batch * sum(rows) * per_row


def weight_bytes(config: Any, dtype: Any, model_shards: int = 1) -> int:
  """Returns the bytes of the base model's weights on each device."""
  # Sizes alone decide how weights are split: no device is asked.
  mesh = jax.sharding.AbstractMesh((1, model_shards), ("data", "model"))
  shapes = checkpoints.param_shapes(config)

  def count(shape, spec):
    return math.prod(shape.shape) // (model_shards if "model" in spec else 1)

  counts = jax.tree.map(count, shapes, mesh_lib.partition_specs(shapes, mesh))
  return sum(jax.tree.leaves(counts)) * jnp.dtype(dtype).itemsize


def prefill_bytes(
  text: qwen2.Qwen2Config, rows: int, dtype: Any, *, batch: int = 1
) -> int:
  """Returns about how many bytes a prefill needs beside weights and cache.

  Of one layer: the residual stream twice, its norm in float32, and the larger
  of two states, all of attention or the halves of the MLP. And the logits.
  """
  heads, kv_heads = _widths(text)
  state = max(2 * heads + 2 * kv_heads, 2 * text.intermediate_size)
  per_row = _row_bytes(text.hidden_size, state, dtype)
  return batch * (rows * per_row + 4 * text.vocab_size)


def tower_bytes(config: Any, grid: Grid, dtype: Any) -> int:
  """Returns about how many bytes the tower needs beside its weights."""
  # The pixels as bytes and in float32, and of one layer what `prefill_bytes`
  # counts.
  vision = config.vision
  state = max(4 * vision.hidden_size, vision.mlp_width)
  per_patch = _row_bytes(vision.hidden_size, state, dtype)
  pixels = (1 + 4) * math.prod(vision.input_shape(grid))
  return pixels + vision.num_patches(grid) * per_patch


def _row_bytes(width, state, dtype) -> int:
  itemsize = jnp.dtype(dtype).itemsize
  return width * (2 * itemsize + 4) + state * itemsize


class PromptMemory(NamedTuple):
  """Bytes on one device while a batch of whole prompts is asked."""

  weights: int  # Of the base model.
  policy: int  # Of the policy's weights.
  features: int  # Of the batch's videos with their maps, float32.
  prompts: int  # Embeddings of the batch.
  cache: int  # Keys and values, with the copy that makes room for the answer.
  activations: int  # Of the prefill or the tower, whichever is larger.

  @property
  def total(self) -> int:
    return sum(self)


def memory(
  config: Any,
  *,
  grid: Grid,
  prompt_rows: int,
  new_tokens: int,
  batch: int,
  dtype: Any,
  policy: network.PolicyConfig | None = None,
  model_shards: int = 1,
) -> PromptMemory:
  """Returns what asking a batch of whole prompts takes on each device.

  Sizes are those of the largest video, the longest prompt with it, and the
  longest answer; `model_shards` devices share one model.
  """
  text, itemsize = config.text, jnp.dtype(dtype).itemsize
  width = text.hidden_size
  # Once as prefilled, once with room for the answer.
  layers = [2 * prompt_rows + new_tokens - 1] * text.num_layers
  return PromptMemory(
    weights=weight_bytes(config, dtype, model_shards),
    policy=policy_bytes(policy) if policy else 0,
    features=batch * feature_bytes(config, grid),
    prompts=batch * prompt_rows * width * itemsize,
    cache=kv_bytes(text, layers, dtype, batch=batch, model_shards=model_shards),
    activations=max(
      prefill_bytes(text, prompt_rows, dtype, batch=batch),
      tower_bytes(config, grid, dtype),
    ),
  )


def policy_bytes(config: network.PolicyConfig) -> int:
  """Returns the bytes of a policy's weights, which are float32."""
  shapes = network.shapes(config).items()
  # The third head is not read.
  read = [x for name, x in shapes if not name.startswith("mode_selection/")]
  return 4 * sum(map(math.prod, read))


def feature_bytes(config: Any, grid: Grid, vision_keys: bool = False) -> int:
  """Returns the bytes of one video in the feature cache, in float32.

  Those of the maps that a decoder adds to its layers are among them.
  """
  maps = 1 + checkpoints.make_model(config).num_deep
  vision, per_token = config.vision, maps * config.text.hidden_size
  if vision_keys:  # Of the tower, with its attention.
    per_token += 1 + vision.hidden_size // vision.num_heads
  return 4 * math.prod(grid) * per_token


class Speed(NamedTuple):
  """What a device does in a second."""

  flops: float  # Operations of matrix products.
  bytes: float  # Read from its memory.

  def seconds(self, flops: float, steps: int = 0, step_bytes: int = 0) -> float:
    """Returns the time of `flops`, and of `steps` that read all weights."""
    return flops / self.flops + steps * step_bytes / self.bytes


# Products and copies in one program: its start costs as much as one of them.
_CHAINED = 20


def measure_speed(dtype: Any, size: int = 0, repeats: int = 5) -> Speed:
  """Returns what a square matrix product and a copy reach on this device.

  Of random numbers: a chip multiplies equal ones with less power, and faster.
  """
  large = jax.default_backend() != "cpu"
  # Sides at which one of them takes a millisecond or more.
  size = size or (8192 if large else 1024)
  numbers = jax.random.normal(jax.random.key(0), (size, size)) / size**0.5
  # Of four bytes each: smaller ones are bound by additions.
  wide = jnp.ones((32 if large else 8) * 1024 * size)

  def rate(amount, step, x):
    def chain(x):
      return jax.lax.fori_loop(0, _CHAINED, lambda _, y: step(y, x), x)

    taken = timing.measure(functools.partial(jax.jit(chain), x), repeats).ms
    return 1e3 * _CHAINED * amount / taken

  return Speed(
    flops=rate(2 * size**3, jnp.matmul, numbers.astype(dtype)),
    bytes=rate(2 * wide.nbytes, lambda y, _: y + 1, wide),
  )
