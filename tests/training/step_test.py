"""The training state and skipped updates; which rewards a ratio can follow."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cacovid_jax import errors
from cacovid_jax.training import optimizer, step
from tests.training import tiny


@pytest.mark.parametrize("average", [0.0, 0.9])
def test_a_skipped_update_leaves_every_bit(average):
  tx = optimizer.make(
    optimizer.OptimizerConfig(lr_heads=0.1, average=average), 10
  )
  params = {"head": {"kernel": jnp.ones((2, 2))}}
  state = step.TrainState.create(params, tx)
  apply = jax.jit(
    lambda state, grads, accept: state.apply_gradients(grads, tx, accept)
  )
  skipped = apply(state, jax.tree.map(lambda p: p * jnp.nan, params), False)
  for old, new in zip(
    jax.tree.leaves(state), jax.tree.leaves(skipped), strict=True
  ):
    np.testing.assert_array_equal(old, new)
  accepted = apply(state, params, True)
  np.testing.assert_allclose(
    accepted.params["head"]["kernel"], 0.9 - 0.1 * 0.01, rtol=1e-5
  )
  assert int(accepted.step) == 0  # The step counts videos, not updates.


@pytest.mark.parametrize("reward", ["log_likelihood", "margin"])
def test_a_graded_reward_with_an_adaptive_ratio_is_one_line(reward, tmp_path):
  config = tiny.config(**{"rollout.reward": reward, "ratio.adaptive": True})
  with pytest.raises(errors.UserError, match="ratio.adaptive=False") as raised:
    tiny.train(tmp_path / "run", config)
  assert f"rollout.reward={reward}" in str(raised.value)
  assert "\n" not in str(raised.value)
  assert not (tmp_path / "run").exists()
