"""Budgets of frames: sums, bounds, optimality, and what follows them."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize

from cacovid_jax import compressors, errors
from cacovid_jax.compressors import allocators, simple
from tests.compressors import given, quick, videos

GRID = (5, 2, 3)
AREA, NUM_VIDEO = 6, 30
PER_FRAME = ["density_peaks", "divprune?scope=frame", "random", "uniform"]


def aux_of(seed, grid=GRID):
  frame, token = jax.random.split(jax.random.key(seed))
  return given.Aux(
    scores=videos.Scores(
      jax.random.normal(frame, [grid[0], 2]),
      jax.random.normal(token, [math.prod(grid), 2]),
    )
  )


def frames_of(features, grid):
  return jnp.reshape(features, [grid[0], grid[1] * grid[2], -1])


def features_of(seed, grid=GRID):
  return jax.random.normal(jax.random.key(seed), [math.prod(grid), 8])


@functools.cache
def knapsack(total, low, high):
  return quick.jit(lambda errors: allocators.adaptok(errors, total, low, high))


def cost(table, counts, low):
  return float(sum(table[g, c - low] for g, c in enumerate(counts)))


@pytest.mark.parametrize("total,low,high", [(7, 0, 4), (12, 1, 5), (4, 1, 5)])
def test_the_knapsack_equals_brute_force(total, low, high):
  for seed in range(20):
    table = np.random.default_rng(seed).random([4, high - low + 1])
    table = table.astype(np.float32)
    feasible = [
      c
      for c in itertools.product(range(low, high + 1), repeat=4)
      if sum(c) == total
    ]
    best = min(feasible, key=lambda c: cost(table, c, low))
    np.testing.assert_array_equal(knapsack(total, low, high)(table), best)


def test_equal_costs_give_fewer_tokens_to_lower_parts():
  for seed in range(20):
    table = np.random.default_rng(seed).integers(0, 3, [4, 5])
    feasible = [c for c in itertools.product(range(5), repeat=4) if sum(c) == 7]
    best = min(feasible, key=lambda c: (cost(table, c, 0), c))
    np.testing.assert_array_equal(knapsack(7, 0, 4)(table), best)


def test_the_knapsack_equals_an_integer_program():
  num_parts, low, high, total = 9, 2, 8, 41
  levels = high - low + 1
  for seed in range(5):
    table = np.random.default_rng(seed).random([num_parts, levels])
    one_each = np.kron(np.eye(num_parts), np.ones(levels))
    tokens = np.tile(np.arange(low, high + 1), num_parts)[None]
    solved = optimize.milp(
      table.reshape(-1),
      integrality=np.ones(table.size),
      bounds=optimize.Bounds(0, 1),
      constraints=[
        optimize.LinearConstraint(one_each, 1, 1),
        optimize.LinearConstraint(tokens, total, total),
      ],
    )
    counts = np.asarray(knapsack(total, low, high)(table.astype(np.float32)))
    assert counts.sum() == total
    assert cost(table, counts, low) == pytest.approx(solved.fun, abs=1e-5)


def test_rates_keep_their_mean_and_stay_in_bounds():
  rates = quick.jit(allocators.rates, static_argnums=1)
  for mean in (0.05, 0.25, 0.5, 0.9, 1.0):
    for seed in range(20):
      rng = np.random.default_rng(seed)
      error = rng.gamma(rng.choice([0.3, 2.0, 20.0]), size=12)
      rate = np.asarray(rates(error.astype(np.float32), mean), np.float64)
      least = 1 / 16 if mean > 1 / 16 else mean / 16
      assert rate.min() >= least - 1e-7 and rate.max() <= 1.0
      if rate.min() > least + 1e-6:
        assert rate.mean() == pytest.approx(mean, rel=1e-4)
      # Frames with larger errors never get a smaller rate.
      assert np.all(np.diff(rate[np.argsort(error)]) >= -1e-6)


def test_rates_equal_the_formula():
  error = np.array([1.0, 2.0, 3.0, 6.0])
  # Mean 3; w = -2/3, -1/3, 0, 1; at r = 0.4 all of it fits below 1 / r - 1.
  np.testing.assert_allclose(
    allocators.rates(jnp.asarray(error), 0.4),
    [0.4 / 3, 0.8 / 3, 0.4, 0.8],
    rtol=1e-4,
  )
  # At r = 0.75 the shrinkage is (1 / r - 1) / 1 = 1/3, and the largest is 1.
  np.testing.assert_allclose(
    allocators.rates(jnp.asarray(error), 0.75),
    [0.75 * 7 / 9, 0.75 * 8 / 9, 0.75, 1.0],
    rtol=1e-4,
  )


@pytest.mark.parametrize("error", [0.0, 3.0])
def test_equal_errors_give_equal_rates(error):
  np.testing.assert_allclose(
    allocators.rates(jnp.full([6], error), 0.3), 0.3, rtol=1e-6
  )


def signals(name, kind):
  """A signal of 5 parts that may have 1 to 6 tokens."""
  rng = np.random.default_rng(len(name))
  shape = {"adaptok": (5, 6), "cacovid": (5, 2)}.get(name, (5,))
  random = rng.random(shape) if kind == "random" else np.zeros(shape)
  if kind == "one_large":
    random[0] = 1e6
  return jnp.asarray(random, jnp.float32)


@functools.cache
def counts_of(name, total):
  allocate = allocators.get(name).allocate
  return quick.jit(lambda signal: allocate(signal, total, 1, 6))


@pytest.mark.parametrize("kind", ["random", "zeros", "one_large"])
@pytest.mark.parametrize("name", allocators.names())
def test_counts_sum_to_the_total_within_bounds(name, kind):
  for total in (5, 7, 18, 30):
    counts = np.asarray(counts_of(name, total)(signals(name, kind)))
    assert counts.sum() == total
    assert counts.min() >= 1 and counts.max() <= 6


@pytest.mark.parametrize("total", [4, 31])
@pytest.mark.parametrize("name", allocators.names())
def test_a_sum_out_of_reach_is_one_line(name, total):
  with pytest.raises(errors.UserError) as caught:
    allocators.get(name).allocate(signals(name, "random"), total, 1, 6)
  assert "\n" not in str(caught.value)


def test_prefix_errors_equal_a_loop():
  features = np.array(features_of(3))
  features[7] = 0.0
  order = np.array(
    [np.random.default_rng(t).permutation(AREA) for t in range(5)]
  )
  found = allocators.prefix_errors(frames_of(features, GRID), order)
  for t, frame in enumerate(features.reshape(5, AREA, 8)):
    for k in range(AREA + 1):
      kept = order[t, :k].tolist()
      total = 0.0
      for i in range(AREA):
        best = 0.0
        for j in kept:
          norm = np.linalg.norm(frame[i]) * np.linalg.norm(frame[j])
          best = max(best, frame[i] @ frame[j] / norm if norm else 0.0)
        total += 0.0 if i in kept else 1 - best
      assert float(found[t, k]) == pytest.approx(total, abs=1e-5)


def test_code_errors_equal_those_of_principal_components():
  grid = (5, 3, 4)
  rng = np.random.default_rng(0)
  # Four strong directions, and frame 2 leaves them.
  x = rng.normal(size=[60, 4]) @ rng.normal(size=[4, 16]) * 3
  x[24:36] += 0.5 * rng.normal(size=[12, 16])
  x = x.astype(np.float32)
  centred = x - x.mean(axis=0)
  _, _, directions = np.linalg.svd(centred)
  directions = directions[:4]
  left = np.abs(centred - centred @ directions.T @ directions)
  found = allocators.code_errors(frames_of(x, grid))
  np.testing.assert_allclose(
    found, left.reshape(5, -1).mean(axis=-1), rtol=0.05, atol=1e-3
  )
  assert int(np.argmax(found)) == 2


@pytest.mark.parametrize("kind", ["zeros", "identical_frames"])
def test_no_signal_gives_equal_shares(kind):
  frame = features_of(1, (1, 2, 3))
  features = jnp.tile(frame if kind != "zeros" else frame * 0, (5, 1))
  order = jnp.tile(jnp.arange(AREA), (5, 1))
  counts = allocators.frame_counts(
    "infotok", given.inputs(features, GRID), order, 11
  )
  np.testing.assert_array_equal(np.sort(counts), [2, 2, 2, 2, 3])


@functools.cache
def program(spec, allocator, num_keep):
  compressor = compressors.get(spec, allocator=allocator)

  def compress(features, aux, rng):
    return given.compress(
      compressor, features, grid=GRID, num_keep=num_keep, aux=aux, rng=rng
    )

  return quick.jit(compress)


# Each method with one allocator, each allocator with one method.
@pytest.mark.parametrize(
  "spec,allocator",
  [
    *((spec, "adaptok") for spec in PER_FRAME),
    ("density_peaks", "infotok"),
    ("density_peaks", "cacovid"),
  ],
)
def test_methods_follow_allocators_in_a_batch_and_alone(spec, allocator):
  frame = features_of(9, (1, 2, 3))
  batch = jnp.stack(
    [
      features_of(0),
      features_of(1),
      jnp.zeros([30, 8]),
      jnp.tile(frame, (5, 1)),
      features_of(2).at[6:12].set(0.0),
      features_of(3),
      features_of(4),
      features_of(5).astype(jnp.bfloat16).astype(jnp.float32),
    ]
  )
  run = program(spec, allocator, 11)
  aux = jax.tree.map(lambda *x: jnp.stack(x), *[aux_of(i) for i in range(8)])
  keys = jax.random.split(jax.random.key(0), 8)
  batched = quick.jit(jax.vmap(run.__wrapped__))(batch, aux, keys)
  for i in range(8):
    out = run(batch[i], aux_of(i), keys[i])
    index = np.asarray(out.index)
    assert np.all(np.diff(index) > 0) and np.asarray(out.mask).all()
    counts = np.bincount(index // AREA, minlength=5)
    assert counts.sum() == 11 and counts.min() >= 1
    np.testing.assert_array_equal(out.features, batch[i][index])
    np.testing.assert_array_equal(batched.index[i], index)
  assert run._cache_size() == 1


def test_the_tokens_are_the_first_ones_of_the_frame_s_order():
  features, aux = features_of(6), aux_of(6)
  out = program("density_peaks", "cacovid", 11)(
    features, aux, jax.random.key(0)
  )
  counts = allocators.get("cacovid").allocate(aux.scores.frame, 11, 1, AREA)
  expected = []
  for t, count in enumerate(np.asarray(counts)):
    best = simple.peaks(features[t * AREA : (t + 1) * AREA], num_keep=AREA)
    expected += sorted((t * AREA + np.asarray(best[:count])).tolist())
  np.testing.assert_array_equal(out.index, expected)


def test_frames_with_higher_scores_get_more_tokens():
  frame = jnp.array([[0.0, 3.0], [0, 0], [0, 0], [0, 0], [3.0, 0.0]])
  counts = np.asarray(allocators.cacovid(frame, 15, 1, AREA))
  assert counts[0] == counts.max() > counts[4] == counts.min()


@pytest.mark.parametrize("spec", ["density_peaks", "divprune?scope=frame"])
def test_equal_shares_by_name_are_the_default(spec):
  features = features_of(7)
  plain = program(spec, None, 12)(features, aux_of(0), jax.random.key(0))
  named = program(spec, "uniform", 12)(features, aux_of(0), jax.random.key(0))
  jax.tree.map(np.testing.assert_array_equal, plain, named)


def test_measured_errors_beat_equal_shares_at_equal_tokens():
  """Half of the frames repeat one token: the others need the budget."""
  rng = np.random.default_rng(0)
  frames = rng.normal(size=[5, AREA, 8])
  frames[::2] = frames[::2, :1]
  features = jnp.asarray(frames.reshape(30, 8), jnp.float32)
  order = jax.vmap(lambda z: simple.peaks(z, num_keep=AREA))(
    jnp.asarray(frames, jnp.float32)
  )
  table = np.asarray(allocators.prefix_errors(frames_of(features, GRID), order))
  total = {}
  for name in ("uniform", "adaptok", "infotok"):
    counts = np.asarray(
      allocators.frame_counts(name, given.inputs(features, GRID), order, 12)
    )
    total[name] = cost(table, counts, 0)
  assert total["adaptok"] < total["uniform"]
  assert total["adaptok"] <= total["infotok"] + 1e-5
  counts = allocators.frame_counts(
    "adaptok", given.inputs(features, GRID), order, 12
  )
  np.testing.assert_array_equal(np.asarray(counts)[::2], 1)


def test_the_order_of_even_spacing_is_a_permutation_with_spread_prefixes():
  for n in (1, 2, 3, 6, 16, 49, 196):
    order = simple.spread_order(n)
    np.testing.assert_array_equal(np.sort(order), np.arange(n))
    for k in (2, 4, 8):
      if 8 <= 2 * k <= n:
        gaps = np.diff(np.sort(order[:k]), append=np.sort(order[:k])[0] + n)
        assert gaps.max() <= 2 * math.ceil(n / k)


def test_allocators_lower_for_a_tpu():
  for allocator in ("adaptok", "infotok", "cacovid"):
    traced = program("density_peaks", allocator, 11).trace(
      features_of(0), aux_of(0), jax.random.key(0)
    )
    assert "stablehlo" in traced.lower(lowering_platforms=("tpu",)).as_text()


def test_an_allocator_adds_what_it_needs():
  plain = compressors.get("density_peaks")
  assert plain.requires == frozenset()
  by_policy = compressors.get("density_peaks?allocator=cacovid")
  assert by_policy.requires == {"scores"} and by_policy.sees_question
  assert compressors.get("uniform?allocator=adaptok").requires == frozenset()
  with pytest.raises(ValueError, match="needs scores"):
    given.compress(by_policy, features_of(0), grid=GRID, num_keep=7)


@pytest.mark.parametrize("spec", PER_FRAME)
def test_an_unknown_allocator_lists_the_known_ones(spec):
  with pytest.raises(errors.UserError, match="uniform, adaptok, infotok") as e:
    compressors.get(spec, allocator="fair")
  assert "\n" not in str(e.value)


@pytest.mark.parametrize(
  "spec",
  ["divprune?allocator=adaptok", "density_peaks?scope=video&allocator=uniform"],
)
def test_an_allocator_without_frames_to_share_is_one_line(spec):
  with pytest.raises(errors.UserError, match="needs scope 'frame'") as caught:
    given.compress(compressors.get(spec), features_of(0), grid=GRID, num_keep=7)
  assert "\n" not in str(caught.value)
