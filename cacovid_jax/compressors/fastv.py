"""FastV: after a few layers, keep what the prompt's last token looks at.

Between layers K - 1 and K, the video tokens with the largest attention from
the last prompt token in layer K - 1, mean over heads, go on; their positions
and the caches of the layers before stay as they are.
Paper: https://arxiv.org/abs/2403.06764 (section 4).
"""

import dataclasses

from cacovid_jax.compressors import in_llm


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class FastV(in_llm.InLLM):
  """One cut before layer K.

  Attributes:
    layer: K, at least 1.
    scale_layers: whether `layer` is that of a decoder of 28 layers, as in the
      papers, and moves with the depth; False takes it as it is.
  """

  layer: int = 2
  scale_layers: bool = True

  def plan(self, num_layers, num_video, ratio):
    """Returns the one cut; the mean over layers is `ratio` from below."""
    cut = self._cut(num_layers)
    total = in_llm.token_layers(num_layers, num_video, ratio)
    left = total - cut * num_video
    keep = left // (num_layers - cut)
    if keep < 1:
      raise in_llm.infeasible(
        self, num_layers, num_video, ratio, f"{cut} of them see every token"
      )
    if not self.exact_budget:
      # Half to even, as Python's and NumPy's own rounding.
      keep = max(1, round(left / (num_layers - cut)))
    return [(cut, keep)]

  def minimum_ratio(self, num_layers, num_video):
    """Returns the ratio at which one token is left behind the cut."""
    cut = self._cut(num_layers)
    least = cut * num_video + num_layers - cut
    return least / (num_layers * num_video)

  def step(self, seen, *, layer, keep, grid):
    """Returns the tokens that the last token attends to most."""
    return in_llm.keep_by_last_query(seen, keep)

  def _cut(self, num_layers):
    return in_llm.cut_layer(
      self.name, self.layer, num_layers, self.scale_layers
    )


COMPRESSOR = FastV(name="fastv")
