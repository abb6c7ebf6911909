"""Facility location (FLoC, https://arxiv.org/abs/2511.00141).

Picks the tokens that together resemble all tokens best: the greedy subset of
`math.facility_location`. Windows, weights and the way it is computed are ours;
the paper gives the objective.

Axes: N video tokens, Q tokens of the question, D width, K kept tokens.
"""

import dataclasses

import jax
import jax.numpy as jnp

from cacovid_jax import errors
from cacovid_jax.compressors import base, selection_ops
from cacovid_jax.compressors.math import facility_location, similarity


@dataclasses.dataclass(frozen=True, kw_only=True)
class FLoC(base.Compressor):
  """The greedy facility location subset of the video's tokens.

  Every token is assigned to the kept one that it resembles most, so mass
  counts what a row stands for; the rows themselves are tokens, unchanged.

  Attributes:
    block: see `facility_location.greedy`; speed only.
    windows: how many stretches of frames are covered each by itself; the
      budget goes to where the gain is largest.
    floor: least similarity that counts, below 1.
    question_temperature: None weighs all tokens alike; else their weights are
      N times the softmax of their cosines to the mean of the question over
      this, above 0.
    similarities: see `facility_location.greedy`; speed and memory only.
    kernel: see `facility_location.greedy`; speed only.
    merge: "nearest" makes each row the mean of the tokens assigned to it.
  """

  name: str = "floc"
  block: int = base.number(512, 1, whole=True)
  windows: int = 1
  floor: float = 0.0
  question_temperature: float | None = base.number(None, 0, open_low=True)
  similarities: str = base.choice("auto", "matrix", "blocks")
  kernel: bool = True
  merge: str = base.choice(*selection_ops.MERGES)

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
    weights = None
    if self.question_temperature is not None:
      weights = question_weights(
        features, inputs.text, self.question_temperature
      )
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
  """Returns float32[N] that sum to N, larger for tokens like the question.

  Of tokens float[N, D] and text float[Q, D], whose rows of zeros are padding.
  """
  question = text.astype(jnp.float32).sum(axis=0, keepdims=True)
  cosines = similarity.between(features.astype(jnp.float32), question)[:, 0]
  return features.shape[0] * jax.nn.softmax(cosines / temperature)
