"""The memory of one video: what was kept, what it earned.

Letters: T frames, N video tokens, G combinations, C of them in token mode and F
in frame mode, I iterations, K kept tokens, Mt = I C and Mf = I F rows.

It is allocated once for all I iterations, so that one program serves every
iteration; unfilled rows are not valid and `policy.objective` leaves them out.
Combinations of neither mode enter no loss and are not stored.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from cacovid_jax.policy import network, objective, sampling


class Replay(struct.PyTreeNode):
  """Memory of one video, and where its iterations stand.

  Attributes:
    old_scores: scores of the first iteration; draws and ratios refer to them.
    rows: masks, rewards and valid flags of all combinations so far.
    iteration: i32[], iterations done on this video.
    rung: i32[], rung of the ratio ladder that the next iteration uses.
  """

  old_scores: network.Scores
  rows: objective.Memory
  iteration: jax.Array
  rung: jax.Array


def empty(
  old_scores: network.Scores,
  *,
  modes: sampling.Modes,
  iterations: int,
  rung,
) -> Replay:
  """Returns the memory of a new video; ONE example.

  Args:
    old_scores: of the policy before the first iteration.
    modes: combinations of each mode.
    iterations: I.
    rung: int or i32[], that the first iteration uses.
  """
  num_token, num_frame = modes.token, modes.frame
  frames, tokens = old_scores.frame.shape[0], old_scores.token.shape[0]
  rows = objective.Memory(
    token_mask=jnp.zeros((iterations * num_token, tokens), bool),
    token_reward=jnp.zeros((iterations * num_token,), jnp.float32),
    token_valid=jnp.zeros((iterations * num_token,), bool),
    frame_mask=jnp.zeros((iterations * num_frame, frames), bool),
    frame_reward=jnp.zeros((iterations * num_frame,), jnp.float32),
    frame_valid=jnp.zeros((iterations * num_frame,), bool),
  )
  return Replay(
    old_scores=old_scores,
    rows=rows,
    iteration=jnp.zeros((), jnp.int32),
    rung=jnp.asarray(rung, jnp.int32),
  )


class Masks(NamedTuple):
  """What an iteration's combinations kept, of one shape for every rung.

  Attributes:
    token: bool[C,N], True where a token-mode combination keeps a token.
    frame: bool[F,T], True where a frame-mode combination drew a frame.
  """

  token: jax.Array
  frame: jax.Array


def masks(
  combinations: sampling.Combinations, modes: sampling.Modes, num_tokens: int
) -> Masks:
  """Returns the masks of ONE video's combinations."""
  by_token = combinations.index[: modes.token]
  return Masks(
    token=sampling.token_masks(by_token, num_tokens),
    frame=combinations.frame_mask,
  )


def append(replay: Replay, masks: Masks, rewards) -> Replay:
  """Returns the memory with one more iteration's combinations; ONE example.

  Args:
    replay: memory with room for them.
    masks: what they kept.
    rewards: f32[G] in the order of `sampling.Modes`; a row whose reward is not
      finite is stored as not valid.
  """
  num_token, num_frame = len(masks.token), len(masks.frame)
  rows = replay.rows
  finite = jnp.isfinite(rewards)
  rewards = jnp.where(finite, rewards, 0.0).astype(jnp.float32)
  mode = slice(num_token, num_token + num_frame)

  def write(old, new, size):
    return jax.lax.dynamic_update_slice_in_dim(
      old, new, replay.iteration * size, axis=0
    )

  return replay.replace(
    rows=objective.Memory(
      token_mask=write(rows.token_mask, masks.token, num_token),
      token_reward=write(rows.token_reward, rewards[:num_token], num_token),
      token_valid=write(rows.token_valid, finite[:num_token], num_token),
      frame_mask=write(rows.frame_mask, masks.frame, num_frame),
      frame_reward=write(rows.frame_reward, rewards[mode], num_frame),
      frame_valid=write(rows.frame_valid, finite[mode], num_frame),
    ),
    iteration=replay.iteration + 1,
  )


def mean_token_reward(replay: Replay):
  """Returns f32[], mean token-mode reward so far; 0.5 for an empty memory."""
  valid = replay.rows.token_valid
  count = jnp.sum(valid)
  total = jnp.sum(jnp.where(valid, replay.rows.token_reward, 0.0))
  return jnp.where(count > 0, total / jnp.maximum(count, 1), 0.5)
