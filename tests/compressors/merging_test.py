"""Folding dropped tokens into kept ones, against a loop."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from cacovid_jax import compressors, errors
from cacovid_jax.compressors import base, selection_ops
from tests.compressors import given, quick, selections, videos

GRID, NUM_VIDEO = selections.GRID, selections.NUM_VIDEO
fold = quick.jit(selection_ops.fold)


def scores_of(seed, grid=GRID):
  rng = np.random.default_rng(seed)
  return videos.Scores(
    jnp.asarray(rng.normal(size=[grid[0], 2]), jnp.float32),
    jnp.asarray(rng.normal(size=[math.prod(grid), 2]), jnp.float32),
  )


def assert_folded(out, selection, features):
  """Token by token: each joins a nearest row, rows are means of all."""
  x = np.asarray(features, np.float64)
  rows = np.asarray(selection.features, np.float64)
  mask, mass = np.asarray(selection.mask), np.array(selection.mass)
  weight = mass.astype(np.float64)
  total = rows * weight[:, None]
  joined = np.asarray(out.assign)
  for i, row in enumerate(np.asarray(selection.assign)):
    if row >= 0:
      assert joined[i] == row
      continue
    cosines = selections.unit(rows) @ selections.unit(x[i])
    # Rows that are the same token are told apart by rounding only.
    nearest = np.flatnonzero(cosines > cosines[mask].max() - 1e-6)
    assert joined[i] in nearest and mask[joined[i]]
    total[joined[i]] += x[i]
    weight[joined[i]] += 1
    mass[joined[i]] += 1
  expected = total / np.maximum(weight, 1e-9)[:, None]
  np.testing.assert_allclose(out.features, expected, atol=1e-5)
  np.testing.assert_array_equal(out.mass, mass)
  np.testing.assert_array_equal(out.index, selection.index)
  np.testing.assert_array_equal(out.mask, selection.mask)


@pytest.mark.parametrize("kind", [*selections.KINDS, "scenes"])
def test_a_plain_selection_folds_as_the_loop_does(kind):
  for seed in range(3):
    features = selections.video(kind, seed)
    order = np.random.default_rng(seed).permutation(NUM_VIDEO)
    plain = base.take(features, jnp.asarray(order[:7]))
    out = fold(plain, features)
    selections.check(out, NUM_VIDEO, 7)
    assert np.asarray(out.mass).sum() == NUM_VIDEO
    assert_folded(out, plain, features)


def test_rows_that_are_merged_already_count_by_their_mass():
  features = selections.video("random", 5)
  assign = np.full(NUM_VIDEO, -1, np.int32)
  assign[:12] = [0, 1, 2, 0, 0, 1, 0, 0, 0, 0, 0, 0]
  merged = base.merge(features, jnp.array([0, 1, 2]), jnp.asarray(assign))
  np.testing.assert_array_equal(merged.mass, [9, 2, 1])
  out = fold(merged, features)
  assert_folded(out, merged, features)


def test_a_row_that_nothing_joins_stays_bit_by_bit():
  features = jnp.array([[1e-3, 3.0], [3.0, 1e-3], [3.1, 0.0], [2.9, 0.0]])
  out = fold(base.take(features, jnp.array([0, 1])), features)
  np.testing.assert_array_equal(out.features[0], features[0])
  np.testing.assert_allclose(out.features[1], [3.0, 1e-3 / 3], rtol=1e-6)
  np.testing.assert_array_equal(out.mass, [1, 3])


def test_padding_rows_take_no_part():
  features = selections.video("random", 6)
  index = jnp.array([3, 9, 20, NUM_VIDEO, NUM_VIDEO])
  plain = base.take(features, index, jnp.int32(3))
  out = fold(plain, features)
  assert_folded(out, plain, features)
  assert not np.any(out.features[3:]) and not np.any(out.mass[3:])


def test_bfloat16_tokens_are_averaged_in_float32():
  features = jnp.concatenate(
    [jnp.ones([1, 8]), jnp.full([300, 8], 1.0078125)]
  ).astype(jnp.bfloat16)
  out = fold(base.take(features, jnp.array([0])), features)
  assert out.features.dtype == jnp.bfloat16
  # Sums in bfloat16 would stop growing at 256.
  np.testing.assert_array_equal(out.features[0].astype(float), 1.0078125)


@pytest.mark.parametrize(
  "name,field",
  [
    ("cacovid", "scores"),
    ("cacovid_untrained", "untrained_scores"),
    ("cacovid_other_question", "other_scores"),
  ],
)
def test_the_policy_variants_merge_what_they_drop(name, field):
  features = selections.video("random", 7)
  aux = given.Aux(**{field: scores_of(7)})
  rules = [compressors.get(name), compressors.get(name, merge="nearest")]
  plain, merged = quick.jit(
    lambda x, aux: [
      given.compress(rule, x, grid=GRID, num_keep=9, aux=aux) for rule in rules
    ]
  )(features, aux)
  np.testing.assert_array_equal(
    plain.features, np.asarray(features)[np.asarray(plain.index)]
  )
  assert_folded(merged, plain, features)
  selections.check(merged, NUM_VIDEO, 9)


@pytest.mark.parametrize("option", ["merge=nearest", "budget=clip"])
def test_a_batch_equals_single_videos_in_one_program(option):
  selections.check_batch_and_compilations(
    compressors.get(f"cacovid?{option}"),
    9,
    lambda seed: given.Aux(scores=scores_of(seed)),
  )


@pytest.mark.parametrize(
  ("option", "known"),
  [("merge=mean", "'none' or 'nearest'"), ("budget=all", "'frames' or 'clip'")],
)
def test_an_unknown_choice_is_one_line(option, known):
  with pytest.raises(errors.UserError, match=known) as raised:
    compressors.get(f"cacovid?{option}")
  assert "\n" not in str(raised.value)
