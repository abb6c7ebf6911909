"""The text half of a video model: decoder, cache and head, as functions.

Axes: B batch, L prompt tokens, D width, P position rows, V vocabulary.
"""

import dataclasses
from typing import Any

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
    room = [(0, 0)] * 5
    room[2] = (0, cache_length - x.shape[1])
    cache = qwen2.Cache(
      keys=jnp.pad(out.pop("keys"), room),
      values=jnp.pad(out.pop("values"), room),
      lengths=lengths,
    )
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)
    return self.logits(params, last[:, 0]), cache, out

  def decode_step(self, params, ids, positions, cache):
    """Returns (logits float32[B, V], cache) after one more token per row.

    Args:
      params: the model's parameters.
      ids: int32[B] the new tokens.
      positions: int32[B, P] their positions.
      cache: `qwen2.Cache` with room left in every row.
    """
    x = self._language(params, ids, method="embed")
    hidden, cache = self._language(params, x, positions, cache, method="decode")
    return self.logits(params, hidden), cache

  def _language(self, params, *args, **kwargs):
    module = qwen2.Qwen2(self.config.text, self.dtype, self.backend, self.remat)
    return module.apply({"params": params["language_model"]}, *args, **kwargs)
