"""RLOO (https://arxiv.org/abs/2402.14740) instead of clipped ratios."""

import dataclasses

import jax
import jax.numpy as jnp

from cacovid_jax.models import token_grid
from cacovid_jax.policy import objective


@dataclasses.dataclass(frozen=True)
class RLOO:
  """A combination's reward, less the mean of all others, times its log-prob."""

  entropy_weight: float = 0.0  # Of all choices' entropy, which is raised.

  def __call__(self, scores, old_scores, memory, grid):
    grid = token_grid.TokenGrid.of(grid)
    token = self._loss(scores.token, memory[:3], grid.valid_tokens)
    frame = self._loss(scores.frame, memory[3:], grid.valid_frames)
    return token + frame, {"token_loss": token, "frame_loss": frame}

  def _loss(self, scores, rows, items):
    mask, rewards, valid = rows
    count = jnp.maximum(valid.sum(), 2)
    rewards = jnp.where(valid, rewards, 0.0)
    others = (rewards.sum() - rewards) / (count - 1)
    advantage = jnp.where(valid, rewards - others, 0.0)

    def mean(x):  # Over the items that the video has.
      return token_grid.fill(x, items, 0.0).sum(axis=-1) / items.sum()

    gain = (advantage * mean(objective.mask_log_probs(scores, mask))).sum()
    log_probs = jax.nn.log_softmax(scores)
    entropy = -mean((jnp.exp(log_probs) * log_probs).sum(axis=-1))
    return -gain / count - self.entropy_weight * entropy
