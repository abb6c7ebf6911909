"""DivPrune: how distances are held, and the published rounding."""

import jax
import numpy as np
import pytest

from cacovid_jax import compressors, errors
from cacovid_jax.compressors.math import max_min
from tests.compressors import given, quick, selections


@pytest.mark.parametrize("scope", ["video", "frame"])
def test_distances_held_or_not_give_the_same_picks(scope):
  def picks(features):
    return [
      given.compress(
        compressors.get("divprune", distances=distances, scope=scope),
        features,
        grid=selections.GRID,
        num_keep=11,
      ).index
      for distances in ["auto", "matrix", "rows"]
    ]

  run = quick.jit(picks)
  for features in [selections.video("random", seed) for seed in range(20)]:
    auto, matrix, rows = run(features)
    np.testing.assert_array_equal(matrix, rows)
    np.testing.assert_array_equal(matrix, auto)


def test_a_long_video_does_not_hold_the_matrix():
  # Shapes only: 20 000 tokens would take 1.6 GB.
  features = jax.ShapeDtypeStruct([20_000, 8], np.float32)
  shapes = str(
    jax.make_jaxpr(lambda x: max_min.max_min_subset(x, num_keep=3))(features)
  )
  assert "20000,20000" not in shapes
  shapes = str(
    jax.make_jaxpr(
      lambda x: max_min.max_min_subset(x, num_keep=3, distances="matrix")
    )(features)
  )
  assert "20000,20000" in shapes


@pytest.mark.parametrize("kind", selections.KINDS)
@pytest.mark.parametrize("num_keep", [1, 11, 29])
def test_selection_of_any_video(kind, num_keep):
  out = given.compress(
    compressors.get("divprune", distances="matrix"),
    selections.video(kind),
    grid=selections.GRID,
    num_keep=num_keep,
  )
  selections.check(out, selections.NUM_VIDEO, num_keep)


def test_a_batch_equals_single_videos_in_one_program():
  selections.check_batch_and_compilations(compressors.get("divprune"), 11)


def test_published_rounding_takes_the_even_number_of_two():
  exact = compressors.get("divprune")
  published = compressors.get("divprune", exact_budget=False)
  # 0.25 of 30 is 7.5 and 0.35 of 30 is 10.5.
  rows = [
    (rule.rows(selections.GRID, 0.25), rule.rows(selections.GRID, 0.35))
    for rule in (exact, published)
  ]
  assert rows == [(7, 10), (8, 10)]
  out = given.compress(
    published,
    selections.video("random"),
    grid=selections.GRID,
    num_keep=8,
    ratio=0.25,
  )
  selections.check(out, selections.NUM_VIDEO, 8)


def test_published_rounding_to_nothing_is_one_line():
  published = compressors.get("divprune", exact_budget=False)
  with pytest.raises(errors.UserError, match="keeps no token"):
    published.rows((1, 2, 3), 0.05)


def test_unknown_distances_are_one_line():
  with pytest.raises(errors.UserError, match="'matrix' or 'rows'"):
    given.compress(
      compressors.get("divprune", distances="all"),
      selections.video("random"),
      grid=selections.GRID,
      num_keep=3,
    )


def test_it_can_be_made_for_a_tpu():
  selections.check_lowers_for_tpu(compressors.get("divprune"), 11)
