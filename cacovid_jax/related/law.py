"""How the error of a video LLM falls with its size and with its visual tokens.

  error = AB / N^alpha / T^beta + D

of N parameters of the language model and T tokens that it is shown. Sizes and
tokens trade off at equal compute, 2 N (Q + V) for Q text and V visual tokens.
Paper: https://arxiv.org/abs/2411.03312, section 3 (one factor A, one B there:
only their product can be seen). Its law is of pictures and of one family of
compressors: fit one's own sweep before planning with it.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from cacovid_jax import errors
from cacovid_jax.related import study as study_lib

# Published scores, mean accuracy over nine benchmarks: (billions of parameters,
# visual tokens) by rows and columns. Facts of the public repository.
SIZES = (0.5, 1.8, 4.0, 7.0)
TOKENS = (1, 4, 16, 36, 64, 144, 576)
SCORES = (
  (0.3855, 0.3917, 0.4078, 0.4133, 0.4151, 0.4244, 0.4320),
  (0.4333, 0.4519, 0.4528, 0.4597, 0.4609, 0.4758, 0.4808),
  (0.4630, 0.4692, 0.4858, 0.4916, 0.5023, 0.5092, 0.5185),
  (0.4810, 0.4971, 0.5050, 0.5141, 0.5172, 0.5238, 0.5354),
)
_NAMES = ("AB", "alpha", "beta", "D")
# Levels of D that the profile looks at, as shares below the least error.
_LEAST_FLOOR = -0.2
_LEVELS = 61


class Sweep(NamedTuple):
  """Measured errors, one row each; arrays float64[n]."""

  parameters: np.ndarray  # Of the language model, in any one unit.
  tokens: np.ndarray  # T, at least 1.
  error: np.ndarray  # In (0, 1], 1 - accuracy.

  @classmethod
  def of(cls, parameters, tokens, error) -> "Sweep":
    """Checks and returns a sweep of equally long sequences."""
    columns = np.broadcast_arrays(
      *(np.asarray(x, np.float64) for x in (parameters, tokens, error))
    )
    for name, column in zip(cls._fields, columns, strict=True):
      if not (np.isfinite(column) & (column > 0)).all():
        raise errors.UserError(
          f"{name} of a sweep have to be above 0; leave such rows out"
        )
    return cls(*(column.reshape(-1) for column in columns))


def published(text_tokens: float = 0.0) -> Sweep:
  """Returns the published scores as errors; T = V + text tokens."""
  tokens = np.array(TOKENS, np.float64) + text_tokens
  error = 1 - np.array(SCORES)
  return Sweep.of(np.array(SIZES)[:, None], tokens, error)


@dataclasses.dataclass(frozen=True)
class Law:
  """A fitted law, with what the sweep says of its parameters."""

  ab: float
  alpha: float
  beta: float
  floor: float  # D.
  rmse: float
  fitted: tuple[str, ...]  # Of AB, alpha, beta and D.
  covariance: np.ndarray  # float64[len(fitted)] squared.
  # Levels of D that fit as well as the best, by an F test of 95 %.
  floor_range: tuple[float, float] | None = None
  floor_limits: tuple[float, float] | None = None  # That were looked at.

  def __call__(self, parameters, tokens):
    """Returns the predicted errors."""
    power = np.power(parameters, -self.alpha) * np.power(tokens, -self.beta)
    return self.ab * power + self.floor

  def standard_error(self, name: str) -> float:
    """Returns that of "AB", "alpha", "beta" or "D".

    Raises:
      UserError: the sweep cannot tell the parameter.
    """
    if name in ("A", "B"):
      raise errors.UserError(
        f"{name} cannot be told from a sweep, only the product AB can; ask for"
        " AB"
      )
    errors.check_known("fitted parameter", name, self.fitted)
    if name == "D" and self._floor_is_open:
      low, high = self.floor_range
      raise errors.UserError(
        f"D is not identified: every level from {low:.3f} to {high:.3f} fits as"
        " well; add larger models or more tokens to the sweep, or fix D = 0"
      )
    at = self.fitted.index(name)
    return math.sqrt(self.covariance[at, at])

  @property
  def _floor_is_open(self) -> bool:
    found, looked_at = self.floor_range, self.floor_limits
    return any(np.isclose(found, looked_at, rtol=0, atol=1e-9))


def fit(sweep: Sweep, *, with_floor: bool = False) -> Law:
  """Returns the law of least squares on the errors themselves.

  Gauss-Newton from the fit of their logarithms. D = 0 unless `with_floor`:
  then the best level below the least error and above -0.2 is taken, and all
  levels that fit as well are told.

  Raises:
    UserError: too few rows, or one size or one number of tokens only.
  """
  for name in ("parameters", "tokens"):
    count = len(np.unique(getattr(sweep, name)))
    if count < 2:
      raise errors.UserError(
        f"a sweep of {count} value of {name} cannot tell its exponent; give at"
        " least 2"
      )
  num_rows, num_fitted = len(sweep.error), 4 if with_floor else 3
  if num_rows <= num_fitted:
    raise errors.UserError(
      f"a sweep of {num_rows} rows cannot fit {num_fitted} numbers; give more"
    )
  if not with_floor:
    return _law(sweep, *_at_floor(sweep, 0.0), 0.0, _NAMES[:3])
  limits = (_LEAST_FLOOR, float(sweep.error.min()) - 1e-3)
  levels = np.linspace(*limits, _LEVELS)
  sums = np.array([_at_floor(sweep, level)[1] for level in levels])
  best = int(sums.argmin())
  # What an F test on one degree of freedom does not tell from the best.
  quantile = stats.f.ppf(0.95, 1, num_rows - num_fitted)
  within = levels[sums <= sums[best] * (1 + quantile / (num_rows - num_fitted))]
  law = _law(sweep, *_at_floor(sweep, levels[best]), levels[best], _NAMES)
  found = (float(within[0]), float(within[-1]))
  return dataclasses.replace(law, floor_range=found, floor_limits=limits)


def _at_floor(sweep, floor):
  """Returns (log AB, alpha, beta) and the sum of squares at a level of D."""
  columns = np.log([sweep.parameters, sweep.tokens])
  design = np.column_stack([np.ones(len(sweep.error)), *-columns])
  above = sweep.error - floor
  x = np.linalg.lstsq(design, np.log(above), rcond=None)[0]
  for _ in range(50):
    predicted = np.exp(design @ x)
    jacobian = design * predicted[:, None]
    step = np.linalg.lstsq(jacobian, above - predicted, rcond=None)[0]
    x = x + step
    if np.abs(step).max() < 1e-12:
      break
  return x, float(np.square(above - np.exp(design @ x)).sum())


def _law(sweep, x, total, floor, fitted):
  """Returns the law of (log AB, alpha, beta), and its covariance."""
  ab, alpha, beta = float(np.exp(x[0])), float(x[1]), float(x[2])
  num_rows = len(sweep.error)
  found = Law(ab, alpha, beta, float(floor), 0.0, fitted, np.eye(len(fitted)))
  above = found(sweep.parameters, sweep.tokens) - floor
  columns = [
    above / ab,
    -np.log(sweep.parameters) * above,
    -np.log(sweep.tokens) * above,
    np.ones(num_rows),
  ]
  jacobian = np.column_stack(columns[: len(fitted)])
  variance = total / (num_rows - len(fitted))
  covariance = variance * np.linalg.pinv(jacobian.T @ jacobian)
  rmse = math.sqrt(total / num_rows)
  return dataclasses.replace(found, rmse=rmse, covariance=covariance)


def left_out(sweep: Sweep) -> dict[float, float]:
  """Returns the largest error of prediction of each size, from the others."""
  found = {}
  for size in np.unique(sweep.parameters):
    own = sweep.parameters == size
    law = fit(Sweep(*(column[~own] for column in sweep)))
    predicted = law(sweep.parameters[own], sweep.tokens[own])
    found[float(size)] = float(np.abs(predicted - sweep.error[own]).max())
  return found


class Plan(NamedTuple):
  """A model and a number of visual tokens that a budget buys."""

  parameters: float
  tokens: int
  error: float  # As predicted.
  compute: float  # 2 N (Q + V), in units of the parameters.


def best_tokens(law: Law, text_tokens: float, most: int) -> int:
  """Returns Q beta / (alpha - beta) in [1, most], V of a size that may be any.

  Where tokens help as much as parameters, all of them are kept.
  """
  if law.alpha <= law.beta:
    return most
  best = text_tokens * law.beta / (law.alpha - law.beta)
  return int(np.clip(round(best), 1, most))


def plan(
  law: Law,
  budget: float,
  sizes: Sequence[float],
  tokens: Sequence[int],
  text_tokens: float = 0.0,
) -> list[Plan]:
  """Returns what fits a budget of compute, of least predicted error first.

  Args:
    law: T in it are visual tokens.
    budget: of 2 N (Q + V), N in the unit of `sizes`.
    sizes: parameters of the models that there are.
    tokens: numbers of visual tokens that there are.
    text_tokens: Q.

  Raises:
    UserError: nothing fits.
  """
  found = [
    Plan(size, count, float(law(size, count)), 2 * size * (text_tokens + count))
    for size in sizes
    for count in tokens
  ]
  fits = [one for one in found if one.compute <= budget]
  if not fits:
    least = min(one.compute for one in found)
    raise errors.UserError(
      f"a budget of {budget:g} buys none of these models with {min(tokens)}"
      f" tokens; the least is {least:g}"
    )
  return sorted(fits, key=lambda one: (one.error, one.compute))


def _planted_arms(noise, floor, seed):
  """Returns how near fits come to a planted law of 5 sizes x 6 tokens."""
  true = {"AB": 0.6, "alpha": 0.071, "beta": 0.05}
  sizes, tokens = np.meshgrid([0.3, 1, 3, 10, 30], [1, 4, 16, 49, 196, 784])
  drawn = np.random.default_rng(seed).normal(size=sizes.shape)
  error = true["AB"] * sizes ** -true["alpha"] * tokens ** -true["beta"]
  sweep = Sweep.of(sizes, tokens, error + floor + noise * drawn)
  out = {}
  for arm, with_floor in (("D = 0", False), ("D fitted", True)):
    law = fit(sweep, with_floor=with_floor)
    found = {"AB": law.ab, "alpha": law.alpha, "beta": law.beta}
    out[arm] = {
      f"{name}, relative error": abs(found[name] / true[name] - 1)
      for name in true
    }
    low, high = law.floor_range or (0.0, 0.0)
    more = {"RMSE": law.rmse, "range of D": high - low}
    more["size left out, error"] = max(left_out(sweep).values())
    more["best V at Q = 50"] = float(best_tokens(law, 50, 784))
    out[arm] |= more
  return out


def study(settings, clips, folder=None) -> study_lib.Study:
  """Returns planted laws and what a fit recovers of them."""
  del clips, folder  # Nothing is trained.
  cases = {
    case: functools.partial(_planted_arms, settings.noise, floor)
    for case, floor in (("no floor", 0.0), ("a floor of 0.1", 0.1))
  }

  def bars(outcome):
    most, case = study_lib.Bar.most, "no floor"
    found = {
      name: max(outcome.values(case, "D = 0", f"{name}, relative error"))
      for name in _NAMES[:3]
    }
    out = [most(f"{name}, relative error", v, 0.1) for name, v in found.items()]
    left = max(outcome.values(case, "D = 0", "size left out, error"))
    return [*out, most("error of a size left out", left, 0.01)]

  shown = list(cases), "alpha, relative error", "relative error of alpha"
  return study_lib.Study("The law of sizes and tokens", cases, bars, shown)
