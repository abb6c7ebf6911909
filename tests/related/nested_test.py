"""The linear code against scikit-learn, and the clips of squares."""

import numpy as np
import pytest
from sklearn import decomposition, linear_model

from cacovid_jax import errors
from cacovid_jax.related import nested


def test_errors_are_those_of_principal_components():
  x = nested.blocks(nested.squares(0, 60)[0])
  code = nested.LinearCode.fit(x)
  known = decomposition.PCA(64, svd_solver="full").fit(x)
  found = code.errors(x)
  for level in (0, 1, 5, 16):
    axes = known.components_[: level * nested.STEP]
    held = (x - known.mean_) @ axes.T @ axes
    expected = np.square(x - known.mean_ - held).sum(axis=1)
    np.testing.assert_allclose(found[:, level], expected, atol=2e-3)
  assert (np.diff(found, axis=1) <= 1e-9).all()


def test_ridge_is_that_of_scikit_learn():
  rng = np.random.default_rng(0)
  x, y = rng.normal(size=(50, 5)), rng.normal(size=(50, 3))
  x = x / np.abs(x).max(axis=0)  # The scale that the penalty is on.
  known = linear_model.Ridge(0.5, fit_intercept=False).fit(x, y)
  np.testing.assert_allclose(nested.ridge(x, y, 0.5), known.coef_.T, rtol=1e-6)


def test_clips_hold_more_with_more_squares():
  clips, counts = nested.squares(1, 200)
  assert clips.shape == (200, 8, 16, 16) and clips.min() == 0
  assert 0.4 <= clips.max() <= 1 and set(counts) == set(range(1, 7))
  lit = (clips[:, 0] > 0).mean(axis=(1, 2))
  assert lit[counts >= 5].mean() > 2 * lit[counts == 1].mean()
  assert nested.features(nested.blocks(clips)).shape == (800, 17)


def test_too_few_clips_for_the_code_are_one_line():
  with pytest.raises(errors.UserError, match="32 blocks .* more than 16 clips"):
    nested.LinearCode.fit(nested.blocks(nested.squares(0, 8)[0]))


def test_arms_are_told_against_the_first_by_hand():
  curves = np.array([[9.0, 4.0, 1.0], [9.0, 6.0, 0.0]])
  found = nested.arms(curves, {"even": [1, 1], "all": [2, 2]}, "gain")
  assert found["even"] == {"tokens": 4.0, "squared error": 5.0, "gain": 0.0}
  assert found["all"]["squared error"] == 0.5
  assert found["all"]["gain"] == pytest.approx(10)


def test_a_known_code_is_asked_about_other_clips():
  code, known, asked, counts = nested.known_code(3, 20, 5)
  assert (len(known), len(asked), len(counts)) == (80, 20, 20)
  np.testing.assert_array_equal(counts[::4], nested.squares(3, 5)[1])
  np.testing.assert_array_equal(code.mean, known.mean(axis=0))
  assert not (known[:20] == asked).all(axis=1).any()
