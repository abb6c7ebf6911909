"""One attention function for every model, with a choice of kernels.

Axes: B batch, T queries, S keys, N query heads, K kv heads (K divides N; query
head i reads kv head i // (N / K)), H head dimension.
"""

import jax
import jax.numpy as jnp

BACKENDS = ("auto", "xla", "cudnn", "splash")


def attention(
  q,
  k,
  v,
  *,
  causal=False,
  lengths=None,
  mask=None,
  q_offset=0,
  backend="auto",
):
  """Returns softmax(q k / sqrt(H)) v, float[B, T, N, H].

  Args:
    q: float[B, T, N, H].
    k: float[B, S, K, H].
    v: float[B, S, K, H].
    causal: static; True lets query t see keys up to t + q_offset only.
    lengths: int32[B] number of valid keys of each row, which come first (right
      padding); None when all are valid.
    mask: bool[B, T, S], True where a query may see a key; None for all.
    q_offset: index of the first query among the keys, int or int32[B].
    backend: one of `BACKENDS`. "auto" takes a flash kernel where the platform
      and the dtype have one and the masks are of the (causal, lengths) kind.

  Queries without any visible key give finite values without meaning.
  """
  backend = _resolve(q, mask, q_offset, backend)
  return _xla(q, k, v, causal, lengths, mask, q_offset)


def _resolve(q, mask, q_offset, backend):
  if backend not in BACKENDS:
    raise ValueError(f"attention backend {backend!r} is not one of {BACKENDS}")
  return "xla"


def _visible(num_queries, num_keys, causal, lengths, mask, q_offset):
  """Returns bool[B or 1, T, S] of visible keys, or None when all are."""
  visible = None if mask is None else mask
  keys = jnp.arange(num_keys)[None, None, :]
  if causal:
    offset = jnp.reshape(jnp.asarray(q_offset, jnp.int32), (-1, 1, 1))
    seen = keys <= jnp.arange(num_queries)[None, :, None] + offset
    visible = seen if visible is None else visible & seen
  if lengths is not None:
    seen = keys < lengths[:, None, None]
    visible = seen if visible is None else visible & seen
  return visible


def _xla(q, k, v, causal, lengths, mask, q_offset):
  visible = _visible(q.shape[1], k.shape[1], causal, lengths, mask, q_offset)
  batch, num_queries, num_heads, head_dim = q.shape
  grouped = q.reshape(  # [B, T, K, N / K, H]
    batch, num_queries, k.shape[2], num_heads // k.shape[2], head_dim
  )
  scores = jnp.einsum(
    "BTKGH,BSKH->BKGTS", grouped, k, preferred_element_type=jnp.float32
  )
  scores = scores * head_dim**-0.5
  if visible is not None:
    lowest = jnp.finfo(jnp.float32).min
    scores = jnp.where(visible[:, None, None], scores, lowest)
  probs = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
  return jnp.einsum("BKGTS,BSKH->BTKGH", probs, v).reshape(q.shape)


def attention_over_cache(q, k, v, cache_k, cache_v, lengths):
  """Returns float[B, 1, N, H]: one new query over a cache and its own key.

  The new key is not written into the cache first, so a scan over layers reads
  the cache and never copies it.

  Args:
    q: float[B, 1, N, H] of the new token.
    k: float[B, 1, K, H] of the new token.
    v: float[B, 1, K, H] of the new token.
    cache_k: float[B, S, K, H] of the earlier tokens.
    cache_v: float[B, S, K, H] of the earlier tokens.
    lengths: int32[B] number of valid rows of the cache.
  """
  batch, _, num_heads, head_dim = q.shape
  grouped = q.reshape(batch, k.shape[2], num_heads // k.shape[2], head_dim)
  old = jnp.einsum(
    "BKGH,BSKH->BKGS", grouped, cache_k, preferred_element_type=jnp.float32
  )
  valid = jnp.arange(cache_k.shape[1])[None] < lengths[:, None]  # [B, S]
  old = jnp.where(valid[:, None, None], old, jnp.finfo(jnp.float32).min)
  new = jnp.einsum(
    "BKGH,BSKH->BKGS", grouped, k, preferred_element_type=jnp.float32
  )
  scores = jnp.concatenate([old, new], axis=-1) * head_dim**-0.5
  probs = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
  out = jnp.einsum("BKGS,BSKH->BKGH", probs[..., :-1], cache_v)
  out += jnp.einsum("BKGS,BSKH->BKGH", probs[..., -1:], v)
  return out.reshape(q.shape)


def last_query_attention(q, k, lengths):
  """Returns float32[B, S]: how each row's last valid token sees the keys.

  The softmax row of the last valid query, averaged over heads. Only this row
  is computed, never a T x S map.

  Args:
    q: float[B, T, N, H].
    k: float[B, T, K, H].
    lengths: int32[B] valid tokens of each row, at least 1, right padded.
  """
  batch, _, num_heads, head_dim = q.shape
  last = jnp.take_along_axis(q, (lengths - 1)[:, None, None, None], axis=1)
  last = last.reshape(batch, k.shape[2], num_heads // k.shape[2], head_dim)
  scores = jnp.einsum(
    "BKGH,BSKH->BKGS", last, k, preferred_element_type=jnp.float32
  )
  valid = jnp.arange(k.shape[1])[None] < lengths[:, None]
  scores = jnp.where(
    valid[:, None, None], scores * head_dim**-0.5, jnp.finfo(jnp.float32).min
  )
  return jax.nn.softmax(scores, axis=-1).mean(axis=(1, 2))
