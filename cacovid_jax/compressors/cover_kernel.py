"""Greedy picks among a block of candidates as one kernel for NVIDIA GPUs.

Facility location picks candidates one after the other, and each pick changes
what the others would add. As separate kernels that is several launches a
pick. Here one program holds in registers what is covered and what candidates
gain; a pick reads the row of the candidate, lists the tokens that it covers
better than all before, and takes from the gains what these tokens no longer
give: few tokens, where all rows of the block would have to be read otherwise.

Axes: M candidates of a block, A tokens that they cover, C tokens at a time.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

_NUM_WARPS = 16
# Columns of a block that are in registers at once: 16 of 512 candidates are
# 16 registers of each thread.
_TOKENS = 16


def block_picks(rows, covered, gains, rival, limit, interpret=False):
  """Returns the picks of `floc.block_picks_loop`, which defines them.

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
