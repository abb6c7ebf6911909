"""Selection by a learned policy (METHOD.md 7), and its two controls.

With `size="question"`, ours, each question gets the smallest size of a ladder
whose best tokens leave out no more of the policy's mass than a threshold: many
where its answer may lie anywhere, few where it lies in one place. The
threshold is such that a validation split keeps the asked share on average.

Scores of a policy that is initialised but not trained tell what architecture,
pretrained layer and the even half of the budget give for free. If the trained
policy does as well by another question about the video, it has learnt what is
striking in a video, not what is asked.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from cacovid_jax import errors
from cacovid_jax.compressors import base, selection_ops
from cacovid_jax.policy import selection


def _is_share(value) -> bool:
  kinds = isinstance(value, (int, float)) and not isinstance(value, bool)
  return kinds and 0 <= value <= 1


def _check_ladder(method, name, value):
  numbers = isinstance(value, tuple) and all(
    isinstance(one, (int, float)) and 0 < one < math.inf for one in value
  )
  if not numbers or 1 not in value:
    raise errors.UserError(
      f"{method}: {name} is {value!r}; give multiples of the ratio, 1 among"
      " them, such as (0.25,0.5,1,2,4)"
    )


def _check_threshold(method, name, value):
  pairs = value if isinstance(value, tuple) else ((1, value),)
  for pair in pairs:
    if (
      not isinstance(pair, tuple)
      or len(pair) != 2
      or not all(map(_is_share, pair))
    ):
      raise errors.UserError(
        f"{method}: {name} is {value!r}; give a share from 0 to 1, or such"
        " pairs as ((0.1,0.2),(0.05,0.3)) of ratio and share"
      )


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
  # "question" chooses among the sizes of `ladder`, multiples of the ratio; the
  # ratio then is a mean.
  size: str = base.choice("ratio", "question")
  ladder: tuple[float, ...] = dataclasses.field(
    default=(0.25, 0.5, 1.0, 2.0, 4.0), metadata={"check": _check_ladder}
  )
  # Share of the mass that may be left out: of all ratios, or pairs (ratio,
  # share); None lets an evaluation choose.
  threshold: Any = dataclasses.field(
    default=None, metadata={"check": _check_threshold}
  )

  @property
  def rounds_itself(self):
    """See `base.Compressor`."""
    return self.size == "question" or super().rounds_itself

  @property
  def uncalibrated(self):
    """True if an evaluation is to choose the threshold."""
    return self.size == "question" and self.threshold is None

  def rows(self, grid, ratio):
    """See `base.Compressor`; of the largest size."""
    return self.row_sizes(grid, ratio)[-1]

  def row_sizes(self, grid, ratio):
    """See `base.Compressor`."""
    kept = super().rows(grid, ratio)
    if self.size == "ratio":
      return [kept]
    return [selection.num_keep(grid, one) for one in self._ratios(grid, ratio)]

  def _ratios(self, grid, ratio):
    """Returns the ratios, rising, of sizes that keep a token."""
    found = sorted({min(step * ratio, 1.0) for step in self.ladder})
    T, H, W = grid
    return [one for one in found if one * T * H * W >= 1]

  def mass_left(self, inputs, ratio):
    """Returns float32[S], see `selection.mass_left`, of each of the sizes."""
    (scores,) = self.requires
    sizes = self.row_sizes(inputs.grid, ratio)
    return selection.mass_left(getattr(inputs, scores), sizes)

  def mass_left_batch(self, inputs, *, ratio):
    """Returns float32[B, S], `mass_left` of inputs with a leading B."""
    return jax.vmap(lambda one: self.mass_left(one, ratio))(inputs)

  def _threshold_at(self, ratio):
    found = self.threshold
    if isinstance(found, tuple):
      found = dict(found).get(ratio)
    if found is None:
      raise errors.UserError(
        f"{self.name}: size=question has no threshold at ratio {ratio};"
        " evaluate a benchmark with a validation split, which chooses one, or"
        " give threshold=0.2, the share of the policy's mass that may be left"
        " out"
      )
    return found

  def choose(self, inputs, num_keep, ratio):
    """Returns the policy's tokens; ratio None stands for K / N."""
    if ratio is None:
      ratio = ratio_of(inputs.grid, num_keep)
    shares = dict(
      importance_ratio=self.importance_ratio,
      max_frame_share=self.max_frame_share,
      by_frame=self.budget == "frames",
    )
    count = None
    if self.size == "ratio":
      budget = selection.budget(inputs.grid, ratio, **shares)
    else:
      budget = self._of_question(inputs, ratio, shares)
      count = budget.kept
    (scores,) = self.requires
    index = selection.select(getattr(inputs, scores), budget)
    if index.shape[0] != num_keep:
      raise ValueError(
        f"ratio {ratio} keeps {index.shape[0]} tokens, not {num_keep}"
      )
    taken = base.take(inputs.features, index, count)
    if self.merge == "none":
      return taken
    return selection_ops.fold(taken, inputs.features)

  def _of_question(self, inputs, ratio, shares):
    """Returns the `selection.Budget` of the size that a question gets."""
    threshold = self._threshold_at(ratio)
    grid, most = inputs.grid, self.rows(inputs.grid, ratio)
    found = [
      selection.budget(grid, one, num_keep_max=most, **shares)
      for one in self._ratios(grid, ratio)
    ]
    # The largest size takes what none fits.
    fits = (self.mass_left(inputs, ratio) <= threshold).at[-1].set(True)
    place = jnp.argmax(fits)
    return jax.tree.map(lambda *leaves: jnp.stack(leaves)[place], *found)


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
