"""Rates by information: exact counts, cells, the source of known bits."""

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from cacovid_jax import errors
from cacovid_jax.related import fitting, infotok
from cacovid_jax.related import study as study_lib
from configs import related_systems


def test_counts_are_exact_and_released_ones_fall_short():
  rng = np.random.default_rng(0)
  for _ in range(20):
    error = rng.exponential(size=30)
    ours = np.asarray(infotok.counts(error, 240, 1, 16, power=0.5))
    assert ours.sum() == 240 and 1 <= ours.min() and ours.max() <= 16
    # Order follows the error.
    assert (np.diff(ours[np.argsort(error)]) >= 0).all()
    released = np.asarray(infotok.released_counts(error, 240, 1, 16))
    assert released.sum() < 240
  with pytest.raises(errors.UserError, match="budget of 20 tokens .* 30 parts"):
    infotok.counts(error, 20, 1, 16)


def test_cells_are_the_largest_by_rank_and_released_ones_miss_some():
  error = np.random.default_rng(1).permutation(12).astype(np.float32)
  for rate in (0.25, 0.5, 0.75, 1.0):
    kept = np.asarray(infotok.kept_cells(error, rate))
    expected = error >= 12 - round(12 * rate)
    np.testing.assert_array_equal(kept, expected)
    released = np.asarray(infotok.kept_cells(error, rate, released=True))
    # One less than the rate says: at rate 1 the smallest is left out.
    assert released.sum() == 12 - 1 - int((1 - rate) * 11)
  flat = np.ones(5)
  assert np.asarray(infotok.kept_cells(flat, 0.4)).tolist() == [
    True, True, False, False, False,
  ]  # fmt: skip
  assert not np.asarray(infotok.kept_cells(flat, 0.4, released=True)).any()


def test_bits_count_the_mask():
  assert infotok.bits(np.array([3, 5]), 8, 16.0) == 4 * 16 + 8


def test_the_source_tells_its_bits():
  clips, told = infotok.source(0, 300)
  # Orthonormal directions: the energy is the number of signs.
  np.testing.assert_allclose(np.square(clips).sum(axis=1), told, rtol=1e-5)
  assert set(told) == set(range(1, 9))


def test_a_tokenizer_gives_more_to_clips_that_tell_more():
  """400 steps are enough; later tokens never raise the error by much."""
  train, _ = infotok.source(1, 2000)
  test, told = infotok.source(2, 200)
  net = infotok.ScalarTokenizer(hidden=64)
  rng = jax.random.key(0)
  start = net.init(rng, train[:1], jnp.ones((1, 8), bool))["params"]
  params = fitting.fit(
    (infotok._loss, net, 64), start, jnp.asarray(train), rng,
    fitting.Schedule(steps=400, lr=5e-3, chunk=400),
  )  # fmt: skip
  curves = np.asarray(infotok.errors_by_count(net, params, jnp.asarray(test)))
  counts = np.asarray(infotok.counts(curves[:, 4], 800, 1, 8, power=0.5))
  means = [counts[told == k].mean() for k in range(1, 9)]
  assert np.corrcoef(means, np.arange(1, 9))[0, 1] > 0.8
  assert curves[:, 8].mean() < 0.5 * curves[:, 2].mean()


def test_a_masked_token_is_not_read():
  net = infotok.ScalarTokenizer(hidden=8)
  x = np.random.default_rng(3).normal(size=(4, 6)).astype(np.float32)
  mask = np.arange(8) < np.array([[1], [3], [8], [4]])
  params = net.init(jax.random.key(0), x, mask)
  _, code = net.apply(params, x, mask)
  assert not np.asarray(code)[~mask].any()
  assert set(np.unique(code)) <= {-1.0, 0.0, 1.0}


def test_the_smallest_study_runs():
  config = related_systems.get_config("debug").infotok
  study = infotok.study(config, None)
  found = [(case, 0, run(0)) for case, run in study.cases.items()]
  table = study_lib.Outcome(found)
  case = "16 tokens"
  tokens = [
    table.mean(case, arm, "tokens") for c, arm in table.rows if c == case
  ]
  # All but the released rounding spend the same.
  assert sum(np.isclose(tokens, 16)) == len(tokens) - 1
  best = table.mean(case, "exact (oracle)", "squared error")
  for c, arm in table.rows:
    if c == case and "released" not in arm:
      assert best <= table.mean(case, arm, "squared error") + 1e-9
  assert isinstance(config, ml_collections.ConfigDict)
  assert study.picture(table).startswith("<?xml") and study.bars(table)
