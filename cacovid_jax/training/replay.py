"""The memory of one video: what was kept, what it earned.

Letters: T frames, N video tokens, G combinations, C of them in token mode and F
in frame mode, I iterations, K kept tokens, Mt = I C and Mf = I F rows.

Allocated once, so that one program serves every iteration; unfilled rows are
not valid. Combinations of neither mode enter no loss and are not stored.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from cacovid_jax.policy import network, objective, sampling


class Replay(struct.PyTreeNode):
  """Memory of one video, and where its iterations stand."""

  # Of the first iteration; draws and ratios refer to them.
  old_scores: network.Scores
  rows: objective.Memory  # All combinations so far.
  iteration: jax.Array  # i32[], iterations done on this video.
  rung: jax.Array  # i32[], of the ladder, that the next iteration uses.
  answered: Any = None  # See `training.repeats`.


class Masks(NamedTuple):
  """What an iteration's combinations kept, of one shape for every rung."""

  token: jax.Array  # bool[C,N], True where token mode keeps a token.
  frame: jax.Array  # bool[F,T], True where frame mode drew a frame.


def empty(old_scores, *, modes, iterations: int, rung) -> Replay:
  """Returns the memory of a new video, with room for I iterations."""

  def room(count, items):
    rows = iterations * count
    mask = jnp.zeros((rows, items), bool)
    return mask, jnp.zeros(rows, jnp.float32), jnp.zeros(rows, bool)

  frames, tokens = old_scores.frame.shape[0], old_scores.token.shape[0]
  return Replay(
    old_scores=old_scores,
    rows=objective.Memory(
      *room(modes.token, tokens), *room(modes.frame, frames)
    ),
    iteration=jnp.zeros((), jnp.int32),
    rung=jnp.asarray(rung, jnp.int32),
  )


def masks(combinations, modes: sampling.Modes, num_tokens: int) -> Masks:
  """Returns the masks of ONE video's combinations."""
  by_token = combinations.index[: modes.token]
  kept = sampling.token_masks(by_token, num_tokens)
  return Masks(kept, combinations.frame_mask)


def append(replay: Replay, masks: Masks, rewards) -> Replay:
  """Returns the memory with one more iteration; ONE example.

  A row whose reward, of f32[G], is not finite is stored as not valid.
  """
  num_token, num_frame = len(masks.token), len(masks.frame)
  valid = jnp.isfinite(rewards)
  rewards = jnp.where(valid, rewards, 0.0).astype(jnp.float32)
  token, frame = slice(num_token), slice(num_token, num_token + num_frame)
  by_token = masks.token, rewards[token], valid[token]
  by_frame = masks.frame, rewards[frame], valid[frame]
  new = objective.Memory(*by_token, *by_frame)

  def write(old, new):
    return jax.lax.dynamic_update_slice_in_dim(
      old, new, replay.iteration * len(new), axis=0
    )

  return replay.replace(
    rows=jax.tree.map(write, replay.rows, new), iteration=replay.iteration + 1
  )


def mean_token_reward(replay: Replay):
  """Returns f32[], mean token-mode reward so far; 0.5 for an empty memory."""
  valid = replay.rows.token_valid
  count = jnp.sum(valid)
  total = jnp.sum(jnp.where(valid, replay.rows.token_reward, 0.0))
  return jnp.where(count > 0, total / jnp.maximum(count, 1), 0.5)
