"""FrameFusion: merge similar neighbours in time, then prune by importance.

Stage 0 acts before layer 0, stage k behind the attention of layer k - 1 and
before its MLP. A stage merges tokens into the surviving token before them at
the same place of the frame, if the two point alike; when hardly any still do,
the next stage keeps what the prompt's last token looks at. Where merging alone
would use up the budget, it ends early with as many tokens as that allows
(ours). Paper: https://arxiv.org/abs/2501.01986 (sections 3 and 4).

Axes: R rows between two layers, n of them of the video.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cacovid_jax import errors
from cacovid_jax.compressors import base, budgets, layerwise, selection_ops
from cacovid_jax.models import attention, prompt_batch, qwen2
from cacovid_jax.models import layers as layers_lib

# Entering lengths of the bucketed mode are multiples of this share of N.
_BUCKET = 0.05


class State(NamedTuple):
  """How far B prompts have come: int32[B], and three bool[B]."""

  spent: jax.Array  # Video tokens seen so far, summed over layers.
  merged: jax.Array  # True when merging has ended and pruning is due.
  done: jax.Array  # True when the budget is met.
  forced: jax.Array  # True if merging had to end early.


@dataclasses.dataclass(frozen=True, kw_only=True)
class FrameFusion(layerwise.LayerwiseCompressor, name="framefusion"):
  """Merging by threshold, then pruning by attention."""

  # Least cosine of two tokens that are merged; merging ends when less than this
  # share of the tokens is.
  threshold: float = base.number(0.6, -1, 1)
  min_merge: float = base.number(0.1, 0, 1)
  # "exact-mask" runs every layer at the length of the whole prompt; "bucketed"
  # reads on the host how many tokens stage 0 leaves, runs a program of about
  # that length and ends merging after `max_merges` stages.
  mode: str = base.choice("exact-mask", "bucketed")
  max_merges: int = base.number(3, 1, whole=True)

  @property
  def on_host(self):
    return self.mode == "bucketed"

  def plan(self, num_layers, num_video, ratio):
    """Returns the bound that is certain: the last layer's tokens."""
    stages = self.stages(num_layers, (1, 1, num_video), ratio)
    return [(num_layers - 1, stages.most)]

  def minimum_ratio(self, num_layers, num_video):
    """Returns the ratio of one token per layer."""
    return budgets.lowest_ratio(num_layers, num_video, entering=1)

  def rows_per_layer(self, num_layers, grid, ratio):
    """Returns the mean that the ratio stands for: the video decides."""
    total = self.stages(num_layers, grid, ratio).total
    return budgets.evenly(total, num_layers)

  def computed_rows(self, num_layers, grid, ratio):
    """Returns N for every layer where tokens are only masked."""
    rows = self.rows_per_layer(num_layers, grid, ratio)
    return rows if self.on_host else [math.prod(grid)] * num_layers

  def prefill(
    self, model, params, prompt, inputs, *, ratio, new_rows, own_params=None,
    selection=None,
  ):  # fmt: skip
    """See `base.Compressor.prefill`; in bucketed mode it cannot be jitted."""
    del own_params, selection
    stages = self.stages(model.config.text.num_layers, inputs.grid, ratio)
    rows, state = first_stage(prompt, stages=stages)
    size = stages.num_video
    if self.on_host:
      size = bucket(int(np.asarray(rows.count).max()), size)
      if np.asarray(state.done).all():
        size, stages = 0, stages._replace(last_merge=-1)
      size = max(size, stages.most)
    static = dict(stages=stages, model=model, size=size, new_rows=new_rows)
    return _rest(params, rows, state, **static)

  def stages(self, num_layers, grid, ratio) -> "_Stages":
    """Returns the numbers of stages; UserError if a layer sees no token."""
    last_merge, num_video = num_layers - 1, math.prod(grid)
    if self.mode == "bucketed":
      last_merge = min(self.max_merges - 1, max(num_layers - 2, 0))
    exact = budgets.exact(budgets.check_ratio(ratio))
    total = math.floor(exact * num_layers * num_video)
    if total < num_layers:
      raise errors.UserError(
        f"{self.name}: ratio {ratio:g} keeps no token of {num_video}; use at"
        f" least {self.minimum_ratio(num_layers, num_video):.4f}"
      )
    return _Stages(self, grid, num_layers, total, last_merge)


class _Stages(NamedTuple):
  """The static numbers behind every stage."""

  rule: FrameFusion
  grid: tuple[int, int, int]
  num_layers: int
  total: int  # Token-layers in all.
  last_merge: int  # The last stage that may merge; -1 if none of them.

  @property
  def num_video(self):
    return math.prod(self.grid)

  @property
  def most(self):
    """The most tokens that can be left at the last layer."""
    # A stage that merges less than is due leaves less for the later ones.
    most = self.total // self.num_layers + (not self.rule.exact_budget)
    return min(most, self.num_video)


def bucket(count: int, num_video: int) -> int:
  """Returns the entering length of a program for `count` of N tokens."""
  step = math.ceil(num_video * _BUCKET)
  return min(math.ceil(count / step) * step, num_video)


@functools.partial(jax.jit, static_argnames="stages")
def first_stage(rows, *, stages):
  """Returns (rows, `State`) behind stage 0 of `FrameFusion.stages`."""
  return _stage(stages, rows, _start(rows), None, 0)


@functools.partial(
  jax.jit, static_argnames=("stages", "model", "size", "new_rows")
)
def _rest(params, rows, state, *, stages, model, size, new_rows):
  """Returns what `prefill` does, of what `first_stage` left.

  There is room for `size` video tokens in the layers behind which stages may
  change the rows, then for the most that can be left.
  """

  def block(carry, own):
    (rows, state), (number,) = carry, own
    state = state._replace(spent=state.spent + rows.count)

    def between(x, out):
      seen = rows._replace(x=x)
      changed = jax.lax.cond(
        state.done.all() | (number + 1 >= stages.num_layers),
        lambda: (seen, state),
        lambda: _stage(stages, seen, state, out["look"], number + 1),
      )
      return changed[0].x, changed

    x, out = model.layer(
      params, number, rows.x, rows.positions, lengths=rows.lengths,
      look=attention.last_query_attention, between=between,
    )  # fmt: skip
    went_on, state = out["between"]
    x = qwen2.add_deep(x, number, went_on.deep, went_on.video_rows)
    seen = out["keys"], out["values"], rows.lengths, rows.count
    return (went_on._replace(x=x), state), seen

  last_stage = stages.last_merge + 1
  rows = _first_rows(rows, size)
  rows = rows._replace(x=rows.x.astype(model.dtype))
  caches, counts = [], jnp.zeros((0, len(rows.count)), jnp.int32)
  if last_stage:
    (rows, state), (keys, values, lengths, counts) = model.loop(
      params, block, (rows, state), (np.arange(last_stage),)
    )
    lengths, counts = map(layers_lib.joined, (lengths, counts))
    caches.append(qwen2.Cache(keys, values, lengths))
  if last_stage < stages.num_layers:
    rows = _first_rows(rows, stages.most)
    rows, cache, _ = layerwise.run_slice(
      model, params, rows, last_stage, stages.num_layers
    )
    caches.append(cache)
    later = jnp.tile(rows.count, (stages.num_layers - last_stage, 1))
    counts = jnp.concatenate([counts, later])
  left = rows._replace(index=rows.index[:, : stages.most])
  return (
    prompt_batch.last_logits(model, params, rows),
    tuple(qwen2.with_room(cache, new_rows) for cache in caches),
    base.SelectionTrace.of(left, counts.T, forced=state.forced),
  )


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
    frames=None if rows.frames is None else rows.frames[:, :out_length],
  )


def _start(rows):
  none, no = jnp.zeros_like(rows.count), jnp.zeros(rows.count.shape, bool)
  return State(none, no, no, no)


def _stage(stages, rows, state, attended, number):
  """Returns (rows, state) after one stage of every prompt.

  Of `prompt_batch.PrunedPrompts`; as many rows come back, with padding. The
  state has the tokens of layers 0 to `number` - 1 spent; `attended` float32[B,
  R] is each last token's attention in the layer before, None at stage 0.
  """
  video = prompt_batch.read_video(rows.x, rows.video_rows)
  paid = jnp.zeros(rows.index.shape, jnp.float32)
  if attended is not None:
    paid = prompt_batch.read_video(attended, rows.video_rows)
  # What layers add later is merged with what they add it to.
  maps = () if rows.deep is None else jnp.unstack(rows.deep, axis=1)
  (merged, *maps), survives, state = jax.vmap(
    functools.partial(_stage_of_one, stages, number=number)
  )((video, *maps), rows.index, rows.count, paid, state)
  x = prompt_batch.write_video(rows.x, rows.video_rows, merged)
  rows = rows._replace(x=x, deep=jnp.stack(maps, axis=1) if maps else None)
  kept, count = jax.vmap(lambda s: layerwise.compact(s, len(s)))(survives)
  _, rows = prompt_batch.take(rows, kept, count, num_video=stages.num_video)
  return rows, state


def _stage_of_one(stages, maps, index, count, paid, state, *, number):
  """Returns (maps, survives bool[n], state) of ONE prompt.

  Maps are 1 + S of float[n, D]: the stream's rows of video, and `deep`.
  """
  valid = jnp.arange(index.shape[0]) < count
  layers_left = jnp.maximum(stages.num_layers - number, 1)
  left = stages.total - state.spent
  keep_merging = keep_pruning = left // layers_left
  if not stages.rule.exact_budget:
    share = left / layers_left
    keep_merging = jnp.ceil(share).astype(jnp.int32)
    keep_pruning = jnp.round(share).astype(jnp.int32)
  remove = jnp.maximum(count - keep_merging, 0)
  merged, flagged, (ends, enough, forced) = _merge(
    stages, maps, index, count, remove=remove, left=left, number=number
  )
  rank = selection_ops.rank(jnp.where(valid, paid, -1.0))
  merging = ~(state.merged | state.done)
  pruning = state.merged & ~state.done
  survives = valid & ~(merging & flagged)
  survives &= ~pruning | (rank < keep_pruning)
  state = State(
    spent=state.spent,
    merged=state.merged | (merging & (enough | forced | ends)),
    done=state.done | pruning | (merging & (enough | forced)),
    forced=state.forced | (merging & forced),
  )
  pairs = zip(merged, maps, strict=True)
  maps = tuple(jnp.where(merging, new, old) for new, old in pairs)
  return maps, survives, state


def _merge(stages, maps, index, count, *, remove, left, number):
  """Returns (merged maps, flagged bool[n], three bool[]).

  Of maps as of `_stage_of_one`, the first of which decides. Flagged tokens have
  gone into the one before them in time. The three: merging ends; enough are
  alike to meet the budget, by `remove` less; it had to be met by force, this
  and the later layers seeing `left` in all.
  """
  T, H, W = stages.grid
  rule, size, patches = stages.rule, index.shape[0], H * W
  slot = jnp.arange(size)
  inside = slot < count
  # Surviving tokens of a place of the frame follow each other in time.
  place, frame = index % patches, index // patches
  key = jnp.where(inside, place * T + frame, T * patches)
  order = jnp.argsort(key, stable=True)
  ordered = maps[0][order].astype(jnp.float32)
  ordered_place = jnp.where(inside, place, -1)[order]
  norm = jnp.maximum(jnp.linalg.norm(ordered, axis=-1), 1e-6)
  dot = (ordered * jnp.roll(ordered, 1, axis=0)).sum(axis=-1)
  # Steps above rounding noise: equal tokens are equally alike.
  similarity = dot / (norm * jnp.roll(norm, 1))
  similarity = jnp.round(similarity * 2**20) / 2**20
  same = (ordered_place == jnp.roll(ordered_place, 1)) & (slot > 0)
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
  rank = selection_ops.rank(ranked)
  flags = jnp.where(enough | forced, inside & (rank < remove), alike)
  back = selection_ops.inverse(order)

  def merged(x):
    mean, members = _means_of_runs(x[order].astype(jnp.float32), flags)
    # A token that nothing joined stays as it is, bit for bit.
    joined = inside & ~flags & (members > 1)
    return jnp.where(joined[:, None], mean.astype(x.dtype), x[order])[back]

  maps = tuple(map(merged, maps))
  return maps, flags[back], (ends, enough, forced)


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
