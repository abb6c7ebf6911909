"""The text half of a video model: decoder, cache and head, as functions.

Axes: B batch, L prompt tokens, D width, P position rows, V vocabulary.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from cacovid_jax.models import qwen2


@dataclasses.dataclass(frozen=True)
class LanguageModel:
  """Pure functions of (params, arrays) that every video model shares.

  Frozen and hashable, so it can be a static argument of a jitted function.
  `params` may be stored in another dtype than `dtype`, in which it computes.

  Attributes:
    config: has the decoder's `qwen2.Qwen2Config` as `text`.
    dtype: of the computation.
    backend: attention backend, see `models.attention`.
    remat: recompute a layer's intermediates in a backward pass.
  """

  config: Any
  dtype: jnp.dtype = jnp.float32
  backend: str = "auto"
  remat: bool = False

  @property
  def num_position_rows(self):
    """P of every `positions` argument: 1, or 3 for time, row and column."""
    sections = self.config.text.rope_sections
    return 1 if sections is None else len(sections)

  def embed_text(self, params, ids):
    """Returns the embeddings float[..., D] of text ids int32[...]."""
    return self._language(params, ids, method="embed")

  def forward(
    self,
    params,
    x,
    positions,
    *,
    mask=None,
    lengths=None,
    causal=True,
    want_hidden=False,
    want_attention=False,
  ):
    """Returns (hidden float[B, L, D] after the final norm, out).

    Args:
      params: the model's parameters.
      x: float[B, L, D] embeddings.
      positions: int32[B, P, L].
      mask: bool[B, L, L], True where a query may see a key, or None.
      lengths: int32[B] valid tokens (right padding), or None.
      causal: static.
      want_hidden: static; see `qwen2.Qwen2`.
      want_attention: static; see `qwen2.Qwen2`.
    """
    return self._language(
      params,
      x,
      positions,
      mask=mask,
      lengths=lengths,
      causal=causal,
      want_hidden=want_hidden,
      want_attention=want_attention,
      method="__call__",
    )

  def logits(self, params, hidden):
    """Returns float32[..., V] of hidden float[..., D] (after the norm)."""
    return self._language(params, hidden, method="logits")

  def prefill(
    self,
    params,
    x,
    positions,
    lengths,
    *,
    cache_length,
    want_hidden=False,
    want_attention=False,
  ):
    """Returns (logits, cache, out) after reading the prompts.

    Args:
      params: the model's parameters.
      x: float[B, L, D] embeddings, right padded.
      positions: int32[B, P, L].
      lengths: int32[B] valid tokens of each prompt, at least 1.
      cache_length: static, at least L; room for the prompt and what follows.
      want_hidden: static; see `qwen2.Qwen2`.
      want_attention: static; see `qwen2.Qwen2`.

    Returns:
      logits float32[B, V] behind each prompt's last valid token, the
      `qwen2.Cache`, and the dict of named intermediates.
    """
    if cache_length < x.shape[1]:
      raise ValueError(
        f"cache_length {cache_length} is below the {x.shape[1]} prompt rows"
      )
    hidden, out = self._language(
      params,
      x,
      positions,
      lengths=lengths,
      want_hidden=want_hidden,
      want_attention=want_attention,
      want_cache=True,
      method="__call__",
    )
    cache = qwen2.Cache(out.pop("keys"), out.pop("values"), lengths)
    cache = qwen2.with_room(cache, cache_length - x.shape[1])
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)
    return self.logits(params, last[:, 0]), cache, out

  def decode_step(self, params, ids, positions, cache):
    """Returns (logits float32[B, V], cache) after one more token per row.

    Args:
      params: the model's parameters.
      ids: int32[B] the new tokens.
      positions: int32[B, P] their positions.
      cache: `qwen2.Cache` with room left in every row, or a tuple of them for
        consecutive slices of the layers, each with rows of its own.
    """
    x = self._language(params, ids, method="embed")
    if isinstance(cache, qwen2.Cache):
      hidden, cache = self._language(
        params, x, positions, cache, method="decode"
      )
      return self.logits(params, hidden), cache
    x, caches, first = x[:, None], [], 0
    for part in cache:
      x, part = self._decode_slice(params, x, positions, part, first)
      caches.append(part)
      first += part.keys.shape[0]
    return self.end(params, x[:, 0]), tuple(caches)

  def layer(self, params, number, x, positions, **kwargs):
    """Returns (x, out) after decoder layer `number`, on its own.

    Args:
      params: the model's parameters.
      number: int or int32[], from 0.
      x: float[B, L, D].
      positions: int32[B, P, L].
      **kwargs: see `qwen2.DecoderLayer`.
    """
    # Indexed where it is used: a slice of all the layers would copy them.
    own = jax.tree.map(
      lambda leaf: jax.lax.dynamic_index_in_dim(leaf, number, keepdims=False),
      params["language_model"]["layers"],
    )
    cfg = self.config.text
    cos, sin = qwen2.angles(cfg, positions)
    module = qwen2.DecoderLayer(cfg, self.dtype, self.backend)
    return module.apply(
      {"params": own}, x.astype(self.dtype), cos, sin, **kwargs
    )

  def run_layers(
    self, params, x, positions, lengths, *, first, last, look=None
  ):
    """Returns (x, keys, values, seen) after layers `first` to `last` - 1.

    Args:
      params: the model's parameters.
      x: float[B, L, D] residual stream, right padded.
      positions: int32[B, P, L].
      lengths: int32[B] valid tokens of each row.
      first: static, first layer of the slice.
      last: static, the layer behind the slice.
      look: static; `look(q, k, lengths)` -> float32[B, L] of the slice's last
        layer, or None.

    Returns:
      x without the final norm, keys and values float[last - first, B, L, K, H],
      and what `look` saw, None without it.
    """

    def only_last(number):
      def seen(q, k, lengths):
        return jax.lax.cond(
          number == last - 1,
          lambda: look(q, k, lengths),
          lambda: jnp.zeros(q.shape[:2], jnp.float32),
        )

      return seen if look is not None else None

    def block(carry, number):
      x, out = self.layer(
        params,
        number,
        carry[0],
        positions,
        lengths=lengths,
        look=only_last(number),
      )
      return (x, out.get("look")), (out["keys"], out["values"])

    nothing = None if look is None else jnp.zeros(x.shape[:2], jnp.float32)
    (x, seen), (keys, values) = jax.lax.scan(
      block, (x.astype(self.dtype), nothing), jnp.arange(first, last)
    )
    return x, keys, values, seen

  def end(self, params, x):
    """Returns float32[..., V] of x float[..., D], before the final norm."""
    hidden = self._language(params, x, method="normalise")
    return self.logits(params, hidden)

  def _decode_slice(self, params, x, positions, cache, first):
    """Returns (x float[B, 1, D], cache) after the layers that `cache` holds."""
    num_layers, batch = cache.keys.shape[:2]
    lengths = jnp.broadcast_to(cache.lengths, (num_layers, batch))

    def block(x, per_layer):
      number, keys, values, lengths = per_layer
      x, out = self.layer(
        params,
        number,
        x,
        positions[..., None],
        cache=(keys, values),
        lengths=lengths,
      )
      return x, (out["keys"][:, 0], out["values"][:, 0])

    numbers = jnp.arange(first, first + num_layers)
    x, (keys, values) = jax.lax.scan(
      block, x, (numbers, cache.keys, cache.values, lengths)
    )
    # Written once for all layers: inside the scan it would copy the cache.
    where = numbers[:, None] - first, jnp.arange(batch)[None], lengths
    return x, qwen2.Cache(
      keys=cache.keys.at[where].set(keys),
      values=cache.values.at[where].set(values),
      lengths=cache.lengths + 1,
    )

  def _language(self, params, *args, **kwargs):
    module = qwen2.Qwen2(self.config.text, self.dtype, self.backend, self.remat)
    return module.apply({"params": params["language_model"]}, *args, **kwargs)
