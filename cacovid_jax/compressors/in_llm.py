"""Compressors that act inside the language model, between its layers.

A plan says before which layers video tokens are dropped and how many go on;
the layers in between run as slices of depth, each with its own number of rows
and its own key-value cache. The budget is a mean over layers: a ratio of 10 %
means that a layer's attention sees, on average, 10 % of the video tokens
(SparseVLM, https://arxiv.org/abs/2410.04417, counts so, and VidCom2,
https://arxiv.org/abs/2505.14454, says so).

Axes: B batch, L prompt tokens, D width, N video tokens, R rows between two
layers, n of them of the video, K tokens left at the last layer, P position
rows, T frames, H W token grid.
"""

import abc
import dataclasses
import fractions
import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from cacovid_jax import errors
from cacovid_jax.compressors import base, budgets
from cacovid_jax.models import attention, generation, prompt_batch, qwen2


class Seen(NamedTuple):
  """What a rule may look at between two layers, of ONE prompt.

  Attributes:
    hidden: float[R, D] residual stream.
    positions: int32[P, R].
    length: int32[] valid rows.
    attention: float32[n] paid to the video rows in the layer before.
    mask: bool[n] valid video rows, a prefix.
    index: int32[n], see `prompt_batch.PrunedPrompts`.
    row: int32[n], see `prompt_batch.PrunedPrompts`.
    entered: `base.Selection` or None.
  """

  hidden: jax.Array
  positions: jax.Array
  length: jax.Array
  attention: jax.Array
  mask: jax.Array
  index: jax.Array
  row: jax.Array
  entered: base.Selection | None


class Trace(NamedTuple):
  """What became of the video tokens.

  Attributes:
    index: int32[B, K] tokens left at the last layer, ascending; N at padding.
    mask: bool[B, K] which of them there are.
    tokens: float32[B, layers] video tokens that each layer's attention saw.
    forced: bool[B], True where a rule had to end early to stay within the
      budget; None for rules that never have to.
  """

  index: jax.Array
  mask: jax.Array
  tokens: jax.Array
  forced: jax.Array | None = None

  def equivalent_ratio(self, num_video: int) -> jax.Array:
    """Returns float32[B]: mean over layers of the share of N tokens seen."""
    return self.tokens.mean(axis=1) / num_video


# Compared by identity, as `base.Compressor` is: programs are cached by it.
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class InLLM(abc.ABC):
  """A rule that drops video tokens inside the language model.

  A subclass gives `plan` and `step`; the fields that it adds are its options.

  Attributes:
    name: what tables call it.
    needs: names of the `base.Aux` fields that `before` reads.
    stochastic: True if `before` draws from a key.
    options: the options that were set, for the record.
    oracle: True if it knows the answer's place.
    before: what chooses the tokens that enter the model; None lets all in.
    exact_budget: True spends the ratio as closely as whole tokens allow,
      never more; False rounds as the method's own code does.
    note: one sentence for tables, where the method is not quite what its name
      says.
    look: "last" for the attention of the prompt's last token, mean over heads;
      "after_video" for the most that any head of any token behind the video
      pays.
    drop_from_caches: True also forgets dropped tokens in the layers that saw
      them, so that decoding sees the same tokens everywhere.
  """

  name: str
  needs: frozenset[str] = frozenset()
  stochastic: bool = False
  options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  oracle: bool = False
  before: base.Compressor | None = None
  exact_budget: bool = True
  note: str = ""
  look: str = "last"
  drop_from_caches: bool = False

  @property
  def sees_question(self) -> bool:
    """True: the residual stream of later layers depends on the question."""
    return True

  @property
  def requirements(self) -> tuple[str, ...]:
    """What it cannot do without, in words, of `base.requirements_of`."""
    return base.requirements_of(self.needs | {"attention"})

  @property
  def on_host(self) -> bool:
    """True if `generate` reads counts on the host and cannot be jitted."""
    return False

  @property
  def known_options(self) -> tuple[str, ...]:
    """Names of the options that it takes, sorted."""
    general = {field.name for field in dataclasses.fields(InLLM)}
    own = {field.name for field in dataclasses.fields(self)}
    return tuple(sorted(own - general))

  def with_options(self, *, exact_budget: bool | None = None, **options):
    """Returns the method with options set; `known_options` says which.

    Args:
      exact_budget: as of the class; None leaves it.
      **options: values of the method's own options.
    """
    changes = dict(options)
    if exact_budget is not None:
      changes["exact_budget"] = exact_budget
    return dataclasses.replace(
      self, **changes, options={**self.options, **options}
    )

  @abc.abstractmethod
  def plan(
    self, num_layers: int, num_video: int, ratio: float
  ) -> list[tuple[int, int]]:
    """Returns [(layer, keep), ...]: what each layer from `layer` on sees.

    Layer 0 stands for what enters the model. Layers ascend, keeps do not.

    Raises:
      UserError: the ratio cannot be met; names the lowest that can.
    """

  @abc.abstractmethod
  def minimum_ratio(self, num_layers: int, num_video: int) -> float | None:
    """Returns the lowest ratio that `plan` can meet; None if it meets none."""

  @abc.abstractmethod
  def step(self, seen: Seen, *, layer: int, keep: int, grid):
    """Returns (kept int32[keep], num_valid int32[]) of ONE prompt.

    `kept` ascends among the video rows 0..n-1; entries behind the first
    `num_valid` are not read.
    """

  def rows(self, grid, ratio: float, num_layers: int) -> int:
    """Returns K, the tokens left at the last layer, static."""
    num_video = math.prod(grid)
    steps = self.plan(num_layers, num_video, ratio)
    return steps[-1][1] if steps else num_video

  def prefill(
    self,
    model,
    params,
    rows: prompt_batch.PrunedPrompts,
    *,
    grid,
    ratio: float,
    new_rows: int,
  ):
    """Returns (logits, caches, trace) after reading the prompts.

    Args:
      model: `models.video_llm.VideoLLM`.
      params: its parameters.
      rows: the prompts, with the tokens that `before` let in.
      grid: static (T, H, W) of the whole video.
      ratio: static.
      new_rows: static, room in the caches for what follows.

    Returns:
      logits float32[B, V] behind each prompt, a tuple of `qwen2.Cache` for
      consecutive slices of the layers, and the `Trace`.
    """
    num_layers = model.config.text.num_layers
    num_video = math.prod(grid)
    cuts = [
      (layer, keep)
      for layer, keep in self.plan(num_layers, num_video, ratio)
      if layer > 0
    ]
    num_behind = rows.x.shape[1] - rows.index.shape[1]
    caches, tokens, first = [], [], 0
    for layer, keep in [*cuts, (num_layers, None)]:
      look = None
      if keep is not None:
        look = looker(self.look, rows.lengths - rows.num_after, num_behind)
      x, keys, values, attended = model.run_layers(
        params, rows.x, rows.positions, rows.lengths,
        first=first, last=layer, look=look,
        deep=rows.deep, video_rows=rows.video_rows,
      )  # fmt: skip
      caches.append(qwen2.Cache(keys, values, rows.lengths))
      tokens += [rows.count] * (layer - first)
      first, rows = layer, rows._replace(x=x)
      if keep is None:
        break
      # Rounded the method's own way, fewer may have entered.
      keep = min(keep, rows.index.shape[1])
      step = functools.partial(self.step, layer=layer, keep=keep, grid=grid)
      kept, count = jax.vmap(step)(see(rows, attended))
      taken, rows = prompt_batch.take(rows, kept, count, num_video=num_video)
      if self.drop_from_caches:
        caches = [
          prompt_batch.drop(cache, taken, rows.lengths) for cache in caches
        ]
    trace = Trace(
      index=rows.index,
      mask=jnp.arange(rows.index.shape[1])[None] < rows.count[:, None],
      tokens=jnp.stack(tokens, axis=1).astype(jnp.float32),
    )
    return (
      prompt_batch.last_logits(model, params, rows),
      tuple(qwen2.with_room(cache, new_rows) for cache in caches),
      trace,
    )


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class TwoStages(InLLM):
  """A method with one part before the language model and one inside it.

  Its options are those of `before` and of the stage inside. The budgets of
  both parts follow from the ratio: about `llm_keep` of what enters goes on.

  Attributes:
    llm_stage: False for the part before the model alone, at the whole ratio.
    llm_layer: the layer before which the second part acts, of a decoder of 28
      layers.
    llm_keep: share of the entered tokens that goes on.
  """

  llm_stage: bool = True
  llm_layer: int = 20
  llm_keep: float = 0.3

  def __post_init__(self):
    share = self.llm_keep
    if not isinstance(share, int | float) or not 0 < share <= 1:
      raise errors.UserError(
        f"{self.name}: llm_keep={share!r} is outside (0, 1]"
      )

  @property
  def known_options(self):
    """Names of the options of both parts, sorted."""
    return tuple(sorted({*super().known_options, *self.before.known_options}))

  def with_options(self, *, exact_budget=None, **options):
    """See `InLLM.with_options`; without its second part, a `Compressor`."""
    known = super().known_options
    own = {k: v for k, v in options.items() if k in known}
    rest = {k: v for k, v in options.items() if k not in own}
    before = self.before.with_options(exact_budget=exact_budget, **rest)
    stage = own.get("llm_stage", self.llm_stage)
    if not isinstance(stage, bool):
      raise errors.UserError(
        f"{self.name}: llm_stage={stage!r}; give True or False"
      )
    if not stage:
      for name in sorted(set(own) - {"llm_stage"}):
        raise errors.UserError(
          f"{self.name}: {name} is an option of the stage in the language"
          " model; give llm_stage=True with it"
        )
      return dataclasses.replace(
        before, options={**before.options, "llm_stage": False}
      )
    made = dataclasses.replace(self, before=before, needs=before.needs)
    # The class's own way, with options of both parts for the record.
    made = InLLM.with_options(made, exact_budget=exact_budget, **own)
    return dataclasses.replace(made, options={**self.options, **options})

  def plan(self, num_layers, num_video, ratio):
    """Returns what enters and what goes on; `ratio` from below in the mean."""
    layer = cut_layer(self.name, self.llm_layer, num_layers, True)
    try:
      entering, keep = budgets.two_stages(
        ratio, num_layers, num_video, layer=layer, share=self.llm_keep
      )
    except errors.UserError as error:
      raise errors.UserError(f"{self.name}: {error}") from None
    if not self.exact_budget:
      # Of as many tokens as may enter; what does is known to `before`.
      keep = max(1, int(self.llm_keep * num_video))
    return [(0, entering), (layer, keep)]

  def minimum_ratio(self, num_layers, num_video):
    """Returns the ratio of one token per layer."""
    if num_layers < 2:
      return None
    return budgets.lowest_ratio(num_layers, num_video, entering=1)

  def step(self, seen, *, layer, keep, grid):
    """Returns the tokens that the last token attends to most."""
    del layer, grid
    return keep_by_last_query(seen, keep)


def generate(
  model,
  params,
  compressor: InLLM,
  prompts: prompt_batch.PromptBatch,
  aux=None,
  *,
  grid,
  ratio,
  max_new_tokens,
  eos_ids,
  pad_id,
  text=None,
  rngs=None,
):
  """Returns (ids int32[B, max_new_tokens], `Trace`) of whole prompts.

  Can be jitted with the compressor, grid, ratio and everything behind static,
  unless `compressor.on_host`.

  Args:
    model: `models.video_llm.VideoLLM`.
    params: its parameters.
    compressor: the rule.
    prompts: B whole prompts with N video tokens each.
    aux: `base.Aux` with leading axis B, for what `compressor.before` needs.
    grid: static (T, H, W) with T * H * W = N.
    ratio: static, mean share of the video tokens that a layer sees.
    max_new_tokens: static, at least 1.
    eos_ids: static, token ids that end an answer.
    pad_id: id written behind the end.
    text: float[B, Lq, D] embedded questions, if `before` needs them.
    rngs: keys [B], if `before` draws.
  """
  ratio = base.check_ratio(ratio)
  if compressor.on_host and isinstance(prompts.x, jax.core.Tracer):
    raise ValueError(
      f"{compressor.name} reads counts on the host; call generate outside jit"
    )
  rows = enter(
    compressor, prompts, aux,
    grid=grid, ratio=ratio, num_layers=model.config.text.num_layers,
    text=text, rngs=rngs,
  )  # fmt: skip
  logits, caches, trace = compressor.prefill(
    model, params, rows, grid=grid, ratio=ratio, new_rows=max_new_tokens - 1
  )
  extend = _extend if compressor.on_host else generation.extend
  ids = extend(
    model,
    params,
    logits,
    caches,
    prompts.next_position,
    num_position_rows=prompts.positions.shape[1],
    max_new_tokens=max_new_tokens,
    eos_ids=tuple(eos_ids),
    pad_id=pad_id,
  )
  return ids, trace


_extend = jax.jit(
  generation.extend,
  static_argnums=0,
  static_argnames=("num_position_rows", "max_new_tokens", "eos_ids", "pad_id"),
)


def enter(
  compressor: InLLM,
  prompts: prompt_batch.PromptBatch,
  aux=None,
  *,
  grid,
  ratio,
  num_layers,
  text=None,
  rngs=None,
) -> prompt_batch.PrunedPrompts:
  """Returns the prompts with the video tokens that enter the model.

  Arguments are those of `generate`.
  """
  num_video = math.prod(grid)
  if prompts.video_rows.shape[1] != num_video:
    raise ValueError(
      f"prompts with {prompts.video_rows.shape[1]} video rows do not hold"
      f" {num_video} video tokens"
    )
  rows = prompt_batch.whole(prompts)
  if compressor.before is None:
    return rows
  before, steps = (
    compressor.before,
    compressor.plan(num_layers, num_video, ratio),
  )
  num_keep = next((keep for layer, keep in steps if layer == 0), num_video)
  share = num_keep / num_video
  if not compressor.exact_budget:
    before = before.with_options(exact_budget=False)
    num_keep = before.rows(grid, share)

  def choose(features, text, aux, rng):
    return before.compress(
      features,
      grid=grid,
      num_keep=num_keep,
      text=text,
      aux=aux,
      rng=rng,
      ratio=share,
    )

  selection = jax.vmap(choose)(
    prompt_batch.read_video(rows.x, rows.video_rows), text, aux, rngs
  )
  return prompt_batch.keep(rows, selection, num_video=num_video)


def see(rows: prompt_batch.PrunedPrompts, attended) -> Seen:
  """Returns what a rule sees, leading axis B, given float32[B, R] attention."""
  size = rows.index.shape[1]
  return Seen(
    hidden=rows.x,
    positions=rows.positions,
    length=rows.lengths,
    attention=prompt_batch.read_video(attended, rows.video_rows),
    mask=jnp.arange(size)[None] < rows.count[:, None],
    index=rows.index,
    row=rows.row,
    entered=rows.entered,
  )


def keep_by_last_query(seen: Seen, keep: int):
  """Returns (kept int32[keep], count): what the last token looks at most.

  Ties go to the earlier token.
  """
  values = jnp.where(seen.mask, seen.attention, -1.0)
  _, kept = jax.lax.top_k(values, keep)
  # Rows that are not valid lie behind all that are.
  count = jnp.minimum(seen.mask.sum(), keep).astype(jnp.int32)
  return jnp.sort(kept).astype(jnp.int32), count


def keep_by_text_attention(
  seen: Seen, keep: int, sets, *, num_sets, share=None
):
  """Returns (kept int32[keep], count): the best of every set of tokens.

  Args:
    seen: with the attention that the text pays.
    keep: static.
    sets: int32[n] set of each video row, below `num_sets` where valid.
    num_sets: static.
    share: None shares out exactly `keep` tokens in proportion to the sets'
      sizes, by largest remainder; a number keeps int(share * size) of each,
      as PruneVID's own code does, which is `keep` at most.
  """
  size = seen.mask.shape[0]
  sets = jnp.where(seen.mask, sets, num_sets)
  sizes = jnp.zeros(num_sets + 1, jnp.int32).at[sets].add(1)
  total = seen.mask.sum()
  if share is None:
    quotas = budgets.largest_remainder_on_device(
      sizes[:num_sets], jnp.minimum(keep, total), high=sizes[:num_sets]
    )
  else:
    table = jnp.array([int(share * n) for n in range(size + 1)], jnp.int32)
    quotas = table[sizes[:num_sets]]
  quotas = jnp.append(quotas, 0)
  # Sorted by set and, in a set, by attention; the place in the set is the rank.
  order = jnp.lexsort((-seen.attention, sets))
  start = jnp.cumsum(sizes) - sizes
  rank = jnp.arange(size) - start[sets[order]]
  survives = jnp.zeros(size, bool).at[order].set(rank < quotas[sets[order]])
  return compact(survives, keep)


def sets_of_static_and_frames(selection: base.Selection, grid):
  """Returns int32[K] sets of merged rows, 2 * T in all.

  A row that stands for tokens of one frame belongs to that frame's set; one
  that stands for several frames to set T + first of them: PruneVID's dynamic
  and static tokens. Padding goes to set 2 * T.
  """
  T, H, W = grid
  size = selection.index.shape[0]
  frame = jnp.arange(T * H * W, dtype=jnp.int32) // (H * W)
  group = jnp.where(selection.assign < 0, size, selection.assign)
  first = jax.ops.segment_min(frame, group, size + 1)[:size]
  last = jax.ops.segment_max(frame, group, size + 1)[:size]
  sets = jnp.where(last > first, T + first, first)
  return jnp.where(selection.mask, sets, 2 * T)


def compact(survives, size: int):
  """Returns (int32[size] ascending places of True, behind them n; count)."""
  length = survives.shape[0]
  (places,) = jnp.nonzero(survives, size=size, fill_value=length)
  return places, survives.sum().astype(jnp.int32)


def cut_layer(
  name: str, layer: int, num_layers: int, scale_layers: bool
) -> int:
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


def token_layers(num_layers: int, num_video: int, ratio: float) -> int:
  """Returns floor(ratio * layers * N): tokens that all layers may see."""
  # The decimal number that was written, not its nearest binary fraction.
  exact = fractions.Fraction(str(base.check_ratio(ratio)))
  return math.floor(exact * num_layers * num_video)


def looker(kind: str, text_start, num_behind: int):
  """Returns `look(q, k, lengths)` -> float32[B, R] for `run_layers`."""
  if kind == "last":
    return attention.last_query_attention
  if kind == "after_video":
    return lambda q, k, lengths: attention.strongest_attention(
      q, k, text_start, lengths, num_queries=num_behind
    )
  raise ValueError(f"look {kind!r} is neither 'last' nor 'after_video'")
