"""Objective: masked memories, agreeing rewards, clamp, metrics."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cacovid_jax.models import token_grid
from cacovid_jax.policy import network, objective, sampling

T, N = 4, 24
each_credit = pytest.mark.parametrize("frame_credit", ["row", "frame"])


@functools.partial(jax.jit, static_argnames="config")
def step(scores, old_scores, memory, config=None):
  loss = functools.partial(objective.loss, config=config)
  return jax.value_and_grad(loss, has_aux=True)(scores, old_scores, memory)


def scores_of(seed, scale=1.0):
  rng = np.random.default_rng(seed)
  return network.Scores(
    frame=jnp.asarray(scale * rng.standard_normal((T, 2)), jnp.float32),
    token=jnp.asarray(scale * rng.standard_normal((N, 2)), jnp.float32),
  )


def memory_of(seed, num_token=6, num_frame=3, token_reward=None):
  rng = np.random.default_rng(seed)
  # Combinations of different sizes: kappa differs between rows.
  share = rng.uniform(0.1, 0.6, (num_token, 1))
  if token_reward is None:
    token_reward = rng.uniform(size=num_token)
  return objective.Memory(
    token_mask=rng.uniform(size=(num_token, N)) < share,
    token_reward=np.float32(token_reward),
    token_valid=np.ones(num_token, bool),
    frame_mask=rng.uniform(size=(num_frame, T)) < 0.5,
    frame_reward=rng.uniform(size=num_frame).astype(np.float32),
    frame_valid=np.ones(num_frame, bool),
  )


def standardised(values):
  values = np.asarray(values, np.float64)
  return (values - values.mean()) / (values.std(ddof=1) + 1e-4)


def credit_by_a_loop(masks, rewards):
  """Returns [M, T]: a frame's rewards with it less those without, signed."""
  earned = {}
  for t in range(masks.shape[1]):
    drawn = [r for mask, r in zip(masks, rewards, strict=True) if mask[t]]
    left = [r for mask, r in zip(masks, rewards, strict=True) if not mask[t]]
    if drawn and left:
      earned[t] = np.mean(drawn, dtype=float) - np.mean(left, dtype=float)
  found = np.zeros(masks.shape[1])
  found[list(earned)] = standardised(list(earned.values()))
  return np.where(masks, found, -found)


def loss_by_a_loop(scores, old, memory, config):
  """METHOD.md 5, one choice at a time, in float64."""

  def mode(new, old, masks, rewards, weighted):
    advantages = np.tile(standardised(rewards)[:, None], masks.shape[1])
    if config.frame_credit == "frame" and not weighted:
      advantages = credit_by_a_loop(masks, rewards)
    losses = []
    for mask, row in zip(masks, advantages, strict=True):
      share = mask.mean()
      total = weight_sum = 0.0
      for i, (kept, advantage) in enumerate(zip(mask, row, strict=True)):

        def log_prob(s, i=i, kept=kept):
          s = np.float64(s[i])
          return s[int(kept)] - np.log(np.exp(s).sum())

        ratio = math.exp(log_prob(new) - log_prob(old))
        clipped = min(max(ratio, 1 - config.clip_low), 1 + config.clip_high)
        term = -min(ratio * advantage, clipped * advantage)
        d = math.log(0.5) - log_prob(new)
        term += config.kl_weight * (math.exp(d) - d - 1)
        weight = ((1 - share) if kept else share) if weighted else 1.0
        total += weight * term
        weight_sum += weight
      losses.append(total / (weight_sum + (1e-7 if weighted else 0.0)))
    return np.mean(losses)

  return (
    mode(scores.token, old.token, memory.token_mask, memory.token_reward, True),
    mode(
      scores.frame, old.frame, memory.frame_mask, memory.frame_reward, False
    ),
  )


@each_credit
@pytest.mark.parametrize("kl_weight", [0.0, 0.02])
def test_equals_a_loop(kl_weight, frame_credit):
  config = objective.ObjectiveConfig(
    kl_weight=kl_weight, frame_credit=frame_credit
  )
  new, old, memory = scores_of(1), scores_of(2), memory_of(3, num_frame=7)
  memory.frame_mask[:, 0] = True  # Each row drew it: nothing to compare with.
  assert not memory.frame_mask[:, 1:].all(axis=0).any()
  (total, metrics), _ = step(new, old, memory, config)
  token_loss, frame_loss = loss_by_a_loop(new, old, memory, config)
  np.testing.assert_allclose(metrics["token_loss"], token_loss, rtol=1e-5)
  np.testing.assert_allclose(metrics["frame_loss"], frame_loss, rtol=1e-5)
  np.testing.assert_allclose(total, token_loss + frame_loss, rtol=1e-5)


def padded(memory, num_token, num_frame, seed):
  """Returns the memory with rubbish in rows that are not filled."""
  rng = np.random.default_rng(seed)
  return objective.Memory(
    token_mask=np.concatenate(
      [memory.token_mask, rng.uniform(size=(num_token, N)) < 0.5]
    ),
    token_reward=np.append(
      memory.token_reward, np.full(num_token, np.nan, np.float32)
    ),
    token_valid=np.append(memory.token_valid, np.zeros(num_token, bool)),
    frame_mask=np.concatenate([memory.frame_mask, np.zeros((num_frame, T))]),
    frame_reward=np.append(
      memory.frame_reward, np.full(num_frame, 1e9, np.float32)
    ),
    frame_valid=np.append(memory.frame_valid, np.zeros(num_frame, bool)),
  )


@each_credit
def test_unfilled_rows_have_no_influence(frame_credit):
  config = objective.ObjectiveConfig(kl_weight=0.02, frame_credit=frame_credit)
  new, old, memory = scores_of(1), scores_of(2), memory_of(3)
  filled = step(new, old, memory, config)
  preallocated = step(new, old, padded(memory, 10, 5, seed=4), config)
  # Only the order of the sums may differ.
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=2e-6, atol=1e-9),
    preallocated,
    filled,
  )


def test_unfilled_rows_do_not_turn_an_overflow_into_nan():
  # exp of the log-ratio overflows for dropped tokens; the only filled row
  # keeps all of them.
  new, old = scores_of(1), scores_of(1)
  new = new._replace(token=new.token.at[:, 0].add(200.0))
  old = old._replace(token=old.token.at[:, 1].add(200.0))
  memory = padded(memory_of(3), 10, 5, seed=4)
  memory = memory._replace(token_mask=np.zeros_like(memory.token_mask))
  memory.token_mask[:6] = True
  (total, _), grads = step(new, old, memory)
  assert np.isfinite(total)
  assert np.isfinite(grads.token).all()


@each_credit
def test_an_empty_memory_has_no_loss_and_no_gradient(frame_credit):
  config = objective.ObjectiveConfig(frame_credit=frame_credit)
  memory = memory_of(3)
  memory = memory._replace(
    token_valid=np.zeros(6, bool), frame_valid=np.zeros(3, bool)
  )
  (total, metrics), grads = step(scores_of(1), scores_of(2), memory, config)
  assert float(total) == 0.0
  assert not np.any(grads.token) and not np.any(grads.frame)
  assert all(np.isfinite(value) for value in metrics.values())


@each_credit
@pytest.mark.parametrize("reward", [0.0, 1.0, 0.7, 1 / 3])
def test_agreeing_rewards_give_exactly_zero_gradients(reward, frame_credit):
  config = objective.ObjectiveConfig(frame_credit=frame_credit)
  memory = memory_of(3, token_reward=[reward] * 6)
  memory = memory._replace(frame_reward=np.full(3, reward, np.float32))
  (total, _), grads = step(scores_of(1), scores_of(2), memory, config)
  assert float(total) == 0.0
  assert not np.any(grads.token) and not np.any(grads.frame)


def test_advantages_by_hand():
  # Rewards 0, 1, 1 have mean 2/3 and standard deviation sqrt(1/3).
  rewards = jnp.array([0.0, 1.0, 5.0, 1.0])
  valid = jnp.array([True, True, False, True])
  advantages = objective.advantages(rewards, valid)
  deviation = math.sqrt(1 / 3) + 1e-4
  expected = np.array([-2 / 3, 1 / 3, 0.0, 1 / 3]) / deviation
  np.testing.assert_allclose(advantages, expected, rtol=1e-6)


def test_frame_advantages_by_hand():
  # The third row is not filled; the last frame is that of no row.
  mask = np.array(
    [[1, 0, 1, 0], [0, 1, 1, 0], [0, 1, 0, 1], [1, 0, 0, 0]], bool
  )
  rewards = jnp.array([1.0, 0.0, np.nan, 0.5])
  valid = jnp.array([True, True, False, True])
  found = objective.frame_advantages(mask, rewards, valid, np.ones(4, bool))
  # Frames earn 0.75 - 0, 0 - 0.75 and 0.5 - 0.5: 0.75 standard deviations.
  earned = np.array([0.75, -0.75, 0.0, 0.0]) / (0.75 + 1e-4)
  signs = np.where(mask, 1.0, -1.0) * np.array([1, 1, 0, 1])[:, None]
  np.testing.assert_allclose(found, signs * earned, rtol=1e-6, atol=1e-7)


def test_with_frame_credit_the_decisive_frame_rises():
  """A bandit: eight combinations of 2 of 16 frames, right with frame 5."""
  config = objective.ObjectiveConfig(frame_credit="frame")
  filled, none = np.ones(8, bool), np.zeros((1, 1), bool)

  def update(frame, rng):
    gap = jnp.broadcast_to(network.keep_gap(frame), (8, 16))
    drawn = sampling.draw_without_replacement(rng, gap, num_draws=2)
    mask = sampling.token_masks(drawn, 16)
    memory = objective.Memory(
      none, np.zeros(1), none[0], mask, mask[:, 5].astype(float), filled
    )
    scores = network.Scores(frame, jnp.zeros((1, 2)))
    grads, _ = jax.grad(objective.loss, has_aux=True)(
      scores, scores, memory, config
    )
    return frame - 0.3 * grads.frame, None

  rngs = jax.random.split(jax.random.key(0), 60)
  frame, _ = jax.lax.scan(update, jnp.zeros((16, 2)), rngs)
  gap = np.asarray(network.keep_gap(frame))
  assert gap[5] > 1.5 and np.delete(gap, 5).max() < 0.3


def test_a_single_combination_has_no_advantage():
  advantages = objective.advantages(jnp.array([0.4]), jnp.array([True]))
  np.testing.assert_array_equal(advantages, [0.0])


def test_kept_and_dropped_tokens_weigh_alike():
  mask = np.zeros((1, N), bool)
  mask[0, :3] = True
  weights = np.asarray(
    objective.balance_weights(mask, np.ones(mask.shape[1], bool))
  )
  np.testing.assert_allclose(weights[0, :3].sum(), weights[0, 3:].sum())


def test_the_first_iteration_has_ratio_one_and_clips_nothing():
  scores, memory = scores_of(1), memory_of(3)
  (_, metrics), grads = step(scores, scores, memory)
  assert float(metrics["token_mean_ratio"]) == 1.0
  assert float(metrics["frame_clip_fraction"]) == 0.0
  np.testing.assert_allclose(metrics["token_advantage_std"], 1.0, rtol=1e-3)
  assert np.abs(grads.token).max() > 0
  by_frame = objective.ObjectiveConfig(frame_credit="frame")
  (_, metrics), _ = step(scores, scores, memory, by_frame)
  earned = credit_by_a_loop(memory.frame_mask, memory.frame_reward)
  spread = np.sqrt((earned**2).mean() * 3 / 2)  # Of three rows.
  np.testing.assert_allclose(metrics["frame_advantage_std"], spread, rtol=1e-4)


def test_metrics_by_hand():
  memory = memory_of(3)
  zero = network.Scores(jnp.zeros((T, 2)), jnp.zeros((N, 2)))
  # Every token's gap is 3: keep has ratio sigmoid(3) / 0.5 = 1.905.
  new = zero._replace(token=zero.token.at[:, 1].set(3.0))
  (_, metrics), _ = step(new, zero, memory)
  p = 1 / (1 + math.exp(-3))
  entropy = -p * math.log(p) - (1 - p) * math.log(1 - p)
  np.testing.assert_allclose(metrics["token_entropy"], entropy, rtol=1e-5)
  np.testing.assert_allclose(metrics["token_mean_gap"], 3.0)
  np.testing.assert_allclose(metrics["frame_entropy"], math.log(2), rtol=1e-6)
  share = memory.token_mask.mean(axis=-1)
  ratio = (2 * p * share + 2 * (1 - p) * (1 - share)).mean()
  np.testing.assert_allclose(metrics["token_mean_ratio"], ratio, rtol=1e-5)
  # Kept tokens clip under a positive advantage, dropped under a negative one.
  above = memory.token_reward > memory.token_reward.mean()
  clipped = np.where(above, share, 1 - share).mean()
  np.testing.assert_allclose(metrics["token_clip_fraction"], clipped, rtol=1e-5)


def test_the_clamp_bounds_a_growing_ratio():
  # Kept tokens of negative advantage became far likelier: nothing clips that.
  memory = memory_of(3)
  old = network.Scores(jnp.zeros((T, 2)), jnp.zeros((N, 2)))
  new = old._replace(
    token=old.token.at[:, 0].set(-80.0), frame=old.frame.at[:, 0].set(-80.0)
  )
  old = old._replace(
    token=old.token.at[:, 1].set(-80.0), frame=old.frame.at[:, 1].set(-80.0)
  )
  (free, _), _ = step(new, old, memory)
  bounded = objective.ObjectiveConfig(log_ratio_clamp=1.1)
  (total, metrics), grads = step(new, old, memory, bounded)
  assert float(free) > 1e20
  assert abs(float(total)) < 10
  assert float(metrics["token_mean_ratio"]) <= math.exp(1.1)
  assert np.isfinite(grads.token).all()


def test_a_wide_clamp_changes_nothing():
  given = scores_of(1), scores_of(2), memory_of(3)
  wide = objective.ObjectiveConfig(log_ratio_clamp=50.0)
  jax.tree.map(np.testing.assert_array_equal, step(*given), step(*given, wide))


def test_old_scores_get_no_gradient():
  new, old, memory = scores_of(1), scores_of(2), memory_of(3)
  grads = jax.grad(lambda old: objective.loss(new, old, memory)[0])(old)
  assert not np.any(grads.token) and not np.any(grads.frame)


def test_vmap_equals_a_loop():
  videos = [(scores_of(i), scores_of(i + 9), memory_of(i)) for i in range(3)]
  batch = jax.tree.map(lambda *leaves: jnp.stack(leaves), *videos)
  (totals, _), _ = jax.vmap(step)(*batch)
  singles = [step(*video)[0][0] for video in videos]
  np.testing.assert_allclose(totals, singles, rtol=1e-5, atol=1e-7)


# Videos of different grids in one program.


@functools.partial(jax.jit, static_argnames="config")
def step_in_bucket(scores, old_scores, memory, grid, config):
  loss = functools.partial(objective.loss, config=config, grid=grid)
  return jax.value_and_grad(loss, has_aux=True)(scores, old_scores, memory)


@each_credit
@pytest.mark.parametrize("filler", [0.0, 80.0, np.nan])
def test_padding_of_a_bucket_has_no_influence(filler, frame_credit):
  bucket = token_grid.GridBucket(6, 10, 40)
  config = objective.ObjectiveConfig(kl_weight=0.02, frame_credit=frame_credit)
  new, old, memory = scores_of(1), scores_of(2), memory_of(3)

  def pad(x, axis, size, value):
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, size - x.shape[axis])
    return np.pad(np.asarray(x), widths, constant_values=value)

  def padded(scores):
    return network.Scores(
      pad(scores.frame, 0, 6, filler), pad(scores.token, 0, 40, filler)
    )

  for kept in (False, True):
    more = memory._replace(
      token_mask=pad(memory.token_mask, 1, 40, kept),
      frame_mask=pad(memory.frame_mask, 1, 6, kept),
    )
    grid = token_grid.TokenGrid.of((T, 2, 3), bucket)
    (total, metrics), grads = step_in_bucket(
      padded(new), padded(old), more, grid, config
    )
    (expected, others), alone = step(new, old, memory, config)
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    for name, value in others.items():
      np.testing.assert_allclose(metrics[name], value, rtol=1e-5, atol=1e-7)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-8)
    close(grads.frame[:T], alone.frame)
    close(grads.token[:N], alone.token)
    assert not np.any(grads.frame[T:]) and not np.any(grads.token[N:])


def test_a_grid_of_another_bucket_is_refused():
  new, memory = scores_of(1), memory_of(3)
  grid = token_grid.TokenGrid.of((T, 2, 3), token_grid.GridBucket(6, 10, 40))
  with pytest.raises(AssertionError, match="shape"):
    objective.loss(new, new, memory, grid=grid)
