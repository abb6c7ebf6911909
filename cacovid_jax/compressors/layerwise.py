"""Compressors that act inside the language model, between its layers.

The layers between two cuts run as slices of depth, each with its own key-value
cache. The budget is a mean over layers: a ratio of 10 % means that a layer's
attention sees, on average, 10 % of the video tokens, as
https://arxiv.org/abs/2410.04417 and https://arxiv.org/abs/2505.14454 count.

Axes: R rows between two layers, n of them of the video, P position rows.
"""

import dataclasses
import math
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from cacovid_jax import errors
from cacovid_jax.compressors import base, budgets
from cacovid_jax.models import (
  attention,
  generation,
  prompt_batch,
  qwen2,
  token_grid,
)


class LayerState(NamedTuple):
  """What a rule may look at between two layers, of ONE prompt."""

  hidden: jax.Array  # float[R, D] residual stream.
  positions: jax.Array  # int32[P, R].
  length: jax.Array  # int32[] valid rows.
  attention: jax.Array  # float32[n] paid to video rows in the layer before.
  mask: jax.Array  # bool[n] valid video rows, a prefix.
  # int32[n], int32[n] and the selection of `PrunedPrompts`.
  index: jax.Array
  row: jax.Array
  entered: base.Selection | None
  grid: tuple[int, int, int] | None = None  # Of the whole video, static.


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerwiseCompressor(base.Compressor):
  """A rule that drops video tokens inside the language model.

  A subclass gives `plan` and `minimum_ratio`, and its own `step` where it keeps
  others than those that the last token attends to most. An exact budget spends
  the ratio as closely as whole tokens allow, never more.
  """

  # What chooses the tokens that enter the model; None lets all in.
  pre_llm: base.Compressor | None = None
  attention_fn: str = "last"  # See `attention_of`.
  # True also forgets dropped tokens in the layers that saw them, so that
  # decoding sees the same tokens everywhere.
  drop_from_caches: bool = False

  selects_first: ClassVar[bool] = False

  @classmethod
  def _general_fields(cls):
    return {field.name for field in dataclasses.fields(LayerwiseCompressor)}

  def plan(self, num_layers, num_video, ratio) -> list[tuple[int, int]]:
    """Returns [(layer, keep), ...]: what each layer from `layer` on sees.

    Layer 0 stands for what enters the model. Layers ascend, keeps do not.
    UserError where the ratio cannot be met; it names the lowest.
    """
    raise NotImplementedError(f"{type(self).__name__} has no plan")

  def step(self, state: LayerState, *, layer: int, keep: int):
    """Returns (kept int32[keep], num_valid int32[]) of ONE prompt.

    The first `num_valid` of `kept` ascend among the video rows. A trained rule
    also takes `params`.
    """
    return keep_by_last_query(state, keep)

  def rows(self, grid, ratio: float, num_layers: int | None = None) -> int:
    """Returns K, the tokens left at the last layer, static."""
    if self.selects_first:
      return super().rows(grid, ratio)
    steps = self.plan(num_layers, math.prod(grid), ratio)
    return steps[-1][1] if steps else math.prod(grid)

  def rows_per_layer(self, num_layers, grid, ratio):
    """See `base.Compressor.rows_per_layer`."""
    if self.selects_first:
      return super().rows_per_layer(num_layers, grid, ratio)
    steps = [(0, math.prod(grid))]
    steps += self.plan(num_layers, math.prod(grid), ratio)
    return [
      min(keep for first, keep in steps if first <= layer)
      for layer in range(num_layers)
    ]

  def prefill(
    self, model, params, prompt, inputs, *, ratio, new_rows, own_params=None,
    selection=None,
  ):  # fmt: skip
    """See `base.Compressor.prefill`; a slice of layers for each cut."""
    if self.selects_first:
      return super().prefill(
        model, params, prompt, inputs, ratio=ratio, new_rows=new_rows,
        own_params=own_params, selection=selection,
      )  # fmt: skip
    num_layers = model.config.text.num_layers
    num_video = math.prod(inputs.grid)
    rows = self.enter(
      prompt, inputs, ratio=ratio, num_layers=num_layers, own_params=own_params
    )
    caches, tokens, first = [], [], 0
    for layer, keep in self.plan(num_layers, num_video, ratio):
      if layer == 0:
        continue
      tokens += [rows.count] * (layer - first)
      look = attention_of(self.attention_fn, rows)
      rows, cache, attended = run_slice(model, params, rows, first, layer, look)
      kept, count = self.cut(
        rows, attended, inputs.grid,
        layer=layer, keep=keep, own_params=own_params,
      )  # fmt: skip
      taken, rows = prompt_batch.take(rows, kept, count, num_video=num_video)
      caches.append(cache)
      if self.drop_from_caches:
        caches = [prompt_batch.drop(c, taken, rows.lengths) for c in caches]
      first = layer
    tokens += [rows.count] * (num_layers - first)
    rows, cache, _ = run_slice(model, params, rows, first, num_layers)
    return (
      prompt_batch.last_logits(model, params, rows),
      tuple(qwen2.with_room(c, new_rows) for c in [*caches, cache]),
      base.SelectionTrace.of(rows, jnp.stack(tokens, axis=1)),
    )

  def enter(
    self, prompt, inputs, *, ratio, num_layers, own_params=None
  ) -> prompt_batch.PrunedPrompts:
    """Returns the prompts with the video tokens that enter, see `prefill`."""
    if self.pre_llm is None:
      return prompt
    num_video = math.prod(inputs.grid)
    steps = dict(self.plan(num_layers, num_video, ratio))
    num_keep = steps.get(0, num_video)
    share = num_keep / num_video
    pre_llm = self.pre_llm
    if not self.exact_budget:
      pre_llm = pre_llm.with_options(exact_budget=False)
      num_keep = pre_llm.rows(inputs.grid, share)
    # As the prompt holds them, in its dtype.
    features = prompt_batch.read_video(prompt.x, prompt.video_rows)
    selection = pre_llm.select_batch(
      dataclasses.replace(inputs, features=features),
      num_keep=num_keep,
      ratio=share,
      params=own_params if self.trained else pre_llm.load(),
    )
    return prompt_batch.keep(prompt, selection, num_video=num_video)

  def cut(self, rows, attended, grid, *, layer, keep, own_params=None):
    """Returns `step` of B prompts, given float32[B, R] attention."""
    given = {"params": own_params} if self.trained else {}
    # Rounded the method's own way, fewer may have entered.
    size = rows.index.shape[1]
    keep = min(keep, size)

    def one(*state):
      state = LayerState(*state, grid=grid)
      return self.step(state, layer=layer, keep=keep, **given)

    paid = prompt_batch.read_video(attended, rows.video_rows)
    mask = jnp.arange(size)[None] < rows.count[:, None]
    state = rows.x, rows.positions, rows.lengths, paid, mask, rows.index
    return jax.vmap(one)(*state, rows.row, rows.entered)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TwoStages(LayerwiseCompressor):
  """A method with one part before the language model and one inside it.

  A subclass gives `choose`, the first part.
  """

  llm_stage: bool = True  # False for the first part alone, at the whole ratio.
  llm_layer: int = 20  # Where the second part acts, of a decoder of 28 layers.
  # Share of the entered tokens that goes on, about.
  llm_keep: float = base.number(0.3, 0, 1, open_low=True)

  @property
  def selects_first(self) -> bool:
    """True without the second part: an ordinary compressor then."""
    return not self.llm_stage

  def __post_init__(self):
    super().__post_init__()
    told = f"{self.name}: llm_stage={self.llm_stage!r}; give True or False"
    errors.check(isinstance(self.llm_stage, bool), told)
    own = {n: getattr(type(self), n) for n in ("llm_keep", "llm_layer")}
    pre_llm = None
    if self.llm_stage:
      given = tuple(n for n in self.given if n not in ("llm_stage", *own))
      pre_llm = dataclasses.replace(self, llm_stage=False, given=given, **own)
    elif misplaced := [name for name in own if name in self.given]:
      raise errors.UserError(
        f"{self.name}: {misplaced[0]} is an option of the stage in the language"
        " model; give llm_stage=True with it"
      )
    object.__setattr__(self, "pre_llm", pre_llm)

  def plan(self, num_layers, num_video, ratio):
    """Returns what enters and what goes on."""
    layer = cut_layer(self.name, self.llm_layer, num_layers, True)
    try:
      entering, keep = budgets.two_stages(
        ratio, num_layers, num_video, layer=layer, share=self.llm_keep
      )
    except errors.UserError as error:
      raise errors.UserError(f"{self.name}: {error}") from None
    if not self.exact_budget:
      # Of as many tokens as may enter; what does is known to `pre_llm`.
      keep = max(1, int(self.llm_keep * num_video))
    return [(0, entering), (layer, keep)]

  def minimum_ratio(self, num_layers, num_video):
    """Returns the ratio of one token per layer."""
    if self.selects_first or num_layers < 2:
      return None
    return budgets.lowest_ratio(num_layers, num_video, entering=1)


def generate(
  model, params, compressor, prompt, inputs, next_positions, *,
  ratio, max_new_tokens, eos_ids, pad_id, own_params=None,
):  # fmt: skip
  """Returns (ids int32[B, max_new_tokens], `SelectionTrace`) of whole prompts.

  Of prompts of `prompt_batch.whole`, inputs with a leading B and the position
  of the first generated token int32[B]; `own_params` are of a trained
  compressor. Can be jitted with the compressor, ratio and everything behind
  static, unless `compressor.on_host`; `ids` have `pad_id` behind the end of an
  answer.
  """
  ratio = base.check_ratio(ratio)
  if compressor.on_host and isinstance(prompt.x, jax.core.Tracer):
    raise ValueError(
      f"{compressor.name} reads counts on the host; call generate outside jit"
    )
  logits, caches, trace = compressor.prefill(
    model, params, prompt, inputs,
    ratio=ratio, new_rows=max_new_tokens - 1, own_params=own_params,
  )  # fmt: skip
  extend = _extend if compressor.on_host else generation.extend
  ids = extend(
    model, params, logits, caches, next_positions,
    max_new_tokens=max_new_tokens, eos_ids=tuple(eos_ids), pad_id=pad_id,
  )  # fmt: skip
  return ids, trace


_extend = jax.jit(
  generation.extend,
  static_argnums=0,
  static_argnames=("max_new_tokens", "eos_ids", "pad_id"),
)


def run_slice(model, params, rows, first, last, look=None):
  """Runs the layers from `first` up to `last` on `prompt_batch.PrunedPrompts`.

  Returns (rows, cache, attention float32[B, R] received in the last, by
  `look`).
  """
  x, keys, values, attended = model.run_layers(
    params, rows.x, rows.positions, rows.lengths, first=first, last=last,
    look=look, deep=rows.deep, video_rows=rows.video_rows,
  )  # fmt: skip
  cache = qwen2.Cache(keys, values, rows.lengths)
  return rows._replace(x=x), cache, attended


def keep_by_last_query(state: LayerState, keep: int):
  """Returns (kept int32[keep], count): what the last token looks at most."""
  values = jnp.where(state.mask, state.attention, -1.0)
  _, kept = jax.lax.top_k(values, keep)
  # Rows that are not valid lie behind all that are.
  count = jnp.minimum(state.mask.sum(), keep).astype(jnp.int32)
  return jnp.sort(kept).astype(jnp.int32), count


def keep_by_text_attention(state, keep: int, sets, *, num_sets, share=None):
  """Returns (kept int32[keep], count): the best of every set of tokens.

  Of the sets int32[n] of video rows, below `num_sets`, static, where valid.
  `share` None shares out exactly `keep` tokens in proportion to the sets'
  sizes; a number keeps int(share * size) of each, as PruneVID's own code.
  """
  size = state.mask.shape[0]
  sets = jnp.where(state.mask, sets, num_sets)
  sizes = jnp.zeros(num_sets + 1, jnp.int32).at[sets].add(1)
  total = state.mask.sum()
  if share is None:
    quotas = budgets.largest_remainder_on_device(
      sizes[:num_sets], jnp.minimum(keep, total), high=sizes[:num_sets]
    )
  else:
    table = jnp.array([int(share * n) for n in range(size + 1)], jnp.int32)
    quotas = table[sizes[:num_sets]]
  quotas = jnp.append(quotas, 0)
  # Sorted by set and, in a set, by attention; the place in the set is the rank.
  order = jnp.lexsort((-state.attention, sets))
  start = jnp.cumsum(sizes) - sizes
  rank = jnp.arange(size) - start[sets[order]]
  survives = jnp.zeros(size, bool).at[order].set(rank < quotas[sets[order]])
  return compact(survives, keep)


def compact(survives, size: int):
  """Returns (int32[size] ascending places of True, behind them n; count)."""
  return token_grid.first(survives, size), survives.sum().astype(jnp.int32)


def cut_layer(name: str, layer: int, num_layers: int, scale_layers: bool):
  """Returns the layer before which tokens are dropped, checked."""
  if not isinstance(layer, int) or isinstance(layer, bool) or layer < 1:
    raise errors.UserError(
      f"{name}: layer={layer!r}; tokens can be dropped before layer 1 or later"
    )
  found = budgets.scale_layer(layer, num_layers) if scale_layers else layer
  if found >= num_layers:
    raise errors.UserError(
      f"{name}: layer={layer} leaves none of the model's {num_layers} layers"
      " behind it; use a lower layer"
    )
  return found


def attention_of(kind: str, rows: prompt_batch.PrunedPrompts):
  """Returns `f(q, k, lengths)` -> float32[B, R] for `run_layers`.

  Of kind "last" the attention of the prompt's last token, mean over heads; of
  "after_video" the most that any head of any token behind the video pays.
  """
  if kind == "last":
    return attention.last_query_attention
  if kind == "after_video":
    text_start = rows.lengths - rows.num_after
    num_behind = rows.x.shape[1] - rows.index.shape[1]
    return lambda q, k, lengths: attention.strongest_attention(
      q, k, text_start, lengths, num_queries=num_behind
    )
  raise ValueError(f"attention_fn {kind!r} is neither 'last' nor 'after_video'")
