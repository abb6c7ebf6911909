"""What a video language model is, and the decoder functions all of them share.

Axes: B batch, L prompt tokens, D width, P position rows, V vocabulary, T
temporal patches, H W token grid of one, N = T·H·W video tokens, S auxiliary
feature maps.
"""

import abc
import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cacovid_jax import errors
from cacovid_jax.models import layers as layers_lib
from cacovid_jax.models import products, qwen2

# What a vision tower can tell besides features, float32 on the token grid, of
# its last layer, mean over heads. "vision_attention" [N]: attention that a
# token receives from its own temporal patch. "vision_keys" [N, head]: its keys.
# LLaVA-OneVision's checkpoints come without SigLIP's pooling head, whose
# attention is thus not among them (`"vision_use_head": false`).
SIGNALS = ("vision_attention", "vision_keys")


def check_signals(signals) -> tuple[str, ...]:
  """Returns the wanted names in the order of `SIGNALS`; refuses others."""
  unknown = set(signals) - set(SIGNALS)
  if unknown:
    raise ValueError(
      f"no vision signal is called {', '.join(map(repr, sorted(unknown)))};"
      f" there are {', '.join(SIGNALS)}"
    )
  return tuple(name for name in SIGNALS if name in signals)


def normalised(inputs):
  """Returns `TowerInputs` with float32 values, where they are bytes.

  To the bit as `processors.Processor` does on the host; on a TPU, where looking
  up single values is slow, up to rounding.
  """
  if inputs.table is None:
    return inputs
  # Values of a channel lie together.
  count, channels = inputs.values.shape[-1], inputs.table.shape[1]
  table = inputs.table[:, np.arange(count) * channels // count]

  def compute(values, table):
    return table[0] + values * ((table[-1] - table[0]) / 255.0)

  def look_up(values, table):
    return table[values, np.arange(count)]

  values = jax.lax.platform_dependent(
    inputs.values, table, tpu=compute, default=look_up
  )
  return inputs._replace(values=values, table=None)


def signal_shapes(shape, head_dim):
  """Returns the shape of each signal of patches or tokens of a shape."""
  return dict(zip(SIGNALS, (shape, (*shape, head_dim)), strict=True))


def no_signals(wanted, shape, head_dim):
  """Returns zeros, `signals` of `observe` before the last layer."""
  shapes = signal_shapes(shape, head_dim)
  return {name: jnp.zeros(shapes[name], jnp.float32) for name in wanted}


def observe(signals, is_last, received, k):
  """Returns the dict of wanted signals, made now in the last layer.

  `is_last` is bool[], `received()` the attention, k float[..., heads, head].
  """
  if not signals:
    return signals
  makers = {
    "vision_attention": received,
    "vision_keys": lambda: k.astype(jnp.float32).mean(axis=-2),
  }
  # A branch and not an output of each layer: only one layer pays.
  return jax.lax.cond(
    is_last, lambda: {name: makers[name]() for name in signals}, lambda: signals
  )


class VideoFeatures(NamedTuple):
  """ONE encoded video."""

  features: Any  # float[N, D], zero behind the grid's own tokens.
  grid: tuple[int, int, int]  # (T, H, W).
  # See `processors.TowerInputs`.
  second_per_grid_t: float | tuple[float, ...] = 1.0
  signals: Mapping[str, jax.Array] = {}  # Those of `SIGNALS` that were wanted.
  # float[S, N, D] added to the video rows that decoder layers 0 to S - 1 give
  # (Qwen3-VL's DeepStack), None for most models. Pruning gathers it as it does
  # features; merging averages it over the tokens that a row stands for.
  deep: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class VideoLLM(abc.ABC):
  """Pure functions of (params, arrays): what the rest of the library calls.

  Hashable, so that it can be a static argument of a jitted function. `params`
  may be stored in another dtype than `dtype`, in which it computes.
  """

  config: Any  # Has the decoder's `qwen2.Qwen2Config` as `text`.
  dtype: jnp.dtype = jnp.float32  # Of the computation.
  backend: str = "auto"  # Attention backend, see `models.attention`.
  remat: bool = False  # Recompute a layer's intermediates in a backward pass.

  # S of `VideoFeatures.deep`, and rows of text that end a video in a prompt.
  num_deep = 0
  num_newlines = 0

  @property
  def precision(self) -> str:
    """What features and answers depend on, of how numbers are rounded."""
    return jnp.dtype(self.dtype).name

  @property
  def num_position_rows(self):
    """P of every `positions` argument: 1, or 3 for time, row and column."""
    sections = self.config.text.rope_sections
    return 1 if sections is None else len(sections)

  @property
  @abc.abstractmethod
  def processor(self):
    """The `processors.Processor` of the config's sizes."""

  @abc.abstractmethod
  def read_processor(self, directory):
    """Returns the `processors.Processor` of a checkpoint's files."""

  def grid(self, num_frames, height, width) -> tuple[int, int, int]:
    """Returns (T, H, W) of a video from its frames' pixels after resizing."""
    return self.processor.resized_grid(num_frames, height, width)

  def tower_inputs(self, inputs, bucket=None):
    """Returns `TowerInputs` of one video as `encode` takes them, on the host.

    Padded to `bucket`, a `token_grid.GridBucket`, if one is given.
    """
    del bucket  # Of models whose grids differ.
    return inputs

  @abc.abstractmethod
  def encode_stages(self, params, inputs, signals=()):
    """Returns (features float[N, D], out) of one video, arguments as `encode`.

    `out` holds the tower's intermediates by name, what `VideoFeatures.deep`
    is, and the wanted signals.
    """

  def encode(self, params, inputs, *, signals=()) -> VideoFeatures:
    """Returns a video of `tower_inputs` with the wanted `SIGNALS` (static)."""
    signals, inputs = check_signals(signals), normalised(inputs)
    features, out = self.encode_stages(params, inputs, signals)
    of_video = (features, inputs.grid, inputs.second_per_grid_t)
    wanted = {name: out[name] for name in signals}
    return VideoFeatures(*of_video, wanted, out.get("deep"))

  def signal_shapes(self, num_video) -> Mapping[str, tuple[int, ...]]:
    return signal_shapes((num_video,), self.config.vision.head_dim)

  @abc.abstractmethod
  def positions(self, ids, video):
    """Returns (int32[P, L], next position) of ONE prompt, on the host.

    Of ids int[L] without padding, and the grid and seconds of their video.
    """

  @abc.abstractmethod
  def init(self, rng):
    """Returns random float32 parameters."""

  @property
  def told(self) -> Mapping[str, Any]:
    """What logs and results tell of it: rules of prompts that releases of the
    reference differ in, and what config.model changes."""
    return {}

  def with_outer_vision_tags(self, stay: bool) -> "VideoLLM":
    """Returns the model whose prompts keep the marks around a clip, or do not.

    Of those alone that write each temporal patch on its own.
    """
    errors.check(
      not stay,
      "model.outer_vision_tags is for models that write the time of each"
      " temporal patch (Qwen3-VL); leave it out",
    )
    return self

  def with_float8_tower(self, wanted: bool) -> "VideoLLM":
    """Returns the model whose tower multiplies in 8 bits (`models.products`).

    SigLIP's alone, where the device can.
    """
    errors.check(
      not wanted,
      "model.float8_tower is for the SigLIP tower of LLaVA-OneVision; leave it"
      " out",
    )
    return self

  def encode_prompt(self, tokenizer, text, grid, second_per_grid_t=None):
    """Returns the `data.tokenizer.Prompt` of a question about a video.

    The tokenizer is the checkpoint's, `grid` the video's (T, H, W). Seconds are
    as of `processors.TowerInputs`; without any, a prompt that tells them is as
    long as such prompts usually get.
    """
    del second_per_grid_t  # Not in these models' text.
    return tokenizer.encode_prompt(text, math.prod(grid))

  def frame_rows(self, tokenizer, prompt, grid, second_per_grid_t=None):
    """Returns int32[L], the temporal patch of each row, -1 of none.

    Of a `Prompt`, and what it was encoded with. Rows of a patch are its tokens
    and the text that it alone has; UserError of models that write none.
    """
    raise errors.UserError(
      "evals.empty_frames=drop is for models that write the time of each"
      " temporal patch (Qwen3-VL); leave it out"
    )

  def embed_prompt(self, params, ids, features, video_rows):
    """Returns one prompt's embeddings float[L, D].

    Of ids int32[L], of which those under the video are ignored, and features
    float[N, D], whose rows are int32[N], L for padded ones.
    """
    x = self.embed_text(params, ids)
    return x.at[video_rows].set(features.astype(x.dtype), mode="drop")

  def embed_text(self, params, ids):
    """Returns float[..., D] of text ids int32[...]."""
    return self._language(params, ids, method="embed")

  def forward(self, params, x, positions, **options):
    """Returns (hidden float[B, L, D] after the final norm, out).

    Of embeddings float[B, L, D] at positions int32[B, P, L]; `options` are
    those of `qwen2.Qwen2.__call__`.
    """
    return self._language(params, x, positions, method="__call__", **options)

  def logits(self, params, hidden):
    """Returns float32[..., V] of hidden float[..., D] (after the norm)."""
    return self._language(params, hidden, method="logits")

  def prefill(
    self, params, x, positions, lengths, *, cache_length, earlier=None,
    **options,
  ):  # fmt: skip
    """Returns (logits, cache, out) after reading the prompts.

    Of embeddings float[B, L, D], right padded to `lengths` int32[B], at least
    1, at positions int32[B, P, L]. The cache has L rows, or more if
    `cache_length`, static, is more: these, and perhaps a few that no token
    needs. `options` are as of `forward`, `mask` and `causal` apart. The logits
    float32[B, V] are those behind each last valid token.

    Rows read before, `earlier` of `qwen2.Qwen2.__call__`, are no part of x and
    positions, but of `lengths`, of L and of the cache.
    """
    before = 0 if earlier is None else earlier[0].shape[2]
    count, rows = x.shape[1], before + x.shape[1]
    if cache_length < rows:
      raise ValueError(
        f"cache_length {cache_length} is below the {rows} prompt rows"
      )
    padded = functools.partial(products.padded_rows, backend=self.backend)
    more = padded(count, len(x), before) - count
    hidden, out = self.forward(
      params, jnp.pad(x, [(0, 0), (0, more), (0, 0)]),
      jnp.pad(positions, [(0, 0), (0, 0), (0, more)]), lengths=lengths,
      want_cache=True, earlier=earlier, **options,
    )  # fmt: skip
    cache = qwen2.Cache(out.pop("keys"), out.pop("values"), lengths)
    room = cache_length if cache_length == rows else padded(cache_length)
    cache = qwen2.with_room(cache, room - rows - more)
    out = {k: v[:, :, : v.shape[2] - more] for k, v in out.items()}
    last = (lengths - 1 - before)[:, None, None]
    last = jnp.take_along_axis(hidden, last, axis=1)
    return self.logits(params, last[:, 0]), cache, out

  def decode_step(self, params, ids, positions, cache):
    """Returns (logits float32[B, V], cache) after one more token per row.

    Of tokens int32[B] at positions int32[B, P]. The `qwen2.Cache` has room
    left in every row; or it is a tuple of them for consecutive slices of the
    layers, each with rows of its own.
    """
    whole = isinstance(cache, qwen2.Cache)
    x, caches, first = self.embed_text(params, ids)[:, None], [], 0
    for part in [cache] if whole else cache:
      x, part = self._decode_slice(params, x, positions, part, first)
      caches.append(part)
      first += len(part.keys)
    logits = self.final_logits(params, x[:, 0])
    return logits, caches[0] if whole else tuple(caches)

  def layer(self, params, number, x, positions, **kwargs):
    """Returns (x, out) after decoder layer `number` on its own, int or int32[].

    Of x float[B, L, D] at positions int32[B, P, L], as `qwen2.DecoderLayer`.
    """
    own = layers_lib.layer(params["language_model"]["layers"], number)
    cos, sin = qwen2.angles(self.config.text, positions)
    module = qwen2.DecoderLayer(self.config.text, self.dtype, self.backend)
    x = x.astype(self.dtype)
    return module.apply({"params": own}, x, cos, sin, **kwargs)

  def loop(self, params, body, x, per_layer):
    """Returns `layers.loop` over decoder layers, in the form of params."""
    form = layers_lib.form_of(params["language_model"]["layers"])
    return layers_lib.loop(body, x, per_layer, form)

  def run_layers(
    self, params, x, positions, lengths, *, first, last, look=None, deep=None,
    video_rows=None,
  ):  # fmt: skip
    """Returns (x, keys, values, seen) after layers `first` to `last` - 1.

    Of the residual stream float[B, L, D], right padded, as in `prefill`; `deep`
    as in `qwen2.add_deep`. x comes without the final norm, keys and values of
    these layers are as of `qwen2.Cache`. `look`, static, gives what is seen in
    the slice's last layer: `look(q, k, lengths)` -> float32[B, L], or None.
    """
    nothing = jnp.zeros(x.shape[:2], jnp.float32)

    def block(carry, own):
      (number,) = own

      def seen(*args):
        is_last = number == last - 1
        return jax.lax.cond(is_last, lambda: look(*args), lambda: nothing)

      options = dict(lengths=lengths, look=None if look is None else seen)
      x, out = self.layer(params, number, carry[0], positions, **options)
      x = qwen2.add_deep(x, number, deep, video_rows)
      return (x, out.get("look")), (out["keys"], out["values"])

    start = (x.astype(self.dtype), None if look is None else nothing)
    numbers = np.arange(first, last)
    (x, seen), (keys, values) = self.loop(params, block, start, (numbers,))
    return x, keys, values, seen

  def final_logits(self, params, x):
    """Returns float32[..., V] of x float[..., D], before the final norm."""
    return self.logits(params, self._language(params, x, method="normalise"))

  def _decode_slice(self, params, x, positions, cache, first):
    """Returns (x float[B, 1, D], cache) after the layers that `cache` holds."""
    num_layers, batch = len(cache.keys), len(x)
    lengths = jnp.broadcast_to(cache.lengths, (num_layers, batch))
    write = isinstance(cache.keys, tuple)

    def block(x, per_layer):
      number, *earlier, lengths = per_layer
      options = dict(cache=earlier, lengths=lengths, write=write)
      x, out = self.layer(params, number, x, positions[..., None], **options)
      new = out["keys"], out["values"]
      return x, new if write else tuple(rows[:, 0] for rows in new)

    numbers = np.arange(first, first + num_layers)
    per_layer = numbers, cache.keys, cache.values, lengths
    x, (keys, values) = self.loop(params, block, x, per_layer)
    if not write:
      # Written once for all layers: inside the scan it would copy the cache.
      where = numbers[:, None] - first, jnp.arange(batch)[None], lengths
      keys = cache.keys.at[where].set(keys)
      values = cache.values.at[where].set(values)
    return x, qwen2.Cache(keys, values, cache.lengths + 1)

  def _language(self, params, *args, **kwargs):
    module = qwen2.Qwen2(self.config.text, self.dtype, self.backend, self.remat)
    return module.apply({"params": params["language_model"]}, *args, **kwargs)
