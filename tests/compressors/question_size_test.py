"""Sizes of each question, against a loop in NumPy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cacovid_jax import compressors, errors
from cacovid_jax.compressors import base, budgets
from cacovid_jax.policy import network

GRID = (4, 3, 4)
RATIO = 0.25
SIZES = (3, 6, 12, 24, 48)
VIDEOS = 6


@pytest.fixture(scope="module")
def inputs():
  """Videos of scores from flat to peaked."""
  rng = np.random.default_rng(0)
  token = rng.normal(size=(VIDEOS, 48, 2)).astype(np.float32)
  token *= np.float32([0.1, 0.5, 1, 2, 4, 8])[:, None, None]
  frame = rng.normal(size=(VIDEOS, 4, 2)).astype(np.float32)
  features = rng.normal(size=(VIDEOS, 48, 8)).astype(np.float32)
  return base.CompressorInputs(
    features=features, grid=GRID, scores=network.Scores(frame, token)
  )


def left_out(token):
  """float64[S], the mass of all tokens but the best K."""
  gap = np.float64(token[:, 1]) - np.float64(token[:, 0])
  mass = np.exp(gap - gap.max())
  mass = sorted(mass / mass.sum(), reverse=True)
  return [sum(mass[size:]) for size in SIZES]


def pick(left, threshold):
  for size, share in zip(SIZES, left, strict=True):
    if share <= threshold:
      return size
  return SIZES[-1]


def select(spec, inputs, ratio=RATIO):
  method = compressors.get(spec)
  rows = method.rows(GRID, ratio)
  run = jax.jit(
    lambda given: method.select_batch(given, num_keep=rows, ratio=ratio)
  )
  return run(inputs)


@pytest.mark.parametrize("options", ["", "&budget=clip&importance_ratio=1.0"])
def test_each_question_gets_what_the_loop_gives_it(inputs, options):
  left = [left_out(token) for token in inputs.scores.token]
  threshold = 0.4
  expected = [pick(row, threshold) for row in left]
  assert len(set(expected)) > 3
  spec = f"cacovid?size=question&threshold={threshold}{options}"
  found = select(spec, inputs)
  assert found.index.shape == (VIDEOS, 48)
  np.testing.assert_array_equal(found.mask.sum(axis=1), expected)
  # The tokens are those that the plain rule keeps at that size.
  for video, size in enumerate(expected):
    one = jax.tree.map(lambda leaf, at=video: leaf[at : at + 1], inputs)
    plain = select(f"cacovid{options.replace('&', '?', 1)}", one, size / 48)
    mine = jax.tree.map(lambda leaf, at=video: leaf[at], found)
    np.testing.assert_array_equal(mine.index[:size], plain.index[0])
    assert (mine.index[size:] == 48).all() and not mine.mask[size:].any()
    np.testing.assert_array_equal(mine.features[:size], plain.features[0])
    assert not mine.features[size:].any()
    np.testing.assert_array_equal(mine.assign, plain.assign[0])


def test_folding_leaves_no_row_behind_the_size(inputs):
  spec = "cacovid?size=question&threshold=0.4&merge=nearest"
  found = select(spec, inputs)
  assert (found.mass.sum(axis=1) == 48).all()
  assert not jnp.where(found.mask, 0, found.mass).any()


def test_the_threshold_is_the_least_of_the_asked_mean():
  rng = np.random.default_rng(1)
  left = np.sort(rng.random((40, 5)).astype(np.float32))[:, ::-1]
  left[:, -1] = 0
  shares = np.tile(np.float64(SIZES) / 48, (40, 1))

  def mean(threshold):
    return np.mean([pick(row, threshold) / 48 for row in left])

  for ratio in (0.0625, 0.25, 0.3, 1.0):
    found = budgets.mean_threshold(left, shares, ratio)
    assert mean(found) <= ratio
    # Of all thresholds of which a smaller one would keep more than that.
    tried = np.linspace(0, 1, 4001)
    fits = [t for t in tried if mean(t) <= ratio]
    assert mean(found) == pytest.approx(mean(fits[0]), abs=0.01)


def test_sizes_that_keep_nothing_are_left_out():
  method = compressors.get("cacovid?size=question&threshold=0.5")
  assert method.row_sizes(GRID, 0.03) == [1, 2, 5]
  assert method.row_sizes(GRID, 0.5) == [6, 12, 24, 48]
  assert method.rows(GRID, 0.03) == 5
  assert compressors.get("cacovid").row_sizes(GRID, 0.25) == [12]


def test_a_threshold_may_be_given_for_each_ratio(inputs):
  pairs = "((0.25,0.4),(0.125,1.0))"
  spec = f"cacovid?size=question&threshold={pairs}"
  same = select("cacovid?size=question&threshold=0.4", inputs)
  np.testing.assert_array_equal(select(spec, inputs).index, same.index)
  assert (select(spec, inputs, 0.125).mask.sum(axis=1) == 1).all()
  with pytest.raises(errors.UserError, match="no threshold at ratio 0.5; eval"):
    select(spec, inputs, 0.5)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ("size=video", "size is 'video'; use 'ratio' or 'question'"),
    ("ladder=(2,4)", r"ladder is \(2, 4\); give multiples of the ratio, 1 am"),
    ("ladder=(1,-1)", "give multiples of the ratio"),
    ("threshold=1.5", "threshold is 1.5; give a share from 0 to 1"),
    ("threshold=((0.1,2),)", "give a share from 0 to 1, or such pairs"),
    ("threshold=much", "threshold is 'much'; give a share"),
  ],
)
def test_mistakes_are_named(options, message):
  with pytest.raises(errors.UserError, match=message):
    compressors.get(f"cacovid?{options}")


def test_without_threshold_it_says_where_one_comes_from(inputs):
  method = compressors.get("cacovid?size=question")
  assert method.uncalibrated and not compressors.get("cacovid").uncalibrated
  with pytest.raises(errors.UserError, match="which chooses one, or give thre"):
    select("cacovid?size=question", inputs)
  whole = dataclasses.replace(method, threshold=0.0)
  assert not whole.uncalibrated
