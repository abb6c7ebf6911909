"""Facility location (FLoC, https://arxiv.org/abs/2511.00141).

Picks the tokens that together resemble all tokens best: greedily the subset S
that maximises the coverage

  f(S) = sum_v w_v * (max(c, max over u in S of cos(x_v, x_u)) - c)

with floor c and weights w_v = 1. f is normalised (f of nothing is 0), monotone
and submodular, so that greedy reaches 1 - 1/e of the best f at least; with
c = 0 similarities below zero count as none, with c = -1 the maximiser is that
of the raw cosines. Windows of the video are solved as one problem whose
similarities between windows are left out; the bound then holds for that
objective only. Windows, weights and the way it is computed are ours; the
paper gives the objective.

Similarities are rounded to whole multiples of a power of two (2^-18 at 6272
tokens), so that gains are sums of integers: the same in any order and on any
device, and ties are ties.

Axes: N video tokens, D width, K kept tokens, W windows, A tokens of a window,
n = W * A, M block of candidates.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cacovid_jax import errors
from cacovid_jax.compressors import base, cover_kernel, merging, similarity

# Largest similarity matrix that is held: 14188 tokens in one window. A batch
# holds one of them for each video.
_MATRIX_BYTES = 768 * 2**20
# A GPU asks its host whether to go on after each trip of a loop of unknown
# length, which takes as long as a pick or two.
_PICKS_PER_TRIP = 8


def compress(
  features,
  *,
  grid,
  num_keep,
  text=None,
  aux=None,
  rng=None,
  block=512,
  windows=1,
  floor=0.0,
  question_temperature=None,
  similarities="auto",
  kernel=True,
  merge="none",
):
  """Returns the greedy facility location subset of the video's tokens.

  Every token is assigned to the kept one that it resembles most, so mass
  counts what a row stands for; the rows themselves are tokens, unchanged.

  Args:
    features: float[N, D] video tokens.
    grid: static (T, H, W).
    num_keep: K, static.
    text: float[Lq, D] embedded question, rows of zeros are padding; for
      `question_temperature`.
    aux: unused.
    rng: unused.
    block: M, candidates that are looked at together; speed only.
    windows: how many stretches of frames are covered each by itself; the
      budget goes to where the gain is largest.
    floor: c, below 1.
    question_temperature: None weighs all tokens alike; else w is N times the
      softmax of their cosines to the mean of the question over this.
    similarities: "matrix" computes all at once and holds them, "blocks"
      computes those of a block when it is looked at; "auto" holds them where
      they fit. Speed and memory only.
    kernel: True makes the picks of a block, of a single window, in one kernel
      where the platform is an NVIDIA GPU. Speed only (6272 tokens, a quarter
      kept, on an H200: 20 ms instead of 35).
    merge: "nearest" makes each row the mean of the tokens assigned to it.
  """
  del aux, rng
  merging.check(merge)
  weights = None
  if question_temperature is not None:
    if text is None:
      raise errors.UserError(
        "floc: question_temperature weighs tokens by the question, and none"
        " was given; leave the option out"
      )
    weights = question_weights(features, text, question_temperature)
  index = greedy(
    features,
    num_keep,
    grid=grid,
    block=block,
    windows=windows,
    floor=floor,
    weights=weights,
    similarities=similarities,
    kernel=kernel,
  )
  taken = base.take(features, index)
  merged = merging.fold(taken, features)
  if merge == "none":
    return merged._replace(features=taken.features)
  return merged


def greedy(
  features,
  num_keep,
  *,
  grid,
  block=512,
  windows=1,
  floor=0.0,
  weights=None,
  similarities="auto",
  kernel=True,
):
  """Returns int32[K] tokens in picking order, by lazy evaluation in blocks.

  Gains only shrink, so a gain that was computed earlier is an upper bound. A
  round takes the M largest bounds, and computes these gains anew; the best of
  them is picked while it beats all bounds outside the block, then the gains
  of the block are computed anew and so on. A round without a pick has all
  bounds computed anew. The picks are those of plain greedy, the earlier token
  among equals.

  Args:
    features: float[N, D] video tokens.
    num_keep: K, static, below N.
    grid: static (T, H, W).
    block: M.
    windows: see `compress`.
    floor: see `compress`.
    weights: float32[N] that sum to N; None for ones.
    similarities: see `compress`.
    kernel: see `compress`.
  """
  num_video = features.shape[0]
  _check(block, windows, floor, grid)
  place = window_places(grid, windows)  # [W, A]
  num_windows, area = place.shape
  num_places = place.size
  inside = place.reshape(-1) < num_video
  block = min(block, num_places - 1)
  if similarities == "auto":
    fits = 4 * num_places * area <= _MATRIX_BYTES
    similarities = "matrix" if fits else "blocks"
  if similarities not in ("matrix", "blocks"):
    raise errors.UserError(
      f"floc: unknown similarities {similarities!r}; use 'auto', 'matrix' or"
      " 'blocks'"
    )

  x = features
  if num_windows > 1:
    x = x.at[place].get(mode="fill", fill_value=0)
  x = x.reshape(num_windows, area, -1)
  if weights is None:
    weights = jnp.ones([num_video], jnp.float32)
  weights = weights.at[place].get(mode="fill", fill_value=0.0)  # [W, A]
  to_integers = functools.partial(
    _integers, floor=floor, scale=_scale(num_video, floor)
  )
  if similarities == "matrix":
    matrix = to_integers(similarity.between(x), weights[:, None, :])

    def rows_of(candidates):
      return matrix.reshape(num_places, area)[candidates]

    def gains_of_all(covered):
      left = matrix - covered[:, None, :]
      return jnp.maximum(left, 0).sum(axis=-1).reshape(-1)

  else:

    def rows_of(candidates):
      if num_windows == 1:
        return to_integers(similarity.between(x[0][candidates], x[0]), weights)
      window, own = candidates // area, candidates % area
      rows = similarity.between(x[window, own][:, None], x[window])[:, 0]
      return to_integers(rows, weights[window])

    def gains_of_all(covered):
      def gain(window):
        x, weights, covered = window

        def of_one(candidate):
          rows = similarity.between(candidate[None], x)
          left = to_integers(rows, weights) - covered
          return jnp.maximum(left, 0).sum()

        return jax.lax.map(of_one, x, batch_size=block)

      return jax.lax.map(gain, (x, weights, covered)).reshape(-1)

  picked = lazy_greedy(
    rows_of,
    gains_of_all,
    num_keep,
    covered=jnp.zeros([num_windows, area], jnp.int32),
    inside=inside,
    block=block,
    picks_of_block=(
      block_picks_kernel if kernel and num_windows == 1 else block_picks_loop
    ),
  )
  return jnp.asarray(place.reshape(-1), jnp.int32)[picked]


class _Picks(NamedTuple):
  """State of the greedy loop.

  Attributes:
    order: int32[K] picks so far.
    count: int32[], how many.
    covered: int32[W, A], similarity of each token to its best pick.
    bounds: int32[n], at least the gain of each candidate; -1 if it is none.
    stuck: bool[], True if the last round picked nothing.
  """

  order: jax.Array
  count: jax.Array
  covered: jax.Array
  bounds: jax.Array
  stuck: jax.Array


class _Block(NamedTuple):
  """State of the picks among one block of candidates.

  Attributes:
    picked: int32[M] places of the picks so far.
    count: int32[], how many.
    covered: as of `_Picks`.
    gains: int32[M] gains of the block's candidates or bounds of them, -1 for
      those that are picked.
    open: bool[], False once a candidate outside might be better.
  """

  picked: jax.Array
  count: jax.Array
  covered: jax.Array
  gains: jax.Array
  open: jax.Array


def lazy_greedy(
  rows_of, gains_of_all, num_keep, *, covered, inside, block, picks_of_block
):
  """Returns int32[K], greedy picks of a facility location problem.

  Args:
    rows_of: int32[M] candidates -> int32[M, A], what each covers of every
      token of its window, at least 0.
    gains_of_all: int32[W, A] covered -> int32[n], the gain of each candidate.
    num_keep: K, at most the number of candidates.
    covered: int32[W, A] zeros.
    inside: NumPy bool[n], the candidates that are there.
    block: M, below n.
    picks_of_block: `block_picks_loop` or its equal.
  """
  area = covered.shape[1]
  places = jnp.arange(block, dtype=jnp.int32)

  def round_of_picks(state):
    bounds = jax.lax.cond(
      state.stuck,
      lambda: jnp.where(state.bounds < 0, -1, gains_of_all(state.covered)),
      lambda: state.bounds,
    )
    # Of equal bounds the earlier candidates come first, also at the cut.
    largest, found = jax.lax.top_k(bounds, block + 1)
    candidates = jnp.sort(found[:block])
    rival = jnp.stack([largest[block], jnp.sum(candidates < found[block])])
    picked, count, covered, gains = picks_of_block(
      rows_of(candidates),
      candidates // area,
      state.covered,
      bounds[candidates],
      rival.astype(jnp.int32),
      num_keep - state.count,
    )
    order = jnp.where(places < count, state.count + places, num_keep)
    return _Picks(
      order=state.order.at[order].set(candidates[picked], mode="drop"),
      count=state.count + count,
      covered=covered,
      bounds=bounds.at[candidates].set(gains),
      stuck=count == 0,
    )

  picks = jax.lax.while_loop(
    lambda state: state.count < num_keep,
    round_of_picks,
    _Picks(
      order=jnp.zeros([num_keep], jnp.int32),
      count=jnp.int32(0),
      covered=covered,
      bounds=jnp.where(inside, gains_of_all(covered), -1),
      stuck=jnp.array(False),
    ),
  )
  return picks.order


def block_picks_loop(rows, windows, covered, bounds, rival, limit):
  """Picks the candidate of largest gain while it beats those outside.

  Args:
    rows: int32[M, A], what candidates cover of every token of their window.
    windows: int32[M], the window of each.
    covered: int32[W, A], what is covered of each token.
    bounds: int32[M], -1 for candidates that are picked, which stay so.
    rival: int32[2], the largest bound of the other candidates, and the first
      place in the block that comes behind the one that has it.
    limit: int32[], picks that may be made.

  Returns:
    picked int32[M], places of the picks in their order, then anything;
    int32[], their number; covered and gains after them.
  """
  block = rows.shape[0]
  places = jnp.arange(block, dtype=jnp.int32)

  def pick(_, state):
    gains = gains_of(rows, windows, state.covered, state.gains)
    best = jnp.argmax(gains).astype(jnp.int32)
    gain, window = gains[best], windows[best]
    wins = (gain > rival[0]) | ((gain == rival[0]) & (best < rival[1]))
    wins &= state.open & (gain >= 0) & (state.count < limit)
    covers = jnp.where(wins, rows[best], 0)
    slot = jnp.where(wins, state.count, block)
    return _Block(
      picked=state.picked.at[slot].set(best, mode="drop"),
      count=state.count + wins,
      covered=state.covered.at[window].max(covers),
      gains=jnp.where(wins & (places == best), -1, gains),
      open=wins,
    )

  state = jax.lax.while_loop(
    lambda state: state.open,
    lambda state: jax.lax.fori_loop(0, _PICKS_PER_TRIP, pick, state),
    _Block(
      picked=jnp.zeros([block], jnp.int32),
      count=jnp.int32(0),
      covered=covered,
      gains=bounds,
      open=limit > 0,
    ),
  )
  return state.picked, state.count, state.covered, state.gains


def block_picks_kernel(rows, windows, covered, bounds, rival, limit):
  """`block_picks_loop` of a single window, on NVIDIA GPUs in one kernel."""

  def on_cuda(rows, windows, covered, bounds, rival, limit):
    gains = gains_of(rows, windows, covered, bounds)
    picked, count, covered, gains = cover_kernel.block_picks(
      rows, covered[0], gains, rival, limit
    )
    return picked, count, covered[None], gains

  return jax.lax.platform_dependent(
    rows, windows, covered, bounds, rival, limit,
    cuda=on_cuda,
    default=block_picks_loop,
  )  # fmt: skip


def gains_of(rows, windows, covered, bounds):
  """Returns int32[M], what candidates add to what is covered.

  Arguments are those of `block_picks_loop`.
  """
  left = rows - covered[windows]
  return jnp.where(bounds < 0, -1, jnp.maximum(left, 0).sum(axis=-1))


def window_places(grid, windows):
  """Returns NumPy int32[W, A], the tokens of each window, N as padding.

  Windows are stretches of frames whose lengths differ by one at most.
  """
  num_frames, height, width = grid
  num_video = num_frames * height * width
  tokens = np.arange(num_video, dtype=np.int32).reshape(num_frames, -1)
  parts = [part.reshape(-1) for part in np.array_split(tokens, windows)]
  places = np.full([windows, max(map(len, parts))], num_video, np.int32)
  for row, part in zip(places, parts, strict=True):
    row[: len(part)] = part
  return places


def question_weights(features, text, temperature):
  """Returns float32[N] that sum to N, larger for tokens like the question.

  Args:
    features: float[N, D] video tokens.
    text: float[Lq, D] embedded question, rows of zeros are padding.
    temperature: above 0, what the cosines are divided by.
  """
  if not temperature > 0:
    raise errors.UserError(
      f"floc: question_temperature {temperature} is not above 0"
    )
  question = text.astype(jnp.float32).sum(axis=0, keepdims=True)
  cosines = similarity.between(features.astype(jnp.float32), question)[:, 0]
  return features.shape[0] * jax.nn.softmax(cosines / temperature)


def _scale(num_video, floor) -> float:
  """Returns the power of two that similarities are multiplied by.

  The gain of a token is at most N * (1 - c), with the rounding of N terms
  and of their weights; it has to fit into int32. Steps below 2^-20 would
  tell apart what differs by the rounding of float32 only.
  """
  most = 1.001 * num_video * (1.0 - floor)
  bits = math.floor(math.log2((2**31 - 1 - num_video) / most))
  return 2.0 ** min(bits, 20)


def _integers(cosines, weights, *, floor, scale):
  """Returns int32[...], what a token is covered by in whole numbers.

  Args:
    cosines: float32[...].
    weights: float32[...] weights of the tokens that are covered.
    floor: c.
    scale: what similarities are multiplied by.
  """
  above = jnp.clip(cosines, floor, 1.0) - floor
  return jnp.round(above * weights * scale).astype(jnp.int32)


def _check(block, windows, floor, grid):
  for name, value, most in (
    ("block", block, None),
    ("windows", windows, grid[0]),
  ):
    if not isinstance(value, int) or value < 1 or (most and value > most):
      limit = f"1 to {most}, the number of frames" if most else "at least 1"
      raise errors.UserError(f"floc: {name} is {value!r}; give {limit}")
  if not -1.0 <= floor < 1.0:
    raise errors.UserError(
      f"floc: floor {floor} is outside [-1, 1); 0 ignores opposite tokens"
    )


def _configure(compressor, **options):
  """Asks for the question where the options look at it."""
  if options.get("question_temperature") is None:
    return compressor
  return dataclasses.replace(
    compressor, needs=compressor.needs | frozenset(["text"])
  )


COMPRESSOR = base.Compressor(
  name="floc", function=compress, configure=_configure
)
