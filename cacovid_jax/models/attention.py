"""One attention function for every model, with a choice of kernels.

Axes: B batch, T queries, S keys, N query heads, K kv heads (K divides N; query
head i reads kv head i // (N / K)), H head dimension.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from cacovid_jax import config_limits

# Score of a key that is not visible.
_LOWEST = np.finfo(np.float32).min
_product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
# Query rows per step once a whole T x S map would be too large.
_CHUNK = 512
_LARGEST_MAP = 2048 * 2048
# Queries whose rows `attention_received` holds at a time.
_RECEIVED_CHUNK = 1024
# Row blocks of a map: they stay in a CPU's cache, and each of a causal map is
# computed up to its own diagonal only, 5/8 of the whole.
_BLOCKS = 4
_BLOCK_ROWS = 128
# Splash wants sequences in whole blocks and a head in whole lanes.
_LANES = 128


def attention(
  q, k, v, *, causal=False, lengths=None, mask=None, backend="auto"
):
  """Returns softmax(q k / sqrt(H)) v, float[B, T, N, H].

  Of q float[B, T, N, H], k and v float[B, S, K, H]. No backend holds a T x S
  map of long sequences in memory, `mask` apart. Queries without any visible key
  give finite values without meaning. Where an axis `model` of a mesh is left to
  the compiler, which cannot split kernels, each of its devices computes heads.

  Args:
    causal: static; True lets query t see keys up to t only.
    lengths: int32[B] number of valid keys of each row, at least 1, which come
      first (right padding); None when all are valid.
    mask: bool[B, T, S], True where a query may see a key; None for all.
    backend: one of `config_limits.BACKENDS`. "auto" chooses by platform and
      dtype; a kernel that cannot do what is asked (cuDNN in float32, splash
      with a mask) gives way to "xla".
  """
  if backend not in (known := config_limits.BACKENDS):
    raise ValueError(f"attention backend {backend!r} is not one of {known}")
  if backend == "auto":
    backend = flash_backend()
    # Below one block, padding costs more than the kernel saves.
    if backend == "splash" and q.shape[1] < _LANES:
      backend = "xla"
  if backend == "cudnn" and _cudnn_can(q, k, mask):
    return _by_heads(_cudnn, causal, q, k, v, lengths, mask)
  if backend == "splash" and mask is None:
    return _by_heads(_splash, causal, q, k, v, lengths)
  return _xla(q, k, v, causal, lengths, mask)


def _by_heads(kernel, causal, q, k, v, *seen):
  """Returns kernel(q, k, v, causal, *seen), mapped by hand where it must be.

  Devices of the axis `model` compute heads of their own, if it divides them.
  Where it does not divide kv heads, these are repeated until it does.
  """

  def run(q, k, v, *seen):
    return kernel(q, k, v, causal, *seen)

  if not (axes := _shared_axes()):
    return run(q, k, v, *seen)
  size = jax.sharding.get_abstract_mesh().shape["model"]
  heads = P(None, None, "model") if q.shape[2] % size == 0 else P()
  if heads != P():
    times = size // math.gcd(k.shape[2], size)
    k, v = (jnp.repeat(x, times, axis=2) for x in (k, v))
  mapped = jax.shard_map(
    run,
    in_specs=(heads, heads, heads, *[P()] * len(seen)),
    out_specs=heads,
    axis_names=axes,
    check_vma=False,  # As of `mesh.map_over_data`.
  )
  return mapped(q, k, v, *seen)


def _shared_axes() -> set[str]:
  """Returns the mesh's axes over which the compiler splits what runs here."""
  mesh = jax.sharding.get_abstract_mesh()
  return {axis for axis in mesh.auto_axes if mesh.shape[axis] > 1}


def _cudnn_can(q, k, mask):
  num_queries, head_dim = q.shape[1], q.shape[3]
  # cuDNN differentiates a masked map of even sides only.
  even = num_queries % 2 == 0 and k.shape[1] % 2 == 0
  return (
    q.dtype in (jnp.bfloat16, jnp.float16)
    and head_dim % 8 == 0
    and head_dim <= 128
    and (mask is None or even)
  )


@functools.cache
def flash_backend() -> str:
  """Returns what "auto" stands for on this device, of long sequences."""
  platform = jax.default_backend()
  if platform == "tpu":
    return "splash"
  if platform == "gpu":
    device = jax.devices()[0]
    is_nvidia = "cuda" in device.client.platform_version
    if is_nvidia and float(device.compute_capability) >= 8.0:
      return "cudnn"
  return "xla"


def _visible(num_queries, num_keys, causal, lengths, mask, start=0):
  """Returns bool[B or 1, T, S] of visible keys, or None when all are.

  Of some queries, the first of which is number `start`.
  """
  seen = [] if mask is None else [mask]
  keys = jnp.arange(num_keys)[None, None, :]
  if causal:
    seen.append(keys <= jnp.arange(num_queries)[None, :, None] + start)
  if lengths is not None:
    seen.append(keys < lengths[:, None, None])
  return functools.reduce(jnp.logical_and, seen) if seen else None


def _xla(q, k, v, causal, lengths, mask):
  """All queries at once, or in chunks when the map would be too large."""
  num_queries, num_keys = q.shape[1], k.shape[1]
  if num_queries * num_keys <= _LARGEST_MAP:
    if mask is None and num_keys == num_queries >= _BLOCK_ROWS:
      return _in_blocks(q, k, v, causal, lengths)
    visible = _visible(num_queries, num_keys, causal, lengths, mask)
    return _dense(q, k, v, visible)

  num_chunks = -(-num_queries // _CHUNK)
  extra = num_chunks * _CHUNK - num_queries

  def chunks(x):  # [B, T, ...] -> [chunks, B, _CHUNK, ...]
    x = jnp.pad(x, [(0, 0), (0, extra)] + [(0, 0)] * (x.ndim - 2))
    x = x.reshape(x.shape[0], num_chunks, _CHUNK, *x.shape[2:])
    return jnp.moveaxis(x, 1, 0)

  # Recomputed in a backward pass: its inputs are small, its maps are not.
  @jax.checkpoint
  def one_chunk(chunk):
    number, q, mask = chunk
    start = number * _CHUNK
    visible = _visible(_CHUNK, num_keys, causal, lengths, mask, start)
    return _dense(q, k, v, visible)

  masks = None if mask is None else chunks(mask)
  out = jax.lax.map(one_chunk, (jnp.arange(num_chunks), chunks(q), masks))
  out = jnp.moveaxis(out, 0, 1)
  return out.reshape(q.shape[0], -1, *q.shape[2:])[:, :num_queries]


def _in_blocks(q, k, v, causal, lengths):
  """Self-attention in row blocks, each with the keys that it can see."""
  length = q.shape[1]
  size = -(-length // _BLOCKS)
  blocks = []
  for start in range(0, length, size):
    end = min(start + size, length)
    keys = end if causal else length
    visible = _visible(end - start, keys, causal, lengths, None, start)
    blocks.append(_dense(q[:, start:end], k[:, :keys], v[:, :keys], visible))
  return jnp.concatenate(blocks, axis=1)


def _dense(q, k, v, visible):
  batch, num_queries, num_heads, head_dim = q.shape
  num_kv_heads, groups = k.shape[2], num_heads // k.shape[2]
  # Heads come first and a group's queries below each other, so that both
  # products are plain batched matrix products: with the heads left between
  # the other axes XLA's CPU backend is up to 20 times slower.
  q = q.reshape(batch, num_queries, num_kv_heads, groups, head_dim)
  q = q.transpose(0, 2, 3, 1, 4)  # [B, K, N / K, T, H]
  q = q.reshape(batch, num_kv_heads, groups * num_queries, head_dim)
  k, v = (x.swapaxes(1, 2) for x in (k, v))  # [B, K, S, H]
  scores = _product("BKRH,BKSH->BKRS", q, k) * head_dim**-0.5
  scores = scores.reshape(batch, num_kv_heads, groups, num_queries, -1)
  if visible is not None:
    scores = jnp.where(visible[:, None, None], scores, _LOWEST)
  probs = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
  probs = probs.reshape(batch, num_kv_heads, groups * num_queries, -1)
  out = jnp.einsum("BKRS,BKSH->BKRH", probs, v)
  out = out.reshape(batch, num_kv_heads, groups, num_queries, head_dim)
  out = out.transpose(0, 3, 1, 2, 4)  # [B, T, K, N / K, H]
  return out.reshape(batch, num_queries, num_heads, head_dim)


def _cudnn(q, k, v, causal, lengths, mask):
  if mask is not None:
    mask = _visible(q.shape[1], k.shape[1], causal, lengths, mask)
    options = dict(mask=mask[:, None])
  else:
    options = dict(is_causal=causal)
  num_queries = q.shape[1]
  if lengths is not None and mask is None:
    options |= dict(key_value_seq_lengths=lengths.astype(jnp.int32))
    # It differentiates even sides only; what has lengths may be trained.
    q, k, v = map(_padded_to_even, (q, k, v))
  out = jax.nn.dot_product_attention(q, k, v, implementation="cudnn", **options)
  return out[:, :num_queries]


def _padded_to_even(x):
  return jnp.pad(x, [(0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0)])


def _splash(q, k, v, causal, lengths, interpret=False):
  """The TPU kernel; `interpret` runs it on any platform, slowly."""
  # Here: an experimental part of JAX that the other platforms never need.
  from jax.experimental.pallas.ops.tpu import splash_attention as splash

  batch, num_queries, num_heads, head_dim = q.shape
  num_keys = k.shape[1]
  if lengths is None:
    lengths = jnp.full(batch, num_keys, jnp.int32)
  scale = head_dim**-0.5  # The kernel does not scale.
  q = (q.astype(jnp.float32) * scale).astype(q.dtype)
  q, k, v = (_heads_first_in_blocks(x) for x in (q, k, v))
  shape = (q.shape[2], k.shape[2])
  mask = (splash.CausalMask if causal else splash.FullMask)(shape)
  kernel = splash.make_splash_mha(
    splash.MultiHeadMask([mask] * num_heads),
    block_sizes=splash.BlockSizes(**_block_sizes(*shape)),
    head_shards=1, q_seq_shards=1, interpret=interpret,
  )  # fmt: skip

  def one(q, k, v, length):
    # Keys behind the length are another segment than every query, and key 0
    # is always valid, so no row of the softmax is empty.
    behind = (jnp.arange(shape[1]) >= length).astype(jnp.int32)
    segments = splash.SegmentIds(jnp.zeros(shape[0], jnp.int32), behind)
    return kernel(q, k, v, segment_ids=segments)

  out = jax.vmap(one)(q, k, v, lengths)  # [B, N, T, H], padded
  return out[:, :, :num_queries, :head_dim].transpose(0, 2, 1, 3)


def _heads_first_in_blocks(x):
  """Returns float[B, N, T, H] of x float[B, T, N, H], padded to 128s."""
  extra = [-x.shape[axis] % _LANES for axis in (1, 3)]
  x = jnp.pad(x, [(0, 0), (0, extra[0]), (0, 0), (0, extra[1])])
  return x.transpose(0, 2, 1, 3)


def _block_sizes(num_queries, num_keys):
  def blocks(length, *names):
    size = next(size for size in (512, 256, _LANES) if length % size == 0)
    return dict.fromkeys((f"block_{name}" for name in names), size)

  keys = ("kv", "kv_compute", "kv_dkv", "kv_dkv_compute", "kv_dq")
  return blocks(num_queries, "q", "q_dkv", "q_dq") | blocks(num_keys, *keys)


def attention_over_cache(q, k, v, cache_k, cache_v, lengths):
  """Returns float[B, 1, N, H]: one new query over a cache and its own key.

  The cache float[B, S, K, H], of which `lengths` int32[B] rows are valid, comes
  without the new k, v [B, 1, K, H]: a scan over layers never copies it.
  """
  old, new = _row_scores(q, cache_k), _row_scores(q, k)
  scores = jnp.concatenate([_valid(old, lengths), new], axis=-1)
  scores = scores * q.shape[-1] ** -0.5
  probs = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
  out = jnp.einsum("BKGS,BSKH->BKGH", probs[..., :-1], cache_v)
  out += jnp.einsum("BKGS,BSKH->BKGH", probs[..., -1:], v)
  return out.reshape(q.shape)


def attention_in_cache(q, cache_k, cache_v, lengths):
  """Returns float[B, 1, N, H]: one query over a cache with its own key.

  Of the cache float[B, S, K, H], `lengths` int32[B] rows are valid.
  """
  scores = _valid(_row_scores(q, cache_k) * q.shape[-1] ** -0.5, lengths)
  probs = jax.nn.softmax(scores, axis=-1).astype(cache_v.dtype)
  if flash_backend() != "cudnn" or _shared_axes():
    return jnp.einsum("BKGS,BSKH->BKGH", probs, cache_v).reshape(q.shape)
  batch, num_kv_heads, groups, num_keys = probs.shape
  # One product of all queries and all kv heads, of which each query then takes
  # its own: cuBLAS shares a long sum among a GPU's cores in a single product,
  # and not in a small one for each head.
  every = _product(
    "BRS,BSD->BRD",
    probs.reshape(batch, -1, num_keys),
    cache_v.reshape(batch, num_keys, -1),
  ).reshape(batch, num_kv_heads, groups, num_kv_heads, -1)
  own = jnp.eye(num_kv_heads, dtype=bool)[:, None, :, None]
  out = jnp.where(own, every, 0).sum(axis=3)
  return out.astype(cache_v.dtype).reshape(q.shape)


def _row_scores(q, k):
  """Returns q k, float32[B, K, N / K, S], of one query a row [B, 1, N, H]."""
  batch, _, num_heads, head_dim = q.shape
  q = q.reshape(batch, k.shape[2], num_heads // k.shape[2], head_dim)
  return _product("BKGH,BSKH->BKGS", q, k)


def _valid(scores, lengths):
  """Returns scores [B, ..., S] of which only the first `lengths` count."""
  valid = jnp.arange(scores.shape[-1]) < lengths[:, None, None, None]
  return jnp.where(valid, scores, _LOWEST)


def last_query_attention(q, k, lengths):
  """Returns float32[B, S]: how each row's last valid token sees the keys.

  The softmax row, averaged over heads, of q float[B, T, N, H], k float[B, T, K,
  H], right padded to `lengths` int32[B], at least 1; never a T x S map.
  """
  last = jnp.take_along_axis(q, (lengths - 1)[:, None, None, None], axis=1)
  scores = _valid(_row_scores(last, k) * q.shape[-1] ** -0.5, lengths)
  return jax.nn.softmax(scores, axis=-1).mean(axis=(1, 2))


def strongest_attention(q, k, start, lengths, *, num_queries):
  """Returns float32[B, S]: the most that any late query looks at each key.

  The maximum, over heads and over the queries `start` to `lengths` - 1,
  int32[B], of softmax rows that are each causal over all keys. One kv head at a
  time, never a T x S map. q is float[B, T, N, H], k float[B, T, K, H], right
  padded; num_queries, static and at least 1, bounds `lengths - start`.
  """
  batch, length, num_heads, head_dim = q.shape
  num_kv_heads = k.shape[2]
  place = start[:, None] + jnp.arange(num_queries)[None]  # [B, Q]
  counts = place < lengths[:, None]
  place = jnp.minimum(place, length - 1)
  q = jnp.take_along_axis(q, place[:, :, None, None], axis=1)
  q = q.reshape(batch, num_queries, num_kv_heads, -1, head_dim)
  visible = jnp.arange(length)[None, None] <= place[:, :, None]  # [B, Q, S]

  def one_head(most, head):
    q, k = head  # [B, Q, N / K, H], [B, S, H]
    scores = _product("BQGH,BSH->BGQS", q, k) * head_dim**-0.5
    scores = jnp.where(visible[:, None], scores, _LOWEST)
    probs = jax.nn.softmax(scores, axis=-1)
    probs = jnp.where(counts[:, None, :, None], probs, 0.0)
    return jnp.maximum(most, probs.max(axis=(1, 2))), None

  heads = jnp.moveaxis(q, 2, 0), jnp.moveaxis(k, 2, 0)
  nothing = jnp.zeros((batch, length), jnp.float32)
  return jax.lax.scan(one_head, nothing, heads)[0]


def attention_received(q, k, lengths=None):
  """Returns float32[S, R]: the attention that each key gets in all.

  Softmax of q k / sqrt(H), float[S, R, N, H] both, averaged over heads and
  summed over queries, of S segments of R patches that attend within themselves.
  Maps exist one segment at a time, of long segments some rows at a time. Only
  the first `lengths` int32[S] patches of a segment, at least 1, ask and get.
  """
  num_patches, head_dim = q.shape[1], q.shape[3]
  patch = jnp.arange(num_patches)
  chunk = min(num_patches, _RECEIVED_CHUNK)
  num_chunks = -(-num_patches // chunk)

  def segment(arguments):
    q, k, length = arguments
    k = k.astype(jnp.float32)
    rows = jnp.pad(q, [(0, num_chunks * chunk - num_patches), (0, 0), (0, 0)])
    rows = rows.reshape(num_chunks, chunk, *q.shape[1:])

    def some_rows(total, numbered):
      number, q = numbered
      q = q.astype(jnp.float32)
      scores = jnp.einsum("RNH,SNH->NRS", q, k, precision="highest")
      scores = jnp.where(patch < length, scores * head_dim**-0.5, _LOWEST)
      asks = number * chunk + jnp.arange(chunk) < length
      seen = jax.nn.softmax(scores, axis=-1).mean(axis=0)  # [R, S]
      return total + jnp.where(asks[:, None], seen, 0).sum(axis=0), None

    total = jnp.zeros([num_patches], jnp.float32)
    total, _ = jax.lax.scan(some_rows, total, (jnp.arange(num_chunks), rows))
    return total

  if lengths is None:
    lengths = jnp.full(q.shape[:1], num_patches, jnp.int32)
  return jax.lax.map(segment, (q, k, lengths))
