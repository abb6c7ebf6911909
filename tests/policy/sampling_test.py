"""Sampler: exact counts, exact frequencies, small grids, rungs of a ladder."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from cacovid_jax import errors
from cacovid_jax.models import token_grid
from cacovid_jax.policy import diversity, network, sampling
from tests.policy import diversity_test

GRID = (4, 4, 4)
NUM_TOKENS = 64


def config(**changes):
  return dataclasses.replace(sampling.SamplingConfig(), **changes)


CONFIG = config(frame_ratio=0.5, num_combinations=8)


@functools.cache  # A plan is compiled once: it is equal to itself alone.
def plan_at(ratio):
  return sampling.plan(GRID, ratio, CONFIG)


PLAN = plan_at(0.2)  # Shared by most tests.


def scores_of(rng, grid=GRID, scale=1.0):
  rng_frame, rng_token = jax.random.split(rng)
  return network.Scores(
    frame=scale * jax.random.normal(rng_frame, (grid[0], 2)),
    token=scale * jax.random.normal(rng_token, (int(np.prod(grid)), 2)),
  )


def features_of(rng, grid=GRID, width=8):
  return jax.random.normal(rng, (int(np.prod(grid)), width))


def given():
  return scores_of(jax.random.key(1)), features_of(jax.random.key(2))


@functools.partial(jax.jit, static_argnames="plan")
def sample(rng, scores, features, *, plan):
  return sampling.sample(rng, scores, features, plan=plan)


@functools.partial(jax.jit, static_argnames="plan")
def rank_groups(scores, *, plan):
  return sampling.rank_groups(scores, plan=plan)


def gap(scores):
  return np.asarray(scores[:, 1] - scores[:, 0])


# Plans.


def test_plan_of_the_paper():
  plan = sampling.plan((32, 14, 14), 0.02)
  assert plan.tokens_per_frame == 4
  assert plan.num_keep == 128
  assert plan.group_cap.size == plan.shape.num_groups == 25
  assert plan.group_cap.cap == 0.1
  assert plan.frame_cap.cap == 3 / 32
  assert plan.frames_drawn == 4
  assert (plan.config.modes.token, plan.config.modes.frame) == (23, 8)
  assert plan.config.num_combinations == 32


def test_tokens_per_frame_round_half_to_even():
  assert sampling.plan((1, 1, 10), 0.25).tokens_per_frame == 2
  assert sampling.plan((1, 1, 14), 0.25).tokens_per_frame == 4


def test_fewer_groups_when_they_could_not_hold_the_draws():
  # k = round(0.17 * 9) = 2 and 1 / 0.17 gives 5 groups, but only 4 hold 2.
  plan = sampling.plan((1, 3, 3), 0.17, config(group_size=1))
  assert (plan.tokens_per_frame, plan.group_cap.size) == (2, 4)


def test_more_frames_when_the_drawn_ones_could_not_hold_the_tokens():
  # K = 4 * 4 = 16 tokens need two frames of 9.
  assert sampling.plan((4, 3, 3), 0.5).frames_drawn == 2


def test_groups_of_the_smallest_caps():
  assert sampling.plan((1, 8, 8), 0.5).group_cap.cap == 1.0
  assert sampling.plan((1, 8, 8), 0.25).group_cap.cap == 0.9
  assert sampling.plan((1, 8, 8), 0.1).group_cap.cap == 2 / 5


@pytest.mark.parametrize("grid", [(2, 5, 5), (1, 14, 14), (3, 1, 2), (9, 7, 3)])
def test_a_ratio_below_the_grid_names_the_smallest(grid):
  smallest = sampling.smallest_ratio(grid)
  assert sampling.plan(grid, smallest).tokens_per_frame == 1
  below = 0.5 / (grid[1] * grid[2])  # Half a token rounds to none.
  with pytest.raises(errors.UserError, match=f"{smallest}$"):
    sampling.plan(grid, below)


@pytest.mark.parametrize(
  ("grid", "ratio", "changes", "named"),
  [
    (GRID, 0.0, {}, "ratio"),
    (GRID, 1.5, {}, "ratio"),
    (GRID, float("nan"), {}, "ratio"),
    ((0, 4, 4), 0.5, {}, "grid"),
    (GRID, 0.5, {"num_combinations": 6}, "num_combinations"),
    (GRID, 0.5, {"num_combinations": 0}, "num_combinations"),
    (GRID, 0.5, {"frame_ratio": 0.0}, "frame_ratio"),
    (GRID, 0.5, {"max_group_prob": 0.5}, "max_group_prob"),
    (GRID, 0.5, {"max_frame_prob": 0.5}, "max_frame_prob"),
    (GRID, 0.5, {"group_size": 0}, "group_size"),
  ],
)
def test_a_plan_that_cannot_work_is_refused(grid, ratio, changes, named):
  with pytest.raises(errors.UserError, match=named) as raised:
    sampling.plan(grid, ratio, config(**changes))
  assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
  ("grid", "expected"),
  [
    ((2, 14, 14), [0.01, 0.02, 0.04, 0.08, 0.12]),
    ((2, 7, 7), [0.02, 0.04, 0.08, 0.12]),
    ((2, 5, 5), [0.04, 0.08, 0.12]),
    ((2, 2, 2), [0.1251]),
  ],
)
def test_ladder_leaves_out_or_raises_rungs_below_the_grid(grid, expected):
  ratios = sampling.allowed_ratios(grid, (0.01, 0.02, 0.04, 0.08, 0.12))
  assert list(ratios) == expected
  kept = [sampling.plan(grid, ratio).num_keep for ratio in ratios]
  assert kept == sorted(set(kept))


def test_ladder_raises_a_rung_when_none_keeps_as_few():
  ratios = sampling.allowed_ratios((2, 5, 5), (0.01, 0.08))
  assert ratios == (0.0201, 0.08)


def test_an_empty_ladder_is_refused():
  with pytest.raises(errors.UserError, match="empty"):
    sampling.allowed_ratios(GRID, ())


# Capped distribution.


def capped_by_a_loop(probs, cap):
  """The rule of METHOD.md 2.1, word by word, in float64."""
  p = np.asarray(probs, np.float64)
  n = len(p)
  if n == 1:
    return np.ones(1)
  cap = min(cap, 0.999)
  p = np.maximum(p, 1 / n**2)
  p = p / p.sum()
  if p.max() <= cap:
    return p
  p = np.maximum(p, 1 / n**2)
  fixed = np.zeros(n, bool)
  while not fixed.all() and np.where(fixed, -1, p).max() > cap:
    fixed[np.argmax(np.where(fixed, -1, p))] = True
    p[~fixed] *= (1 - cap * fixed.sum()) / p[~fixed].sum()
    p[fixed] = cap
  return p


@pytest.mark.parametrize("sharpness", [0.1, 1.0, 4.0, 20.0])
@pytest.mark.parametrize(("n", "cap"), [(2, 1.5), (5, 0.4), (12, 0.1), (7, 1)])
def test_capped_distribution_equals_a_loop(n, cap, sharpness):
  rng = np.random.default_rng([n, int(sharpness * 10)])
  draws = np.exp(sharpness * rng.standard_normal((8, n))).astype(np.float32)
  draws /= draws.sum(axis=-1, keepdims=True)
  numbers = sampling.ProbabilityCap.of(n, cap)
  limited = functools.partial(sampling.capped_distribution, cap=numbers)
  capped = jax.jit(jax.vmap(limited))(draws)
  expected = [capped_by_a_loop(p, cap) for p in draws]
  np.testing.assert_allclose(capped, expected, rtol=1e-5)
  np.testing.assert_allclose(capped.sum(axis=-1), 1.0, rtol=1e-6)
  assert float(capped.max()) <= cap * (1 + 1e-6)


def test_a_tight_cap_gives_the_uniform_distribution():
  probs = jnp.array([0.7, 0.1, 0.1, 0.1])
  capped = sampling.capped_distribution(
    probs, sampling.ProbabilityCap.of(4, 0.25)
  )
  np.testing.assert_allclose(capped, 0.25, rtol=1e-6)


def test_one_entry_has_all_the_mass():
  capped = sampling.capped_distribution(
    jnp.array([0.3]), sampling.ProbabilityCap.of(1, 0.5)
  )
  np.testing.assert_array_equal(capped, [1.0])


def test_a_cap_that_cannot_sum_to_one_is_refused():
  with pytest.raises(ValueError, match="cannot sum"):
    sampling.ProbabilityCap.of(4, 0.2)


# Draws.


def test_forbidden_items_are_never_drawn():
  log_weights = jnp.array([0.0, -jnp.inf, 0.0, -jnp.inf])
  for seed in range(20):
    drawn = sampling.draw_without_replacement(
      jax.random.key(seed), log_weights, num_draws=2
    )
    assert sorted(drawn.tolist()) == [0, 2]


def test_draws_have_the_distribution_of_sequential_draws():
  weights = np.array([0.5, 0.25, 0.15, 0.1])
  num_draws = 20_000
  draw = functools.partial(sampling.draw_without_replacement, num_draws=2)
  drawn = jax.jit(jax.vmap(draw, in_axes=(0, None)))(
    jax.random.split(jax.random.key(3), num_draws), jnp.log(weights)
  )
  pairs = list(itertools.permutations(range(4), 2))
  # P(i then j) = w_i * w_j / (1 - w_i).
  expected = [weights[i] * weights[j] / (1 - weights[i]) for i, j in pairs]
  counts = [
    int((drawn == jnp.array(pair)).all(axis=-1).sum()) for pair in pairs
  ]
  assert sum(counts) == num_draws
  assert stats.chisquare(counts, num_draws * np.array(expected)).pvalue > 1e-3


# Groups of a frame.


FIVE_GROUPS = sampling.plan((1, 6, 6), 0.1)  # Of 8, 7, 7, 7, 7.


def test_groups_hold_every_token_once_and_best_first():
  scores = scores_of(jax.random.key(0), (1, 6, 6)).token
  groups = rank_groups(scores, plan=FIVE_GROUPS)
  valid = np.asarray(groups.weights) > 0
  np.testing.assert_array_equal(valid.sum(axis=-1), [8, 7, 7, 7, 7])
  order = np.asarray(groups.tokens)[valid]
  np.testing.assert_array_equal(order, np.argsort(-gap(scores)))
  np.testing.assert_allclose(groups.weights.sum(axis=-1), 1.0, rtol=1e-6)


def test_underflow_keeps_the_order_and_finite_weights():
  scores = scores_of(jax.random.key(0), (1, 6, 6), scale=5000.0).token
  groups = rank_groups(scores, plan=FIVE_GROUPS)
  valid = np.asarray(groups.weights) > 0
  order = np.asarray(groups.tokens)[valid]
  np.testing.assert_array_equal(order, np.argsort(-gap(scores)))
  assert np.isfinite(groups.probs).all() and np.isfinite(groups.weights).all()
  # Groups without mass are drawn from uniformly.
  np.testing.assert_allclose(groups.weights[-1][valid[-1]], 1 / 7, rtol=1e-6)


# Groups of 4, 2 draws a frame; 1 frame of 4.
MANY = sampling.plan(GRID, 0.125, config(num_combinations=4000))


@pytest.fixture(scope="module")
def many_draws():
  """Plan, scores, and 2 998 token-mode and 999 frame-mode draws."""
  plan = MANY
  assert (plan.group_cap.size, plan.frames_drawn) == (4, 1)
  scores = scores_of(jax.random.key(1), scale=2.0)
  features = features_of(jax.random.key(3))
  return plan, scores, sample(jax.random.key(2), scores, features, plan=plan)


def test_group_and_token_frequencies_match_their_probabilities(many_draws):
  check_frequencies(*many_draws)


def check_frequencies(plan, scores, drawn):
  rows = np.asarray(drawn.index[1 : plan.config.modes.token])
  rows = rows.reshape(-1, 4, 2) - 16 * np.arange(4)[:, None]
  for frame in range(4):
    tokens = slice(16 * frame, 16 * frame + 16)
    groups = rank_groups(np.asarray(scores.token)[tokens], plan=plan)
    group_of = np.empty(16, int)
    group_of[np.asarray(groups.tokens)] = np.arange(4)[:, None]
    drawn_groups = group_of[rows[:, frame]]
    # All of a frame's tokens come from one group.
    np.testing.assert_array_equal(drawn_groups[:, 0], drawn_groups[:, 1])
    counts = np.bincount(drawn_groups[:, 0], minlength=4)
    probs = np.asarray(groups.probs, np.float64)
    expected = probs / probs.sum() * len(rows)
    assert stats.chisquare(counts, expected).pvalue > 1e-3
    # Within a group, unordered pairs: P(i, j) + P(j, i).
    group = int(np.argmax(counts))
    weights = np.asarray(groups.weights[group], np.float64)
    weights /= weights.sum()
    tokens = np.asarray(groups.tokens[group])
    pairs = list(itertools.combinations(range(4), 2))
    expected = np.array(
      [
        weights[i] * weights[j] * (1 / (1 - weights[i]) + 1 / (1 - weights[j]))
        for i, j in pairs
      ]
    )
    seen = rows[drawn_groups[:, 0] == group, frame]
    counts = [
      (seen == np.sort(tokens[list(pair)])).all(axis=-1).sum() for pair in pairs
    ]
    assert sum(counts) == len(seen)
    assert stats.chisquare(counts, expected * len(seen)).pvalue > 1e-3


def test_frame_frequencies_match_their_capped_probabilities(many_draws):
  check_frame_frequencies(*many_draws)


def check_frame_frequencies(plan, scores, drawn):
  del plan
  gaps = gap(scores.frame).astype(np.float64)
  probs = capped_by_a_loop(np.exp(gaps) / np.exp(gaps).sum(), 3 / 4)
  counts = np.asarray(drawn.frame_mask[1:, :4]).sum(axis=0)
  expected = probs / probs.sum() * 999
  assert stats.chisquare(counts, expected).pvalue > 1e-3


# Combinations.


@pytest.mark.parametrize("ratio", [0.05, 0.2, 1.0])
def test_every_combination_holds_exactly_its_tokens_once(ratio):
  plan = plan_at(ratio)
  drawn = sample(jax.random.key(0), *given(), plan=plan)
  assert drawn.index.shape == (8, plan.num_keep)
  assert drawn.index.dtype == jnp.int32
  assert drawn.frame_mask.shape == (2, GRID[0])
  rows = np.asarray(drawn.index)
  assert (np.diff(rows, axis=-1) > 0).all()
  assert rows.min() >= 0 and rows.max() < NUM_TOKENS
  masks = sampling.token_masks(drawn.index, NUM_TOKENS)
  np.testing.assert_array_equal(masks.sum(axis=-1), plan.num_keep)
  # Token mode and content mode spread evenly over frames.
  per_frame = np.asarray(masks).reshape(8, GRID[0], -1).sum(axis=-1)
  even = np.delete(per_frame, [5, 6], axis=0)
  np.testing.assert_array_equal(even, plan.tokens_per_frame)


def test_the_first_combination_is_greedy():
  scores, features = given()
  drawn = sample(jax.random.key(0), scores, features, plan=PLAN)
  best = np.argsort(-gap(scores.token).reshape(4, 16), axis=-1)
  best = np.sort(best[:, : PLAN.tokens_per_frame], axis=-1)
  expected = (best + 16 * np.arange(4)[:, None]).reshape(-1)
  np.testing.assert_array_equal(drawn.index[0], expected)


def test_the_public_cap_on_frames_by_hand():
  # G/4 = 2 copies of T = 4 frames: the cap 3 * 2 / 4 is limited to 0.999, the
  # floor is 1/4: [0.85, 0.25, 0.25, 0.25] / 1.6.
  probs = jnp.array([0.85, 0.05, 0.05, 0.05])
  public = config(num_combinations=8, frame_cap="public")
  plan = sampling.plan((4, 5, 5), 0.2, public)
  np.testing.assert_allclose(
    sampling.capped_distribution(probs, plan.frame_cap),
    np.array([0.85, 0.25, 0.25, 0.25]) / 1.6,
    rtol=1e-6,
  )
  # The cap per frame is 3/4, the floor 1/16: [0.85, 3 * 0.0625] / 1.0375 is
  # above it, and 1/4 is left for the other three.
  plan = sampling.plan((4, 5, 5), 0.2, config(num_combinations=8))
  np.testing.assert_allclose(
    sampling.capped_distribution(probs, plan.frame_cap),
    [0.75, 0.25 / 3, 0.25 / 3, 0.25 / 3],
    rtol=1e-6,
  )
  # As the paper samples: 0.75 and 1/64 at T = 32, against 3/32 and 1/1024.
  for name, cap, floor in (
    ("public", 0.75, 1 / 64),
    ("per_frame", 3 / 32, 1 / 1024),
  ):
    numbers = sampling.plan((32, 14, 14), 0.02, config(frame_cap=name))
    assert (numbers.frame_cap.cap, numbers.frame_cap.floor) == (cap, floor)


def test_frame_mode_draws_whole_frames_and_first_the_top_ones():
  scores, features = given()
  drawn = sample(jax.random.key(0), scores, features, plan=PLAN)
  frame_mask = np.asarray(drawn.frame_mask)
  np.testing.assert_array_equal(frame_mask.sum(axis=-1), 2)
  top = np.sort(np.argsort(-gap(scores.frame))[:2])
  np.testing.assert_array_equal(np.flatnonzero(frame_mask[0]), top)
  peaks = jax.jit(diversity.density_peaks, static_argnums=1)
  rows = np.asarray(drawn.index[PLAN.config.modes.token : -1])
  for row, frames in zip(rows, frame_mask, strict=True):
    # The diversity rule sees the tokens of all drawn frames at once.
    tokens = np.flatnonzero(np.repeat(frames, 16))
    kept = peaks(features[tokens], PLAN.num_keep)
    np.testing.assert_array_equal(row, tokens[kept])


def test_content_mode_is_the_diversity_rule_frame_by_frame():
  scores, features = given()
  drawn = sample(jax.random.key(0), scores, features, plan=PLAN)
  peaks = jax.jit(diversity.density_peaks, static_argnums=1)
  expected = [
    16 * t + peaks(z, PLAN.tokens_per_frame)
    for t, z in enumerate(features.reshape(4, 16, -1))
  ]
  np.testing.assert_array_equal(drawn.index[-1], np.concatenate(expected))


def test_same_key_same_draw_and_other_key_another():
  first = sample(jax.random.key(0), *given(), plan=PLAN).index
  again = sample(jax.random.key(0), *given(), plan=PLAN).index
  other = sample(jax.random.key(1), *given(), plan=PLAN).index
  np.testing.assert_array_equal(first, again)
  assert (np.asarray(first[1:]) != np.asarray(other[1:])).any()


def test_vmap_equals_a_loop():
  rngs = jax.random.split(jax.random.key(0), 3)
  scores = jax.vmap(scores_of)(rngs)
  features = jax.vmap(features_of)(rngs)
  batched = jax.vmap(functools.partial(sample, plan=PLAN))(
    rngs, scores, features
  )
  for i in range(3):
    one = sample(
      rngs[i], jax.tree.map(lambda s, i=i: s[i], scores), features[i], plan=PLAN
    )
    np.testing.assert_array_equal(batched.index[i], one.index)
    np.testing.assert_array_equal(batched.frame_mask[i], one.frame_mask)


def test_token_masks_ignore_the_padding():
  masks = sampling.token_masks(jnp.array([[0, 2, 4], [1, 4, 4]]), 4)
  np.testing.assert_array_equal(masks, [[1, 0, 1, 0], [0, 1, 0, 0]])


# Rungs of a ladder under one program.


def test_each_video_draws_what_its_own_rung_draws_padded():
  plans = [plan_at(0.05), PLAN]
  rngs = jax.random.split(jax.random.key(0), 2)
  scores = jax.vmap(scores_of)(rngs)
  features = jax.vmap(features_of)(rngs)
  most = plans[1].num_keep
  draw = jax.vmap(
    lambda *a: sampling.sample_rung(*a[:3], plans, a[3], num_keep=most)
  )
  rungs = jnp.array([1, 0])
  drawn, num_valid = jax.jit(draw)(rngs, scores, features, rungs)
  assert drawn.index.shape == (2, 8, most)
  for i, plan in enumerate(plans[::-1]):
    alone = sample(
      rngs[i], jax.tree.map(lambda s, i=i: s[i], scores), features[i], plan=plan
    )
    kept = plan.num_keep
    assert int(num_valid[i]) == kept
    np.testing.assert_array_equal(drawn.index[i, :, :kept], alone.index)
    np.testing.assert_array_equal(drawn.index[i, :, kept:], NUM_TOKENS)
    np.testing.assert_array_equal(drawn.frame_mask[i], alone.frame_mask)


def test_the_sampler_lowers_for_tpu_at_full_size():
  plan = sampling.plan((32, 14, 14), 0.02)
  draw = jax.jit(functools.partial(sampling.sample, plan=plan))
  shape = jax.ShapeDtypeStruct
  scores = network.Scores(
    frame=shape((32, 2), jnp.float32), token=shape((6272, 2), jnp.float32)
  )
  features = shape((6272, 3584), jnp.bfloat16)
  rng = jax.eval_shape(lambda: jax.random.key(0))
  traced = draw.trace(rng, scores, features)
  assert traced.lower(lowering_platforms=("tpu",)).as_text()


# Videos of different grids in one program.


BUCKET = token_grid.GridBucket(5, 24, 75)
RATIOS = (0.05, 0.2, 0.5, 1.0)
SHAPE = sampling.largest_shape(BUCKET, RATIOS, CONFIG)
CASES = [
  ((4, 5, 3), 0.2),
  ((3, 4, 6), 0.05),
  ((5, 3, 5), 0.5),
  ((3, 6, 4), 1.0),
  ((1, 4, 5), 0.2),
  ((5, 1, 3), 0.2),
  ((2, 1, 1), 1.0),
]


sample_in_bucket = jax.jit(sampling.sample)


def plan_of(grid, ratio):
  return sampling.plan(grid, ratio, CONFIG)


def in_bucket(grid, ratio):
  placed = token_grid.TokenGrid.of(grid, BUCKET)
  return sampling.plan(placed, ratio, CONFIG, SHAPE)


def inputs(seed):
  """Scores and features of a bucket's size, as for a video that fills it."""
  scores = scores_of(jax.random.key(seed), (5, 3, 5))
  features = features_of(jax.random.key(100 + seed), (5, 3, 5))
  return jax.tree.map(np.array, (scores, features))


def spoil(scores, features, grid, filler):
  """Writes what would win, or spread, into the rows of the padding."""
  num_frames, num_tokens = grid[0], int(np.prod(grid))
  scores.frame[num_frames:] = scores.token[num_tokens:] = [-filler, filler]
  features[num_tokens:] = filler
  return scores, features


@pytest.mark.parametrize("filler", [1e6, np.nan])
def test_one_program_draws_the_exact_counts_of_every_grid(filler):
  compiled = sample_in_bucket._cache_size()
  for seed, (grid, ratio) in enumerate(CASES):
    plan = plan_of(grid, ratio)
    given = spoil(*inputs(seed), grid, filler)
    padded = in_bucket(grid, ratio)
    drawn = sample_in_bucket(jax.random.key(seed), *given, padded)
    assert padded.num_keep == plan.num_keep
    assert drawn.index.shape == (8, SHAPE.num_keep)
    rows = np.asarray(drawn.index[:, : plan.num_keep])
    assert (np.diff(rows, axis=-1) > 0).all()
    assert rows.min() >= 0 and rows.max() < plan.grid.num_tokens
    assert (np.asarray(drawn.index[:, plan.num_keep :]) == 75).all()
    # Token mode and content mode spread evenly over frames.
    even = np.delete(rows, [5, 6], axis=0) // (grid[1] * grid[2])
    for row in even:
      np.testing.assert_array_equal(
        np.bincount(row, minlength=grid[0]), plan.tokens_per_frame
      )
    frame_mask = np.asarray(drawn.frame_mask)
    np.testing.assert_array_equal(frame_mask.sum(axis=-1), plan.frames_drawn)
    assert not frame_mask[:, grid[0] :].any()
  assert sample_in_bucket._cache_size() - compiled <= 1


def test_in_a_bucket_the_rules_without_chance_are_those_of_a_full_grid():
  for seed, (grid, ratio) in enumerate(CASES):
    plan = plan_of(grid, ratio)
    num_frames, area = grid[0], grid[1] * grid[2]
    scores, features = spoil(*inputs(seed), grid, 1e6)
    drawn = sample_in_bucket(
      jax.random.key(seed), scores, features, in_bucket(grid, ratio)
    )
    rows = np.asarray(drawn.index[:, : plan.num_keep])
    features = features[: plan.grid.num_tokens]
    # Greedy, the first of token mode.
    by_gap = gap(scores.token)[: plan.grid.num_tokens].reshape(num_frames, area)
    best = np.argsort(-by_gap, axis=-1)[:, : plan.tokens_per_frame]
    best = np.sort(best, axis=-1) + area * np.arange(num_frames)[:, None]
    np.testing.assert_array_equal(rows[0], best.reshape(-1))
    # The top frames, the first of frame mode, and the rule inside of frames.
    frame_mask = np.asarray(drawn.frame_mask)[:, :num_frames]
    top = np.argsort(-gap(scores.frame)[:num_frames])[: plan.frames_drawn]
    np.testing.assert_array_equal(np.flatnonzero(frame_mask[0]), np.sort(top))
    for row, frames in zip(rows[5:7], frame_mask, strict=True):
      tokens = np.flatnonzero(np.repeat(frames, area))
      kept = diversity_test.peaks_by_a_loop(features[tokens], plan.num_keep)
      np.testing.assert_array_equal(row, tokens[kept])
    # Content, the last.
    expected = [
      area * t + diversity_test.peaks_by_a_loop(z, plan.tokens_per_frame)
      for t, z in enumerate(features.reshape(num_frames, area, -1))
    ]
    np.testing.assert_array_equal(rows[-1], np.concatenate(expected))


def test_groups_in_a_bucket_are_those_of_a_full_grid():
  rank = jax.jit(lambda scores, plan: sampling.rank_groups(scores, plan=plan))
  for seed, (grid, ratio) in enumerate(CASES):
    plan = plan_of(grid, ratio)
    area = grid[1] * grid[2]
    scores = 3 * np.random.default_rng(seed).standard_normal((24, 2))
    scores = scores.astype(np.float32)
    scores[area:] = np.nan
    groups = rank(scores, in_bucket(grid, ratio))
    alone = rank_groups(scores[:area], plan=plan)
    n, longest = alone.tokens.shape
    np.testing.assert_array_equal(groups.tokens[:n, :longest], alone.tokens)
    # Sums over other lengths may differ by a rounding.
    close = functools.partial(np.testing.assert_allclose, rtol=1e-6)
    close(groups.probs[:n], alone.probs)
    close(groups.weights[:n, :longest], alone.weights)
    assert not np.any(groups.probs[n:])
    assert not np.any(groups.weights[n:])
    assert not np.any(groups.weights[:, longest:])


@pytest.mark.parametrize("sharpness", [0.1, 1.0, 4.0, 20.0])
def test_a_padded_capped_distribution_equals_a_loop(sharpness):
  capped = jax.jit(sampling.capped_distribution)
  rng = np.random.default_rng(int(10 * sharpness))
  for size, cap in [(1, 0.3), (2, 1.5), (5, 0.4), (5, 0.2), (12, 0.1), (7, 1)]:
    probs = np.zeros(12, np.float32)
    probs[:size] = np.exp(sharpness * rng.standard_normal(size))
    probs /= probs.sum()
    numbers = sampling.ProbabilityCap.of(size, cap, room=12)
    found = np.asarray(capped(probs, numbers))
    expected = capped_by_a_loop(probs[:size], cap)
    np.testing.assert_allclose(found[:size], expected, rtol=1e-5)
    assert not found[size:].any()


@pytest.fixture(scope="module")
def many_draws_in_a_bucket():
  """The draws of `many_draws`, of a grid that leaves padding everywhere."""
  plan = MANY
  bucket = token_grid.GridBucket(5, 20, 75)
  scores = scores_of(jax.random.key(1), scale=2.0)
  spoiled = network.Scores(
    frame=jnp.full((5, 2), jnp.nan).at[:4].set(scores.frame),
    token=jnp.full((75, 2), jnp.nan).at[:64].set(scores.token),
  )
  features = (
    jnp.zeros((75, 2)).at[:64].set(features_of(jax.random.key(3), width=2))
  )
  # Larger sizes than this plan needs: other ratios share the program.
  shape = sampling.largest_shape(bucket, (0.125, 0.3), plan.config)
  grid = token_grid.TokenGrid.of(GRID, bucket)
  padded = sampling.plan(grid, 0.125, plan.config, shape)
  drawn = sample_in_bucket(jax.random.key(2), spoiled, features, padded)
  assert int(padded.num_keep) == 8 < shape.num_keep
  return plan, scores, drawn._replace(index=drawn.index[:, :8])


def test_frequencies_in_a_bucket_match_the_full_grids_probabilities(
  many_draws_in_a_bucket,
):
  check_frequencies(*many_draws_in_a_bucket)


def test_frame_frequencies_in_a_bucket_match_their_capped_probabilities(
  many_draws_in_a_bucket,
):
  check_frame_frequencies(*many_draws_in_a_bucket)


def test_rungs_and_videos_stack_and_each_draws_as_alone():
  def stack(trees):
    return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)

  grids = [(4, 5, 3), (3, 4, 6)]
  ladders = stack(
    [
      stack([in_bucket(grid, ratio) for ratio in (0.05, 0.2, 0.5)])
      for grid in grids
    ]
  )
  given = [spoil(*inputs(seed), grid, 9.0) for seed, grid in enumerate(grids)]
  rngs = jax.random.split(jax.random.key(0), 2)

  def draw(rng, given, ladder, rung):
    most = SHAPE.num_keep
    return sampling.sample_rung(rng, *given, ladder, rung, num_keep=most)

  rungs = np.array([2, 1])
  drawn, num_valid = jax.jit(jax.vmap(draw))(rngs, stack(given), ladders, rungs)
  for i, (grid, ratio) in enumerate(zip(grids, (0.5, 0.2), strict=True)):
    alone = sample_in_bucket(rngs[i], *given[i], in_bucket(grid, ratio))
    assert int(num_valid[i]) == plan_of(grid, ratio).num_keep
    np.testing.assert_array_equal(drawn.index[i], alone.index)
    np.testing.assert_array_equal(drawn.frame_mask[i], alone.frame_mask)


def test_the_largest_shape_holds_every_rung_of_every_grid():
  rng = np.random.default_rng(0)
  bucket = token_grid.GridBucket(6, 30, 90)
  ratios = (0.01, 0.02, 0.04, 0.12)
  shape = sampling.largest_shape(bucket, ratios)
  held = 0
  while held < 60:
    grid = tuple(int(side) for side in rng.integers(1, [7, 7, 31]))
    if bucket.holds(grid):
      placed = token_grid.TokenGrid.of(grid, bucket)
      for ratio in sampling.allowed_ratios(grid, ratios):
        plan = sampling.plan(placed, ratio, shape=shape)
        assert plan.num_keep == sampling.plan(grid, ratio).num_keep
      held += 1
  # And they are no larger than needed: a bucket that is one grid's own.
  alone = sampling.largest_shape(token_grid.GridBucket(1, 1), (1.0,), CONFIG)
  assert alone == sampling.PlanShape(1, 1, 1, 1, 1, 1)


def test_a_plan_that_does_not_fit_is_refused():
  with pytest.raises(errors.UserError, match="no bucket holds .* 6 x 2 x 2"):
    in_bucket((6, 2, 2), 0.5)
  small = sampling.largest_shape(BUCKET, (0.05,), CONFIG)
  grid = token_grid.TokenGrid.of((3, 4, 6), BUCKET)
  with pytest.raises(errors.UserError, match="ratio=1.0 .*largest_shape") as e:
    sampling.plan(grid, 1.0, CONFIG, small)
  assert "\n" not in str(e.value)
  with pytest.raises(errors.UserError, match="empty"):
    sampling.largest_shape(BUCKET, (), CONFIG)


def test_the_sampler_in_a_bucket_lowers_for_tpu_at_full_size():
  bucket = token_grid.GridBucket(64, 256)
  plan = sampling.plan(token_grid.TokenGrid.of((60, 15, 17), bucket), 0.02)
  shape = jax.ShapeDtypeStruct
  scores = network.Scores(
    frame=shape((64, 2), jnp.float32), token=shape((64 * 256, 2), jnp.float32)
  )
  features = shape((64 * 256, 2048), jnp.bfloat16)
  rng = jax.eval_shape(lambda: jax.random.key(0))
  traced = jax.jit(sampling.sample).trace(rng, scores, features, plan)
  assert traced.lower(lowering_platforms=("tpu",)).as_text()
