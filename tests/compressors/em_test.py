"""EM as a merger against a loop, and that EM does what EM promises."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from cacovid_jax import compressors, errors
from cacovid_jax.compressors import em, simple
from tests.compressors import given, quick, selections

unit = selections.unit
GRID = (4, 2, 3)
fit = quick.jit(em.fit, static_argnames="rounds")


def features_of(seed, scale=1.0):
  x = np.random.default_rng(seed).normal(size=[24, 8]) * scale
  return x.astype(np.float32)


def naive(features, num_keep, lam, rounds):
  """One token and one basis at a time, in float64."""
  x = np.asarray(features, np.float64)
  points = unit(x)
  bases = points[simple.even_positions(len(x), num_keep)]

  def shares():
    z = np.zeros([len(x), num_keep])
    for i in range(len(x)):
      weight = np.exp([points[i] @ m / lam for m in bases])
      z[i] = weight / weight.sum()
    return z

  for _ in range(rounds):
    z = shares()
    bases = unit(
      np.array(
        [
          sum(z[i, k] * points[i] for i in range(len(x)))
          for k in range(num_keep)
        ]
      )
    )
  z = shares()
  rows = np.array(
    [np.average(x, axis=0, weights=z[:, k]) for k in range(num_keep)]
  )
  return z, rows


@functools.cache
def program(**options):
  compressor = compressors.get("em", **options)
  return quick.jit(
    lambda x: given.compress(compressor, x, grid=GRID, num_keep=7)
  )


@pytest.mark.parametrize("lam,rounds", [(0.05, 9), (0.5, 3), (1.0, 0)])
def test_rows_and_masses_equal_the_loop(lam, rounds):
  for seed in range(5):
    features = features_of(seed)
    z, rows = naive(features, 7, lam, rounds)
    out = program(lam=lam, rounds=rounds)(features)
    # Which row is which basis: the sum of its members' parts tells.
    order = [int(np.argmin(np.abs(z.sum(axis=0) - m))) for m in out.mass]
    assert sorted(order) == list(range(7))
    np.testing.assert_allclose(out.mass, z.sum(axis=0)[order], rtol=1e-3)
    np.testing.assert_allclose(out.features, rows[order], atol=1e-3)
    np.testing.assert_array_equal(
      np.array(order)[np.asarray(out.assign)], z.argmax(axis=-1)
    )


def test_a_row_stands_where_its_closest_token_is():
  features = features_of(1)
  z, _ = naive(features, 7, 0.05, 9)
  out = program(lam=0.05, rounds=9)(features)
  basis = z.argmax(axis=-1)
  for row in range(7):
    members = np.flatnonzero(np.asarray(out.assign) == row)
    if len(members):
      share = z[members, basis[members[0]]]
      assert int(out.index[row]) in members
      assert z[int(out.index[row]), basis[members[0]]] > share.max() - 1e-4


def test_no_round_lowers_the_objective():
  x = unit(features_of(2))
  for lam in (0.02, 0.1, 1.0):
    objective, bases = [], x[:7]
    for _ in range(25):
      logits = np.asarray(x, np.float64) @ np.asarray(bases, np.float64).T / lam
      objective.append(special.logsumexp(logits, axis=-1).sum())
      bases = fit(x, bases, lam=lam, rounds=1)
    steps = np.diff(objective)
    assert steps.min() >= -1e-5 * np.abs(objective).max()
    assert objective[-1] > objective[0]


def test_the_scale_of_the_tokens_changes_nothing_but_the_scale():
  out = program(lam=0.05, rounds=9)(features_of(3))
  large = program(lam=0.05, rounds=9)(features_of(3, scale=64.0))
  np.testing.assert_array_equal(out.index, large.index)
  np.testing.assert_allclose(out.features * 64, large.features, rtol=1e-4)


def test_planted_directions_are_found():
  rng = np.random.default_rng(0)
  # In stretches: the bases start at evenly spaced tokens, one in each.
  group = np.arange(24) * 7 // 24
  x = np.eye(8)[group] + 0.05 * rng.normal(size=[24, 8])
  out = program(lam=0.05, rounds=9)(x.astype(np.float32))
  rows = np.asarray(out.assign)
  same = group[:, None] == group[None]
  np.testing.assert_array_equal(rows[:, None] == rows[None], same)
  np.testing.assert_allclose(
    out.mass, np.bincount(group)[group[np.asarray(out.index)]], atol=1e-3
  )


@pytest.mark.parametrize("option", [{"lam": 0.0}, {"lam": -1}, {"rounds": -1}])
def test_options_out_of_range_are_one_line(option):
  with pytest.raises(errors.UserError, match="em: ") as caught:
    given.compress(
      compressors.get("em", **option), jnp.ones([24, 8]), grid=GRID, num_keep=3
    )
  assert "\n" not in str(caught.value)
