"""Facility location against brute force and plain greedy."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cacovid_jax import compressors, errors
from cacovid_jax.compressors import floc
from cacovid_jax.compressors.math import facility_location
from tests.compressors import given, quick, selections

GRID, NUM_VIDEO = selections.GRID, selections.NUM_VIDEO


def covers(features, floor=0.0, windows=None, weights=None):
  """Returns float64[N, N]: what each token (row) covers of each (column)."""
  x = selections.unit(features)
  gain = np.maximum(x @ x.T, floor) - floor
  if windows is not None:
    gain = gain * (windows[:, None] == windows[None, :])
  return gain if weights is None else gain * np.asarray(weights, np.float64)


def coverage(gain, chosen):
  """f_c of the tokens chosen."""
  return gain[list(chosen)].max(axis=0).sum()


def plain_greedy(gain, num_keep):
  """Every gain computed anew for every pick; the first among equals."""
  covered, picked = np.zeros(gain.shape[1]), []
  for _ in range(num_keep):
    gains = np.maximum(gain - covered, 0).sum(axis=1)
    # float64 sums of equal gains differ in their last places.
    gains = np.round(gains, 9)
    gains[picked] = -1
    picked.append(int(np.argmax(gains)))
    covered = np.maximum(covered, gain[picked[-1]])
  return picked


def greedy(num_keep, grid=GRID, **options):
  return quick.jit(
    functools.partial(
      facility_location.greedy, num_keep=num_keep, grid=grid, **options
    )
  )


def window_of(windows, grid=GRID):
  """Frames split as evenly as can be, the first windows longer."""
  share, rest = divmod(grid[0], windows)
  lengths = [share + (w < rest) for w in range(windows)]
  return np.repeat(np.arange(windows), lengths).repeat(grid[1] * grid[2])


def test_200_instances_reach_the_bound_of_the_best_subset():
  pick = quick.jit(
    jax.vmap(lambda x: facility_location.greedy(x, 3, grid=(1, 1, 10), block=4))
  )
  rng = np.random.default_rng(0)
  features = rng.normal(size=(200, 10, 4)).astype(np.float32)
  picks = np.asarray(pick(jnp.asarray(features)))
  worst = 1.0
  for x, picked in zip(features, picks, strict=True):
    gain = covers(x)
    best = max(
      coverage(gain, chosen) for chosen in itertools.combinations(range(10), 3)
    )
    worst = min(worst, coverage(gain, picked) / best)
  assert 1 - 1 / math.e <= worst < 1.0


@pytest.mark.parametrize(
  "options",
  [{}, {"block": 1}, {"block": 7, "windows": 3}, {"floor": -1.0, "block": 5}],
  ids=str,
)
def test_lazy_picks_are_those_of_plain_greedy(options):
  pick = greedy(11, **options)
  windows = window_of(options.get("windows", 1))
  for seed in range(10):
    for kind in ["random", "scenes"]:
      features = selections.video(kind, seed)
      gain = covers(features, options.get("floor", 0.0), windows)
      np.testing.assert_array_equal(pick(features), plain_greedy(gain, 11))


@pytest.mark.parametrize("windows", [1, 2])
def test_similarities_need_not_be_held(windows):
  pick = greedy(11, similarities="blocks", windows=windows, block=4)
  for seed in range(10):
    gain = covers(selections.video("scenes", seed), 0.0, window_of(windows))
    covered = np.zeros(NUM_VIDEO)
    picked = np.asarray(pick(selections.video("scenes", seed))).tolist()
    assert len(set(picked)) == 11
    for token in picked:
      gains = np.maximum(gain - covered, 0).sum(axis=1)
      # Two tokens that cover each other gain alike, but for the rounding.
      assert gains[token] >= gains.max() - 1e-5
      covered = np.maximum(covered, gain[token])


@pytest.mark.parametrize("block", [1, 3, 8, 512])
def test_ties_go_to_the_first_token_whatever_the_block(block):
  # Tokens along few axes: gains are small whole numbers, nearly all equal.
  rng = np.random.default_rng(0)
  pick = greedy(25, block=block)
  for _ in range(5):
    features = np.eye(8, dtype=np.float32)[rng.integers(6, size=NUM_VIDEO)]
    np.testing.assert_array_equal(
      pick(jnp.asarray(features)), plain_greedy(covers(features), 25)
    )


def test_duplicates_fill_the_budget_in_order():
  features = selections.video("identical_frames")
  picked = np.asarray(greedy(9)(features))
  assert set(picked[:6] % 6) == set(range(6))
  np.testing.assert_array_equal(
    picked[6:], [i for i in range(NUM_VIDEO) if i not in picked[:6]][:3]
  )
  # Nothing of the coverage is lost.
  gain = covers(features)
  assert coverage(gain, picked) == pytest.approx(NUM_VIDEO, rel=1e-6)


def test_gains_fall_and_coverage_grows():
  rng = np.random.default_rng(0)
  features = selections.video("random", 3)
  gain = covers(features)
  picked = np.asarray(greedy(20)(features))
  reached = [coverage(gain, picked[: k + 1]) for k in range(20)]
  steps = np.diff([0.0, *reached])
  assert (steps >= -1e-9).all() and (np.diff(steps) <= 1e-5).all()
  # Of any chain of subsets, too: that is what the bounds rest on.
  for _ in range(20):
    small, large, token = np.split(rng.permutation(NUM_VIDEO)[:12], [4, 11])
    large = [*small, *large]
    alone = coverage(gain, [*small, *token]) - coverage(gain, small)
    later = coverage(gain, [*large, *token]) - coverage(gain, large)
    assert alone >= later - 1e-9 and later >= -1e-9


def test_every_planted_cluster_gets_one_pick():
  rng = np.random.default_rng(1)
  pick = greedy(5)
  for _ in range(5):
    centres = 3 * np.eye(8)[:5]
    labels = rng.permutation(np.repeat(np.arange(5), 6))
    features = centres[labels] + 0.2 * rng.normal(size=(NUM_VIDEO, 8))
    picked = pick(jnp.asarray(features, jnp.float32))
    assert set(labels[np.asarray(picked)]) == set(range(5))


def test_coverage_beats_random_even_and_medoid_choices():
  rng = np.random.default_rng(2)
  pick = greedy(6)
  for seed in range(5):
    features = selections.video("scenes", seed)
    gain, x = covers(features), selections.unit(features)
    ours = coverage(gain, np.asarray(pick(features)))
    for _ in range(20):
      assert ours > coverage(gain, rng.permutation(NUM_VIDEO)[:6])
    assert ours > coverage(gain, np.linspace(0, 29, 6).round().astype(int))
    # Medoids of k-means from random seeds; as good only by luck.
    centres = x[rng.permutation(NUM_VIDEO)[:6]]
    for _ in range(10):
      labels = np.argmax(x @ centres.T, axis=1)
      centres = np.stack(
        [
          x[labels == k].mean(axis=0) if (labels == k).any() else centres[k]
          for k in range(6)
        ]
      )
    medoids = np.argmax(x @ centres.T, axis=0)
    assert ours >= coverage(gain, medoids) - 1e-6


def test_question_weights_move_the_picks():
  features = selections.video("random", 4)
  text = jnp.zeros([4, 8]).at[:2].set(features[17])
  weights = floc.question_weights(features, text, 0.1)
  cosines = selections.unit(features) @ selections.unit(features[17])
  expected = np.exp(cosines / 0.1)
  expected *= NUM_VIDEO / expected.sum()
  np.testing.assert_allclose(weights, expected, rtol=1e-4)
  picked = greedy(5)(features, weights=weights)
  np.testing.assert_array_equal(
    picked, plain_greedy(covers(features, weights=expected), 5)
  )
  assert int(picked[0]) == 17
  method = compressors.get("floc", question_temperature=0.1)
  assert method.requires == {"text"} and method.sees_question
  assert not compressors.get("floc").sees_question
  out = quick.jit(
    lambda x, text: given.compress(method, x, grid=GRID, num_keep=5, text=text)
  )(features, text)
  np.testing.assert_array_equal(out.index, np.sort(picked))


@pytest.mark.parametrize("num_keep", [1, 11, 29])
@pytest.mark.parametrize("kind", selections.KINDS)
def test_selection_of_any_video(kind, num_keep):
  features = selections.video(kind)
  out = compressed(num_keep)(features)
  selections.check(out, NUM_VIDEO, num_keep)
  index = np.asarray(out.index)
  np.testing.assert_array_equal(out.features, np.asarray(features)[index])
  assert np.asarray(out.mass).sum() == NUM_VIDEO


@functools.cache
def compressed(num_keep, grid=GRID, **options):
  method = compressors.get("floc", **options)
  return quick.jit(
    lambda x: given.compress(method, x, grid=grid, num_keep=num_keep)
  )


def test_tokens_are_assigned_to_the_pick_they_resemble_most():
  features = selections.video("random", 6)
  out = compressed(7)(features)
  index = np.asarray(out.index)
  x = selections.unit(features)
  expected = np.argmax(x @ x[index].T, axis=1)
  np.testing.assert_array_equal(out.assign, expected)
  merged = compressed(7, merge="nearest")(features)
  np.testing.assert_array_equal(merged.assign, out.assign)
  for k in range(7):
    np.testing.assert_allclose(
      merged.features[k],
      np.asarray(features)[expected == k].mean(axis=0),
      atol=1e-6,
    )


def test_one_frame_and_bfloat16():
  features = selections.video("one_zero", 1, (1, 3, 4)).astype(jnp.bfloat16)
  out = compressed(5, (1, 3, 4))(features)
  selections.check(out, 12, 5)
  assert out.features.dtype == jnp.bfloat16
  np.testing.assert_array_equal(
    out.index, np.sort(plain_greedy(covers(features.astype(jnp.float32)), 5))
  )


def test_a_batch_equals_single_videos_in_one_program():
  selections.check_batch_and_compilations(compressors.get("floc", block=4), 11)


def test_gains_fit_into_32_bits():
  for num_video in [2, 30, 6272, 100_000]:
    for floor in [0.0, -1.0, 0.9]:
      scale = facility_location._scale(num_video, floor)
      largest = num_video * ((1 - floor) * scale + 0.5)
      assert largest < 2**31
      assert largest > 2**29 or scale == 2**20


@pytest.mark.parametrize(
  "options,said",
  [
    ({"windows": 6}, "1 to 5, the number of frames"),
    ({"windows": 0}, "1 to 5"),
    ({"block": 0}, "at least 1"),
    ({"floor": 1.0}, r"outside \[-1, 1\)"),
    ({"similarities": "all"}, "'matrix' or"),
    ({"merge": "mean"}, "'none' or 'nearest'"),
    ({"question_temperature": 0.0}, "above 0"),
  ],
)
def test_bad_options_are_one_line(options, said):
  with pytest.raises(errors.UserError, match=said) as caught:
    given.compress(
      compressors.get("floc", **options),
      selections.video("random"),
      grid=GRID,
      num_keep=3,
      text=jnp.ones([2, 8]),
    )
  assert "\n" not in str(caught.value)


def test_weights_without_a_question_are_refused():
  with pytest.raises(ValueError, match="floc needs text"):
    given.compress(
      compressors.get("floc", question_temperature=0.1),
      selections.video("random"),
      grid=GRID,
      num_keep=3,
      aux=given.Aux(),
    )


def test_it_can_be_made_for_a_tpu():
  selections.check_lowers_for_tpu(compressors.get("floc"), 11)
