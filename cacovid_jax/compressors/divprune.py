"""Max-min diversity subset (DivPrune, https://arxiv.org/abs/2503.02175).

In cosine distance, in float32: distances of bfloat16 would change the picks.
Unlike the published code, picked tokens are excluded (there, duplicate tokens
make it pick the same index again), and survivors keep their position ids.
"""

import dataclasses
import functools

from cacovid_jax.compressors import allocators, base
from cacovid_jax.compressors.math import max_min


@dataclasses.dataclass(frozen=True, kw_only=True)
class DivPrune(allocators.FrameShared, name="divprune"):
  """A max-min diverse subset of the video's tokens."""

  # "frame" picks in each frame on its own: another, much faster method.
  scope: str = base.choice("video", "frame")
  # How they are held, see `max_min.max_min_subset`.
  distances: str = base.choice("auto", "matrix", "rows")

  def choose(self, inputs, num_keep, ratio):
    pick = functools.partial(max_min.max_min_subset, distances=self.distances)
    return self.by_rule(pick, inputs, num_keep)

  def reference_rows(self, grid, ratio):
    """Returns K of the published code: half a token goes to the even number."""
    T, H, W = grid
    return round(ratio * T * H * W)
