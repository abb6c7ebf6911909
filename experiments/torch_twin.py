"""A hand-written PyTorch engine of LLaVA-OneVision and the policy: the peer.

What a good serving engine does: queries, keys and values in one product, gate
and up in one, each half of a layer compiled, every stage one CUDA graph,
cuDNN's or flash attention. On a CPU the same code runs eagerly, which is how it
is compared with ours. Weights are those of a checkpoint's files.

Axes: B batch, L rows of a prompt, D width, T frames, P patches, N video tokens,
S rows of a cache, V vocabulary.
"""

import functools
import pathlib

import torch
from safetensors import torch as safetensors_torch
from torch.nn import functional

from cacovid_jax.models import llava_onevision

linear = functional.linear
_TOWER, _TEXT = "vision_tower.vision_model", "language_model.model"


def rms(x, weight, eps):
  """Returns RMSNorm of x float[..., D]."""
  return functional.rms_norm(x, x.shape[-1:], weight, eps)


def _rotate(x, cos, sin):
  first, second = x.chunk(2, dim=-1)
  return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def _before(x, cos, sin, weights, heads, eps):
  """Returns rotated q, k and v, float[B, heads, L, H], of a decoder layer."""
  norm, matrix, bias = weights
  y = linear(rms(x, norm, eps), matrix, bias)
  y = y.unflatten(-1, (sum(heads), -1)).transpose(1, 2)
  q, k, v = y.split(heads, dim=1)
  return _rotate(q, cos, sin), _rotate(k, cos, sin), v.contiguous()


def _after(x, attended, weights, eps):
  """Returns the residual stream behind a decoder layer's MLP."""
  out, norm, gate_up, down = weights
  x = x + linear(attended.transpose(1, 2).flatten(2), out)
  gate, up = linear(rms(x, norm, eps), gate_up).chunk(2, dim=-1)
  return x + linear(functional.silu(gate) * up, down)


def _tower_before(x, weights, heads, eps):
  norm, shift, matrix, bias = weights
  y = functional.layer_norm(x, x.shape[-1:], norm, shift, eps)
  y = linear(y, matrix, bias).unflatten(-1, (3, heads, -1))
  return y.permute(2, 0, 3, 1, 4).unbind()


def _tower_after(x, attended, weights, eps):
  out, bias, norm, shift, fc1, bias1, fc2, bias2 = weights
  x = x + linear(attended.transpose(1, 2).flatten(2), out, bias)
  y = functional.layer_norm(x, x.shape[-1:], norm, shift, eps)
  y = functional.gelu(linear(y, fc1, bias1), approximate="tanh")
  return x + linear(y, fc2, bias2)


def attend(q, k, v, **options):
  """Returns attention float[B, heads, L, H] by the fastest kernel there is."""
  known = torch.nn.attention.SDPBackend
  kernels = [known.CUDNN_ATTENTION, known.FLASH_ATTENTION]
  kernels += [known.EFFICIENT_ATTENTION, known.MATH]
  with torch.nn.attention.sdpa_kernel(kernels, set_priority=True):
    return functional.scaled_dot_product_attention(
      q, k, v, enable_gqa=q.shape[1] != k.shape[1], **options
    )


def heads_of(policy, frames, rows, eps):
  """Returns (frame, token) scores of a policy's rows float[N, D].

  `policy` holds its tensors by their public names.
  """

  def mlp(name, h):
    for i in range(0, 2 * len(policy), 2):
      stem = f"compression_policy.{name}.{i}"
      h = linear(h, policy[f"{stem}.weight"], policy[f"{stem}.bias"])
      if f"compression_policy.{name}.{i + 2}.weight" not in policy:
        return h.float()
      h = functional.silu(h)

  norm = policy["compression_policy.layernorm.weight"]
  means = rows.unflatten(0, (frames, -1)).float().mean(1).to(rows.dtype)
  return (
    mlp("frame_compress", rms(means, norm, eps)),
    mlp("token_compress", rms(rows, norm, eps)),
  )


def kept_rows(scores, num_keep, text, video):
  """Returns int64 rows of a prompt: text, and the tokens of largest gap.

  Of the rows of text and of video tokens. A plain top-k, which does less than
  the method's rule.
  """
  gap = scores[1][:, 1] - scores[1][:, 0]
  kept = video[gap.topk(num_keep).indices]
  return torch.cat([text, kept]).sort().values


class Twin:
  """The engine; stages are functions of tensors on its device."""

  def __init__(self, directory, config, policy, device, dtype):
    """Reads the weights of a checkpoint's folder.

    `config` is a `LlavaOnevisionConfig`; `policy` holds tensors by their public
    names, `dtype` is that of weights and products.
    """
    self.config, self._policy, self._dtype = config, policy, dtype
    self.device = torch.device(device)
    self._functions = _before, _after, _tower_before, _tower_after
    if self.device.type == "cuda":
      # One program for each length of prompts.
      torch._dynamo.config.recompile_limit = 64
      torch._dynamo.config.accumulated_recompile_limit = 512
      compiled = functools.partial(torch.compile, dynamic=False)
      self._functions = tuple(map(compiled, self._functions))
    tensors = {}
    for path in pathlib.Path(directory).glob("*.safetensors"):
      found = safetensors_torch.load_file(path)
      tensors |= {k: v.to(self.device, dtype) for k, v in found.items()}
    self._read(tensors)

  def _read(self, tensors):
    """Takes the weights by their names, fused where that saves a product."""
    weight, bias = (".weight",), (".bias",)

    def pick(stem, names, kinds=(*weight, *bias)):
      return [tensors[f"{stem}.{x}{kind}"] for x in names for kind in kinds]

    def fused(stem, names, kinds=(*weight, *bias)):
      return [torch.cat(pick(stem, names, (kind,))) for kind in kinds]

    qkv = [f"self_attn.{x}_proj" for x in "qkv"]
    self._layers, self._tower, config = [], [], self.config
    for i in range(config.text.num_layers):
      at = f"{_TEXT}.layers.{i}"
      norms = "input_layernorm", "post_attention_layernorm"
      before, after = pick(at, norms, weight)
      out, down = pick(at, ("self_attn.o_proj", "mlp.down_proj"), weight)
      gate_up = fused(at, ("mlp.gate_proj", "mlp.up_proj"), weight)
      attention = [before, *fused(at, qkv)]
      self._layers.append((attention, [out, after, *gate_up, down]))
    for i in range(config.vision.num_layers):
      at = f"{_TOWER}.encoder.layers.{i}"
      names = "self_attn.out_proj", "layer_norm2", "mlp.fc1", "mlp.fc2"
      attention = [*pick(at, ("layer_norm1",)), *fused(at, qkv)]
      self._tower.append((attention, pick(at, names)))
    at = f"{_TOWER}.embeddings"
    self._patches = pick(at, ("patch_embedding",))
    self._patches += pick(at, ("position_embedding",), weight)
    self._projector = pick("multi_modal_projector", ("linear_1", "linear_2"))
    self.newlines = tensors["image_newline"][None]
    self._norm, self._table = pick(_TEXT, ("norm", "embed_tokens"), weight)
    head = "language_model.lm_head.weight"
    self._head = tensors.get(head, self._table)
    taps = llava_onevision.pooling_taps(config.vision.side)
    low, high, share = map(torch.from_numpy, taps)
    pooling, rows = torch.zeros(len(low), config.vision.side), range(len(low))
    pooling[rows, low] += 1 - share
    pooling[rows, high] += share
    self._pooling = pooling.to(self.device, self._dtype)

  def encode(self, pixels, grid):
    """Returns (features float[N, D], ()) of pixels float[T, h, w, 3]."""
    del grid  # The same in all frames.
    vision, (matrix, shift, table) = self.config.vision, self._patches
    side, size = vision.side, vision.patch_size
    x = pixels[:, : side * size, : side * size].to(self._dtype)
    x = x.unflatten(1, (side, size)).unflatten(3, (side, size))
    x = x.permute(0, 1, 3, 5, 2, 4).flatten(3).flatten(1, 2)
    x = linear(x, matrix.flatten(1), shift) + table
    _, _, before, after = self._functions
    for first, second in self._tower:
      q, k, v = before(x, first, vision.num_heads, vision.layer_norm_eps)
      x = after(x, attend(q, k, v), second, vision.layer_norm_eps)
    one, bias1, two, bias2 = self._projector
    y = linear(functional.gelu(linear(x, one, bias1)), two, bias2)
    y = y.unflatten(1, (side, side))
    pooled = torch.einsum("pa,tabd,qb->tpqd", self._pooling, y, self._pooling)
    return pooled.flatten(0, 2), ()

  def tokens(self, ids):
    """Returns embeddings float[..., D] of int64[...]."""
    return self._table[ids]

  def _angles(self, positions):
    """Returns (cos, sin) float[L, H / 2] of positions int64[L]."""
    text = self.config.text
    at = torch.arange(0, text.head_dim, 2, device=self.device)
    rates = text.rope_theta ** (-at.float() / text.head_dim)
    phase = positions[:, None].float() * rates
    return phase.cos().to(self._dtype), phase.sin().to(self._dtype)

  def _layer(self, x, turn, weights, attention):
    """Returns (x, k, v) behind a decoder layer."""
    text, (before, after, _, _) = self.config.text, self._functions
    heads = text.num_heads, text.num_kv_heads, text.num_kv_heads
    q, k, v = before(x, *turn, weights[0], heads, text.rms_norm_eps)
    x = after(x, attention(q, k, v), weights[1], text.rms_norm_eps)
    return x, k, v

  def scores(self, x, positions, video, frames):
    """Returns (frame float32[T, 2], token float32[N, 2]) of one prompt.

    `video` int64[N] are the rows of its T frames.
    """
    # Before its training, the policy's layer is the first one.
    y, _, _ = self._layer(x, self._angles(positions), self._layers[0], attend)
    eps = self.config.text.rms_norm_eps
    return heads_of(self._policy, frames, y[0, video], eps)

  def prefill(self, x, positions, room=0):
    """Returns (logits float32[B, V], cache) with room for more rows."""
    turn, cache = self._angles(positions), []
    causal = functools.partial(attend, is_causal=True)
    for weights in self._layers:
      x, *own = self._layer(x, turn, weights, causal)
      cache.append(
        [functional.pad(a, (0, 0, 0, room)) if room else a for a in own]
      )
    return self._logits(x), cache

  def decode(self, ids, position, at, cache):
    """Returns logits float32[B, V] after tokens int64[B] at a position.

    int64[1] as is `at`, the row of the cache that they are written to.
    """
    x, turn = self.tokens(ids)[:, None], self._angles(position)
    room = cache[0][0].shape[2]
    visible = (torch.arange(room, device=at.device) <= at)[None, None, None]

    def over_cache(keys, values, q, k, v):
      keys.index_copy_(2, at, k)
      values.index_copy_(2, at, v)
      # Queries of one kv head are rows of one product.
      grouped = q.reshape(len(q), keys.shape[1], -1, q.shape[-1])
      return attend(grouped, keys, values, attn_mask=visible).reshape(q.shape)

    for weights, earlier in zip(self._layers, cache, strict=True):
      attention = functools.partial(over_cache, *earlier)
      x, _, _ = self._layer(x, turn, weights, attention)
    return self._logits(x)

  def _logits(self, x):
    last = rms(x[:, -1], self._norm, self.config.text.rms_norm_eps)
    return linear(last, self._head).float()

  def captured(self, function):
    """Returns f() that replays the function's CUDA graph; itself on a CPU."""
    if self.device.type != "cuda":
      return function
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
      for _ in range(3):  # Compiles, and lets kernels choose their algorithms.
        function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
      out = function()

    def replay():
      graph.replay()
      return out

    return replay
