"""One device's share of a training step: draw, answer, remember, update.

Letters: T frames, H W token grid, N video tokens, L prompt tokens, D width, K
kept tokens, G combinations, I iterations, B videos on this device, P position
rows, M new tokens, A letters, R rungs.

T and N are those of a bucket (see `models.token_grid`); what stands behind a
video's own frames and tokens has no influence. The functions are written
against the named axis `data`, over which they average explicitly;
`training.programs` maps them over devices.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import struct

from cacovid_jax.inference import programs
from cacovid_jax.models import prompt_batch, token_grid
from cacovid_jax.policy import network, sampling
from cacovid_jax.training import optimizer, ratio, repeats, replay
from cacovid_jax.training import rollout as rollout_lib

AXIS = "data"


class TrainState(struct.PyTreeNode):
  """Everything that a run must remember: one pytree."""

  # i32[], steps done; a step is all iterations of `videos_per_step` videos. A
  # skipped update counts, so that the data order goes on.
  step: jax.Array
  params: Any  # Of the policy, float32.
  opt_state: Any  # Its own count is that of accepted updates.

  @classmethod
  def create(cls, params, tx: optax.GradientTransformation):
    """Returns the state before the first step."""
    step = jnp.zeros((), jnp.int32)
    return cls(step=step, params=params, opt_state=tx.init(params))

  @property
  def final_params(self):
    """What is validated and exported: the average where there is one."""
    return getattr(self.opt_state, "average", self.params)

  def apply_gradients(self, grads, tx: optax.GradientTransformation, accept):
    """Returns the state after one optimiser update.

    Where `accept` bool[] is False, parameters and moments stay bit for bit as
    they were; one NaN in a moment would otherwise stay for good.
    """
    updates, opt_state = tx.update(grads, self.opt_state, self.params)
    new = optax.apply_updates(self.params, updates), opt_state
    old = self.params, self.opt_state
    params, opt_state = jax.tree.map(
      lambda a, b: jnp.where(accept, a, b), new, old
    )
    return self.replace(params=params, opt_state=opt_state)


class Batch(struct.PyTreeNode):
  """What a step reads of its B videos.

  Until `prepare_videos` embeds them, prompts have features and ids, and no `x`.
  """

  prompts: prompt_batch.PromptBatch
  answer_id: jax.Array  # i32[B] token of the right letter, -1 if it is none.
  option_ids: jax.Array  # i32[B,A] tokens of the letters, -1 where fewer.
  question_hash: jax.Array  # u32[B].
  # bool[B,T] where the answer is to be seen; all False if unknown. It feeds a
  # metric and nothing else.
  decisive_frames: jax.Array
  grid: token_grid.TokenGrid  # Its numbers i32[B].
  rungs: ratio.Rungs  # With a leading axis B.
  # Rows of text in front of every video that are read once for all answers.
  shared_rows: int = struct.field(pytree_node=False, default=0)
  rng: jax.Array | None = None  # Key of each video, once embedded.
  # Their keys and values float[B,layers,rows,kv heads,head], once embedded.
  shared: tuple[jax.Array, jax.Array] | None = None


class Constants(struct.PyTreeNode):
  """Arrays that no step changes.

  Captured, weights would become constants, another seed another program.
  """

  params: Any  # Base weights.
  letters: jax.Array  # i32[V] of `rollout_lib.first_letters`.
  seed: jax.Array  # u32[], of all random draws.


class Metrics(NamedTuple):
  """What a step reports."""

  # {name: f32[]}, averages over all videos of the step, on any device.
  mean: dict[str, jax.Array]
  # "finite" bool[B] (loss and rewards are), "rung" i32[B] of this iteration,
  # "next_rung" i32[B].
  per_video: dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class StepConfig:
  """Everything static about a run; the programs are made from it."""

  model: Any  # The frozen video LLM.
  policy: Any  # The policy module, see `policy.network`.
  tx: optax.GradientTransformation
  ladder: ratio.Ladder  # Of the one grid or the bucket of the videos.
  objective: Any  # The loss of a video's memory, see `policy.objective`.
  rollout: rollout_lib.RolloutConfig
  iterations: int  # I.
  eos_ids: tuple[int, ...]  # That end an answer.
  pad_id: int  # Filler behind the end.

  @property
  def num_video(self) -> int:
    """N, the rows of features."""
    return self.ladder.bucket.tokens

  @property
  def modes(self) -> sampling.Modes:
    return self.ladder.sampler.modes


def policy_scores(config: StepConfig, params, videos: Batch, rung):
  """Returns Scores of B whole prompts at the ratios of rungs i32[B]."""

  def one(prompt, grid, rungs, rung):
    ratio = rungs.ratios[rung]
    return network.score(config.policy, params, prompt, grid, ratio)

  return jax.vmap(one)(videos.prompts, videos.grid, videos.rungs, rung)


def prepare_videos(config: StepConfig, state, constants, batch: Batch):
  """Embeds and scores prompts; returns (the batch with x, empty memories)."""
  embed = functools.partial(config.model.embed_prompt, constants.params)
  prompts = batch.prompts
  x = jax.vmap(embed)(prompts.ids, prompts.features, prompts.video_rows)
  key = jax.random.fold_in(jax.random.key(constants.seed), state.step)
  videos = batch.replace(
    prompts=prompts._replace(x=x, ids=None, features=None),
    rng=jax.vmap(jax.random.fold_in, (None, 0))(key, batch.question_hash),
  )
  if batch.shared_rows:
    given = constants.params, videos.prompts, batch.shared_rows
    read = programs.read_text(config.model, *given)
    videos = videos.replace(shared=_swap(read))
  first = functools.partial(ratio.first_rung, config.ladder)
  start = jax.vmap(first)(videos.rungs, videos.rng)
  scores = policy_scores(config, state.params, videos, start)
  empty = functools.partial(
    replay.empty, modes=config.modes, iterations=config.iterations
  )
  memory = jax.vmap(empty)(scores, rung=start)
  answered = repeats.nothing(config, len(x), len(constants.letters))
  return videos, memory.replace(answered=answered)


def _swap(earlier):
  """Returns keys and values with the axes of layers and videos exchanged."""
  return jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1), earlier)


def draw(config: StepConfig, videos: Batch, memory, *, max_rung: int):
  """Draws every video's combinations from its old scores.

  A video on a smaller rung than `max_rung` gets that rung's combinations,
  padded; which program runs has no influence on what is drawn. Returns
  (sampling.Combinations with index i32[B,G,K], num_valid i32[B]).
  """
  ladder = config.ladder

  def one(key, prompt, memory, rungs):
    return sampling.sample_rung(
      jax.random.fold_in(key, memory.iteration),
      memory.old_scores,
      prompt.x[prompt.video_rows],
      ladder.plans[: max_rung + 1] or rungs.plans,
      memory.rung,
      num_keep=ladder.num_keep[max_rung],
      sampler=ladder.sampler,
    )

  given = videos.rng, videos.prompts, memory, videos.rungs
  if len(ladder.plans) > 1 and max_rung:
    # Mapped side by side, a video would be drawn for on every rung.
    return jax.lax.map(lambda video: one(*video), given)
  return jax.vmap(one)(*given)


def rollout(
  config: StepConfig, constants, videos, memory, *, max_rung: int, decided=None
):
  """Returns (rollout_lib.Answers to combinations, replay.Masks, memory).

  `decided` says where answers may stop, see `generation.extend`.
  """
  combinations, num_valid = draw(config, videos, memory, max_rung=max_rung)

  def ask(index):
    answers = programs.answer_rows(
      config.model,
      constants.params,
      videos.prompts,
      index,
      num_valid,
      max_new_tokens=config.rollout.answer_length,
      eos_ids=config.eos_ids,
      pad_id=config.pad_id,
      decided=decided,
      earlier=_swap(videos.shared),
    )
    return rollout_lib.Answers(*answers)

  known = dict(modes=config.modes, num_video=config.num_video)
  answers, answered = repeats.answer(
    ask, combinations.index, num_valid, memory.answered, **known
  )
  masks = jax.vmap(
    lambda drawn: replay.masks(drawn, config.modes, config.num_video)
  )(combinations)
  return answers, masks, memory.replace(answered=answered)


def gradients(config: StepConfig, params, videos: Batch, memory):
  """Returns (gradient, (losses f32[B] of this device's videos, metrics)).

  Gradient and metrics are averages over the videos of all devices. What is
  frozen has none: zeros, which no device sends.
  """

  def mean_loss(params):
    scores = policy_scores(config, params, videos, memory.rung)
    loss, metrics = jax.vmap(config.objective)(
      scores, memory.old_scores, memory.rows, videos.grid
    )
    return loss.mean(), (loss, metrics)

  grads, (loss, metrics) = jax.grad(mean_loss, has_aux=True)(params)
  means = jax.tree.map(jnp.mean, metrics)
  trained = optimizer.trained(grads)
  trained, metrics = jax.lax.pmean((trained, means), AXIS)
  grads = jax.tree.map(
    lambda own, leaf: jnp.zeros_like(leaf) if own is None else own,
    trained,
    grads,
    is_leaf=lambda own: own is None,
  )
  return grads, (loss, metrics)


def update(config: StepConfig, state, videos, memory, masks, rewards):
  """Remembers one iteration's rewards f32[B,G]; makes one optimiser step.

  Returns (state, memory, Metrics).
  """
  rung = memory.rung
  memory = jax.vmap(replay.append)(memory, masks, rewards)
  grads, (loss, metrics) = gradients(config, state.params, videos, memory)
  finite = jnp.isfinite(loss) & jnp.isfinite(rewards).all(axis=-1)
  norm = optax.tree.norm(grads)
  # Every device must decide alike, or the replicas part for good.
  everywhere = jax.lax.pmin(finite.all().astype(jnp.int32), AXIS) > 0
  accept = everywhere & jnp.isfinite(norm)
  new = state.apply_gradients(grads, config.tx, accept)
  last = memory.iteration[0] == config.iterations
  new = new.replace(step=state.step + last.astype(jnp.int32))
  mean_reward = jax.vmap(replay.mean_token_reward)(memory)
  move = functools.partial(ratio.next_rung, config.ladder)
  next_rung = jax.vmap(move)(videos.rungs, rung, mean_reward)
  ratios = jax.vmap(lambda rungs, j: rungs.ratios[j])(videos.rungs, rung)
  memory = memory.replace(rung=next_rung)
  metrics |= reward_metrics(config, rewards) | frame_metrics(videos, masks)
  metrics |= {
    "loss": jax.lax.pmean(loss.mean(), AXIS),
    "gradient_norm": norm,
    "skipped_update": 1.0 - accept.astype(jnp.float32),
    "ratio": jax.lax.pmean(ratios.mean(), AXIS),
  }
  per_video = {"finite": finite, "rung": rung, "next_rung": next_rung}
  return new, memory, Metrics(metrics, per_video)


def reward_metrics(config: StepConfig, rewards):
  """Returns mean rewards of the modes that there are, the greedy ones apart.

  The drawn ones hardly move (the group cap keeps draws near uniform): the
  greedy combination shows whether the policy learns.
  """
  modes, means = config.modes, {}
  frame = rewards[:, modes.token : modes.token + modes.frame]
  if modes.token:
    means["reward_token"] = rewards[:, : modes.token].mean()
    means["reward_token_greedy"] = rewards[:, 0].mean()
  if modes.frame:
    means["reward_frame"] = frame.mean()
    means["reward_frame_greedy"] = frame[:, 0].mean()
  if modes.control:
    means["reward_content"] = rewards[:, -1].mean()
  return jax.lax.pmean(means, AXIS)


def frame_metrics(videos: Batch, masks: replay.Masks):
  """Returns how often greedy frames hold a decisive one, and its chance.

  Over the videos where these are known; empty without a frame mode.
  """
  if not masks.frame.shape[1]:
    return {}
  decisive = videos.decisive_frames
  known = decisive.any(axis=-1)
  hit = (masks.frame[:, 0] & decisive).any(axis=-1)
  drawn = masks.frame[:, 0].sum(axis=-1)
  taken = jnp.arange(decisive.shape[-1])
  frames = jnp.reshape(videos.grid.num_frames, (-1, 1))
  # All drawn frames miss: prod over draws of (others left) / (frames left).
  others = frames - decisive.sum(axis=-1, keepdims=True) - taken
  factor = jnp.maximum(others, 0) / (frames - taken)
  factor = jnp.where(taken < drawn[:, None], factor, 1.0)
  chance = 1.0 - jnp.prod(factor, axis=-1)
  hits, chances = jnp.where(known, hit, 0), jnp.where(known, chance, 0.0)
  count, hits, chances = jax.lax.psum(
    (known.sum(), hits.sum(), chances.sum()), AXIS
  )
  count = jnp.maximum(count, 1)
  return {"decisive_frame": hits / count, "decisive_chance": chances / count}


def iterate(config, state, constants, videos, memory, *, max_rung: int):
  """Returns (state, memory, ids i32[B,G,M], rewards f32[B,G], metrics)."""
  answers, masks, memory = rollout(
    config, constants, videos, memory, max_rung=max_rung,
    decided=config.rollout.decided(constants.letters),
  )  # fmt: skip
  known = videos.answer_id, videos.option_ids, constants.letters
  target = rollout_lib.Target(*known)
  rewards = rollout_lib.reward(config.rollout, answers, target)
  state, memory, metrics = update(config, state, videos, memory, masks, rewards)
  return state, memory, answers.ids, rewards, metrics


def fixed_ratio_step(config: StepConfig, state, constants, batch: Batch):
  """Runs all iterations at a fixed ratio, rewards on the device.

  Returns (state, ids i32[B,I,G,M], rewards f32[B,I,G], metrics f32[I], [B,I]).
  """
  videos, memory = prepare_videos(config, state, constants, batch)

  def body(carry, _):
    state, memory = carry
    state, memory, *out = iterate(
      config, state, constants, videos, memory, max_rung=0
    )
    return (state, memory), tuple(out)

  (state, _), (ids, rewards, metrics) = jax.lax.scan(
    body, (state, memory), None, length=config.iterations
  )
  ids, rewards, per_video = jax.tree.map(
    lambda a: jnp.moveaxis(a, 0, 1), (ids, rewards, metrics.per_video)
  )
  return state, ids, rewards, metrics._replace(per_video=per_video)
