"""Facility location (FLoC, https://arxiv.org/abs/2511.00141).

The greedy subset of `math.facility_location`; windows, weights and the way it
is computed are ours.
"""

import dataclasses

import jax
import jax.numpy as jnp

from cacovid_jax import errors
from cacovid_jax.compressors import base, selection_ops
from cacovid_jax.compressors.math import facility_location, similarity


@dataclasses.dataclass(frozen=True, kw_only=True)
class FLoC(base.Compressor, name="floc"):
  """The greedy facility location subset of the video's tokens.

  Every other token is assigned to the one that it resembles most.
  """

  # Speed only, as `similarities` and `kernel`; see `facility_location.greedy`.
  block: int = base.number(512, 1, whole=True)
  windows: int = 1  # Stretches of frames that are covered each by itself.
  floor: float = 0.0  # Least similarity that counts, below 1.
  # None weighs all tokens alike; else see `question_weights`.
  question_temperature: float | None = base.number(None, 0, open_low=True)
  similarities: str = base.choice("auto", "matrix", "blocks")
  kernel: bool = True
  # "nearest" makes each row the mean of the tokens assigned to it.
  merge: str = base.choice("none", "nearest")

  def __post_init__(self):
    super().__post_init__()
    if self.question_temperature is not None:
      object.__setattr__(self, "requires", self.requires | {"text"})
    if not -1.0 <= self.floor < 1.0:
      raise errors.UserError(
        f"floc: floor {self.floor} is outside [-1, 1); 0 ignores opposite"
        " tokens"
      )

  def choose(self, inputs, num_keep, ratio):
    """Returns the subset, and which of it each token resembles most."""
    features, most = inputs.features, inputs.grid[0]
    if not isinstance(self.windows, int) or not 1 <= self.windows <= most:
      raise errors.UserError(
        f"floc: windows is {self.windows!r}; give 1 to {most}, the number of"
        " frames"
      )
    weights, temperature = None, self.question_temperature
    if temperature is not None:
      weights = question_weights(features, inputs.text, temperature)
    index = facility_location.greedy(
      features, num_keep, grid=inputs.grid, weights=weights,
      block=self.block, windows=self.windows, floor=self.floor,
      similarities=self.similarities, kernel=self.kernel,
    )  # fmt: skip
    taken = base.take(features, index)
    merged = selection_ops.fold(taken, features)
    if self.merge == "none":
      return merged._replace(features=taken.features)
    return merged


def question_weights(features, text, temperature):
  """Returns float32[N] that sum to N, by softmax of cosines to the mean text.

  Rows of zeros in text float[Q, D] are padding.
  """
  question = text.astype(jnp.float32).sum(axis=0, keepdims=True)
  cosines = similarity.between(features.astype(jnp.float32), question)[:, 0]
  return features.shape[0] * jax.nn.softmax(cosines / temperature)
