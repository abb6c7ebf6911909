"""What storing a policy does to its choices: the overlap of selected tokens.

Public checkpoints keep a policy in half precision, training in float32. Where
two tokens score almost alike, rounding may swap them; how often is measured
here, on prompts and budgets of the caller's.

Axes: L prompt tokens, D width, P position rows, N video tokens, K kept tokens.
"""

import functools
import os
import tempfile
from typing import Any, NamedTuple

import jax
import numpy as np

from cacovid_jax.policy import loading, selection


class Prompt(NamedTuple):
  """What a policy scores.

  Attributes:
    x: float[L, D] embeddings, video features in place.
    positions: int32[P, L].
    video_rows: int32[N] rows of the video tokens.
    grid: (T, H, W) of the video.
  """

  x: Any
  positions: Any
  video_rows: Any
  grid: tuple[int, int, int]


class Overlap(NamedTuple):
  """How alike two policies choose at one ratio.

  Attributes:
    ratio: retention ratio.
    kept: K tokens of each video, summed up.
    shared: of these, chosen by both.
    identical: videos with the very same choice.
    videos: of all videos.
  """

  ratio: float
  kept: int
  shared: int
  identical: int
  videos: int

  @property
  def share(self):
    return self.shared / self.kept


def stored(policy, params, dtype):
  """Returns params after a file in the public format, kept in a dtype."""
  with tempfile.TemporaryDirectory() as folder:
    path = os.path.join(folder, "policy.safetensors")
    loading.save(path, policy, params, dtype)
    return loading.load(path, policy)


def overlaps(policy, params, other, prompts, ratios):
  """Returns an `Overlap` per ratio of what two sets of params select.

  Args:
    policy: the module.
    params: its parameters.
    other: parameters to compare with.
    prompts: list of `Prompt`.
    ratios: retention ratios.
  """
  ratios = tuple(ratios)
  pairs = []
  for prompt in prompts:
    grid = tuple(map(int, prompt.grid))
    pairs.append(
      [
        _select(p, *prompt[:3], policy=policy, grid=grid, ratios=ratios)
        for p in (params, other)
      ]
    )
  return [
    _overlap(ratio, [(ours[i], theirs[i]) for ours, theirs in pairs])
    for i, ratio in enumerate(ratios)
  ]


@functools.partial(jax.jit, static_argnames=("policy", "grid", "ratios"))
def _select(params, x, positions, video_rows, *, policy, grid, ratios):
  """Returns int32[K] kept tokens, per ratio."""
  scores = policy.apply({"params": params}, x, positions, video_rows, grid)
  return [selection.select(scores, grid=grid, ratio=ratio) for ratio in ratios]


def _overlap(ratio, pairs):
  shared = [len(np.intersect1d(ours, theirs)) for ours, theirs in pairs]
  kept = [len(ours) for ours, _ in pairs]
  return Overlap(
    ratio=ratio,
    kept=sum(kept),
    shared=sum(shared),
    identical=sum(s == k for s, k in zip(shared, kept, strict=True)),
    videos=len(pairs),
  )
