"""Selection by a learned policy (METHOD.md 7), and its two controls.

Scores of a policy that is initialised but not trained tell what architecture,
pretrained layer and the even half of the budget give for free. If the trained
policy does as well by another question about the video, it has learnt what is
striking in a video, not what is asked.
"""

import dataclasses
import math

from cacovid_jax.compressors import base, selection_ops
from cacovid_jax.policy import selection


@dataclasses.dataclass(frozen=True, kw_only=True)
class CaCoVID(base.Compressor, name="cacovid"):
  """The tokens of highest keep - drop gap, frame budgets by frame scores."""

  requires: frozenset[str] = frozenset(["scores"])
  # Iota, share of the budget that goes to the best tokens; the rest is spaced
  # evenly over the tokens left.
  importance_ratio: float = 0.5
  # "clip" departs from the paper: those are the best of the whole clip, however
  # many of them one frame holds. With an importance ratio of 1 they are all.
  budget: str = base.choice("frames", "clip")
  # Most that one frame may take of the important tokens, in units of the ratio
  # (METHOD.md's c = 1.5 * r); of budget "frames" alone.
  max_frame_share: float = 1.5
  # "nearest" folds the dropped tokens into the kept ones.
  merge: str = base.choice("none", "nearest")

  def choose(self, inputs, num_keep, ratio):
    """Returns the policy's tokens; ratio None stands for K / N."""
    if ratio is None:
      ratio = ratio_of(inputs.grid, num_keep)
    shares = dict(
      importance_ratio=self.importance_ratio,
      max_frame_share=self.max_frame_share,
      by_frame=self.budget == "frames",
    )
    budget = selection.budget(inputs.grid, ratio, **shares)
    (scores,) = self.requires
    index = selection.select(getattr(inputs, scores), budget)
    if index.shape[0] != num_keep:
      raise ValueError(
        f"ratio {ratio} keeps {index.shape[0]} tokens, not {num_keep}"
      )
    taken = base.take(inputs.features, index)
    if self.merge == "none":
      return taken
    return selection_ops.fold(taken, inputs.features)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Untrained(CaCoVID, name="cacovid_untrained"):
  """The rule on the scores of a policy that was not trained."""

  requires: frozenset[str] = frozenset(["untrained_scores"])


@dataclasses.dataclass(frozen=True, kw_only=True)
class OtherQuestion(CaCoVID, name="cacovid_other_question"):
  """The rule on the policy's scores for another question."""

  requires: frozenset[str] = frozenset(["other_scores"])


def ratio_of(grid: tuple[int, int, int], num_keep: int) -> float:
  """Returns a ratio whose budget on `grid` is exactly `num_keep` tokens."""
  ratio = num_keep / math.prod(grid)
  # The quotient may fall a rounding error short of the budget it came from.
  while selection.num_keep(grid, ratio) < num_keep:
    ratio *= 1.0 + 1e-15
  return ratio
