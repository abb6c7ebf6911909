"""FrameFusion: merge similar neighbours in time, then prune by importance.

Stage 0 acts before layer 0, stage k behind the attention of layer k - 1 and
before its MLP. A stage merges tokens into the surviving token before them at
the same place of the frame, if the two point alike; when hardly any still do,
the next stage keeps what the prompt's last token looks at. One budget covers
both: the mean over layers of the tokens that are left.
Paper: https://arxiv.org/abs/2501.01986 (sections 3 and 4).

Two things differ from the published form. The number of layers is the
model's. And where merging alone would use up the budget, so that no later
layer could keep anything, merging ends one stage earlier with as many tokens
as the rest of the budget allows; `SelectionTrace.forced` tells.

Axes: B batch, L prompt tokens, R rows between two layers, n of them of the
video, N video tokens, D width, T frames, H W token grid.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cacovid_jax import errors
from cacovid_jax.compressors import base, budgets, layerwise
from cacovid_jax.models import attention, prompt_batch, qwen2

MODES = ("exact-mask", "bucketed")
# Entering lengths of the bucketed mode are multiples of this share of N.
_BUCKET = 0.05


class State(NamedTuple):
  """How far B prompts have come.

  Attributes:
    spent: int32[B] video tokens seen so far, summed over layers.
    merged: bool[B], True when merging has ended and pruning is due.
    done: bool[B], True when the budget is met.
    forced: bool[B], True if merging had to end early.
  """

  spent: jax.Array
  merged: jax.Array
  done: jax.Array
  forced: jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class FrameFusion(layerwise.LayerwiseCompressor):
  """Merging by threshold, then pruning by attention.

  Attributes:
    threshold: least cosine of two tokens that are merged, in [-1, 1].
    min_merge: merging ends when a smaller share of the tokens is merged.
    mode: "exact-mask" runs every layer at the length of the whole prompt and
      saves no time, with as many stages as it takes; "bucketed" reads on the
      host how many tokens stage 0 leaves, runs a program of about that length
      and ends merging after `max_merges` stages.
    max_merges: of the bucketed mode.
  """

  name: str = "framefusion"
  threshold: float = 0.6
  min_merge: float = 0.1
  mode: str = "exact-mask"
  max_merges: int = 3

  def __post_init__(self):
    super().__post_init__()
    if self.mode not in MODES:
      raise errors.UserError(
        f"{self.name}: mode={self.mode!r}; use {' or '.join(MODES)}"
      )
    for name, low in (("threshold", -1.0), ("min_merge", 0.0)):
      value = getattr(self, name)
      if not isinstance(value, int | float) or not low <= value <= 1:
        raise errors.UserError(
          f"{self.name}: {name}={value!r} is outside [{low:g}, 1]"
        )
    if not isinstance(self.max_merges, int) or self.max_merges < 1:
      raise errors.UserError(
        f"{self.name}: max_merges={self.max_merges!r}; use 1, 2 or 3"
      )

  @property
  def on_host(self):
    return self.mode == "bucketed"

  def plan(self, num_layers, num_video, ratio):
    """Returns the bound that is certain: the last layer's tokens.

    When they are met depends on the video; the mean over layers does not.
    """
    total = layerwise.token_layers(num_layers, num_video, ratio)
    if total < num_layers:
      raise errors.UserError(
        f"{self.name}: ratio {ratio:g} keeps no token of {num_video}; use at"
        f" least {self.minimum_ratio(num_layers, num_video):.4f}"
      )
    return [(num_layers - 1, self._most(num_layers, num_video, ratio))]

  def minimum_ratio(self, num_layers, num_video):
    """Returns the ratio of one token per layer."""
    return budgets.lowest_ratio(num_layers, num_video, entering=1)

  def step(self, state, *, layer, keep):
    """Returns the pruning step alone; `prefill` merges, too."""
    del layer
    return layerwise.keep_by_last_query(state, keep)

  def rows_per_layer(self, num_layers, grid, ratio):
    """Returns the mean that the ratio stands for: the video decides."""
    self.plan(num_layers, math.prod(grid), ratio)
    total = layerwise.token_layers(num_layers, math.prod(grid), ratio)
    return budgets.evenly(total, num_layers)

  def computed_rows(self, num_layers, grid, ratio):
    """Returns N for every layer where tokens are only masked."""
    rows = self.rows_per_layer(num_layers, grid, ratio)
    exactly = self.mode == "exact-mask"
    return [math.prod(grid)] * num_layers if exactly else rows

  def prefill(
    self, model, params, prompt, inputs, *, ratio, new_rows, own_params=None,
    selection=None,
  ):  # fmt: skip
    """See `base.Compressor.prefill`; in bucketed mode it cannot be jitted."""
    del own_params, selection
    grid = inputs.grid
    self.plan(model.config.text.num_layers, math.prod(grid), ratio)
    exactly = self.mode == "exact-mask"
    read = _prefill_exactly if exactly else _prefill_in_bucket
    return read(
      self, model, params, prompt, grid=grid, ratio=ratio, new_rows=new_rows
    )

  def _most(self, num_layers, num_video, ratio):
    """Returns the most tokens that can be left at the last layer."""
    # A stage that merges less than is due leaves less for the later ones.
    total = layerwise.token_layers(num_layers, num_video, ratio)
    most = total // num_layers + (not self.exact_budget)
    return min(most, num_video)


class _Decided(NamedTuple):
  """What a merging stage means for the later ones; see `State`."""

  merged: jax.Array
  done: jax.Array
  forced: jax.Array


class _Stages(NamedTuple):
  """The static numbers behind every stage."""

  rule: FrameFusion
  grid: tuple[int, int, int]
  num_layers: int
  total: int  # Token-layers in all.
  last_merge: int  # The last stage that may merge.

  @classmethod
  def of(cls, rule, model, grid, ratio):
    num_layers = model.config.text.num_layers
    last_merge = num_layers - 1
    if rule.mode == "bucketed":
      last_merge = min(rule.max_merges - 1, max(num_layers - 2, 0))
    total = layerwise.token_layers(num_layers, math.prod(grid), ratio)
    return cls(rule, grid, num_layers, total, last_merge)


def _prefill_exactly(rule, model, params, rows, *, grid, ratio, new_rows):
  """One scan over the layers; rows that are gone make the prompt shorter."""
  stages = _Stages.of(rule, model, grid, ratio)
  rows, state = _stage(stages, rows, _start(rows), None, 0)

  def block(carry, number):
    rows, state = carry
    state = state._replace(spent=state.spent + rows.count)

    def between(x, out):
      changed = rows._replace(x=x), state
      changed = jax.lax.cond(
        state.done.all() | (number + 1 >= stages.num_layers),
        lambda: changed,
        lambda: _stage(stages, *changed, out["look"], number + 1),
      )
      return changed[0].x, changed

    x, out = model.layer(
      params, number, rows.x, rows.positions, lengths=rows.lengths,
      look=attention.last_query_attention, between=between,
    )  # fmt: skip
    went_on, new_state = out["between"]
    x = qwen2.add_deep(x, number, went_on.deep, went_on.video_rows)
    seen = out["keys"], out["values"], rows.lengths, rows.count
    return (went_on._replace(x=x), new_state), seen

  rows = rows._replace(x=rows.x.astype(model.dtype))
  (rows, state), (keys, values, lengths, counts) = jax.lax.scan(
    block, (rows, state), jnp.arange(stages.num_layers)
  )
  cache = qwen2.with_room(qwen2.Cache(keys, values, lengths), new_rows)
  logits = prompt_batch.last_logits(model, params, rows)
  most = rule._most(stages.num_layers, math.prod(grid), ratio)
  return logits, (cache,), _trace(rows, state, counts, most)


def _prefill_in_bucket(rule, model, params, rows, *, grid, ratio, new_rows):
  """Stage 0, its counts on the host, then a program of that length."""
  static = dict(rule=rule, model=model, grid=grid, ratio=ratio)
  rows, state = first_stage(rows, **static)
  num_video = math.prod(grid)
  done = bool(np.asarray(state.done).all())
  most = rule._most(model.config.text.num_layers, num_video, ratio)
  size = bucket(int(np.asarray(rows.count).max()), num_video)
  return _rest(
    params, rows, state, **static, size=most if done else max(size, most),
    done=done, new_rows=new_rows,
  )  # fmt: skip


def bucket(count: int, num_video: int) -> int:
  """Returns the entering length of a program for `count` of N tokens."""
  step = math.ceil(num_video * _BUCKET)
  return min(math.ceil(count / step) * step, num_video)


@functools.partial(jax.jit, static_argnames=("rule", "model", "grid", "ratio"))
def first_stage(rows, *, rule, model, grid, ratio):
  """Returns (rows, `State`) behind stage 0, in front of layer 0.

  Args:
    rows: `prompt_batch.PrunedPrompts` of whole prompts.
    rule: `FrameFusion`.
    model: of which only the sizes are read.
    grid: (T, H, W).
    ratio: mean over layers.
  """
  stages = _Stages.of(rule, model, grid, ratio)
  return _stage(stages, rows, _start(rows), None, 0)


@functools.partial(
  jax.jit,
  static_argnames=(
    "rule", "model", "grid", "ratio", "size", "done", "new_rows"
  ),
)  # fmt: skip
def _rest(
  params, rows, state, *, rule, model, grid, ratio, size, done, new_rows
):
  stages = _Stages.of(rule, model, grid, ratio)
  num_layers, num_video = stages.num_layers, math.prod(grid)
  most = rule._most(num_layers, num_video, ratio)
  # Stages up to this one may change the rows; all are done behind it.
  last_stage = 0 if done else stages.last_merge + 1
  rows = _first_rows(rows, size)
  rows = rows._replace(x=rows.x.astype(model.dtype))
  parts, counts = [], []
  for number in range(last_stage):
    state = state._replace(spent=state.spent + rows.count)

    def between(x, out, rows=rows, state=state, number=number):
      rows, state = _stage(
        stages, rows._replace(x=x), state, out["look"], number + 1
      )
      if number + 1 == last_stage:
        rows = _first_rows(rows, most)
      return rows.x, (rows, state)

    x, out = model.layer(
      params, number, rows.x, rows.positions, lengths=rows.lengths,
      look=attention.last_query_attention, between=between,
    )  # fmt: skip
    parts.append((out["keys"], out["values"], rows.lengths))
    counts.append(rows.count)
    rows, state = out["between"]
    x = qwen2.add_deep(x, number, rows.deep, rows.video_rows)
    rows = rows._replace(x=x)
  caches = []
  if parts:
    keys, values, lengths = map(jnp.stack, zip(*parts, strict=True))
    caches.append(qwen2.Cache(keys, values, lengths))
  if last_stage < num_layers:
    x, keys, values, _ = model.run_layers(
      params, rows.x, rows.positions, rows.lengths,
      first=last_stage, last=num_layers,
      deep=rows.deep, video_rows=rows.video_rows,
    )  # fmt: skip
    rows = rows._replace(x=x)
    caches.append(qwen2.Cache(keys, values, rows.lengths))
  counts += [rows.count] * (num_layers - last_stage)
  caches = tuple(qwen2.with_room(cache, new_rows) for cache in caches)
  logits = prompt_batch.last_logits(model, params, rows)
  return logits, caches, _trace(rows, state, jnp.stack(counts), most)


def _first_rows(rows, size):
  """Returns the rows with room for `size` video tokens only."""
  size = min(size, rows.index.shape[1])
  out_length = rows.x.shape[1] - rows.index.shape[1] + size
  return rows._replace(
    x=rows.x[:, :out_length],
    positions=rows.positions[..., :out_length],
    video_rows=rows.video_rows[:, :size],
    index=rows.index[:, :size],
    row=rows.row[:, :size],
    deep=None if rows.deep is None else rows.deep[:, :, :size],
  )


def _start(rows):
  batch = rows.count.shape[0]
  no = jnp.zeros(batch, bool)
  return State(jnp.zeros(batch, jnp.int32), no, no, no)


def _trace(rows, state, counts, most):
  index = rows.index[:, :most]
  return base.SelectionTrace(
    index=index,
    mask=jnp.arange(index.shape[1])[None] < rows.count[:, None],
    tokens=counts.T.astype(jnp.float32),
    forced=state.forced,
  )


def _stage(stages, rows, state, attended, number):
  """Returns (rows, state) after one stage of every prompt.

  Args:
    stages: `_Stages`.
    rows: `prompt_batch.PrunedPrompts`; as many come back, the gone ones as
      padding.
    state: `State`, with the tokens of layers 0 to `number` - 1 spent.
    attended: float32[B, R] attention of each prompt's last token in the layer
      before; None at stage 0.
    number: int or int32[], which stage.
  """
  size, num_video = rows.index.shape[1], math.prod(stages.grid)
  video = prompt_batch.read_video(rows.x, rows.video_rows)
  if attended is None:
    paid = jnp.zeros(rows.index.shape, jnp.float32)
  else:
    paid = prompt_batch.read_video(attended, rows.video_rows)
  one = functools.partial(_stage_of_one, stages, number=number)
  merged, survives, state = jax.vmap(one)(
    video, rows.index, rows.count, paid, state
  )
  x = prompt_batch.write_video(rows.x, rows.video_rows, merged)
  kept, count = jax.vmap(lambda s: layerwise.compact(s, size))(survives)
  _, rows = prompt_batch.take(
    rows._replace(x=x), kept, count, num_video=num_video
  )
  return rows, state


def _stage_of_one(stages, video, index, count, paid, state, *, number):
  """Returns (video float[n, D], survives bool[n], state) of ONE prompt."""
  rule = stages.rule
  valid = jnp.arange(index.shape[0]) < count
  layers_left = jnp.maximum(stages.num_layers - number, 1)
  left = stages.total - state.spent
  keep_merging, keep_pruning = left // layers_left, left // layers_left
  if not rule.exact_budget:
    share = left / layers_left
    keep_merging = jnp.ceil(share).astype(jnp.int32)
    keep_pruning = jnp.round(share).astype(jnp.int32)

  merged, flagged, decided = _merge(
    stages, video, index, valid, count,
    remove=jnp.maximum(count - keep_merging, 0), left=left, number=number,
  )  # fmt: skip
  by_attention = jnp.argsort(jnp.where(valid, -paid, 1.0), stable=True)
  rank = _inverse(by_attention)

  merging = ~(state.merged | state.done)
  pruning = state.merged & ~state.done
  survives = valid & ~(merging & flagged)
  survives &= ~pruning | (rank < keep_pruning)
  return (
    jnp.where(merging, merged, video),
    survives,
    State(
      spent=state.spent,
      merged=state.merged | (merging & decided.merged),
      done=state.done | pruning | (merging & decided.done),
      forced=state.forced | (merging & decided.forced),
    ),
  )


def _merge(stages, video, index, valid, count, *, remove, left, number):
  """Returns (merged video float[n, D], flagged bool[n], `_Decided`).

  Flagged tokens have gone into the one before them in time.

  Args:
    stages: `_Stages`.
    video: float[n, D].
    index: int32[n] tokens of the whole video.
    valid: bool[n].
    count: int32[] valid ones.
    remove: int32[] tokens whose removal meets the budget at once.
    left: int32[] token-layers that this layer and the later ones may see.
    number: int or int32[].
  """
  T, H, W = stages.grid
  rule, size, patches = stages.rule, index.shape[0], H * W
  # Surviving tokens of a place of the frame follow each other in time.
  place, frame = index % patches, index // patches
  key = jnp.where(valid, place * T + frame, T * patches)
  order = jnp.argsort(key, stable=True)
  ordered = video[order].astype(jnp.float32)
  ordered_place = jnp.where(valid, place, -1)[order]
  norm = jnp.maximum(jnp.linalg.norm(ordered, axis=-1), 1e-6)
  dot = (ordered * jnp.roll(ordered, 1, axis=0)).sum(axis=-1)
  # Steps above rounding noise: equal tokens are equally alike.
  similarity = dot / (norm * jnp.roll(norm, 1))
  similarity = jnp.round(similarity * 2**20) / 2**20
  slot = jnp.arange(size)
  same = (ordered_place == jnp.roll(ordered_place, 1)) & (slot > 0)
  inside = slot < count
  alike = inside & same & (similarity >= rule.threshold)

  num_alike = alike.sum()
  enough = num_alike >= remove
  few = num_alike < rule.min_merge * count.astype(jnp.float32)
  ends = few | (jnp.asarray(number) >= stages.last_merge)
  # What the next stages need at least: merging leaves one token per place,
  # pruning one in all.
  least = patches if stages.total >= stages.num_layers * patches else 1
  least = jnp.where(ends, 1, least)
  later = (stages.num_layers - 1 - number) * least
  forced = ~enough & (left - (count - num_alike) < later)

  # The first token of a place joins the one before it in this order, of
  # another place, only when nothing else is left to be merged.
  ranked = jnp.where(same, similarity, similarity - 4.0)
  ranked = jnp.where(inside & (slot > 0), ranked, -jnp.inf)
  rank = _inverse(jnp.argsort(-ranked, stable=True))
  flags = jnp.where(enough | forced, inside & (rank < remove), alike)

  mean, members = _means_of_runs(ordered, flags)
  # A token that nothing joined stays as it is, bit for bit.
  joined = inside & ~flags & (members > 1)
  changed = jnp.where(joined[:, None], mean.astype(video.dtype), video[order])
  back = _inverse(order)
  decided = _Decided(enough | forced | ends, enough | forced, forced)
  return changed[back], flags[back], decided


def _means_of_runs(x, flags):
  """Returns (mean float32[n, D], members int32[n]) of the run from each row on.

  A run is a row and all that directly follow it with `flags` bool[n] set.
  """
  ends = jnp.append(~flags[1:], True)

  def joined(later, earlier):
    ended, sums, members = earlier
    more = ~ended
    return (
      later[0] | ended,
      sums + jnp.where(more[:, None], later[1], 0.0),
      members + jnp.where(more, later[2], 0),
    )

  _, sums, members = jax.lax.associative_scan(
    joined, (ends, x, jnp.ones(ends.shape, jnp.int32)), reverse=True
  )
  return sums / members[:, None], members


def _inverse(order):
  """Returns int32[n]: the place of each item in `order`."""
  return (
    jnp.zeros(order.shape, jnp.int32)
    .at[order]
    .set(jnp.arange(order.shape[0], dtype=jnp.int32))
  )
