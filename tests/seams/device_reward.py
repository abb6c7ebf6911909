"""A reward on the device: how sure the model is of the right letter."""

import jax
import jax.numpy as jnp


def probability(answers, target, *, temperature=1.0):
  """Returns f32[G], the right letter's share among the question's letters."""
  logits = answers.logits.astype(jnp.float32) / temperature
  letters = jnp.where(
    target.option_ids >= 0, logits[:, target.option_ids], -jnp.inf
  )
  right = logits[:, target.answer_id]
  return jnp.exp(right - jax.nn.logsumexp(letters, axis=-1))


probability.first_token = True
