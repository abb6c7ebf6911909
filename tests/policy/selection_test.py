"""Selection against the rule written as plain loops, and its edge cases."""

import functools
import json
import math
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cacovid_jax import errors
from cacovid_jax.models import token_grid
from cacovid_jax.policy import network, selection


def scores_of(seed, grid, scale=1.0):
  rng = np.random.default_rng(seed)
  num_tokens = int(np.prod(grid))
  return network.Scores(
    frame=(scale * rng.standard_normal((grid[0], 2))).astype(np.float32),
    token=(scale * rng.standard_normal((num_tokens, 2))).astype(np.float32),
  )


def repair_by_a_loop(budgets, total):
  budgets = list(budgets)
  while sum(budgets) > total:
    budgets[budgets.index(max(budgets))] -= 1
  while sum(budgets) < total:
    budgets[budgets.index(min(budgets))] += 1
  return budgets


def select_by_a_loop(scores, grid, r, iota=0.5, share=1.5):
  """The rule of METHOD.md 7, step by step, on the host."""
  T, H, W = grid
  c = share * r
  total = math.floor(r * T * H * W)
  b = iota * r * H * W * T
  gap = scores.frame[:, 1] - scores.frame[:, 0]
  if (gap == gap[0]).all():
    p = np.full(T, 1 / T, np.float32)
  else:
    f = gap / np.abs(gap).max() * np.float32(3)
    p = np.exp(f - f.max())
    p = p / p.sum()
    p = np.minimum(np.maximum(p, 1 / (2 * T)), c / (T * r)).astype(np.float32)
    p = p / p.sum()
  cap = min(math.floor(iota * H * W * c), H * W)
  budgets = np.round(p * np.float32(round(b)))
  budgets = np.minimum(np.maximum(budgets, 1), cap).astype(int).tolist()
  important = total if iota == 1 else min(math.floor(b), total)
  budgets = repair_by_a_loop(budgets, important)
  token_gap = (scores.token[:, 1] - scores.token[:, 0]).reshape(T, H * W)
  keep = np.zeros((T, H * W), bool)
  for t in range(T):
    keep[t, np.argsort(-token_gap[t], kind="stable")[: budgets[t]]] = True
  return with_even_others(keep.reshape(-1), total - important)


def with_even_others(keep, count):
  others = np.flatnonzero(~keep)
  if count:
    picked = np.round(np.linspace(0, len(others) - 1, count)).astype(int)
    keep[others[picked]] = True
  return np.flatnonzero(keep)


def select_by_a_sort(scores, grid, r, iota=0.5):
  """The rule without budgets of frames: the best of the clip, by a sort."""
  T, H, W = grid
  total = math.floor(r * T * H * W)
  best = total if iota == 1 else min(math.floor(iota * r * H * W * T), total)
  gap = scores.token[:, 1] - scores.token[:, 0]
  keep = np.zeros(T * H * W, bool)
  keep[np.argsort(-gap, kind="stable")[:best]] = True
  return with_even_others(keep, total - best)


def select(scores, grid, ratio, **options):
  budget = selection.budget(grid, ratio, **options)
  # Closed over: its numbers are constants of the program.
  run = jax.jit(lambda scores: selection.select(scores, budget))
  return np.asarray(run(jax.tree.map(jnp.asarray, scores)))


CASES = [
  ((8, 5, 5), 0.25, 0.5, 1.5),
  ((5, 3, 7), 0.4, 0.3, 1.5),
  ((16, 4, 4), 0.05, 0.5, 1.5),  # Less than a token a frame: "too many".
  ((12, 3, 3), 0.06, 0.5, 3.0),
  ((6, 4, 4), 0.5, 1.0, 1.5),
  ((6, 4, 4), 0.2, 0.0, 1.5),
  ((1, 6, 6), 0.2, 0.5, 1.5),
  ((1, 6, 6), 0.2, 1.0, 1.5),
  ((4, 4, 4), 1.0, 0.5, 1.5),
  ((4, 4, 4), 1.0, 1.0, 1.5),
  ((5, 8, 12), 0.3, 0.75, 1.5),  # 108 important tokens, or 107 in other order.
  ((3, 1, 1), 0.4, 0.5, 1.5),
]


@pytest.mark.parametrize(("grid", "ratio", "iota", "share"), CASES)
def test_equals_a_loop(grid, ratio, iota, share):
  budget = selection.budget(
    grid, ratio, importance_ratio=iota, max_frame_share=share
  )
  run = jax.jit(functools.partial(selection.select, budget=budget))
  for seed in range(3):
    scores = scores_of(seed, grid, scale=[0.01, 1.0, 300.0][seed])
    index = np.asarray(run(scores))
    expected = select_by_a_loop(scores, grid, ratio, iota, share)
    np.testing.assert_array_equal(index, expected)
    assert len(index) == selection.num_keep(grid, ratio)
    assert (np.diff(index) > 0).all()


@pytest.mark.parametrize(("grid", "ratio", "iota", "share"), CASES)
def test_the_best_of_the_clip_are_those_of_a_sort(grid, ratio, iota, share):
  budget = selection.budget(
    grid, ratio, by_frame=False, importance_ratio=iota, max_frame_share=share
  )
  run = jax.jit(functools.partial(selection.select, budget=budget))
  for seed, scale in enumerate([0.01, 1.0, 0.0]):
    scores = scores_of(seed, grid, scale)
    # What frames score has no say.
    index = np.asarray(run(scores._replace(frame=np.nan * scores.frame)))
    expected = select_by_a_sort(scores, grid, ratio, iota)
    np.testing.assert_array_equal(index, expected)
    assert len(index) == selection.num_keep(grid, ratio)


@pytest.mark.parametrize("value", [0.0, 2.5, -1.0])
def test_equal_frame_gaps_share_the_budget_equally(value):
  grid = (4, 4, 4)
  scores = scores_of(0, grid)._replace(
    frame=np.tile(np.float32([0.0, value]), (4, 1))
  )
  index = select(scores, grid=grid, ratio=0.25, importance_ratio=1.0)
  np.testing.assert_array_equal(np.bincount(index // 16), [4, 4, 4, 4])
  np.testing.assert_array_equal(
    index, select_by_a_loop(scores, grid, 0.25, 1.0)
  )


def test_all_scores_equal_still_keep_exactly_the_budget():
  grid = (4, 3, 3)
  scores = network.Scores(np.zeros((4, 2)), np.zeros((36, 2)))
  scores = jax.tree.map(np.float32, scores)
  index = select(scores, grid=grid, ratio=0.3)
  np.testing.assert_array_equal(index, select_by_a_loop(scores, grid, 0.3))


def test_no_frame_takes_more_than_its_cap():
  grid = (8, 4, 4)
  scores = scores_of(1, grid)
  scores.frame[3, 1] += 50
  index = select(scores, grid=grid, ratio=0.25, importance_ratio=1.0)
  assert np.bincount(index // 16)[3] == 6  # floor(16 * 1.5 * 0.25)


def test_importance_of_zero_spaces_all_tokens_evenly():
  grid = (2, 5, 5)
  index = select(scores_of(0, grid), grid=grid, ratio=0.2, importance_ratio=0.0)
  np.testing.assert_array_equal(index, np.round(np.linspace(0, 49, 10)))


def test_the_best_tokens_are_kept():
  grid = (4, 4, 4)
  scores = scores_of(2, grid)
  index = select(scores, grid=grid, ratio=0.25)
  gap = (scores.token[:, 1] - scores.token[:, 0]).reshape(4, 16)
  best = np.argmax(gap, axis=-1) + 16 * np.arange(4)
  assert set(best) <= set(index.tolist())


def test_repair_equals_one_token_at_a_time():
  repair = jax.jit(functools.partial(selection.repair, max_budget=12))
  for seed in range(6):
    budgets = np.random.default_rng(seed).integers(0, 10, size=7)
    for total in [0, 1, 5, int(budgets.sum()), 60, 83, 84]:
      repaired = repair(jnp.asarray(budgets, jnp.int32), total)
      expected = repair_by_a_loop(budgets, total)
      np.testing.assert_array_equal(repaired, expected)


def test_budgets_are_float64_products_from_left_to_right():
  assert selection.num_keep((16, 7, 7), 0.1) == 78
  # 0.29 * 100 is 28.999...: one token less, as on the public side.
  assert selection.num_keep((1, 10, 10), 0.29) == math.floor(0.29 * 1 * 10 * 10)
  assert selection.num_keep((32, 14, 14), 0.1) == 627


@pytest.mark.parametrize("ratio", [0.0, -0.1, 1.01, float("nan")])
def test_a_ratio_outside_its_range_is_refused(ratio):
  with pytest.raises(errors.UserError, match="outside"):
    selection.num_keep((4, 4, 4), ratio)


def test_a_budget_of_nothing_is_refused_and_names_what_is_enough():
  with pytest.raises(errors.UserError, match=r"use at least 0\.015625") as err:
    selection.num_keep((4, 4, 4), 0.01)
  assert selection.num_keep((4, 4, 4), 0.015625) == 1
  assert "\n" not in str(err.value)


def test_an_importance_ratio_outside_its_range_is_refused():
  with pytest.raises(errors.UserError, match="importance"):
    selection.budget((2, 2, 2), 0.5, importance_ratio=1.1)


def test_vmap_equals_a_loop():
  grid = (4, 4, 4)
  many = [scores_of(seed, grid) for seed in range(3)]
  run = functools.partial(selection.select, budget=selection.budget(grid, 0.2))
  batch = jax.tree.map(lambda *s: jnp.stack(s), *many)
  batched = jax.jit(jax.vmap(run))(batch)
  for i, scores in enumerate(many):
    np.testing.assert_array_equal(
      batched[i], select_by_a_loop(scores, grid, 0.2)
    )


@pytest.mark.parametrize("by_frame", [True, False])
def test_selection_lowers_for_accelerators_at_full_size(by_frame):
  budget = selection.budget((32, 14, 14), 0.1, by_frame=by_frame)
  run = jax.jit(functools.partial(selection.select, budget=budget))
  scores = network.Scores(
    frame=jax.ShapeDtypeStruct((32, 2), jnp.float32),
    token=jax.ShapeDtypeStruct((6272, 2), jnp.float32),
  )
  traced = run.trace(scores)
  for platform in ("tpu", "cuda"):
    assert traced.lower(lowering_platforms=(platform,)).as_text()


def test_a_full_grid_has_no_trace_of_a_mask(monkeypatch):
  fill, traces = token_grid.fill, []

  def watched(x, valid, value):
    filled = fill(x, valid, value)
    traces.append(filled is not x)
    return filled

  monkeypatch.setattr(token_grid, "fill", watched)
  for bucket in (None, token_grid.GridBucket(4, 15)):
    traces.clear()
    budget = selection.budget((4, 3, 5), 0.3, bucket=bucket)
    if bucket is None:
      run = functools.partial(selection.select, budget=budget)
      jax.eval_shape(run, scores_of(0, (4, 3, 5)))
      assert traces and not any(traces)
    else:
      jax.eval_shape(selection.select, scores_of(0, (4, 3, 5)), budget)
      assert all(traces)


# Videos of different grids in one program.


GOLDEN = os.path.join(os.path.dirname(__file__), "..", "golden", "policy")
BUCKET = token_grid.GridBucket(6, 20, 70)


select_in_bucket = jax.jit(selection.select)


def padded(scores, bucket, filler):
  """Scores of a video as they lie in a bucket, NumPy."""
  frame = np.full((bucket.frames, 2), filler, np.float32)
  token = np.full((bucket.tokens, 2), filler, np.float32)
  frame[: len(scores.frame)] = scores.frame
  token[: len(scores.token)] = scores.token
  return network.Scores(frame, token)


def random_cases(seed, count):
  """Grids, ratios and importance ratios that fit the bucket."""
  rng = np.random.default_rng(seed)
  cases = [((6, 1, 1), 1.0, 1.0), ((3, 4, 5), 1.0, 0.5), ((1, 4, 5), 0.3, 0.5)]
  while len(cases) < count:
    grid = tuple(int(side) for side in rng.integers(1, [7, 6, 11]))
    ratio = float(rng.choice([0.05, 0.1, 0.25, 0.29, 0.3, 0.5, 0.75]))
    iota = float(rng.choice([0.0, 0.3, 0.5, 0.75, 1.0]))
    if BUCKET.holds(grid) and math.floor(ratio * math.prod(grid)) >= 1:
      cases.append((grid, ratio, iota))
  return cases


@pytest.mark.parametrize("kind", ["random", "equal frames", "all equal"])
def test_one_program_selects_for_every_grid_what_a_loop_does(kind):
  cases = random_cases(0, 60)
  compiled = select_in_bucket._cache_size()
  for seed, (grid, ratio, iota) in enumerate(cases):
    scores = scores_of(seed, grid, scale=[0.01, 1.0, 300.0][seed % 3])
    if kind != "random":
      scores = scores._replace(frame=0 * scores.frame + np.float32([0, 2]))
    if kind == "all equal":
      scores = scores._replace(token=0 * scores.token)
    # What stands in the padding would win if it were looked at.
    filler = [1e9, np.nan, np.inf][seed % 3]
    given = padded(scores, BUCKET, filler)
    given.frame[grid[0] :, 0] = given.token[math.prod(grid) :, 0] = -1.0
    budget = selection.budget(
      grid, ratio, bucket=BUCKET, num_keep_max=70, importance_ratio=iota
    )
    index = select_in_bucket(given, budget)
    expected = select_by_a_loop(scores, grid, ratio, iota)
    assert budget.kept == len(expected)
    np.testing.assert_array_equal(index[: len(expected)], expected)
    np.testing.assert_array_equal(index[len(expected) :], BUCKET.tokens)
  assert select_in_bucket._cache_size() - compiled <= 1


def test_the_bucket_gives_the_indices_of_a_full_grid():
  for seed, (grid, ratio, iota) in enumerate(random_cases(1, 7)):
    scores = scores_of(seed, grid)
    budget = selection.budget(
      grid, ratio, bucket=BUCKET, num_keep_max=70, importance_ratio=iota
    )
    index = select_in_bucket(padded(scores, BUCKET, 0.0), budget)
    expected = select(scores, grid=grid, ratio=ratio, importance_ratio=iota)
    np.testing.assert_array_equal(index[: int(budget.kept)], expected)


@pytest.mark.parametrize("name", ["select", "select_repair"])
def test_one_program_selects_all_golden_cases(name):
  bucket = token_grid.GridBucket(66, 200, 64 * 196)
  compiled = select_in_bucket._cache_size()
  with np.load(os.path.join(GOLDEN, f"{name}.npz")) as arrays:
    for i, meta in enumerate(json.loads(str(arrays["meta"]))):
      grid = tuple(meta[side] for side in "thw")
      scores = network.Scores(
        arrays[f"frame_logits_{i}"], arrays[f"token_logits_{i}"]
      )
      budget = selection.budget(
        grid,
        meta["retention_ratio"],
        bucket=bucket,
        num_keep_max=1600,
        importance_ratio=meta["importance_ratio"],
        max_frame_ratio=meta["max_frame_ratio"],
      )
      index = select_in_bucket(padded(scores, bucket, 7.0), budget)
      assert budget.kept == meta["kept"]
      np.testing.assert_array_equal(
        index[: meta["kept"]], np.flatnonzero(arrays[f"keep_{i}"])
      )
      assert (np.asarray(index[meta["kept"] :]) == bucket.tokens).all()
  assert select_in_bucket._cache_size() - compiled <= 1


def test_vmap_over_videos_of_different_grids_and_ratios():
  cases = [((4, 3, 5), 0.3), ((2, 2, 2), 0.5), ((6, 2, 5), 0.1)]
  scores = [scores_of(seed, grid) for seed, (grid, _) in enumerate(cases)]
  budgets = [
    selection.budget(grid, ratio, bucket=BUCKET, num_keep_max=20)
    for grid, ratio in cases
  ]
  stack = functools.partial(jax.tree.map, lambda *leaves: np.stack(leaves))
  index = jax.jit(jax.vmap(selection.select))(
    stack(*[padded(s, BUCKET, 5.0) for s in scores]), stack(*budgets)
  )
  assert index.shape == (3, 20)
  for i, (grid, ratio) in enumerate(cases):
    np.testing.assert_array_equal(
      index[i, : int(budgets[i].kept)], select_by_a_loop(scores[i], grid, ratio)
    )


def test_the_best_of_clips_of_different_grids_in_one_program():
  cases = random_cases(3, 24)
  budgets, given = [], []
  for seed, (grid, ratio, iota) in enumerate(cases):
    scores = scores_of(seed, grid, scale=[1.0, 0.0][seed % 2])
    given.append(padded(scores, BUCKET, [1e9, np.nan, np.inf][seed % 3]))
    given[-1].token[math.prod(grid) :, 0] = -1.0
    budgets.append(
      selection.budget(
        grid,
        ratio,
        bucket=BUCKET,
        num_keep_max=70,
        by_frame=False,
        importance_ratio=iota,
      )
    )
  stack = functools.partial(jax.tree.map, lambda *leaves: np.stack(leaves))
  found = jax.jit(jax.vmap(selection.select))(stack(*given), stack(*budgets))
  for seed, (grid, ratio, iota) in enumerate(cases):
    scores = scores_of(seed, grid, scale=[1.0, 0.0][seed % 2])
    expected = select_by_a_sort(scores, grid, ratio, iota)
    index, behind = np.split(np.asarray(found[seed]), [len(expected)])
    np.testing.assert_array_equal(index, expected)
    assert (behind == BUCKET.tokens).all()


def test_the_default_room_is_the_most_that_a_grid_of_the_bucket_keeps():
  # 0.29 * 100 is below 29, 0.29 * 1 * 10 * 10 is not.
  assert math.floor(0.29 * 100) == 28
  tight = selection.budget(
    (1, 10, 10), 0.29, bucket=token_grid.GridBucket(1, 100)
  )
  assert tight.kept == tight.num_keep_max == 29
  for grid, ratio, _ in random_cases(2, 40):
    budget = selection.budget(grid, ratio, bucket=BUCKET)
    assert budget.kept <= budget.num_keep_max <= BUCKET.tokens


def test_a_budget_that_does_not_fit_is_refused():
  with pytest.raises(
    errors.UserError, match=r"7 x 2 x 2 .* GridBucket\(7, 4, 28"
  ):
    selection.budget((7, 2, 2), 0.5, bucket=BUCKET)
  with pytest.raises(errors.UserError, match="raise num_keep_max") as raised:
    selection.budget((4, 3, 5), 0.5, bucket=BUCKET, num_keep_max=29)
  assert "\n" not in str(raised.value)
  with pytest.raises(errors.UserError, match="keeps no token"):
    selection.budget((2, 2, 2), 0.1, bucket=BUCKET)
  with pytest.raises(errors.UserError, match="importance"):
    selection.budget((2, 2, 2), 0.5, bucket=BUCKET, importance_ratio=-0.1)


def test_selection_in_a_bucket_lowers_for_tpu_at_full_size():
  bucket = token_grid.GridBucket(64, 256)
  budget = selection.budget((60, 15, 17), 0.1, bucket=bucket)
  shape = jax.ShapeDtypeStruct
  scores = network.Scores(
    frame=shape((64, 2), jnp.float32), token=shape((64 * 256, 2), jnp.float32)
  )
  traced = jax.jit(selection.select).trace(scores, budget)
  assert traced.lower(lowering_platforms=("tpu",)).as_text()
