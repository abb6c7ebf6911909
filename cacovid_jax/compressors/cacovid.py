"""Selection by a learned policy (METHOD.md 7), and its two controls.

`cacovid` follows the trained policy. `cacovid_untrained` runs the same rule on
the scores of a policy that is initialised but not trained: what the
architecture, the pretrained layer and the even half of the budget give for
free. `cacovid_other_question` runs the trained policy on the same video with
another question in the prompt: if it does as well, the policy has learnt what
is striking in a video, not what is asked.
"""

import dataclasses
import math

from cacovid_jax.compressors import base, selection_ops
from cacovid_jax.policy import selection


@dataclasses.dataclass(frozen=True, kw_only=True)
class CaCoVID(base.Compressor):
  """The tokens of highest keep - drop gap, frame budgets by frame scores.

  Attributes:
    importance_ratio: iota, share of the budget that goes to the best tokens;
      the rest is spaced evenly over the tokens left.
    max_frame_share: most that one frame may take of the important tokens, in
      units of the ratio (METHOD.md's c = 1.5 * r).
    merge: "none" drops the other tokens, as the paper does; "nearest" folds
      each into the kept token that it resembles most.
  """

  name: str = "cacovid"
  requires: frozenset[str] = frozenset(["scores"])
  importance_ratio: float = 0.5
  max_frame_share: float = 1.5
  merge: str = base.choice(*selection_ops.MERGES)

  def choose(self, inputs, num_keep, ratio):
    """Returns the policy's tokens; ratio None stands for K / N.

    The budget of important tokens is a share of the unrounded ratio * N.
    """
    if ratio is None:
      ratio = ratio_of(inputs.grid, num_keep)
    budget = selection.budget(
      inputs.grid,
      ratio,
      importance_ratio=self.importance_ratio,
      max_frame_share=self.max_frame_share,
    )
    (scores,) = self.requires
    index = selection.select(getattr(inputs, scores), budget)
    if index.shape[0] != num_keep:
      raise ValueError(
        f"ratio {ratio} keeps {index.shape[0]} tokens, not {num_keep}"
      )
    taken = base.take(inputs.features, index)
    return selection_ops.merge_dropped(self.merge, taken, inputs.features)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Untrained(CaCoVID):
  """The rule on the scores of a policy that was not trained."""

  name: str = "cacovid_untrained"
  requires: frozenset[str] = frozenset(["untrained_scores"])


@dataclasses.dataclass(frozen=True, kw_only=True)
class OtherQuestion(CaCoVID):
  """The rule on the policy's scores for another question."""

  name: str = "cacovid_other_question"
  requires: frozenset[str] = frozenset(["other_scores"])


def ratio_of(grid: tuple[int, int, int], num_keep: int) -> float:
  """Returns a ratio whose budget on `grid` is exactly `num_keep` tokens."""
  ratio = num_keep / math.prod(grid)
  # The quotient may fall a rounding error short of the budget it came from.
  while selection.num_keep(grid, ratio) < num_keep:
    ratio *= 1.0 + 1e-15
  return ratio
