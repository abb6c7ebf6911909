"""Qwen2 decoder with a key-value cache that is plain data.

Axes: B batch, L tokens of a prompt, D width, V vocabulary, P position rows,
S rows of the cache, N heads, K kv heads, H head dimension.
Paper: https://arxiv.org/abs/2407.10671.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from cacovid_jax import schema
from cacovid_jax.models import attention, hf_config, placement, products, rope
from cacovid_jax.models import layers as layers_lib


@dataclasses.dataclass(frozen=True, kw_only=True)
class Qwen2Config:
  """Sizes of a decoder."""

  vocab_size: int = hf_config.key()
  hidden_size: int = hf_config.key()
  intermediate_size: int = hf_config.key()
  num_layers: int = hf_config.key("num_hidden_layers", kind=hf_config.LAYERS)
  num_heads: int = hf_config.key("num_attention_heads")
  num_kv_heads: int = hf_config.key("num_key_value_heads")
  head_dim: int
  rope_theta: float = 1e6
  rope_sections: tuple[int, ...] | None = None  # Frequencies a row.
  rms_norm_eps: float = hf_config.key(default=1e-6, optional=True)
  tie_embeddings: bool = False
  max_positions: int = hf_config.key(
    "max_position_embeddings", 32768, optional=True
  )
  rope_interleaved: bool = False  # See `rope.angles`.
  attention_bias: bool = True  # Whether queries, keys and values have biases.
  qk_norm: bool = False  # Whether heads of q and k are normalised (Qwen3).

  @classmethod
  def qwen2_0_5b(cls):
    return cls._of(152000, 896, 4864, 24, 14, 2, 64, tie_embeddings=True)

  @classmethod
  def qwen2_7b(cls, **changes):
    return cls._of(152128, 3584, 18944, 28, 28, 4, 128, **changes)

  @classmethod
  def qwen2_5_3b(cls):
    return cls._of(151936, 2048, 11008, 36, 16, 2, 128, tie_embeddings=True)

  @classmethod
  def tiny(cls):
    return cls._of(64, 32, 48, 3, 4, 2, 8, max_positions=512)

  @classmethod
  def _of(cls, *sizes, **changes):
    """Returns the config of the first seven fields and some others."""
    names = [field.name for field in dataclasses.fields(cls)]
    return cls(**dict(zip(names, sizes, strict=False)) | changes)

  @classmethod
  def from_hf(
    cls, config, tie_embeddings=False, *, model_type="qwen2",
    where="text_config.", num_sections=None,
  ):  # fmt: skip
    """Reads the `text_config` section of a config.json, of 4.x or 5.x.

    Tied embeddings may be told outside the section, too. `model_type` is what
    it may name, `where` its name in messages ("" for a file without one). Of
    position rows, `num_sections` share the frequencies; None for plain RoPE.
    """
    allowed = dict(hidden_act="silu", use_sliding_window=False)
    hf_config.require(config, where, model_type=model_type, **allowed)
    rotary = config.get("rope_parameters") or config.get("rope_scaling") or {}
    schema.fit(rotary, dict, "config.json", key=f"{where}rope_parameters")
    kind = rotary.get("rope_type", rotary.get("type", "default"))
    hf_config.check(
      kind in ["default"] + ["mrope"] * (num_sections is not None),
      f"{where}rope_parameters has type {kind!r}; only the default rotary"
      " embedding is implemented",
    )
    sizes = hf_config.numbers(cls, config, where)
    num_heads, num_kv_heads = sizes["num_heads"], sizes["num_kv_heads"]
    hf_config.check(
      num_heads % num_kv_heads == 0,
      f"{where}num_attention_heads {num_heads} is no multiple of"
      f" num_key_value_heads {num_kv_heads}",
    )
    usual = sizes["hidden_size"] // num_heads
    head_dim = hf_config.number(config, "head_dim", int, usual, where)
    told = f"{where}head_dim is {head_dim}; positions turn pairs of values"
    hf_config.check(head_dim >= 2 and head_dim % 2 == 0, told)
    sections = None
    if num_sections is not None:
      sections = rotary.get("mrope_section")
      hf_config.check(
        isinstance(sections, list)
        and len(sections) == num_sections
        and all(isinstance(size, int) and size > 0 for size in sections)
        and sum(sections) == head_dim // 2,
        f"{where}rope_scaling.mrope_section is {sections!r}; give"
        f" {num_sections} positive numbers whose sum is {head_dim // 2}",
      )
      sections = tuple(sections)
    tied = hf_config.switch(config, "tie_word_embeddings", where=where)
    given = rotary if "rope_theta" in rotary else config
    theta = hf_config.number(given, "rope_theta", float, where=where)
    return cls(
      **sizes, head_dim=head_dim, rope_theta=theta, rope_sections=sections,
      tie_embeddings=tie_embeddings or tied,
    )  # fmt: skip

  def to_hf(self):
    """Returns the `text_config` section, in a form 4.x and 5.x both read."""
    described = hf_config.described(self) | {
      "model_type": "qwen2",
      "head_dim": self.head_dim,
      "hidden_act": "silu",
      "rope_theta": self.rope_theta,
      "tie_word_embeddings": self.tie_embeddings,
      "use_sliding_window": False,
    }
    if self.rope_sections is not None:
      sections = {"type": "mrope", "mrope_section": list(self.rope_sections)}
      described["rope_scaling"] = sections
    return described


class Cache(NamedTuple):
  """Keys and values of earlier tokens, right padded, one row per prompt.

  Layers that saw different numbers of rows share one by lengths of their own.
  Layers whose parameters are separate have separate arrays here, too.
  """

  # float[layers, B, S, K, H], or a tuple of float[B, S, K, H].
  keys: jax.Array | tuple[jax.Array, ...]
  values: jax.Array | tuple[jax.Array, ...]
  lengths: jax.Array  # int32[B], or int32[layers, B]


def with_room(cache: Cache, new_rows: int) -> Cache:
  """Returns the cache with room for more tokens; below 0, with less room."""

  def pad(x):
    room = [(0, new_rows, 0), (0, 0, 0), (0, 0, 0)]
    room = [(0, 0, 0)] * (x.ndim - 3) + room
    return jax.lax.pad(x, jnp.zeros((), x.dtype), room)

  return Cache(*jax.tree.map(pad, cache[:2]), cache.lengths)


def angles(config: Qwen2Config, positions):
  """Returns (cos, sin) float32[B, L, H] of positions int32[B, P, L]."""
  return rope.angles(
    jnp.moveaxis(positions, 1, 0), config.head_dim, config.rope_theta,
    config.rope_sections, interleaved=config.rope_interleaved,
  )  # fmt: skip


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


class Part(nn.Module):
  """A part of a model, in the dtype that it computes in."""

  config: Any
  dtype: jnp.dtype = jnp.float32
  backend: str = "auto"  # Attention backend, see `models.attention`.
  remat: bool = False  # Recompute layers' intermediates in a backward pass.

  @nn.nowrap
  def dense(self, size, name, use_bias):
    return nn.Dense(size, use_bias=use_bias, dtype=self.dtype, name=name)

  @nn.nowrap
  def rms_norm(self, name, epsilon):
    return RMSNorm(epsilon, self.dtype, name=name)


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


def gated_mlp(x, part, use_bias):
  """Returns [..., D] of x [..., D] by layers in a `Part`."""
  widths = [part.config.intermediate_size] * 2
  # One pass over both, which XLA makes of it where they are one array.
  gate, up = layers_lib.products(part, "gate_up_proj", widths, x, use_bias)
  return part.dense(x.shape[-1], "down_proj", use_bias)(nn.silu(gate) * up)


class DecoderLayer(Part):
  """Grouped-query attention and a gated MLP, both behind an RMSNorm."""

  @nn.compact
  def __call__(
    self, x, cos, sin, *, causal=True, lengths=None, mask=None, cache=None,
    write=False, earlier=None, look=None, between=None,
  ):  # fmt: skip
    """Returns (x, out) after one layer of x float[B, L, D].

    `out` has the new "keys" and "values", float[B, L, K, H]. cos and sin are
    float32[B, L, H], of `rope.angles`.

    Args:
      causal: static; False lets every token see every valid one.
      lengths: int32[B] valid tokens of each row (right padding) or, with a
        cache, valid rows of the cache; None when all are valid.
      mask: bool[B, L, L or P + L], True where a query may see a key.
      cache: None or (keys, values) float[B, S, K, H] of earlier tokens; then
        L is 1 and `lengths` is required.
      write: static; True writes the new row into the cache, which is then what
        "keys" and "values" are. Nothing reads the old one: it is not copied.
      earlier: None or (keys, values) float[A, P, K, H] of P earlier tokens,
        each for the next B / A rows. All see these; `lengths` counts them, and
        the new keys and values begin with them.
      look: static; out["look"] is `look(q, k, lengths)` of what is rotated.
      between: static; `between(x, out)` of the residual stream behind the
        attention gives the (x, more) with which the layer goes on, perhaps of
        other rows; `more` becomes out["between"].
    """
    cfg = self.config
    norm = functools.partial(self.rms_norm, epsilon=cfg.rms_norm_eps)

    def rotate(heads, name):
      heads = norm(f"{name}_norm")(heads) if cfg.qk_norm else heads
      return rope.apply(heads, cos, sin)

    h = norm("input_layernorm")(x)
    heads = (cfg.num_heads, cfg.num_kv_heads, cfg.num_kv_heads)
    widths = [count * cfg.head_dim for count in heads]
    qkv = layers_lib.products(self, "qkv_proj", widths, h, cfg.attention_bias)
    q, k, v = (x.reshape(*x.shape[:-1], -1, cfg.head_dim) for x in qkv)
    q, k = rotate(q, "q"), rotate(k, "k")
    before = 0 if earlier is None or mask is not None else earlier[0].shape[1]
    # Nobody reads what these find: without a mask, kernels want square maps.
    q = jnp.pad(q, [(0, 0), (before, 0), (0, 0), (0, 0)]) if before else q
    if earlier is not None:
      old = (jnp.repeat(one, len(x) // len(one), axis=0) for one in earlier)
      k, v = (jnp.concatenate([next(old), new], axis=1) for new in (k, v))
    if write:
      row = jnp.arange(len(x)), lengths
      k = cache[0].at[row].set(k[:, 0], unique_indices=True)
      v = cache[1].at[row].set(v[:, 0], unique_indices=True)
      h = attention.attention_in_cache(q, k, v, lengths + 1)
    elif cache is not None:
      h = attention.attention_over_cache(q, k, v, *cache, lengths)
    else:
      h = attention.attention(
        q, k, v, causal=causal, lengths=lengths, mask=mask, backend=self.backend
      )[:, before:]
    out = {"keys": k, "values": v}
    if look is not None:
      full = jnp.full(x.shape[0], x.shape[1], jnp.int32)
      out["look"] = look(q, k, full if lengths is None else lengths)
    h = h.reshape(*x.shape[:-1], cfg.num_heads * cfg.head_dim)
    x = x + self.dense(cfg.hidden_size, "o_proj", use_bias=False)(h)
    if between is not None:
      x, out["between"] = between(x, out)

    h = norm("post_attention_layernorm")(x)
    return x + gated_mlp(h, self, use_bias=False), out


class Qwen2(Part):
  """Embedding, decoder layers (a stack of `models.layers`), norm and head."""

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
    return self.norm(x)

  def embed(self, ids):
    """Returns float[..., D] of ids int32[...]."""
    return jnp.take(self.embed_tokens, ids, axis=0).astype(self.dtype)

  def logits(self, hidden):
    """Returns float32[..., V] of hidden float[..., D] (after the norm)."""
    tied = self.config.tie_embeddings
    table = self.embed_tokens if tied else self.lm_head
    table = table.astype(self.dtype)
    # Accumulated and kept in float32: half precision ties the top tokens.
    product = functools.partial(
      jnp.einsum, "...D,VD->...V", preferred_element_type=jnp.float32
    )
    if hidden.size > hidden.shape[-1]:
      return product(hidden, table)
    one_row = dict(cuda=products.of_one_row, default=product)
    return jax.lax.platform_dependent(hidden, table, **one_row)

  def __call__(
    self, x, positions, *, causal=True, lengths=None, mask=None, earlier=None,
    deep=None, video_rows=None, want_hidden=False, want_attention=False,
    want_cache=False,
  ):  # fmt: skip
    """Returns (hidden float[B, L, D] after the final norm, out).

    Of embeddings float[B, L, D] at positions int32[B, P, L]. `causal`,
    `lengths`, `mask` and `earlier` (each with an axis of layers in front) are
    as of `DecoderLayer`, `deep` and `video_rows` as of `add_deep`. What is
    wanted, static, is in `out`:

    want_hidden: "hidden" float[layers, B, L, D], the output of every layer,
      before `deep` is added and before the final norm.
    want_attention: "last_query_attention" float32[layers, B, L], the attention
      row of each last valid token.
    want_cache: "keys" and "values" as of `Cache`, with L rows.
    """
    cos, sin = angles(self.config, positions)
    look = attention.last_query_attention if want_attention else None
    options = dict(causal=causal, lengths=lengths, mask=mask, look=look)

    def block(layer, x, own):
      number, *before = own
      x, aux = layer(x, cos, sin, earlier=tuple(before) or None, **options)
      out = {"hidden": x} if want_hidden else {}
      if want_attention:
        out["last_query_attention"] = aux["look"]
      if want_cache:
        out.update(keys=aux["keys"], values=aux["values"])
      return add_deep(x, number, deep, video_rows), out

    numbers = np.arange(self.config.num_layers)
    per_layer = (numbers, *(earlier or ()))
    x, out = layers_lib.apply(
      block, self.layers, x.astype(self.dtype), per_layer, self.remat
    )
    for name in out.keys() - {"keys", "values"}:
      out[name] = layers_lib.joined(out[name])
    return self.norm(x), out


def decoder_rows(config, source, lm_head):
  """Returns the `placement.rows` of a decoder, `language_model` of ours.

  Its names begin with `source`; `lm_head` is the output table's whole name.
  """
  ours = "language_model"
  rows = placement.rows(source, ours, embed_tokens="table", norm="scale")
  if not config.tie_embeddings:
    rows[lm_head] = (f"{ours}/lm_head", "same", None)
  return rows | layer_rows(
    f"{source}.layers.{{}}", f"{ours}/layers", layers=config.num_layers,
    bias=config.attention_bias, qk_norm=config.qk_norm,
  )  # fmt: skip


def layer_rows(source, path, *, bias=True, qk_norm=False, layers=None):
  """Returns the rows of one decoder layer or of a stack; `placement.rows`."""
  norms = ["input_layernorm", "post_attention_layernorm"]
  norms += ["self_attn.q_norm", "self_attn.k_norm"] * qk_norm
  own = [f"self_attn.{name}_proj" for name in "qkv"]
  rest = ["self_attn.o_proj"]
  rest += [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
  kinds = dict.fromkeys(norms, "scale")
  kinds |= dict.fromkeys(own, "dense" if bias else "linear")
  return placement.rows(
    source, path, layers, **kinds, **dict.fromkeys(rest, "linear")
  )
