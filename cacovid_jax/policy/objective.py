"""Combinatorial policy optimisation: the loss of a video's replay memory.

Each token, and each frame, is an independent choice between drop and keep. A
combination's reward is credited to all its choices through a clipped ratio;
beyond the paper, `frame_credit` gives each frame its own share of the rewards.

Axes: T frames, N video tokens, M combinations in the memory.
Paper: https://arxiv.org/abs/2602.01649 (combinatorial policy optimisation).
"""

import dataclasses
import math
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from cacovid_jax.models import token_grid
from cacovid_jax.policy import network


@dataclasses.dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
  """The paper's objective; one's own is called alike, see `training.seams`."""

  clip_low: float = 0.2  # The ratio is clipped below at 1 - clip_low.
  clip_high: float = 0.28  # And above at 1 + clip_high.
  kl_weight: float = 0.0  # Weight of the divergence from the uniform policy.
  # If given, the log-ratio stays within +- this. The paper has none (None); the
  # unclipped side, negative advantage and a growing ratio, then has no bound
  # and large learning rates diverge.
  log_ratio_clamp: float | None = None
  std_epsilon: float = 1e-4  # Added to the rewards' standard deviation.
  weight_epsilon: float = 1e-7  # Added to the sum of a row's token weights.
  # "row" credits a reward to all frames that a row chose, as the paper does;
  # "frame" credits each with what it changed, see `frame_advantages`.
  frame_credit: str = "row"

  def __call__(self, scores, old_scores, memory, grid=None):
    return loss(scores, old_scores, memory, self, grid)


class Memory(NamedTuple):
  """Combinations and rewards of one video, preallocated for all iterations."""

  token_mask: jax.Array  # bool[Mt, N], True where a token was kept.
  token_reward: jax.Array  # float32[Mt].
  token_valid: jax.Array  # bool[Mt], False for a row that is not filled yet.
  frame_mask: jax.Array  # bool[Mf, T], True where a frame was drawn.
  frame_reward: jax.Array  # float32[Mf].
  frame_valid: jax.Array  # bool[Mf].


def loss(scores, old_scores, memory, config=None, grid=None):
  """Returns (the loss float32[] of one video's memory, metrics float32[]).

  Args:
    scores: current Scores(frame f32[T, 2], token f32[N, 2]).
    old_scores: those that combinations were drawn from; they get no gradient.
    memory: rows of this Memory that are not valid have no influence at all.
    config: an ObjectiveConfig; None is the default one.
    grid: a TokenGrid, in whose bucket what stands behind the video's own has no
      influence either; None is a full grid.
  """
  config = config or ObjectiveConfig()
  tokens = np.ones(len(scores.token), bool)
  frames = np.ones(len(scores.frame), bool)
  if grid is not None:
    tokens, frames = grid.valid_tokens, grid.valid_frames
  chex.assert_shape([scores.token, old_scores.token], (*tokens.shape, 2))
  chex.assert_shape([scores.frame, old_scores.frame], (*frames.shape, 2))
  weights = balance_weights(memory.token_mask, tokens)
  token_loss, token_metrics = _mode_loss(
    scores.token, old_scores.token, memory[:3], weights, config, tokens
  )
  frame_loss, frame_metrics = _mode_loss(
    scores.frame, old_scores.frame, memory[3:], None, config, frames
  )
  metrics = {"token_loss": token_loss, "frame_loss": frame_loss}
  metrics |= {f"token_{name}": x for name, x in token_metrics.items()}
  metrics |= {f"frame_{name}": x for name, x in frame_metrics.items()}
  return token_loss + frame_loss, metrics


def advantages(rewards, valid, *, epsilon=1e-4):
  """Returns float32[M], standardised rewards float32[M]; zero if not valid.

  Exactly zero everywhere when all valid rewards agree. `epsilon` is added to
  the standard deviation (with Bessel's correction).
  """
  count = valid.sum()
  shifted = _shifted(rewards, valid)
  mean = shifted.sum() / jnp.maximum(count, 1)
  centred = jnp.where(valid, shifted - mean, 0.0)
  variance = jnp.sum(centred**2) / jnp.maximum(count - 1, 1)
  return centred / (jnp.sqrt(variance) + epsilon)


def frame_advantages(mask, rewards, valid, items, *, epsilon=1e-4):
  """Returns float32[M, T]: what frames earned, signed by a row's choice.

  A frame's is the mean reward of the valid rows of mask bool[M, T] that drew
  it, less that of those that did not, standardised over the frames of items
  bool[T] that have both; others have zero.
  """
  sides = jnp.stack([mask, ~mask]) & valid[:, None]  # [2, M, T]
  count = sides.sum(axis=1)
  shifted = _shifted(rewards, valid)[:, None]
  sums = jnp.where(sides, shifted, 0.0).sum(axis=1)
  drawn, left = sums / jnp.maximum(count, 1)
  both = (count > 0).all(axis=0) & items
  earned = advantages(drawn - left, both, epsilon=epsilon)
  return jnp.where(valid[:, None], jnp.where(mask, earned, -earned), 0.0)


def _shifted(rewards, valid):
  """Returns rewards less the largest, exactly zero where they agree.

  The mean of equal numbers may be off by a rounding, which the division by
  epsilon would blow up.
  """
  shift = jnp.max(jnp.where(valid, rewards, -jnp.inf), initial=-jnp.inf)
  return jnp.where(valid, rewards - shift, 0.0)


def kept_share(mask, items):
  """Returns float32[M, 1]: kept share of the items bool[N], of bool[M, N]."""
  return _item_mean(mask.astype(jnp.float32), items)[:, None]


def balance_weights(mask, items):
  """Returns float32[M, N] that let kept and dropped tokens weigh alike."""
  share = kept_share(mask, items)
  weights = jnp.where(mask, 1.0 - share, share)
  return token_grid.fill(weights, items, 0.0)


def mask_log_probs(scores, mask):
  """Returns float32[M, N] log-probs of the choices mask bool[M, N]."""
  log_probs = jax.nn.log_softmax(scores.astype(jnp.float32), axis=-1)
  return jnp.where(mask, log_probs[:, 1], log_probs[:, 0])


def _mode_loss(scores, old_scores, memory, weights, config, items):
  """Returns the loss and the metrics of a mode's masks, rewards and valid."""
  mask, rewards, valid = memory
  mask = mask.astype(bool)
  # Here, not only in the means: a zero times a NaN would be one.
  scores = token_grid.fill(scores, items[:, None], 0.0)
  old_scores = token_grid.fill(old_scores, items[:, None], 0.0)
  given = dict(epsilon=config.std_epsilon)
  if weights is None and config.frame_credit == "frame":  # Of frames.
    advantage = frame_advantages(mask, rewards, valid, items, **given)
  else:
    advantage = advantages(rewards, valid, **given)[:, None]
  # Rows that are not filled stay out of the gradient too, where a zero times
  # an overflow would be NaN.

  def choices(scores):
    return jnp.where(
      valid[:, None], mask_log_probs(scores, mask), math.log(0.5)
    )

  log_probs = choices(scores)
  old_log_probs = choices(jax.lax.stop_gradient(old_scores))
  log_ratio = log_probs - old_log_probs  # [M, N]
  if config.log_ratio_clamp is not None:
    bound = config.log_ratio_clamp
    log_ratio = jnp.clip(log_ratio, -bound, bound)
  ratio = jnp.exp(jnp.where(advantage == 0, 0.0, log_ratio))
  clipped = jnp.clip(ratio, 1 - config.clip_low, 1 + config.clip_high)
  term = -jnp.minimum(ratio * advantage, clipped * advantage)
  if config.kl_weight:
    deviation = math.log(0.5) - log_probs
    kl = jnp.exp(deviation) - deviation - 1
    term = term + config.kl_weight * kl
  if weights is None:
    rows = _item_mean(term, items)
  else:
    total = weights.sum(axis=-1) + config.weight_epsilon
    rows = jnp.sum(weights * term, axis=-1) / total
  mean = _valid_mean(rows, valid)
  ratio = jnp.exp(log_ratio)
  return mean, _metrics(scores, ratio, advantage, valid, config, items)


def _item_mean(x, items):
  """Returns [...], means over N of x [..., N], of the items bool[N] only."""
  return token_grid.fill(x, items, 0).sum(axis=-1) / items.sum()


def _valid_mean(rows, valid):
  """Returns the mean of rows float32[M] over the valid ones."""
  return jnp.where(valid, rows, 0.0).sum() / jnp.maximum(valid.sum(), 1)


def _metrics(scores, ratio, advantage, valid, config, items):
  # The side on which the objective is flat depends on the advantage's sign.
  clipped = jnp.where(
    advantage > 0,
    ratio > 1 + config.clip_high,
    (advantage < 0) & (ratio < 1 - config.clip_low),
  )
  log_probs = jax.nn.log_softmax(scores.astype(jnp.float32), axis=-1)
  entropy = -jnp.sum(jnp.exp(log_probs) * log_probs, axis=-1)
  gap = network.keep_gap(scores)
  mean_gap = _item_mean(gap, items)
  choices = items.sum() if advantage.shape[-1] > 1 else 1  # With one each.
  variance = jnp.sum(advantage**2) / choices / jnp.maximum(valid.sum() - 1, 1)
  metrics = {
    "clip_fraction": _valid_mean(_item_mean(clipped, items), valid),
    "mean_ratio": _valid_mean(_item_mean(ratio, items), valid),
    "entropy": _item_mean(entropy, items),
    "mean_gap": mean_gap,
    "gap_std": jnp.sqrt(_item_mean((gap - mean_gap) ** 2, items)),
    "advantage_std": jnp.sqrt(variance),
  }
  return jax.lax.stop_gradient(metrics)
