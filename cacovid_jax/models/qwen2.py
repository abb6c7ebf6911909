"""Qwen2 decoder with a key-value cache that is plain data.

Axes: B batch, L tokens of a prompt, D width, V vocabulary, P position rows,
S rows of the cache, N heads, K kv heads, H head dimension.
Paper: https://arxiv.org/abs/2407.10671.
"""

import dataclasses
import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from cacovid_jax import errors
from cacovid_jax.models import attention, hf_config, placement, rope

# Our sizes -> keys of the `text_config` section.
_KEYS = dict(
  vocab_size="vocab_size",
  hidden_size="hidden_size",
  intermediate_size="intermediate_size",
  num_layers="num_hidden_layers",
  num_heads="num_attention_heads",
  num_kv_heads="num_key_value_heads",
)
# Vocabulary, width, width of the MLP, layers, heads, kv heads, width of a head.
_SIZES = {
  "qwen2_0_5b": (152000, 896, 4864, 24, 14, 2, 64),
  "qwen2_7b": (152128, 3584, 18944, 28, 28, 4, 128),
  "qwen2_5_3b": (151936, 2048, 11008, 36, 16, 2, 128),
  "tiny": (64, 32, 48, 3, 4, 2, 8),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Qwen2Config:
  """Sizes of a decoder."""

  vocab_size: int
  hidden_size: int
  intermediate_size: int
  num_layers: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  rope_theta: float = 1e6
  rope_sections: tuple[int, ...] | None = None  # Frequencies a row.
  rms_norm_eps: float = 1e-6
  tie_embeddings: bool = False
  max_positions: int = 32768
  rope_interleaved: bool = False  # See `rope.angles`.
  attention_bias: bool = True  # Whether queries, keys and values have biases.
  qk_norm: bool = False  # Whether heads of q and k are normalised (Qwen3).

  @classmethod
  def qwen2_0_5b(cls):
    return cls._of("qwen2_0_5b", tie_embeddings=True)

  @classmethod
  def qwen2_7b(cls, **changes):
    return cls._of("qwen2_7b", **changes)

  @classmethod
  def qwen2_5_3b(cls):
    return cls._of("qwen2_5_3b", tie_embeddings=True)

  @classmethod
  def tiny(cls):
    return cls._of("tiny", max_positions=512)

  @classmethod
  def _of(cls, name, **changes):
    names = (*_KEYS, "head_dim")
    return cls(**dict(zip(names, _SIZES[name], strict=True)) | changes)

  @classmethod
  def from_hf(
    cls,
    config,
    tie_embeddings=False,
    *,
    model_type="qwen2",
    where="text_config.",
    num_sections=None,
  ):
    """Reads the `text_config` section of a config.json, of 4.x or 5.x.

    Tied embeddings may be told outside the section, too. `model_type` is what
    it may name, `where` its name in messages ("" for a file without one). Of
    position rows, `num_sections` share the rotary frequencies; None for plain
    RoPE.
    """
    hf_config.require(
      config,
      where,
      model_type=[model_type],
      hidden_act=["silu"],
      use_sliding_window=[False],
    )
    rotary = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rotary.get("rope_type", rotary.get("type", "default"))
    if kind not in ["default"] + ["mrope"] * (num_sections is not None):
      raise errors.UserError(
        f"config.json: {where}rope_parameters has type {kind!r}; only the"
        " default rotary embedding is implemented"
      )
    number = functools.partial(hf_config.number, where=where)
    sizes = hf_config.sizes(config, _KEYS, where)
    num_heads, num_kv_heads = sizes["num_heads"], sizes["num_kv_heads"]
    if num_heads % num_kv_heads:
      raise errors.UserError(
        f"config.json: {where}num_attention_heads {num_heads} is no multiple of"
        f" num_key_value_heads {num_kv_heads}"
      )
    head_dim = number(
      config, "head_dim", default=sizes["hidden_size"] // num_heads
    )
    sections = None
    if num_sections is not None:
      sections = _sections(rotary, num_sections, head_dim // 2, where)
    tied = tie_embeddings or config.get("tie_word_embeddings", False)
    return cls(
      **sizes,
      head_dim=head_dim,
      rope_theta=number(
        rotary if "rope_theta" in rotary else config, "rope_theta", float
      ),
      rope_sections=sections,
      rms_norm_eps=number(config, "rms_norm_eps", float, default=1e-6),
      tie_embeddings=bool(tied),
      max_positions=number(config, "max_position_embeddings", default=32768),
    )

  def to_hf(self):
    """Returns the `text_config` section, in a form 4.x and 5.x both read."""
    described = hf_config.described(self, _KEYS) | {
      "model_type": "qwen2",
      "head_dim": self.head_dim,
      "hidden_act": "silu",
      "rope_theta": self.rope_theta,
      "rms_norm_eps": self.rms_norm_eps,
      "tie_word_embeddings": self.tie_embeddings,
      "max_position_embeddings": self.max_positions,
      "use_sliding_window": False,
    }
    if self.rope_sections is not None:
      described["rope_scaling"] = {
        "type": "mrope",
        "mrope_section": list(self.rope_sections),
      }
    return described


def _sections(rotary, number, frequencies, where):
  """Returns `mrope_section`, checked, as a tuple."""
  sections = rotary.get("mrope_section")
  if (
    not isinstance(sections, list)
    or len(sections) != number
    or not all(isinstance(size, int) and size > 0 for size in sections)
    or sum(sections) != frequencies
  ):
    raise errors.UserError(
      f"config.json: {where}rope_scaling.mrope_section is {sections!r}; give"
      f" {number} positive numbers whose sum is {frequencies}"
    )
  return tuple(sections)


class Cache(NamedTuple):
  """Keys and values of earlier tokens, right padded, one row per prompt.

  Layers that saw different numbers of rows share one by lengths of their own.
  """

  keys: jax.Array  # float[layers, B, S, K, H]
  values: jax.Array  # float[layers, B, S, K, H]
  lengths: jax.Array  # int32[B], or int32[layers, B]


def with_room(cache: Cache, new_rows: int) -> Cache:
  """Returns the cache with room for more tokens."""
  room = [(0, 0), (0, 0), (0, new_rows), (0, 0), (0, 0)]
  return cache._replace(
    keys=jnp.pad(cache.keys, room), values=jnp.pad(cache.values, room)
  )


def angles(config: Qwen2Config, positions):
  """Returns (cos, sin) float32[B, L, H] of positions int32[B, P, L]."""
  return rope.angles(
    jnp.moveaxis(positions, 1, 0),
    config.head_dim,
    config.rope_theta,
    config.rope_sections,
    interleaved=config.rope_interleaved,
  )


def add_deep(x, number, deep, video_rows):
  """Returns x float[B, L, D], output of layer `number`, with its features.

  `deep` float[B, S, N, D] is added behind layers 0 to S - 1, to the rows
  `video_rows` int32[B, N], L for padding; None for none.
  """
  if deep is None:
    return x

  def add():
    own = jax.lax.dynamic_index_in_dim(deep, number, axis=1, keepdims=False)
    batch = jnp.arange(len(x))[:, None]
    return x.at[batch, video_rows].add(own.astype(x.dtype), mode="drop")

  return jax.lax.cond(number < deep.shape[1], add, lambda: x)


def scan_layers(block, layer, x, per_layer, remat):
  """Returns (x, outputs) of `block(layer, x, own)`, layer after layer.

  The parameters of `layer` are stacked, as the leaves of `per_layer` are.
  """
  if remat:
    block = nn.remat(block, prevent_cse=False)
  scan = nn.scan(
    block,
    variable_axes={"params": 0},
    split_rngs={"params": True},
    length=len(jax.tree.leaves(per_layer)[0]),
  )
  return scan(layer, x, per_layer)


class RMSNorm(nn.Module):
  """RMSNorm with two roundings: the scale multiplies the rounded value."""

  epsilon: float
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x):
    scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
    x = x.astype(jnp.float32)
    mean_square = jnp.square(x).mean(axis=-1, keepdims=True)
    x = x * jax.lax.rsqrt(mean_square + self.epsilon)
    return x.astype(self.dtype) * scale.astype(self.dtype)


def gated_mlp(x, dense, width):
  """Returns [..., D] of x [..., D]; `dense(size, name)` makes a layer."""
  gate = nn.silu(dense(width, "gate_proj")(x))
  up = dense(width, "up_proj")(x)
  return dense(x.shape[-1], "down_proj")(gate * up)


class DecoderLayer(nn.Module):
  """Grouped-query attention and a gated MLP, both behind an RMSNorm."""

  config: Qwen2Config
  dtype: jnp.dtype = jnp.float32
  backend: str = "auto"

  @nn.compact
  def __call__(
    self,
    x,
    cos,
    sin,
    *,
    causal=True,
    lengths=None,
    mask=None,
    cache=None,
    look=None,
    between=None,
  ):
    """Returns (x, out) after one layer.

    Args:
      x: float[B, L, D].
      cos: float32[B, L, H], of `rope.angles`.
      sin: float32[B, L, H].
      causal: static; False lets every token see every valid one.
      lengths: int32[B] valid tokens of each row (right padding) or, with a
        cache, valid rows of the cache; None when all are valid.
      mask: bool[B, L, L], True where a query may see a key.
      cache: None or (keys, values) float[B, S, K, H] of earlier tokens; then
        L is 1 and `lengths` is required.
      look: static; `look(q, k, lengths)` of the rotated queries and keys, its
        result becomes out["look"].
      between: static; `between(x, out)` of the residual stream behind the
        attention gives the (x, more) with which the layer goes on, perhaps of
        other rows; `more` becomes out["between"].

    Returns:
      x, and a dict with the new "keys" and "values", float[B, L, K, H].
    """
    cfg = self.config

    def dense(size, name, use_bias=False):
      return nn.Dense(size, use_bias=use_bias, dtype=self.dtype, name=name)

    def norm(name):
      return RMSNorm(cfg.rms_norm_eps, self.dtype, name=name)

    def project(x, num_heads, name):
      x = dense(num_heads * cfg.head_dim, name, cfg.attention_bias)(x)
      return x.reshape(*x.shape[:-1], num_heads, cfg.head_dim)

    def turned(x, num_heads, name):
      x = project(x, num_heads, f"{name}_proj")
      if cfg.qk_norm:
        x = norm(f"{name}_norm")(x)
      return rope.apply(x, cos, sin)

    h = norm("input_layernorm")(x)
    q = turned(h, cfg.num_heads, "q")
    k = turned(h, cfg.num_kv_heads, "k")
    v = project(h, cfg.num_kv_heads, "v_proj")
    out = {"keys": k, "values": v}
    if cache is not None:
      h = attention.attention_over_cache(q, k, v, *cache, lengths)
    else:
      h = attention.attention(
        q, k, v, causal=causal, lengths=lengths, mask=mask, backend=self.backend
      )
    if look is not None:
      if lengths is None:
        lengths = jnp.full(x.shape[0], x.shape[1], jnp.int32)
      out["look"] = look(q, k, lengths)
    h = h.reshape(*x.shape[:-1], cfg.num_heads * cfg.head_dim)
    x = x + dense(cfg.hidden_size, "o_proj")(h)
    if between is not None:
      x, out["between"] = between(x, out)

    h = norm("post_attention_layernorm")(x)
    return x + gated_mlp(h, dense, cfg.intermediate_size), out


class Qwen2(nn.Module):
  """Embedding, decoder layers (parameters stacked by depth), norm and head."""

  config: Qwen2Config
  dtype: jnp.dtype = jnp.float32
  backend: str = "auto"
  remat: bool = False

  def setup(self):
    cfg = self.config
    shape = (cfg.vocab_size, cfg.hidden_size)
    init = nn.initializers.normal(0.02)
    self.embed_tokens = self.param("embed_tokens", init, shape)
    self.layers = DecoderLayer(cfg, self.dtype, self.backend)
    self.norm = RMSNorm(cfg.rms_norm_eps, self.dtype)
    if not cfg.tie_embeddings:
      self.lm_head = self.param("lm_head", init, shape)

  def normalise(self, x):
    """Returns x float[..., D] of the last layer behind the final norm."""
    return self.norm(x)

  def embed(self, ids):
    """Returns float[..., D] of ids int32[...]."""
    return jnp.take(self.embed_tokens, ids, axis=0).astype(self.dtype)

  def logits(self, hidden):
    """Returns float32[..., V] of hidden float[..., D] (after the norm)."""
    tied = self.config.tie_embeddings
    table = self.embed_tokens if tied else self.lm_head
    # Accumulated and kept in float32: half precision ties the top tokens.
    return jnp.einsum(
      "...D,VD->...V",
      hidden,
      table.astype(self.dtype),
      preferred_element_type=jnp.float32,
    )

  def __call__(
    self,
    x,
    positions,
    *,
    causal=True,
    lengths=None,
    mask=None,
    deep=None,
    video_rows=None,
    want_hidden=False,
    want_attention=False,
    want_cache=False,
  ):
    """Returns (hidden float[B, L, D] after the final norm, out).

    `causal`, `lengths` and `mask` are as of `DecoderLayer`.

    Args:
      x: float[B, L, D] embeddings.
      positions: int32[B, P, L].
      deep: see `add_deep`, None for none.
      video_rows: see `add_deep`.
      want_hidden: static; out["hidden"] float[layers, B, L, D], the output of
        every layer, before `deep` is added and before the final norm.
      want_attention: static; out["last_query_attention"]
        float32[layers, B, L], the attention row of each last valid token.
      want_cache: static; out["keys"] and out["values"]
        float[layers, B, L, K, H].
    """
    cos, sin = angles(self.config, positions)
    look = attention.last_query_attention if want_attention else None
    options = dict(causal=causal, lengths=lengths, mask=mask, look=look)

    def block(layer, x, number):
      x, aux = layer(x, cos, sin, **options)
      out = {"hidden": x} if want_hidden else {}
      if want_attention:
        out["last_query_attention"] = aux["look"]
      if want_cache:
        out.update(keys=aux["keys"], values=aux["values"])
      return add_deep(x, number, deep, video_rows), out

    numbers = jnp.arange(self.config.num_layers)
    x, out = scan_layers(
      block, self.layers, x.astype(self.dtype), numbers, self.remat
    )
    return self.norm(x), out

  def decode(self, x, positions, cache):
    """Returns (hidden float[B, D], cache) after one more token per row.

    Of embeddings float[B, D] at positions int32[B, P], by a `Cache` with room
    for one more token in every row.
    """
    cos, sin = angles(self.config, positions[..., None])

    def block(layer, x, earlier):
      x, aux = layer(x, cos, sin, cache=earlier, lengths=cache.lengths)
      return x, (aux["keys"][:, 0], aux["values"][:, 0])

    x, (keys, values) = scan_layers(
      block,
      self.layers,
      x[:, None].astype(self.dtype),
      (cache.keys, cache.values),
      self.remat,
    )
    # Written once for all layers: inside the scan it would copy the cache.
    rows = jnp.arange(x.shape[0])
    cache = Cache(
      keys=cache.keys.at[:, rows, cache.lengths].set(keys),
      values=cache.values.at[:, rows, cache.lengths].set(values),
      lengths=cache.lengths + 1,
    )
    return self.norm(x)[:, 0], cache


def decoder_rows(config, source, lm_head):
  """Returns the `placement.rows` of a decoder, `language_model` of ours.

  Its names begin with `source`; `lm_head` is the output table's whole name.
  """
  ours = "language_model"
  rows = placement.rows(source, ours, embed_tokens="table", norm="scale")
  if not config.tie_embeddings:
    rows[lm_head] = (f"{ours}/lm_head", "same", None)
  return rows | layer_rows(
    f"{source}.layers.{{}}",
    f"{ours}/layers",
    bias=config.attention_bias,
    qk_norm=config.qk_norm,
    layers=config.num_layers,
  )


def layer_rows(source, path, *, bias=True, qk_norm=False, layers=None):
  """Returns the rows of one decoder layer or of a stack; `placement.rows`."""
  norms = ["input_layernorm", "post_attention_layernorm"]
  norms += ["self_attn.q_norm", "self_attn.k_norm"] * qk_norm
  kinds = dict.fromkeys(norms, "scale")
  for name in ("q_proj", "k_proj", "v_proj"):
    kinds[f"self_attn.{name}"] = "dense" if bias else "linear"
  kinds["self_attn.o_proj"] = "linear"
  for name in ("gate_proj", "up_proj", "down_proj"):
    kinds[f"mlp.{name}"] = "linear"
  return placement.rows(source, path, layers, **kinds)
