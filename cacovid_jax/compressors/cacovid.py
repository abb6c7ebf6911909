"""Selection by a learned policy (METHOD.md 7), and its two controls.

`cacovid` follows the trained policy. `cacovid_untrained` runs the same rule on
the scores of a policy that is initialised but not trained: what the
architecture, the pretrained layer and the even half of the budget give for
free. `cacovid_other_question` runs the trained policy on the same video with
another question in the prompt: if it does as well, the policy has learnt what
is striking in a video, not what is asked.
"""

from cacovid_jax.compressors import base, merging
from cacovid_jax.policy import selection


def compress(
  features,
  *,
  grid,
  num_keep,
  text=None,
  aux=None,
  rng=None,
  ratio=None,
  importance_ratio=0.5,
  max_frame_share=1.5,
  merge="none",
):
  """Returns the tokens of highest keep - drop gap, frame budgets by frame.

  Args:
    features: float[N, D] video tokens.
    grid: static (T, H, W).
    num_keep: K, static.
    text: unused.
    aux: with `scores`, the policy's frame and token scores.
    rng: unused.
    ratio: retention ratio with floor(ratio * N) = K; the budget of important
      tokens is a share of the unrounded ratio * N. None takes K / N.
    importance_ratio: iota, share of the budget that goes to the best tokens;
      the rest is spaced evenly over the tokens left.
    max_frame_share: most that one frame may take of the important tokens, in
      units of the ratio (METHOD.md's c = 1.5 * r).
    merge: "none" drops the other tokens, as the paper does; "nearest" folds
      each into the kept token that it resembles most (`merging.fold`).
  """
  del text, rng
  return _follow(
    aux.scores, features, grid, num_keep, ratio, importance_ratio,
    max_frame_share, merge,
  )  # fmt: skip


def compress_untrained(
  features, *, grid, num_keep, text=None, aux=None, rng=None, ratio=None,
  importance_ratio=0.5, max_frame_share=1.5, merge="none",
):  # fmt: skip
  """`compress` on `aux.untrained_scores`."""
  del text, rng
  return _follow(
    aux.untrained_scores, features, grid, num_keep, ratio, importance_ratio,
    max_frame_share, merge,
  )  # fmt: skip


def compress_other_question(
  features, *, grid, num_keep, text=None, aux=None, rng=None, ratio=None,
  importance_ratio=0.5, max_frame_share=1.5, merge="none",
):  # fmt: skip
  """`compress` on `aux.other_scores`."""
  del text, rng
  return _follow(
    aux.other_scores, features, grid, num_keep, ratio, importance_ratio,
    max_frame_share, merge,
  )  # fmt: skip


def _follow(
  scores, features, grid, num_keep, ratio, importance_ratio, max_frame_share,
  merge,
):  # fmt: skip
  merging.check(merge)
  if ratio is None:
    ratio = ratio_of(grid, num_keep)
  budget = selection.budget(
    grid,
    ratio,
    importance_ratio=importance_ratio,
    max_frame_share=max_frame_share,
  )
  index = selection.select(scores, budget)
  if index.shape[0] != num_keep:
    raise ValueError(
      f"ratio {ratio} keeps {index.shape[0]} tokens, not {num_keep}"
    )
  return merging.apply(merge, base.take(features, index), features)


def ratio_of(grid: tuple[int, int, int], num_keep: int) -> float:
  """Returns a ratio whose budget on `grid` is exactly `num_keep` tokens."""
  ratio = num_keep / (grid[0] * grid[1] * grid[2])
  # The quotient may fall a rounding error short of the budget it came from.
  while selection.num_keep(grid, ratio) < num_keep:
    ratio *= 1.0 + 1e-15
  return ratio


COMPRESSORS = (
  base.Compressor(
    name="cacovid", function=compress, needs=frozenset(["scores"])
  ),
  base.Compressor(
    name="cacovid_untrained",
    function=compress_untrained,
    needs=frozenset(["untrained_scores"]),
  ),
  base.Compressor(
    name="cacovid_other_question",
    function=compress_other_question,
    needs=frozenset(["other_scores"]),
  ),
)
