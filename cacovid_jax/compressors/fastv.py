"""FastV: after a few layers, keep what the prompt's last token looks at.

Positions and the caches of the layers before stay as they are.
Paper: https://arxiv.org/abs/2403.06764 (section 4).
"""

import dataclasses

from cacovid_jax import errors
from cacovid_jax.compressors import budgets, layerwise


@dataclasses.dataclass(frozen=True, kw_only=True)
class FastV(layerwise.LayerwiseCompressor, name="fastv"):
  """One cut before layer K."""

  layer: int = 2  # K, at least 1.
  # Whether K is that of a decoder of 28 layers, as in the papers, and moves
  # with the depth; False takes it as it is.
  scale_layers: bool = True

  def plan(self, num_layers, num_video, ratio):
    """Returns the one cut; the mean over layers is `ratio` from below."""
    cut = self._cut(num_layers)
    try:
      keep = budgets.keep_behind(ratio, num_layers, num_video, layer=cut)
    except errors.UserError as error:
      raise errors.UserError(f"{self.name}: {error}") from None
    if not self.exact_budget:
      # The share x of K + x (L - K) = ratio * L; half to even, as NumPy rounds.
      left = budgets.exact(ratio) * num_layers - cut
      keep = max(1, round(float(left / (num_layers - cut)) * num_video))
    return [(cut, keep)]

  def minimum_ratio(self, num_layers, num_video):
    """Returns the ratio at which one token is left behind the cut."""
    try:
      cut = self._cut(num_layers)
    except errors.UserError:
      return None
    return budgets.lowest_ratio(num_layers, num_video, layer=cut)

  def _cut(self, num_layers):
    return layerwise.cut_layer(
      self.name, self.layer, num_layers, self.scale_layers
    )
