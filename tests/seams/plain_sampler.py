"""A sampler without groups and frames: K tokens of the video by their gap."""

import dataclasses

import jax
import jax.numpy as jnp

from cacovid_jax.models import token_grid
from cacovid_jax.policy import network, sampling


@dataclasses.dataclass(frozen=True)
class Plain:
  """Draws without replacement from softmax(gap / temperature)."""

  num_combinations: int = 32
  temperature: float = 1.0

  @property
  def modes(self):
    return sampling.Modes(token=self.num_combinations)

  def sample(self, rng, scores, features, plan):
    grid, most = plan.grid, plan.shape.num_keep
    gap = network.keep_gap(scores.token) / self.temperature
    gap = token_grid.fill(gap, grid.valid_tokens, -jnp.inf)
    noise = jax.random.gumbel(rng, (self.num_combinations, len(gap)))
    noise = noise.at[0].set(0.0)  # The first one is greedy.
    _, index = jax.lax.top_k(gap + noise, most)
    # Behind the K that this video keeps stands N, the end of its bucket.
    index = token_grid.fill(
      index, jnp.arange(most) < plan.num_keep, grid.bucket.tokens
    )
    no_frames = jnp.zeros((0, grid.bucket.frames), bool)
    return sampling.Combinations(
      jnp.sort(index, axis=-1).astype(jnp.int32), no_frames
    )
