"""VidCom2: keep what resembles its frame and the video least.

On the half of the channels that vary least, a token's similarity to a mean is
a sum of Gaussians of several widths; here tokens have unit length over them, so
that the widths have a scale. Frames that are less similar keep more.
Paper: https://arxiv.org/abs/2505.14454 (sections on frame and token scores)
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from cacovid_jax.compressors import base, budgets, selection_ops
from cacovid_jax.compressors.math import similarity

# Bandwidths of the Gaussians exp(-d^2 / (2 * bandwidth)).
_BANDWIDTHS = (0.125, 0.25, 0.5, 1.0, 2.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class VidCom2(base.Compressor, name="vidcom2"):
  """The least similar tokens of each frame."""

  # Of the softmax over frames; lower moves more of the budget.
  temperature: float = base.number(0.01, 0, open_low=True)

  def choose(self, inputs, num_keep, ratio):
    """Returns the tokens; its own rounding makes K depend on the video."""
    T, P, _ = inputs.frames.shape
    to_video, to_frame = scores(inputs.frames)
    weight = jax.nn.softmax(-to_video.mean(axis=-1) / self.temperature)
    share = 1.0 + weight - 1.0 / T
    if self.exact_budget:
      count = budgets.largest_remainder_on_device(share, num_keep, high=P)
    else:
      count = jnp.round(ratio * share * P).astype(jnp.int32)
    kept = selection_ops.rank(-(to_video + to_frame)) < count[:, None]
    return base.take_mask(inputs.features, kept.reshape(-1), num_keep)

  def reference_rows(self, grid, ratio):
    """Returns the most tokens that rounding frame by frame can keep."""
    # Each of the T counts gains at most a half.
    T, H, W = grid
    return min(math.floor(ratio * T * H * W + T / 2 + 1e-3), T * H * W)


def scores(frames):
  """Returns similarities float32[T, P] to the video's and the frame's mean."""
  x = frames.astype(jnp.float32)
  width = x.shape[-1]
  # Ones for the half of the channels with the lowest variance: a mask costs
  # less than a gather of columns.
  _, channels = jax.lax.top_k(-x.var(axis=(0, 1)), max(width // 2, 1))
  x = similarity.unit(x * jnp.zeros(width).at[channels].set(1.0))

  def similar(mean):
    squared = jnp.sum(jnp.square(x - mean), axis=-1)
    return sum(jnp.exp(-squared / (2 * h)) for h in _BANDWIDTHS)

  return similar(x.mean(axis=(0, 1))), similar(x.mean(axis=1, keepdims=True))
