"""The law: its published table, planted laws, the planner against a grid."""

import numpy as np
import pytest
from scipy import optimize

from cacovid_jax import errors
from cacovid_jax.related import law as law_lib


@pytest.mark.parametrize(
  ("text_tokens", "expected", "rmse"),
  [
    (0, (0.5908, 0.07094, 0.01510), 0.00368),
    (50, (0.6590, 0.07096, 0.03380), 0.00776),
  ],
)
def test_the_published_scores_give_the_known_fit(text_tokens, expected, rmse):
  law = law_lib.fit(law_lib.published(text_tokens))
  found = (law.ab, law.alpha, law.beta)
  np.testing.assert_allclose(found, expected, rtol=2e-3)
  assert law.rmse == pytest.approx(rmse, abs=2e-5)


def test_the_fit_is_that_of_scipy():
  sweep = law_lib.published()

  def residual(x):
    power = sweep.parameters ** -x[1] * sweep.tokens ** -x[2]
    return x[0] * power - sweep.error

  found = optimize.least_squares(residual, [1, 0.1, 0.1], xtol=1e-14)
  law = law_lib.fit(sweep)
  np.testing.assert_allclose((law.ab, law.alpha, law.beta), found.x, rtol=1e-5)
  variance = 2 * found.cost / (len(sweep.error) - 3)
  covariance = variance * np.linalg.inv(found.jac.T @ found.jac)
  for at, name in enumerate(("AB", "alpha", "beta")):
    own = law.standard_error(name)
    assert own == pytest.approx(covariance[at, at] ** 0.5, rel=1e-3)


def test_what_the_published_scores_cannot_tell_has_no_standard_error():
  law = law_lib.fit(law_lib.published(), with_floor=True)
  assert law.rmse == pytest.approx(0.00348, abs=2e-5)
  assert law.floor == pytest.approx(-0.2)
  with pytest.raises(errors.UserError, match="D is not identified: every"):
    law.standard_error("D")
  with pytest.raises(errors.UserError, match="only the product AB"):
    law.standard_error("A")
  with pytest.raises(errors.UserError, match="no fitted parameter 'gamma'"):
    law.standard_error("gamma")


def planted(seed, ab=0.6, alpha=0.3, beta=0.2, floor=0.0, noise=0.003):
  sizes, tokens = np.meshgrid([0.3, 1, 3, 10, 30], [1, 4, 16, 49, 196, 784])
  error = ab * sizes**-alpha * tokens**-beta + floor
  error = error + noise * np.random.default_rng(seed).normal(size=error.shape)
  return law_lib.Sweep.of(sizes, tokens, error)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_planted_law_is_found(seed):
  law = law_lib.fit(planted(seed, alpha=0.071, beta=0.05))
  found = (law.ab, law.alpha, law.beta)
  np.testing.assert_allclose(found, (0.6, 0.071, 0.05), rtol=0.1)
  for name, own, true in zip(
    ("AB", "alpha", "beta"), found, (0.6, 0.071, 0.05), strict=True
  ):
    assert abs(own - true) < 4 * law.standard_error(name)


def test_a_floor_that_the_sweep_reaches_has_a_standard_error():
  law = law_lib.fit(planted(0, floor=0.1), with_floor=True)
  low, high = law.floor_range
  assert law.floor == pytest.approx(0.1, abs=0.02) and low < 0.1 < high
  assert law.standard_error("D") < 0.01


def test_a_left_out_size_is_predicted():
  assert max(law_lib.left_out(law_lib.published()).values()) < 0.02
  found = law_lib.left_out(planted(3, alpha=0.07, beta=0.02))
  assert sorted(found) == [0.3, 1, 3, 10, 30] and max(found.values()) < 0.02


@pytest.mark.parametrize(
  ("text_tokens", "expected"), [(0, 1), (10, 3), (50, 14), (200, 54)]
)
def test_the_optimum_is_that_of_a_grid(text_tokens, expected):
  law = law_lib.fit(law_lib.published())
  tokens = np.arange(1, 577)
  # The size that a budget leaves to each number of tokens.
  sizes = 1e3 / (text_tokens + tokens)
  grid = int(tokens[np.argmin(law(sizes, tokens))])
  assert law_lib.best_tokens(law, text_tokens, 576) == grid == expected


def test_where_tokens_help_more_than_parameters_all_are_kept():
  law = law_lib.fit(planted(0, alpha=0.05, beta=0.2))
  assert law_lib.best_tokens(law, 50, 784) == 784


def test_a_plan_is_the_best_that_the_budget_buys():
  law = law_lib.fit(law_lib.published())
  plans = law_lib.plan(law, 600, law_lib.SIZES, law_lib.TOKENS, 50)
  assert all(one.compute <= 600 for one in plans)
  best = min(
    (law(n, v), 2 * n * (50 + v))
    for n in law_lib.SIZES
    for v in law_lib.TOKENS
    if 2 * n * (50 + v) <= 600
  )
  assert (plans[0].error, plans[0].compute) == best
  assert plans[0].parameters == 4.0 and plans[0].tokens == 16
  with pytest.raises(errors.UserError, match="budget of 3 buys none"):
    law_lib.plan(law, 3, law_lib.SIZES, law_lib.TOKENS, 50)


@pytest.mark.parametrize(
  ("columns", "told"),
  [
    (([1, 1, 1, 1], [1, 2, 3, 4], [0.5] * 4), "1 value of parameters"),
    (([1, 2, 3], [1, 2, 3], [0.5] * 3), "3 rows cannot fit 3 numbers"),
    (([1, 2], [1, 2], [0.5, 0.0]), "error of a sweep have to be above 0"),
  ],
)
def test_what_no_law_can_be_fitted_to_is_one_line(columns, told):
  with pytest.raises(errors.UserError, match=told):
    law_lib.fit(law_lib.Sweep.of(*columns))
