"""Ranks, recall and gains, by hand and against SciPy."""

import jax
import numpy as np
import pytest
from scipy import special

from cacovid_jax.related import retrieval


def test_ranks_count_equal_scores_as_ahead():
  scores = np.array([[3.0, 1.0, 2.0], [5.0, 5.0, 5.0], [0.0, 9.0, 1.0]])
  assert retrieval.ranks(scores).tolist() == [1, 3, 2]
  found = retrieval.measures(scores)
  assert found["R@1"] == pytest.approx(1 / 3)
  assert found["R@5"] == found["R@10"] == 1
  assert (found["median rank"], found["mean rank"]) == (2, 2)


def test_a_score_that_is_no_number_finds_nothing():
  assert retrieval.ranks(np.full((2, 4), np.nan)).tolist() == [4, 4]


def test_both_ways_ask_along_rows_and_columns():
  scores = np.array([[3.0, 4.0], [1.0, 2.0]])
  assert retrieval.both_ways(scores) == {"t2v R@1": 0.5, "v2t R@1": 0.5}
  with pytest.raises(ValueError, match="3 queries but 2 items"):
    retrieval.ranks(np.ones((3, 2)))


def test_contrast_is_the_cross_entropy_of_the_diagonal():
  logits = np.random.default_rng(0).normal(size=(6, 6))
  expected = (special.logsumexp(logits, axis=1) - np.diag(logits)).mean()
  assert float(retrieval.contrast(logits)) == pytest.approx(expected, rel=1e-5)


def test_the_gain_is_paired():
  rng = np.random.default_rng(1)
  scores = rng.normal(size=(50, 50))
  better = scores + 2 * np.eye(50)
  gain = retrieval.gain(better, scores)
  assert gain.low > 0 and gain.low <= gain.mean <= gain.high
  assert retrieval.gain(scores, scores) == (0, 0, 0)


def test_pairs_are_drawn_once_each_and_stay_pairs():
  pairs = np.arange(6), {"x": 10 * np.arange(6)}
  for batch, expected in ((4, 4), (9, 6)):
    a, b = retrieval.drawn(jax.random.key(0), pairs, batch)
    assert len(set(a.tolist())) == len(a) == expected
    np.testing.assert_array_equal(b["x"], 10 * a)
