"""Budgets against the published table, exact fractions and brute force."""

import fractions
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cacovid_jax import compressors, errors
from cacovid_jax.compressors import budgets
from tests.compressors import naive, quick, shares

RATIOS = (0.25, 0.2, 0.15, 0.1)
TOKENS = 6272

_share = quick.jit(budgets.largest_remainder_on_device)


def percent(value, digits=1):
  return round(100 * value, digits)


def test_fastv_keeps_the_published_share():
  def share(ratio, num_layers, layer):
    fastv = compressors.get(
      "fastv", exact_budget=False, layer=layer, scale_layers=False
    )
    # Of so many tokens that rounding to whole ones does not show.
    ((_, keep),) = fastv.plan(num_layers, 10**9, ratio)
    return keep / 10**9

  assert [percent(share(r, 28, 2)) for r in RATIOS] == [19.2, 13.8, 8.5, 3.1]
  assert percent(share(0.15, 28, 2), 2) == 8.46
  assert percent(share(0.1, 28, 2), 2) == 3.08
  assert [percent(share(r, 36, 2)) for r in RATIOS] == [20.6, 15.3, 10.0, 4.7]
  assert [percent(share(r, 28, 3)) for r in RATIOS[:3]] == [16.0, 10.4, 4.8]
  with pytest.raises(errors.UserError, match=r"infeasible.*0\.1072"):
    share(0.1, 28, 3)


def two_stages(name, ratio, num_layers, num_video):
  """Returns (entering, keep) of PruneVID or FlashVID, layers as of 28."""
  layer, share = {"prunevid": (10, 0.4), "flashvid": (20, 0.3)}[name]
  layer = budgets.scale_layer(layer, num_layers)
  return budgets.two_stages(
    ratio, num_layers, num_video, layer=layer, share=share
  )


def test_prunevid_lets_the_published_share_in():
  def entering(ratio, num_layers, layer=10):
    # Of so many tokens that rounding down to whole ones does not show.
    found, _ = budgets.two_stages(
      ratio, num_layers, 10**6, layer=layer, share=0.4
    )
    return percent(found / 10**6)

  assert [entering(r, 28) for r in RATIOS] == [40.7, 32.6, 24.4, 16.3]
  assert [entering(r, 36) for r in RATIOS] == [44.1, 35.3, 26.5, 17.6]
  # K = 11 of the released code.
  assert [entering(r, 28, 11) for r in RATIOS] == [39.3, 31.5, 23.6, 15.7]


def test_flashvid_lets_a_quarter_more_in_and_keeps_30_percent():
  for ratio, published in zip(RATIOS, (31.25, 25, 18.75, 12.5), strict=True):
    entering, keep = two_stages("flashvid", ratio, 28, TOKENS)
    assert entering == math.floor(published / 100 * TOKENS)
    assert keep / entering == pytest.approx(0.3, abs=20 / 8 / entering)


@pytest.mark.parametrize("num_layers", [28, 36, 24, 3])
@pytest.mark.parametrize("num_video", [TOKENS, 97])
def test_the_mean_over_layers_is_the_ratio(num_layers, num_video):
  for ratio in (*RATIOS, 0.4, 1.0):
    plans = {}
    layer = budgets.scale_layer(2, num_layers)
    if ratio * num_layers >= layer + 1:
      keep = budgets.keep_behind(ratio, num_layers, num_video, layer=layer)
      plans["fastv"] = [(layer, keep)]
    for name, at in (("prunevid", 10), ("flashvid", 20)):
      entering, keep = two_stages(name, ratio, num_layers, num_video)
      assert 1 <= keep <= entering <= num_video
      plans[name] = [(0, entering), (budgets.scale_layer(at, num_layers), keep)]
    for plan in plans.values():
      by_hand = [num_video] * num_layers
      for number, _ in enumerate(by_hand):
        for layer, keep in plan:
          if number >= layer:
            by_hand[number] = keep
      got = np.mean(by_hand) / num_video
      assert got <= ratio + 1e-12
      assert got > ratio - 1 / num_video


def test_a_budget_smaller_than_the_first_layers_names_the_lowest_ratio():
  with pytest.raises(errors.UserError, match="infeasible") as caught:
    budgets.keep_behind(0.05, 28, TOKENS, layer=2)
  lowest = budgets.lowest_ratio(28, TOKENS, layer=2)
  assert f"at least {lowest:.4f}" in str(caught.value)
  assert "\n" not in str(caught.value)
  assert lowest == 0.0716  # 2 / 28 and one token of 6272 behind it.
  assert budgets.keep_behind(lowest, 28, TOKENS, layer=2) >= 1
  with pytest.raises(errors.UserError, match="infeasible"):
    budgets.keep_behind(lowest - 2e-4, 28, TOKENS, layer=2)


def test_two_stages_reach_down_to_one_token():
  assert two_stages("flashvid", 1 / 97, 28, 97) == (1, 1)
  for ratio in (0.011, 0.015, 0.02, 0.05):
    entering, keep = two_stages("flashvid", ratio, 28, 97)
    assert 1 <= keep <= entering
  with pytest.raises(errors.UserError, match="keeps no token"):
    two_stages("flashvid", 0.01, 28, 97)
  with pytest.raises(errors.UserError, match="no layer of 4 behind"):
    budgets.two_stages(0.5, 4, 97, layer=4, share=0.5)
  with pytest.raises(errors.UserError, match="no layer of 4 behind"):
    budgets.keep_behind(0.5, 4, 97, layer=4)


def test_layers_are_scaled_from_28():
  assert [budgets.scale_layer(k, 28) for k in (1, 2, 20)] == [1, 2, 20]
  assert [budgets.scale_layer(k, 36) for k in (2, 10, 20)] == [3, 13, 26]
  assert [budgets.scale_layer(k, 3) for k in (2, 10, 20)] == [1, 1, 2]


def cases():
  rng = np.random.default_rng(0)
  for seed in range(60):
    count = int(rng.integers(1, 7))
    weights = rng.integers(0, 9, count) if seed % 2 else rng.random(count)
    low = rng.integers(0, 3, count)
    high = low + rng.integers(0, 6, count)
    total = int(rng.integers(low.sum(), high.sum() + 1))
    yield weights, total, low, high
  yield np.zeros(4), 7, 0, 3
  yield np.array([0.0, 1.0, 0.0]), 9, 0, 4
  yield np.array([1e-30, 1e30]), 5, 0, 5
  yield np.ones(3), 0, 0, 5
  yield np.array([5.0]), 3, 3, 3


def proportional(weights, total, low, high):
  """The real-valued shares, by removing parts at a bound one at a time."""
  count = len(weights)
  low = np.broadcast_to(low, count).tolist()
  high = np.broadcast_to(high, count).tolist()
  exact = [fractions.Fraction(float(w)) for w in weights]
  # Every assignment of parts to bounds; the right one is consistent.
  for state in itertools.product((-1, 0, 1), repeat=count):
    free = [g for g in range(count) if state[g] == 0 and exact[g]]
    if any(state[g] == 0 and not exact[g] for g in range(count)):
      continue
    fixed = [int(high[g] if state[g] > 0 else low[g]) for g in range(count)]
    rest = total - sum(fixed[g] for g in range(count) if g not in free)
    if free:
      level = rest / sum(exact[g] for g in free)
    elif rest:
      continue
    else:
      level = None
    share = [level * exact[g] if g in free else fixed[g] for g in range(count)]
    if any(not low[g] <= share[g] <= high[g] for g in range(count)):
      continue
    if level is None:
      # Every part is at a bound: some level must lie between their own.
      if any(state[g] > 0 and not exact[g] and low[g] < high[g]
             for g in range(count)):  # fmt: skip
        continue
      levels = [
        (state[g], fixed[g] / exact[g]) for g in range(count) if exact[g]
      ]
      at_least = max((x for at, x in levels if at > 0), default=0)
      at_most = min((x for at, x in levels if at < 0), default=math.inf)
      if at_least > at_most:
        continue
      return share
    right = all(
      (state[g] == 0)
      or (state[g] < 0 and level * exact[g] <= low[g])
      or (state[g] > 0 and level * exact[g] >= high[g])
      for g in range(count)
    )
    if right:
      return share
  return None


def rounded(share, total):
  counts = [math.floor(s) for s in share]
  order = sorted(range(len(share)), key=lambda g: (counts[g] - share[g], g))
  for g in order[: total - sum(counts)]:
    counts[g] += 1
  return counts


def test_largest_remainder_equals_brute_force():
  compared = 0
  for weights, total, low, high in cases():
    counts = shares.largest_remainder(weights, total, low, high)
    assert sum(counts) == total
    assert np.all(counts >= np.broadcast_to(low, len(weights)))
    assert np.all(counts <= np.broadcast_to(high, len(weights)))
    share = proportional(weights, total, low, high)
    if share is not None:
      assert counts == rounded(share, total)
      compared += 1
  assert compared >= 50


def test_largest_remainder_by_hand():
  share = shares.largest_remainder
  assert share([1, 1, 1], 7) == [3, 2, 2]
  assert share([5, 3, 2], 5) == [3, 1, 1]  # 2.5, 1.5 and 1: the first half.
  assert share([5, 3, 2], 5, high=2) == [2, 2, 1]
  assert share([9, 1, 1], 4, low=1) == [2, 1, 1]
  assert share([0, 0], 3) == [2, 1]
  assert share([1, 0, 0], 9, high=[3, 5, 5]) == [3, 3, 3]


def test_largest_remainder_on_device_is_that_of_the_host():
  share = quick.jit(jax.vmap(budgets.largest_remainder_on_device))
  rows = []
  for weights, total, low, high in cases():
    count = len(weights)
    pad = (0, 6 - count)
    low = np.pad(np.broadcast_to(low, count), pad)
    high = np.pad(np.broadcast_to(high, count), pad)
    rows.append((np.pad(weights, pad).astype(np.float32), total, low, high))
  columns = [np.stack(column) for column in zip(*rows, strict=True)]
  found = np.asarray(share(*columns))
  equal = 0
  for (weights, total, low, high), counts in zip(rows, found, strict=True):
    assert counts.sum() == total
    assert np.all((low <= counts) & (counts <= high))
    expected = shares.largest_remainder(weights, total, low, high)
    # Rounding may decide between remainders that are as good as equal.
    assert np.abs(counts - expected).max() <= 1
    equal += np.array_equal(counts, expected)
  assert equal >= len(rows) - 3


def test_whole_weights_are_shared_on_the_device_exactly_as_on_the_host():
  share = quick.jit(jax.vmap(budgets.largest_remainder_on_device))
  rng = np.random.default_rng(2)
  rows = []
  for number in range(120):
    sizes = rng.integers(0, 30, 8) * rng.integers(0, 2, 8)
    sizes[number % 8] += 1
    low = np.minimum(sizes, number % 2) * (rng.random(8) < 0.5)
    # In proportion to room, or to other numbers with many equal ones.
    weights = sizes if number % 3 else np.where(sizes, number % 7 + 1, 0)
    least, most = int(low.sum()), int(sizes.sum())
    total = [least, most, rng.integers(least, most + 1)][number % 3]
    rows.append([np.int32(x) for x in (weights, total, low, sizes)])
  found = np.asarray(share(*map(np.stack, zip(*rows, strict=True))))
  for row, counts in zip(rows, found, strict=True):
    expected = shares.largest_remainder(row[0].tolist(), int(row[1]), *row[2:])
    np.testing.assert_array_equal(counts, expected)


@pytest.mark.parametrize("seed", range(8))
def test_shares_on_the_device_equal_those_found_by_bisection(seed):
  rng = np.random.default_rng(seed)
  most = rng.integers(0, 30, 8)
  most[0] += 1
  weights = [rng.random(8) + 0.01, rng.random(8) ** 8 + 1e-3][seed % 2]
  for total in {0, 1, int(most.sum()) // 3, int(most.sum()) - 1, most.sum()}:
    np.testing.assert_array_equal(
      _share(jnp.asarray(weights), total, 0, most),
      naive.apportion(int(total), weights.tolist(), most.tolist()),
    )


def test_shares_on_the_device_by_hand():
  counts = _share(jnp.ones(4), 6, 0, jnp.full(4, 9))
  np.testing.assert_array_equal(counts, [2, 2, 1, 1])
  # What is at its bound leaves the rest to the others.
  weights, high = jnp.array([100.0, 1.0, 1.0]), jnp.array([4, 9, 9])
  np.testing.assert_array_equal(_share(weights, 10, 0, high), [4, 3, 3])


def test_even_parts():
  assert budgets.evenly(11, 4) == [3, 3, 3, 2]
  assert budgets.evenly(2, 3) == [1, 1, 0]
  assert budgets.evenly(0, 1) == [0]


def test_largest_remainder_of_many_parts():
  weights = np.random.default_rng(1).random(300).astype(np.float32)
  share = quick.jit(
    budgets.largest_remainder_on_device, static_argnums=(1, 2, 3)
  )
  for total, low, high in ((15680, 0, 196), (400, 1, 196), (58000, 0, 196)):
    counts = np.asarray(share(weights, total, low, high))
    assert counts.sum() == total and low <= counts.min()
    assert counts.max() <= high
    expected = shares.largest_remainder(weights, total, low, high)
    assert np.abs(counts - expected).sum() <= 4


def test_infeasible_shares_are_one_line_at_trace_time():
  with pytest.raises(errors.UserError, match="3 parts that take 0 to 6"):
    shares.largest_remainder([1, 1, 1], 7, 0, 2)
  with pytest.raises(errors.UserError, match="take 6 to 9"):
    quick.jit(
      lambda w: budgets.largest_remainder_on_device(w, 5, 2, 3)
    )(jnp.ones(3))  # fmt: skip
  with pytest.raises(ValueError, match="exceed"):
    shares.largest_remainder([1, 1], 3, 2, 1)
  with pytest.raises(ValueError, match="positive"):
    shares.largest_remainder([1, -1], 3)
