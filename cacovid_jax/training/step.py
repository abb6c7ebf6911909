"""One device's share of a training step: draw, answer, remember, update.

Letters: T frames, H W token grid, N video tokens, L prompt tokens, D width, K
kept tokens, G combinations, I iterations, B videos on this device, P position
rows, M new tokens, A letters, R rungs.

With a static grid every video has the same T and N. With a bucket (see
`models.token_grid`) these are the bucket's sizes; a video's own grid is data,
and what stands behind its own frames and tokens has no influence.

The functions are written against the named axis `data`, over which they
average explicitly; `training.programs` maps them over devices. Per-video maths
is `vmap`ped from the pure functions of `policy`.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import struct

from cacovid_jax.models import processors, prompt_batch, token_grid
from cacovid_jax.policy import objective, sampling
from cacovid_jax.training import ratio, replay, rollout
from cacovid_jax.training import state as state_lib

AXIS = "data"


class Own(struct.PyTreeNode):
  """What each of B videos has of its own where their grids differ.

  Attributes:
    grid: `buckets.Grid` of the bucket, its numbers i32[B].
    positions: i32[B,P,L].
    following: i32[B] position of the first generated token.
    rungs: `ratio.Rungs`, leading axis B.
  """

  grid: token_grid.Grid
  positions: jax.Array
  following: jax.Array
  rungs: ratio.Rungs


class Batch(struct.PyTreeNode):
  """What a step reads of its B videos.

  Attributes:
    video: u8[B,T,h,w,3] pixels, or f[B,N,D] features encoded before; in a
      bucket features, zero behind a video's own.
    ids: i32[B,L] whole prompts, right padded.
    length: i32[B].
    video_rows: i32[B,N] rows of the video tokens, L behind a video's own.
    answer_id: i32[B] token of the right letter, -1 if it is none.
    option_ids: i32[B,A] tokens of the question's letters, -1 where fewer.
    question_hash: u32[B].
    decisive_frames: bool[B,T] where the answer is to be seen; all False if
      unknown. It feeds a metric and nothing else.
    own: Own, in a bucket; None with a static grid, where positions count on.
  """

  video: jax.Array
  ids: jax.Array
  length: jax.Array
  video_rows: jax.Array
  answer_id: jax.Array
  option_ids: jax.Array
  question_hash: jax.Array
  decisive_frames: jax.Array
  own: Own | None = None


class Videos(struct.PyTreeNode):
  """A batch that was embedded: what all iterations on it share.

  `rng` is the key of each video; the rest is as in `Batch` and `Own`.
  """

  prompts: prompt_batch.PromptBatch
  answer_id: jax.Array
  option_ids: jax.Array
  decisive_frames: jax.Array
  rng: jax.Array
  grid: token_grid.Grid | None = None
  rungs: ratio.Rungs | None = None


class Frozen(struct.PyTreeNode):
  """Arrays that no step changes.

  They are arguments of every program; captured, the weights would become
  constants, and another seed another program.

  Attributes:
    params: base weights.
    letters: i32[V] of `rollout.first_letters`.
    seed: u32[], of all random draws.
  """

  params: Any
  letters: jax.Array
  seed: jax.Array


class Metrics(NamedTuple):
  """What a step reports.

  Attributes:
    mean: {name: f32[]}, averages over all videos of the step, on any device.
    per_video: "finite" bool[B] (loss and rewards are), "rung" i32[B] of this
      iteration, "next_rung" i32[B].
  """

  mean: dict[str, jax.Array]
  per_video: dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Recipe:
  """Everything static about a run; the programs are made from it.

  Attributes:
    model: the frozen video LLM.
    policy: the policy module, see `policy.network`.
    tx: the optimiser.
    grid: (T, H, W) of all videos, or the `buckets.Bucket` that holds them.
    ladder: retention ratios, `ratio.Ladder` or, in a bucket, `BucketLadder`.
    objective: constants of the loss.
    rollout: how the model answers.
    iterations: I.
    eos_ids: ids that end an answer.
    pad_id: filler behind the end of an answer.
    to_pixels: u8[T,h,w,3] -> f32 pixels as the tower wants them.
  """

  model: Any
  policy: Any
  tx: optax.GradientTransformation
  grid: tuple[int, int, int] | token_grid.Bucket
  ladder: ratio.Ladder | ratio.BucketLadder
  objective: objective.ObjectiveConfig
  rollout: rollout.RolloutConfig
  iterations: int
  eos_ids: tuple[int, ...]
  pad_id: int
  to_pixels: Any = None

  @property
  def bucket(self) -> token_grid.Bucket:
    return token_grid.as_bucket(self.grid)

  @property
  def num_video(self) -> int:
    """N, the rows of features."""
    return self.bucket.tokens

  @property
  def num_combinations(self) -> int:
    return self.ladder.num_combinations


def video_keys(seed, step, question_hash):
  """Returns the key of every video: (seed, step), then the question."""
  key = jax.random.fold_in(jax.random.key(seed), step)
  return jax.vmap(jax.random.fold_in, (None, 0))(key, question_hash)


def policy_scores(recipe: Recipe, params, videos: Videos):
  """Returns Scores of B whole prompts under the policy."""

  def one(prompt, grid):
    return recipe.policy.apply(
      {"params": params},
      prompt.x,
      prompt.positions,
      prompt.video_rows,
      recipe.grid if grid is None else grid,
      prompt.lengths,
    )

  return jax.vmap(one)(videos.prompts, videos.grid)


def begin(recipe: Recipe, state, frozen: Frozen, batch: Batch):
  """Embeds the prompts, scores them once, and empties the memories.

  Returns:
    (Videos, replay.Replay), leading axis B.
  """
  model, params = recipe.model, frozen.params
  features = batch.video
  if features.ndim == 5:

    def encode(video):
      inputs = processors.TowerInputs(recipe.to_pixels(video), recipe.grid)
      return model.encode(params, inputs).features

    # One video at a time: a tower's activations are the step's largest.
    features = jax.lax.map(encode, features)
  videos = Videos(
    prompts=_prompts(model, params, batch, features),
    answer_id=batch.answer_id,
    option_ids=batch.option_ids,
    decisive_frames=batch.decisive_frames,
    rng=video_keys(frozen.seed, state.step, batch.question_hash),
    grid=None if batch.own is None else batch.own.grid,
    rungs=None if batch.own is None else batch.own.rungs,
  )
  scores = policy_scores(recipe, state.params, videos)

  def memory(old, rungs):
    return replay.empty(
      old,
      num_combinations=recipe.num_combinations,
      iterations=recipe.iterations,
      rung=recipe.ladder.start if rungs is None else rungs.start,
    )

  return videos, jax.vmap(memory)(scores, videos.rungs)


def _prompts(model, params, batch: Batch, features):
  """Returns the `PromptBatch` of a batch, features f[B,N,D] in place."""
  x = jax.vmap(model.embed_prompt, (None, 0, 0, 0))(
    params, batch.ids, features, batch.video_rows
  )
  if batch.own is None:
    positions = jnp.broadcast_to(
      jnp.arange(x.shape[1], dtype=jnp.int32), (x.shape[0], 1, x.shape[1])
    )
    following = batch.length
  else:
    positions, following = batch.own.positions, batch.own.following
  return prompt_batch.PromptBatch(
    x, positions, batch.length, batch.video_rows, following
  )


def draw(recipe: Recipe, videos: Videos, memory, *, largest: int):
  """Draws every video's combinations from its old scores.

  A video on a smaller rung than `largest` gets that rung's combinations,
  padded; which program runs has no influence on what is drawn.

  Returns:
    (sampling.Combinations with index i32[B,G,K], num_valid i32[B]).
  """
  ladder = recipe.ladder

  def one(key, prompt, memory, rungs):
    features = prompt.x[prompt.video_rows]
    given = (
      jax.random.fold_in(key, memory.iteration),
      memory.old_scores,
      features,
    )
    if rungs is None:
      plans = ladder.plans[: largest + 1]
      return sampling.sample_rung(*given, plans=plans, rung=memory.rung)
    # With room for every rung: random numbers depend on the sizes drawn.
    plan = jax.tree.map(lambda leaf: leaf[memory.rung], rungs.plans)
    drawn, num_valid = sampling.sample_in_bucket(*given, plan)
    index = drawn.index[:, : ladder.num_keep[largest]]
    return drawn._replace(index=index), num_valid

  return jax.vmap(one)(videos.rng, videos.prompts, memory, videos.rungs)


def roll_out(recipe: Recipe, frozen, videos, memory, *, largest: int):
  """Draws combinations and lets the frozen model answer from each.

  Returns:
    (rollout.Answers, replay.Masks), leading axis B.
  """
  combinations, num_valid = draw(recipe, videos, memory, largest=largest)
  answers = rollout.answer(
    recipe.model,
    frozen.params,
    videos.prompts,
    combinations.index,
    num_valid,
    max_new_tokens=recipe.rollout.answer_length,
    eos_ids=recipe.eos_ids,
    pad_id=recipe.pad_id,
  )
  masks = jax.vmap(lambda c: replay.masks(c, recipe.num_video))(combinations)
  return answers, masks


def gradients(recipe: Recipe, params, videos: Videos, memory):
  """Returns (gradient, (loss f32[B], metrics)), averaged over all devices.

  The metrics are averages as well; the losses are this device's.
  """

  def one(new, old, rows, grid):
    loss, metrics = objective.loss(new, old, rows, recipe.objective, grid)
    for name in ("token", "frame"):
      scores = getattr(new, name)
      valid = None if grid is None else getattr(grid, f"valid_{name}s")
      gap = scores[..., 1] - scores[..., 0]
      metrics[f"{name}_gap_std"] = jnp.std(gap, where=valid)
    return loss, metrics

  def mean_loss(params):
    scores = policy_scores(recipe, params, videos)
    loss, metrics = jax.vmap(one)(
      scores, memory.old_scores, memory.rows, videos.grid
    )
    return loss.mean(), (loss, metrics)

  grads, (loss, metrics) = jax.grad(mean_loss, has_aux=True)(params)
  metrics = jax.tree.map(jnp.mean, metrics)
  grads, metrics = jax.lax.pmean((grads, metrics), AXIS)
  return grads, (loss, metrics)


def update(recipe: Recipe, state, videos, memory, masks, rewards):
  """Remembers one iteration's rewards and makes one optimiser step.

  Args:
    recipe: the run.
    state: TrainState.
    videos: Videos.
    memory: replay.Replay with room for the iteration.
    masks: replay.Masks of the iteration's combinations.
    rewards: f32[B,G].

  Returns:
    (state, memory, Metrics).
  """
  rung = memory.rung
  memory = jax.vmap(replay.append)(memory, masks, rewards)
  grads, (loss, metrics) = gradients(recipe, state.params, videos, memory)
  finite = jnp.isfinite(loss) & jnp.isfinite(rewards).all(axis=-1)
  norm = optax.tree.norm(grads)
  # Every device must decide alike, or the replicas part for good.
  everywhere = jax.lax.pmin(finite.all().astype(jnp.int32), AXIS) > 0
  accept = everywhere & jnp.isfinite(norm)
  new = state_lib.apply_gradients(state, grads, recipe.tx, accept)
  last = memory.iteration[0] == recipe.iterations
  new = new.replace(step=state.step + last.astype(jnp.int32))
  mean_reward = jax.vmap(replay.mean_token_reward)(memory)
  if videos.rungs is None:
    next_rung = ratio.next_rung(recipe.ladder, rung, mean_reward)
    ratios = jnp.asarray(recipe.ladder.ratios, jnp.float32)[rung]
  else:
    move = functools.partial(ratio.next_rung, recipe.ladder)
    next_rung = jax.vmap(move)(rung, mean_reward, videos.rungs)
    ratios = jax.vmap(lambda own, j: own.ratios[j])(videos.rungs, rung)
  memory = memory.replace(rung=next_rung)
  metrics |= reward_metrics(recipe, rewards)
  metrics |= frame_metrics(videos, masks)
  metrics["loss"] = jax.lax.pmean(loss.mean(), AXIS)
  metrics["gradient_norm"] = norm
  metrics["refused"] = 1.0 - accept.astype(jnp.float32)
  metrics["ratio"] = jax.lax.pmean(ratios.mean(), AXIS)
  per_video = {"finite": finite, "rung": rung, "next_rung": next_rung}
  return new, memory, Metrics(metrics, per_video)


def reward_metrics(recipe: Recipe, rewards):
  """Returns mean rewards by mode; greedy and drawn combinations apart.

  The drawn ones hardly move (the group cap keeps draws near uniform): the
  greedy combination shows whether the policy learns.
  """
  num_token, num_frame = replay.counts(recipe.num_combinations)
  frame = rewards[:, num_token : num_token + num_frame]
  means = {
    "reward_token": rewards[:, :num_token].mean(),
    "reward_token_greedy": rewards[:, 0].mean(),
    "reward_frame": frame.mean(),
    "reward_frame_greedy": frame[:, 0].mean(),
    "reward_content": rewards[:, -1].mean(),
  }
  return jax.lax.pmean(means, AXIS)


def frame_metrics(videos: Videos, masks: replay.Masks):
  """Returns how often greedy frames hold a decisive one, and its chance.

  Over the videos whose decisive frames are known; zeros if none is.
  """
  decisive = videos.decisive_frames
  known = decisive.any(axis=-1)
  hit = (masks.frame[:, 0] & decisive).any(axis=-1)
  drawn = masks.frame[:, 0].sum(axis=-1)
  taken = jnp.arange(decisive.shape[-1])
  frames = decisive.shape[-1]
  if videos.grid is not None:
    frames = videos.grid.num_frames[:, None]
  # All drawn frames miss: prod over draws of (others left) / (frames left).
  others = frames - decisive.sum(axis=-1, keepdims=True) - taken
  factor = jnp.maximum(others, 0) / (frames - taken)
  factor = jnp.where(taken < drawn[:, None], factor, 1.0)
  chance = 1.0 - jnp.prod(factor, axis=-1)
  count, hits, chances = jax.lax.psum(
    (
      known.sum(),
      jnp.where(known, hit, 0).sum(),
      jnp.where(known, chance, 0.0).sum(),
    ),
    AXIS,
  )
  count = jnp.maximum(count, 1)
  return {"decisive_frame": hits / count, "decisive_chance": chances / count}


def iterate(recipe, state, frozen, videos, memory, *, largest: int):
  """One iteration with on-device rewards.

  Returns:
    (state, memory, ids i32[B,G,M], rewards f32[B,G], metrics).
  """
  answers, masks = roll_out(recipe, frozen, videos, memory, largest=largest)
  rewards = rollout.reward(
    recipe.rollout,
    answers,
    videos.answer_id,
    videos.option_ids,
    frozen.letters,
  )
  state, memory, metrics = update(recipe, state, videos, memory, masks, rewards)
  return state, memory, answers.ids, rewards, metrics


def whole(recipe: Recipe, state, frozen: Frozen, batch: Batch):
  """All iterations on a batch at a fixed ratio, rewards on the device.

  Returns:
    (state, ids i32[B,I,G,M], rewards f32[B,I,G], metrics); means of the
    metrics are f32[I], those per video [B,I].
  """
  videos, memory = begin(recipe, state, frozen, batch)

  def body(carry, _):
    state, memory = carry
    state, memory, *out = iterate(
      recipe, state, frozen, videos, memory, largest=0
    )
    return (state, memory), tuple(out)

  (state, _), (ids, rewards, metrics) = jax.lax.scan(
    body, (state, memory), None, length=recipe.iterations
  )

  def by_video(a):
    return jnp.moveaxis(a, 0, 1)

  metrics = metrics._replace(
    per_video=jax.tree.map(by_video, metrics.per_video)
  )
  return state, by_video(ids), by_video(rewards), metrics
