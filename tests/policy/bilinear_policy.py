"""A policy of one's own: how well a token matches the question's mean."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from cacovid_jax.models import token_grid
from cacovid_jax.policy import network


class Bilinear(nn.Module):
  width: int
  rank: int

  @classmethod
  def from_llm_config(cls, llm, rank=16, **unused):
    return cls(width=llm.hidden_size, rank=rank)

  @nn.compact
  def __call__(self, x, positions, video_rows, grid, length=None):
    x = x.astype(jnp.float32)
    rows = jnp.arange(x.shape[0])
    text = (rows < (x.shape[0] if length is None else length)).astype(x.dtype)
    text = text.at[video_rows].set(0.0)
    question = nn.Dense(self.rank, name="question")(text @ x / text.sum())
    video = nn.Dense(self.rank, name="video")(x[video_rows])  # [N, rank]
    gap = video @ question
    frame = token_grid.TokenGrid.of(grid).frame_means(gap)
    scores = [jnp.stack([-g, g], axis=-1) / 2 for g in (frame, gap)]
    return network.Scores(*scores)

  @nn.nowrap
  def init_from_llm(self, rng, llm_params):
    x, positions = jnp.zeros((2, self.width)), jnp.zeros((1, 2), jnp.int32)
    given = x, positions, jnp.zeros(1, jnp.int32), (1, 1, 1)
    return jax.jit(lambda r: self.init(r, *given)["params"])(rng)
