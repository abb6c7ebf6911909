"""Facility location: greedy cover, and its picks as one kernel.

The subset S of K tokens that maximises the coverage

  f(S) = sum_v w_v * (max(c, max over u in S of cos(x_v, x_u)) - c)

with floor c, greedily. f is normalised (f of nothing is 0), monotone and
submodular, so that greedy reaches 1 - 1/e of the best f at least; with c = 0
similarities below zero count as none, with c = -1 the maximiser is that of the
raw cosines. Windows of the video are solved as one problem whose similarities
between windows are left out; the bound then holds for that objective only.

Similarities are rounded to whole multiples of a power of two (2^-18 at 6272
tokens), so that gains are sums of integers: the same in any order and on any
device, and ties are ties.

Candidates are picked one after the other, and each pick changes what the
others would add. As separate kernels that is several launches a pick. On
NVIDIA GPUs one program holds in registers what is covered and what candidates
gain; a pick reads the row of the candidate, lists the tokens that it covers
better than all before, and takes from the gains what these tokens no longer
give: few tokens, where all rows of the block would have to be read otherwise.

Axes: N video tokens, D width, K kept tokens, W windows, A tokens of a window
that are covered, n = W * A, M candidates of a block.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from cacovid_jax.compressors.math import similarity

# Largest similarity matrix that is held: 14188 tokens in one window. A batch
# holds one of them for each video.
_MATRIX_BYTES = 768 * 2**20
# A GPU asks its host whether to go on after each trip of a loop of unknown
# length, which takes as long as a pick or two.
_PICKS_PER_TRIP = 8
_NUM_WARPS = 16
# Columns of a block that are in registers at once: 16 of 512 candidates are
# 16 registers of each thread.
_TOKENS = 16


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
    block: M, candidates that are looked at together; speed only.
    windows: W, stretches of frames that are covered each by itself.
    floor: c, below 1.
    weights: w, float32[N] that sum to N; None for ones.
    similarities: "matrix" computes all at once and holds them, "blocks"
      computes those of a block when it is looked at; "auto" holds them where
      they fit. Speed and memory only.
    kernel: True makes the picks of a block, of a single window, in one kernel
      where the platform is an NVIDIA GPU. Speed only (6272 tokens, a quarter
      kept, on an H200: 20 ms instead of 35).
  """
  num_video = features.shape[0]
  place = window_places(grid, windows)  # [W, A]
  num_windows, area = place.shape
  num_places = place.size
  inside = place.reshape(-1) < num_video
  block = min(block, num_places - 1)
  if similarities == "auto":
    fits = 4 * num_places * area <= _MATRIX_BYTES
    similarities = "matrix" if fits else "blocks"
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
    picked, count, covered, gains = block_picks(
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


def block_picks(rows, covered, gains, rival, limit, interpret=False):
  """Returns the picks of `block_picks_loop`, which defines them.

  Args:
    rows: int32[M, A], what candidates cover of every token, at least 0.
    covered: int32[A], what is covered of each token.
    gains: int32[M], exact gains of the candidates, -1 for those picked before.
    rival: int32[2], the bound of all other candidates and the first place in
      the block that comes behind the one that has it.
    limit: int32[], picks that may be made.
    interpret: static; True runs the kernel's operations one by one on any
      platform, for tests.

  Returns:
    picked int32[M], places of the picks in their order, then anything;
    int32[], their number; covered and gains after them.
  """
  num_candidates, area = rows.shape
  size = pl.next_power_of_2(area)
  kernel = functools.partial(
    _block_kernel,
    num_candidates=num_candidates,
    area=area,
    barrier=(lambda: None) if interpret else pltriton.debug_barrier,
  )
  integers = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
  picked, number, covered, gains, *_ = pl.pallas_call(
    kernel,
    out_shape=[
      # One place more: the candidate that is not picked is written as well.
      integers([num_candidates + 1]),
      integers([1]),
      integers([area]),
      integers([num_candidates]),
      # The list of a pick: tokens, what was covered of them, and is now.
      integers([size]),
      integers([size]),
      integers([size]),
    ],
    interpret=interpret,
    compiler_params=pltriton.CompilerParams(num_warps=_NUM_WARPS, num_stages=1),
    name="block_picks",
  )(
    rows.reshape(-1),
    rows.T.reshape(-1),
    covered,
    gains,
    rival.astype(jnp.int32),
    limit.astype(jnp.int32).reshape(1),
  )
  return picked[:num_candidates], number[0], covered, gains


def _block_kernel(
  rows_ref, columns_ref, covered_ref, gains_ref, rival_ref, limit_ref,
  picked_ref, number_ref, covered_out_ref, gains_out_ref,
  token_ref, before_ref, after_ref,
  *, num_candidates, area, barrier,
):  # fmt: skip
  size = token_ref.shape[0]
  size_block = pl.next_power_of_2(num_candidates)
  token = jax.lax.broadcasted_iota(jnp.int32, (size,), 0)
  place = jax.lax.broadcasted_iota(jnp.int32, (size_block,), 0)
  inside, present = token < area, place < num_candidates
  bound, behind, limit = rival_ref[0], rival_ref[1], limit_ref[0]

  def take_from(gains, start, total):
    """Returns the gains without what tokens start.. of the list gave."""
    line = start + jax.lax.broadcasted_iota(jnp.int32, (_TOKENS,), 0)
    listed = line < total
    load = functools.partial(pltriton.load, mask=listed, other=0)
    column = load(token_ref.at[line])
    before, after = load(before_ref.at[line]), load(after_ref.at[line])
    shape = (_TOKENS, size_block)
    where = jnp.broadcast_to((column * num_candidates)[:, None], shape)
    where += jnp.broadcast_to(place[None, :], shape)
    mask = jnp.broadcast_to(listed[:, None], shape)
    mask &= jnp.broadcast_to(present[None, :], shape)
    columns = pltriton.load(columns_ref.at[where], mask=mask, other=0)
    lost = jnp.maximum(columns - before[:, None], 0)
    lost -= jnp.maximum(columns - after[:, None], 0)
    return jnp.where(gains < 0, gains, gains - jnp.sum(lost, axis=0))

  def pick(state):
    covered, gains, number, _ = state
    best = jnp.max(gains)
    chosen = jnp.min(jnp.where(gains == best, place, size_block - 1))
    wins = (best > bound) | ((best == bound) & (chosen < behind))
    wins &= (best >= 0) & (number < limit)
    picked_ref[number] = chosen
    row = pltriton.load(
      rows_ref.at[chosen * area + token], mask=inside & wins, other=0
    )
    better = row > covered
    count = better.astype(jnp.int32)
    upto = jnp.cumsum(count)
    total = jnp.sum(count)
    # Tokens that are not listed get lines of their own, from the end: nothing
    # is written there, but no two tokens may share a line.
    line = jnp.where(better, upto - 1, size - 1 - (token - upto))
    for ref, value in (
      (token_ref, token),
      (before_ref, covered),
      (after_ref, row),
    ):
      pltriton.store(ref.at[line], value, mask=better)
    gains = jnp.where((place == chosen) & wins, -1, gains)
    # All threads have to have written the list before any reads it, and to
    # have read it before the next pick writes.
    barrier()
    gains = jax.lax.fori_loop(
      0,
      (total + _TOKENS - 1) // _TOKENS,
      lambda i, gains: take_from(gains, i * _TOKENS, total),
      gains,
    )
    barrier()
    covered = jnp.maximum(covered, row)
    return covered, gains, number + wins.astype(jnp.int32), wins

  # What is behind A counts as covered, what is behind M as picked. (Places, not
  # slices: newer versions refuse one that ends behind the array.)
  covered = pltriton.load(covered_ref.at[token], mask=inside, other=2**31 - 1)
  gains = pltriton.load(gains_ref.at[place], mask=present, other=-1)
  covered, gains, number, _ = jax.lax.while_loop(
    lambda state: state[3],
    pick,
    (covered, gains, jnp.int32(0), limit > 0),
  )
  number_ref[0] = number
  pltriton.store(covered_out_ref.at[token], covered, mask=inside)
  pltriton.store(gains_out_ref.at[place], gains, mask=present)
