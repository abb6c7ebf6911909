"""Everything a run must remember: one pytree."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct


class TrainState(struct.PyTreeNode):
  """Step, policy parameters and optimiser state.

  Attributes:
    step: i32[], steps done; a step is all iterations of `videos_per_step`
      videos. A refused update counts, so that the data order goes on.
    params: policy parameters, float32.
    opt_state: optimiser state; its own count is that of accepted updates.
  """

  step: jax.Array
  params: Any
  opt_state: Any


def create(params, tx: optax.GradientTransformation) -> TrainState:
  """Returns the state before the first step."""
  return TrainState(
    step=jnp.zeros((), jnp.int32), params=params, opt_state=tx.init(params)
  )


def apply_gradients(
  state: TrainState, grads, tx: optax.GradientTransformation, accept
) -> TrainState:
  """Returns the state after one optimiser update, unchanged if refused.

  Args:
    state: state before the update.
    grads: like `state.params`.
    tx: the optimiser.
    accept: bool[], False leaves parameters and moments bit for bit as they
      were; one NaN in a moment would otherwise stay for good.
  """
  updates, opt_state = tx.update(grads, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)

  def keep(new, old):
    return jax.tree.map(lambda a, b: jnp.where(accept, a, b), new, old)

  return state.replace(
    params=keep(params, state.params),
    opt_state=keep(opt_state, state.opt_state),
  )
