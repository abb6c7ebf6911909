"""Tests of evals.statistics against exact small cases."""

import functools
import itertools
import math

import numpy as np
import pytest

from cacovid_jax.evals import statistics


def accuracy(values, clips, **options):
  return statistics.Sample(clips, **options).accuracy(values)


def draws_of(values, clips, **options):
  return statistics.Sample(clips, **options).draws(values)


def difference(values, reference, clips, **options):
  return statistics.Sample(clips, **options).difference(values, reference)


def share(values, reference, clips, **options):
  return statistics.Sample(clips, **options).share(values, reference)


def test_mean_is_the_plain_mean_over_questions():
  estimate = accuracy([1, 0, 1, 1], ["a", "a", "b", "c"])
  assert estimate.mean == 0.75


def test_interval_matches_every_resample_of_three_clips():
  # Three clips give 27 equally likely ordered resamples; enumerate them.
  correct = {"a": [1, 1], "b": [0], "c": [1, 0, 0]}
  values, clips = [], []
  for clip, answers in correct.items():
    values += answers
    clips += [clip] * len(answers)
  exact = []
  for drawn in itertools.product("abc", repeat=3):
    answers = [x for clip in drawn for x in correct[clip]]
    exact.append(np.mean(answers))
  low, high = np.quantile(np.repeat(exact, 1000), [0.025, 0.975])
  estimate = accuracy(values, clips)
  # The extremes (all "b": 0; all "a": 1) have probability 1/27 each.
  assert (low, high) == (0.0, 1.0)
  assert (estimate.low, estimate.high) == (0.0, 1.0)


def test_replicates_follow_the_exact_distribution():
  draws = draws_of([1, 0], ["a", "b"], replicates=20_000, seed=3)
  shares = [np.mean(draws == x) for x in (0.0, 0.5, 1.0)]
  np.testing.assert_allclose(shares, [0.25, 0.5, 0.25], atol=0.015)


def test_equal_answers_within_clips_widen_the_interval():
  rng = np.random.default_rng(0)
  per_clip = (rng.random(100) < 0.7).astype(float)
  values = np.repeat(per_clip, 4)
  clustered = accuracy(values, np.repeat(np.arange(100), 4))
  naive = accuracy(values, np.arange(400))
  widening = (clustered.high - clustered.low) / (naive.high - naive.low)
  np.testing.assert_allclose(widening, 2.0, rtol=0.1)  # sqrt(4)


def test_interval_covers_the_truth_about_95_times_in_100():
  rng = np.random.default_rng(1)
  hits, trials = 0, 300
  clips = np.repeat(np.arange(60), 3)
  for trial in range(trials):
    difficulty = rng.beta(4, 2, size=60)  # mean 2/3
    values = rng.random(180) < np.repeat(difficulty, 3)
    estimate = accuracy(values, clips, replicates=400, seed=trial)
    hits += estimate.low <= 2 / 3 <= estimate.high
  assert 0.90 <= hits / trials <= 0.985


def test_paired_difference_is_narrower_than_two_intervals():
  rng = np.random.default_rng(2)
  difficulty = rng.random(200)
  noise = rng.random(200)
  first, second = noise < difficulty, noise < difficulty - 0.1
  clips = np.arange(200)
  paired = difference(second, first, clips)
  np.testing.assert_allclose(
    paired.mean, np.mean(second) - np.mean(first.astype(float))
  )
  assert paired.high < 0
  alone = accuracy(first, clips)
  assert paired.high - paired.low < alone.high - alone.low


def test_a_method_against_itself_differs_by_exactly_nothing():
  values = [1, 0, 0, 1, 1]
  paired = difference(values, values, list("abcde"))
  assert (paired.mean, paired.low, paired.high) == (0.0, 0.0, 0.0)


def test_share_of_reference():
  estimate = share([1, 0, 1, 0], [1, 1, 1, 1], list("abcd"))
  assert estimate.mean == 0.5
  assert 0.0 <= estimate.low <= 0.5 <= estimate.high <= 1.0
  assert share([1, 0], [0, 0], ["a", "b"]) is None


def test_same_arguments_give_the_same_numbers():
  values, clips = np.arange(50) % 3 == 0, np.arange(50) // 2
  estimate = functools.partial(accuracy, values, clips, replicates=101)
  first = estimate(seed=5)
  statistics._weights.cache_clear()
  assert estimate(seed=5) == first
  assert len({estimate(seed=seed) for seed in range(5)}) > 1


def test_one_clip_has_no_spread():
  estimate = accuracy([1, 0, 1], ["a"] * 3)
  assert estimate.low == estimate.mean == estimate.high


def test_empty_and_mismatched_input_is_refused():
  with pytest.raises(ValueError, match="Q > 0"):
    accuracy([], [])
  with pytest.raises(ValueError, match="clips"):
    accuracy([1.0], ["a", "b"])


@pytest.mark.parametrize(
  "total,special,drawn", [(16, 1, 2), (16, 3, 2), (5, 5, 1), (5, 0, 3)]
)
def test_chance_overlap_is_hypergeometric(total, special, drawn):
  expected = 1 - math.comb(total - special, drawn) / math.comb(total, drawn)
  np.testing.assert_allclose(
    statistics.overlap_by_chance(total, special, drawn), expected, atol=1e-12
  )


def _macro_draws(values, clips, strata, replicates, seed):
  """A loop over replicates, clips and categories; draws as the module's."""
  names = sorted(set(clips))
  weights, _ = statistics._weights(tuple(clips), replicates, seed)
  draws = []
  kinds, kinds_of = strata["names"], strata["categories"]
  for row in weights:
    found = {name: [] for name in kinds}
    for value, clip, category in zip(values, clips, kinds_of, strict=True):
      found[category] += [value] * int(row[names.index(clip)])
    means = [np.mean(answers) for answers in found.values() if answers]
    absent = len(set(kinds) - set(kinds_of))
    draws.append(np.mean(means) * (1 - absent / len(kinds)))
  return np.array(draws)


def test_a_macro_mean_and_its_interval_match_a_loop():
  values = [1, 0, 1, 1, 0, 1, 0]
  clips = ["a", "a", "b", "c", "c", "d", "d"]
  # Of "w" there are no questions: it counts 0.
  strata = dict(categories=list("xyxzxyx"), names=list("wxyz"))
  sample = statistics.Sample(clips, **strata)
  # x: 1, 1, 0, 0; y: 0, 1; z: 1.
  assert sample.mean(values) == (0 + 1 / 2 + 1 / 2 + 1) / 4
  options = dict(replicates=400, seed=5)
  estimate = accuracy(values, clips, **strata, **options)
  draws = _macro_draws(values, clips, strata, **options)
  assert estimate.mean == 0.5
  np.testing.assert_allclose(
    (estimate.low, estimate.high), np.quantile(draws, [0.025, 0.975])
  )
  reference = [1, 1, 1, 0, 0, 1, 1]
  apart = difference(values, reference, clips, **strata, **options)
  # x: 0, 0, 0, -1; y: -1, 0; z: 1.
  assert apart.mean == (0 - 1 / 4 - 1 / 2 + 1) / 4
  draws = _macro_draws(np.subtract(values, reference), clips, strata, **options)
  np.testing.assert_allclose(
    (apart.low, apart.high), np.quantile(draws, [0.025, 0.975])
  )
  kept = share(values, reference, clips, **strata, **options)
  # The reference: x 3/4, y 1, z 0.
  np.testing.assert_allclose(kept.mean, 2 / (3 / 4 + 1))
  bottom = _macro_draws(reference, clips, strata, **options)
  usable = bottom > 0
  draws = _macro_draws(values, clips, strata, **options)[usable]
  np.testing.assert_allclose(
    (kept.low, kept.high), np.quantile(draws / bottom[usable], [0.025, 0.975])
  )


def test_a_category_that_is_not_listed_is_refused():
  with pytest.raises(ValueError, match="'q'"):
    statistics.Sample("ab", ("x", "q"), ("x",))
