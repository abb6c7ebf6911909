"""The ladder of retention ratios; moves worked out by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cacovid_jax import errors
from cacovid_jax.policy import sampling
from cacovid_jax.training import ratio

GRID = (32, 14, 14)
SAMPLING = sampling.SamplingConfig()


def make(grid=GRID, fixed=None, **changes):
  return ratio.make_ladder(
    grid, SAMPLING, ratio.RatioConfig(**changes), fixed=fixed
  )


def test_default_ladder_starts_at_two_percent():
  ladder = make()
  assert ladder.ratios == (0.01, 0.02, 0.04, 0.08, 0.12)
  assert ladder.ratios[ladder.rungs(GRID).start] == 0.02
  # round(r * 196) tokens of each of 32 frames.
  assert ladder.num_keep == (64, 128, 256, 512, 768)


def test_half_and_double_move_to_the_nearest_rung():
  rungs = make().rungs(GRID)
  np.testing.assert_array_equal(rungs.up, [1, 2, 3, 4, 4])
  # Half of 0.12 is 0.06, nearer to 0.08 than to 0.04 by ratio.
  np.testing.assert_array_equal(rungs.down, [0, 0, 1, 2, 3])


@pytest.mark.parametrize(
  "reward,rung,expected",
  [
    (0.5, 1, 1),
    (0.875, 1, 0),
    (0.874, 1, 1),
    (0.125, 1, 2),
    (0.126, 1, 1),
    (1.0, 0, 0),
    (0.0, 4, 4),
  ],
)
def test_rewards_at_the_bounds_move_the_rung(reward, rung, expected):
  ladder = make()
  step = jax.jit(functools.partial(ratio.next_rung, ladder))
  given = jnp.int32(rung), jnp.float32(reward)
  assert step(ladder.rungs(GRID), *given) == expected


def test_next_rung_is_vmapped_over_videos():
  ladder = make()
  move = functools.partial(ratio.next_rung, ladder, ladder.rungs(GRID))
  got = jax.vmap(move)(jnp.array([1, 1, 1]), jnp.array([0.9, 0.5, 0.1]))
  np.testing.assert_array_equal(got, [0, 1, 2])


def test_rungs_within_some_moves_of_the_start():
  # Up to 0.04 and 0.08, down to 0.01; more moves end at the last rungs.
  found = [make().within(moves) for moves in (0, 1, 2, 9)]
  assert found == [[1], [0, 1, 2], [0, 1, 2, 3], [0, 1, 2, 3, 4]]
  assert make(fixed=0.05).within(4) == [0]


def test_small_grid_raises_the_lowest_rung():
  ladder = make((16, 7, 7))
  # 0.01 of 49 tokens is none; 0.02 is one already.
  assert ladder.ratios[0] >= 0.0102
  assert ladder.num_keep == tuple(sorted(set(ladder.num_keep)))
  assert ladder.num_keep[ladder.rungs((16, 7, 7)).start] == 16


def test_fixed_ratio_is_a_ladder_of_one_rung():
  ladder = make(fixed=0.05)
  assert len(ladder) == 1 and ladder.ratios == (0.05,)
  rungs = ladder.rungs(GRID)
  assert rungs.up == rungs.down == rungs.start == 0


@pytest.mark.parametrize(
  "changes,message",
  [
    ({"rungs": (0.02, 0.01)}, "must rise"),
    ({"rungs": ()}, "must rise"),
    ({"rungs": (0.02, 1.5)}, r"rungs\[1\] is 1.5; it must be .* at most 1"),
    ({"start": 0.03}, "is no rung"),
    ({"low": 0.9}, "low=0.9 must be below ratio.high"),
    ({"high": float("nan")}, "ratio.high is nan; it must be a number"),
    ({"fixed": 0.001}, "keeps no token"),
  ],
)
def test_mistakes_are_named(changes, message):
  with pytest.raises(errors.UserError, match=message):
    make(**changes)
