"""Facility location: greedy cover, and its picks as one kernel.

The subset S of K tokens that maximises the coverage

  f(S) = sum_v w_v * (max(c, max over u in S of cos(x_v, x_u)) - c)

with floor c, greedily: at least 1 - 1/e of the best f. Windows are solved as
one problem without similarities between them. Similarities are rounded to
multiples of a power of two (2^-18 at 6272 tokens), so that gains are sums of
integers: the same in any order and on any device.

Axes: W windows, A tokens of one, n = W * A, M candidates of a block.
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

# A GPU asks its host whether to go on after each trip of a loop of unknown
# length, which takes as long as a pick or two.
_PICKS_PER_TRIP = 8
_NUM_WARPS = 16
# Columns of a block that are in registers at once: 16 of 512 candidates are
# 16 registers of each thread.
_TOKENS = 16


def greedy(
  features, num_keep, *, grid, block=512, windows=1, floor=0.0, weights=None,
  similarities="auto", kernel=True,
):  # fmt: skip
  """Returns int32[K] tokens in picking order, by lazy evaluation in blocks.

  Gains only shrink, so a gain that was computed earlier is an upper bound. A
  round takes the M largest bounds and, again and again, computes these gains
  anew and picks the best while it beats all bounds outside the block. A round
  without a pick has all bounds computed anew. The picks are those of plain
  greedy, the earlier token among equals.

  Args:
    features: float[N, D] video tokens.
    num_keep: K, static, below N.
    grid: static (T, H, W).
    block: M; speed only, as the last two.
    windows: W, stretches of frames that are covered each by itself.
    floor: c, below 1.
    weights: w, float32[N] that sum to N; None for ones.
    similarities: "matrix" holds all, "blocks" computes those of a block when it
      is looked at, "auto" holds them where they fit.
    kernel: picks of a block, of a single window, in one kernel on NVIDIA GPUs
      (6272 tokens, a quarter kept, on an H200: 20 ms instead of 35).
  """
  num_video = features.shape[0]
  place = window_places(grid, windows)  # [W, A]
  num_windows, area = place.shape
  block = min(block, place.size - 1)
  if similarities == "auto":
    fits = 4 * place.size * area <= similarity.MATRIX_BYTES
    similarities = "matrix" if fits else "blocks"
  x = features
  if num_windows > 1:
    x = x.at[place].get(mode="fill", fill_value=0)
  x = x.reshape(num_windows, area, -1)
  if weights is None:
    weights = jnp.ones([num_video], jnp.float32)
  weights = weights.at[place].get(mode="fill", fill_value=0.0)  # [W, A]
  scale = _scale(num_video, floor)

  def to_integers(cosines, weights):
    above = jnp.clip(cosines, floor, 1.0) - floor
    return jnp.round(above * weights * scale).astype(jnp.int32)

  if similarities == "matrix":
    covers = _held(x, weights, to_integers)
  else:
    covers = _in_blocks(x, weights, to_integers, block)
  one_kernel = kernel and num_windows == 1
  picks_of_block = block_picks_kernel if one_kernel else block_picks_loop
  token = place.reshape(-1)
  covered = jnp.zeros([num_windows, area], jnp.int32)
  picked = lazy_greedy(
    *covers, num_keep, covered, token < num_video, block, picks_of_block
  )
  return jnp.asarray(token, jnp.int32)[picked]


def _held(x, weights, to_integers):
  """Returns (rows_of, gains_of_all) of `lazy_greedy`, of one held matrix.

  Of tokens float[W, A, D] and their weights float32[W, A].
  """
  matrix = to_integers(similarity.between(x), weights[:, None, :])

  def gains_of_all(covered):
    left = matrix - covered[:, None, :]
    return jnp.maximum(left, 0).sum(axis=-1).reshape(-1)

  rows = matrix.reshape(-1, x.shape[1])
  return lambda candidates: rows[candidates], gains_of_all


def _in_blocks(x, weights, to_integers, block):
  """Returns what `_held` does, computed when it is looked at."""
  num_windows, area, _ = x.shape

  def row_of(candidate):
    window, own = candidate // area, candidate % area
    row = similarity.between(x[window, own][None], x[window])[0]
    return to_integers(row, weights[window])

  def rows_of(candidates):
    if num_windows == 1:
      return to_integers(similarity.between(x[0][candidates], x[0]), weights)
    # A few at a time: each of them takes a copy of its window.
    return jax.lax.map(row_of, candidates, batch_size=8)

  def gains_of_all(covered):
    def gains(window):
      x, weights, covered = window

      def of_one(candidate):
        row = to_integers(similarity.between(candidate[None], x), weights)
        return jnp.maximum(row - covered, 0).sum()

      return jax.lax.map(of_one, x, batch_size=block)

    return jax.lax.map(gains, (x, weights, covered)).reshape(-1)

  return rows_of, gains_of_all


class _Picks(NamedTuple):
  """State of the greedy loop, or of the picks among one block of candidates."""

  order: jax.Array  # int32[K] picks so far; int32[M] places in the block.
  count: jax.Array  # int32[], how many.
  covered: jax.Array  # int32[W, A], similarity of each token to its best pick.
  gains: jax.Array  # int32[n] or [M], at least a candidate's gain; -1 if none.
  stuck: jax.Array  # bool[], True if nothing was picked last.


def lazy_greedy(
  rows_of, gains_of_all, num_keep, covered, inside, block, picks_of_block
):
  """Returns int32[K], greedy picks of a facility location problem.

  Of M candidates int32[M], below n, `rows_of` gives int32[M, A], what each
  covers of its window's tokens, at least 0; of what is covered, int32[W, A],
  `gains_of_all` gives int32[n], the gain of each. `inside` bool[n] are there;
  `picks_of_block` is `block_picks_loop` or its equal.
  """
  area = covered.shape[1]
  places = jnp.arange(block, dtype=jnp.int32)

  def round_of_picks(state):
    bounds = jax.lax.cond(
      state.stuck,
      lambda: jnp.where(state.gains < 0, -1, gains_of_all(state.covered)),
      lambda: state.gains,
    )
    # Of equal bounds the earlier candidates come first, also at the cut.
    largest, found = jax.lax.top_k(bounds, block + 1)
    candidates = jnp.sort(found[:block])
    rival = jnp.stack([largest[block], jnp.sum(candidates < found[block])])
    given = rows_of(candidates), candidates // area, state.covered
    limits = bounds[candidates], rival.astype(jnp.int32), num_keep - state.count
    picked, count, covered, gains = picks_of_block(*given, *limits)
    order = jnp.where(places < count, state.count + places, num_keep)
    return _Picks(
      order=state.order.at[order].set(candidates[picked], mode="drop"),
      count=state.count + count,
      covered=covered,
      gains=bounds.at[candidates].set(gains),
      stuck=count == 0,
    )

  order, none = jnp.zeros([num_keep], jnp.int32), jnp.int32(0)
  gains = jnp.where(inside, gains_of_all(covered), -1)
  return jax.lax.while_loop(
    lambda state: state.count < num_keep,
    round_of_picks,
    _Picks(order, none, covered, gains, stuck=jnp.array(False)),
  ).order


def block_picks_loop(rows, windows, covered, bounds, rival, limit):
  """Picks the candidate of largest gain while it beats those outside.

  Candidates of the windows int32[M] cover `rows` int32[M, A] of their window's
  tokens, of which `covered` int32[W, A] is; their gains are at most `bounds`
  int32[M], -1 for picked ones, which stay so. `rival` int32[2] is the largest
  bound of the other candidates, and the first place in the block that comes
  behind the one that has it; `limit` int32[] picks may be made.

  Returns int32[M] places of the picks in their order, then anything; int32[],
  their number; covered and gains after them.
  """
  block = rows.shape[0]
  places = jnp.arange(block, dtype=jnp.int32)

  def pick(_, state):
    gains = gains_of(rows, windows, state.covered, state.gains)
    best = jnp.argmax(gains).astype(jnp.int32)
    gain, window = gains[best], windows[best]
    wins = (gain > rival[0]) | ((gain == rival[0]) & (best < rival[1]))
    wins &= ~state.stuck & (gain >= 0) & (state.count < limit)
    covers = jnp.where(wins, rows[best], 0)
    slot = jnp.where(wins, state.count, block)
    return _Picks(
      order=state.order.at[slot].set(best, mode="drop"),
      count=state.count + wins,
      covered=state.covered.at[window].max(covers),
      gains=jnp.where(wins & (places == best), -1, gains),
      stuck=~wins,
    )

  order, none = jnp.zeros([block], jnp.int32), jnp.int32(0)
  return jax.lax.while_loop(
    lambda state: ~state.stuck,
    lambda state: jax.lax.fori_loop(0, _PICKS_PER_TRIP, pick, state),
    _Picks(order, none, covered, bounds, stuck=limit <= 0),
  )[:4]


def block_picks_kernel(*given):
  """`block_picks_loop` of a single window, on NVIDIA GPUs in one kernel."""

  def kernel(rows, windows, covered, bounds, *limits):
    gains = gains_of(rows, windows, covered, bounds)
    *found, covered, gains = block_picks(rows, covered[0], gains, *limits)
    return *found, covered[None], gains

  return jax.lax.platform_dependent(
    *given, cuda=kernel, default=block_picks_loop
  )


def gains_of(rows, windows, covered, bounds):
  """Returns int32[M], what candidates add; see `block_picks_loop`."""
  left = rows - covered[windows]
  return jnp.where(bounds < 0, -1, jnp.maximum(left, 0).sum(axis=-1))


def window_places(grid, windows):
  """Returns int32[W, A] tokens of even stretches of frames, N as padding."""
  num_video = math.prod(grid)
  tokens = np.arange(num_video, dtype=np.int32).reshape(grid[0], -1)
  parts = [part.reshape(-1) for part in np.array_split(tokens, windows)]
  places = np.full([windows, max(map(len, parts))], num_video, np.int32)
  for row, part in zip(places, parts, strict=True):
    row[: len(part)] = part
  return places


def _scale(num_video, floor) -> float:
  """Returns the power of two that similarities are multiplied by."""
  # The gain of a token, N * (1 - c) at most and the rounding of N terms, has to
  # fit into int32. Steps below 2^-20 would tell apart the rounding of float32.
  most = 1.001 * num_video * (1.0 - floor)
  bits = math.floor(math.log2((2**31 - 1 - num_video) / most))
  return 2.0 ** min(bits, 20)


def block_picks(rows, covered, gains, rival, limit, interpret=False):
  """Returns the picks of `block_picks_loop`, which defines them.

  Of one window, whose tokens are covered int32[A], and of exact gains int32[M],
  in registers of one program; a pick reads the row of the candidate, lists the
  few tokens that it covers better than all before, and takes from the gains
  what these no longer give. `interpret` runs it one by one on any platform.
  """
  num_candidates, area = rows.shape
  size = pl.next_power_of_2(area)
  barrier = (lambda: None) if interpret else pltriton.debug_barrier
  kernel = functools.partial(
    _block_kernel, num_candidates=num_candidates, area=area, barrier=barrier
  )
  bounds = rival.astype(jnp.int32), limit.astype(jnp.int32).reshape(1)
  integers = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
  picked, number, covered, gains, *_ = pl.pallas_call(
    kernel,
    out_shape=[
      # One place more: the candidate that is not picked is written as well.
      *(integers([n]) for n in (num_candidates + 1, 1, area, num_candidates)),
      # The list of a pick: tokens, what was covered of them, and is now.
      *(integers([size]) for _ in range(3)),
    ],
    interpret=interpret,
    compiler_params=pltriton.CompilerParams(num_warps=_NUM_WARPS, num_stages=1),
    name="block_picks",
  )(rows.reshape(-1), rows.T.reshape(-1), covered, gains, *bounds)
  return picked[:num_candidates], number[0], covered, gains


def _block_kernel(*refs, num_candidates, area, barrier):
  rows_ref, columns_ref, covered_ref, gains_ref, rival_ref, limit_ref = refs[:6]
  picked_ref, number_ref, covered_out_ref, gains_out_ref = refs[6:10]
  list_refs = refs[10:]
  size, size_block = list_refs[0].shape[0], pl.next_power_of_2(num_candidates)
  token = jax.lax.broadcasted_iota(jnp.int32, (size,), 0)
  place = jax.lax.broadcasted_iota(jnp.int32, (size_block,), 0)
  inside, present = token < area, place < num_candidates
  bound, behind, limit = rival_ref[0], rival_ref[1], limit_ref[0]

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
    upto = jnp.cumsum(better.astype(jnp.int32))
    total = jnp.sum(better.astype(jnp.int32))
    # Tokens that are not listed get lines of their own, from the end: nothing
    # is written there, but no two tokens may share a line.
    line = jnp.where(better, upto - 1, size - 1 - (token - upto))
    for ref, value in zip(list_refs, (token, covered, row), strict=True):
      pltriton.store(ref.at[line], value, mask=better)
    gains = jnp.where((place == chosen) & wins, -1, gains)
    # All threads have to have written the list before any reads it, and to
    # have read it before the next pick writes.
    barrier()
    give_up = functools.partial(
      _without, columns_ref, list_refs, total, num_candidates
    )
    trips = (total + _TOKENS - 1) // _TOKENS
    gains = jax.lax.fori_loop(0, trips, give_up, gains)
    barrier()
    return jnp.maximum(covered, row), gains, number + wins, wins

  # What is behind A counts as covered, what is behind M as picked. (Places, not
  # slices: newer versions refuse one that ends behind the array.)
  covered = pltriton.load(covered_ref.at[token], mask=inside, other=2**31 - 1)
  gains = pltriton.load(gains_ref.at[place], mask=present, other=-1)
  start = covered, gains, jnp.int32(0), limit > 0
  covered, gains, number, _ = jax.lax.while_loop(lambda s: s[3], pick, start)
  number_ref[0] = number
  pltriton.store(covered_out_ref.at[token], covered, mask=inside)
  pltriton.store(gains_out_ref.at[place], gains, mask=present)


def _without(columns_ref, list_refs, total, num_candidates, trip, gains):
  """Returns gains int32[M] without what some listed tokens no longer give.

  The lists hold `total` tokens, what was covered of them before, and is now.
  """
  line = trip * _TOKENS + jax.lax.broadcasted_iota(jnp.int32, (_TOKENS,), 0)
  listed = line < total
  column, before, after = (
    pltriton.load(ref.at[line], mask=listed, other=0) for ref in list_refs
  )
  place = jax.lax.broadcasted_iota(jnp.int32, gains.shape, 0)
  shape = (_TOKENS, *gains.shape)
  where = jnp.broadcast_to((column * num_candidates)[:, None], shape)
  where += jnp.broadcast_to(place[None, :], shape)
  mask = jnp.broadcast_to(listed[:, None], shape)
  mask &= jnp.broadcast_to((place < num_candidates)[None, :], shape)
  columns = pltriton.load(columns_ref.at[where], mask=mask, other=0)
  lost = jnp.maximum(columns - before[:, None], 0)
  lost -= jnp.maximum(columns - after[:, None], 0)
  return jnp.where(gains < 0, gains, gains - jnp.sum(lost, axis=0))
