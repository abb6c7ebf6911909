"""The memory of one video, filled iteration by iteration."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cacovid_jax.policy import network, objective, sampling
from cacovid_jax.training import replay

FRAMES, TOKENS, COMBINATIONS = 2, 6, 8
MODES = sampling.Modes(token=5, frame=2, control=1)


def scores(seed):
  rng = np.random.default_rng(seed)
  return network.Scores(
    frame=jnp.asarray(rng.normal(size=(FRAMES, 2)), jnp.float32),
    token=jnp.asarray(rng.normal(size=(TOKENS, 2)), jnp.float32),
  )


def empty(iterations=3):
  return replay.empty(scores(0), modes=MODES, iterations=iterations, rung=1)


def iteration(seed):
  """Returns (Masks, rewards) of random combinations of two tokens."""
  rng = np.random.default_rng(seed)
  index = np.stack(
    [rng.permutation(TOKENS)[:2] for _ in range(COMBINATIONS)]
  ).astype(np.int32)
  combinations = sampling.Combinations(
    index=jnp.asarray(index), frame_mask=jnp.eye(FRAMES, dtype=bool)
  )
  rewards = jnp.asarray(rng.random(COMBINATIONS), jnp.float32)
  return replay.masks(combinations, MODES, TOKENS), rewards


append = jax.jit(replay.append)


def test_masks_follow_the_order_of_the_sampler():
  index = np.full((COMBINATIONS, 3), TOKENS, np.int32)
  index[0] = [1, 4, TOKENS]  # The last entry is padding.
  combinations = sampling.Combinations(
    jnp.asarray(index), jnp.eye(FRAMES, dtype=bool)
  )
  masks = replay.masks(combinations, MODES, TOKENS)
  assert masks.token.shape == (5, TOKENS)
  np.testing.assert_array_equal(masks.token[0], [0, 1, 0, 0, 1, 0])
  assert not masks.token[1:].any()


def test_rows_are_written_behind_those_of_earlier_iterations():
  memory = empty()
  for seed in (1, 2):
    memory = append(memory, *iteration(seed))
  rows = memory.rows
  assert int(memory.iteration) == 2
  np.testing.assert_array_equal(rows.token_valid, [True] * 10 + [False] * 5)
  np.testing.assert_array_equal(rows.frame_valid, [True] * 4 + [False] * 2)
  masks, rewards = iteration(2)
  np.testing.assert_array_equal(rows.token_mask[5:10], masks.token)
  np.testing.assert_array_equal(rows.token_reward[5:10], rewards[:5])
  np.testing.assert_array_equal(rows.frame_reward[2:4], rewards[5:7])


def test_preallocated_memory_learns_like_one_of_its_rows_only():
  new = scores(5)

  def loss(iterations):
    memory = empty(iterations)
    for seed in (1, 2):
      memory = append(memory, *iteration(seed))

    @jax.jit
    def learn(scores, memory):
      def loss_of(scores):
        given = memory.old_scores, memory.rows, objective.ObjectiveConfig()
        return objective.loss(scores, *given)[0]

      return jax.value_and_grad(loss_of)(scores)

    return learn(new, memory)

  for a, b in zip(
    jax.tree.leaves(loss(2)), jax.tree.leaves(loss(5)), strict=True
  ):
    np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-8)


def test_reward_that_is_not_finite_makes_its_row_not_valid():
  masks, rewards = iteration(1)
  memory = append(empty(), masks, rewards.at[2].set(jnp.nan))
  np.testing.assert_array_equal(
    memory.rows.token_valid[:5], [True, True, False, True, True]
  )
  assert np.isfinite(memory.rows.token_reward).all()


def test_mean_token_reward():
  memory = empty()
  assert replay.mean_token_reward(memory) == 0.5
  rewards = jnp.array([1.0, 0, 0, 1, 0, 1, 1, 1])  # The last three: no tokens.
  memory = append(memory, iteration(1)[0], rewards)
  assert replay.mean_token_reward(memory) == pytest.approx(0.4)
