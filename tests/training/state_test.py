"""The training state and refused updates."""

import jax
import jax.numpy as jnp
import numpy as np

from cacovid_jax.training import optimizer
from cacovid_jax.training import state as state_lib


def test_refused_update_leaves_every_bit():
  tx = optimizer.make(optimizer.OptimizerConfig(lr_heads=0.1), 10)
  params = {"head": {"kernel": jnp.ones((2, 2))}}
  state = state_lib.create(params, tx)
  apply = jax.jit(
    lambda state, grads, accept: state_lib.apply_gradients(
      state, grads, tx, accept
    )
  )
  refused = apply(state, jax.tree.map(lambda p: p * jnp.nan, params), False)
  for old, new in zip(
    jax.tree.leaves(state), jax.tree.leaves(refused), strict=True
  ):
    np.testing.assert_array_equal(old, new)
  accepted = apply(state, params, True)
  np.testing.assert_allclose(
    accepted.params["head"]["kernel"], 0.9 - 0.1 * 0.01, rtol=1e-5
  )
  assert int(accepted.step) == 0  # The step counts videos, not updates.
