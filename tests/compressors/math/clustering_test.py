"""DPC-KNN against its definition point by point, and at the edges."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cacovid_jax.compressors.math import clustering, similarity
from tests.compressors import naive, quick

N, WIDTH, BOUND = 12, 5, 6


@functools.cache
def _compiled():
  def run(x, valid, num_clusters):
    found = clustering.cluster(x, num_clusters, sets=jnp.where(valid, 0, -1))
    # The centres, best score first, then N.
    rank = jnp.where(found.rank < jnp.maximum(num_clusters, 1), found.rank, N)
    order = jnp.full([BOUND], N).at[rank].set(jnp.arange(N), mode="drop")
    return found, order, similarity.segment_mean(x, found.centre, N)

  return quick.jit(run)


def check(x, valid, num_clusters):
  found, order, means = _compiled()(x, valid, num_clusters)
  members = np.flatnonzero(valid)
  score, centres, centre = naive.dpc_knn(x, members, num_clusters)
  np.testing.assert_array_equal(
    order, (centres + [N] * BOUND)[:BOUND]
  )  # fmt: skip
  for i in range(N):
    if not valid[i]:
      assert found.label[i] == -1
      assert found.centre[i] == found.rank[i] == N
      assert found.score[i] == -np.inf
      assert not np.any(means[i])
      continue
    np.testing.assert_allclose(np.exp(found.score[i]), score[i], rtol=1e-4)
    assert found.centre[i] == centre[i]
    assert found.label[i] == centres.index(centre[i])
    own = [j for j in members if centre[j] == i]
    mean = np.asarray(x)[own].mean(axis=0) if own else np.zeros(WIDTH)
    np.testing.assert_allclose(means[i], mean, atol=1e-6)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("num_valid", [1, 2, 6, 7, 12])
def test_equals_the_definition(seed, num_valid):
  rng = np.random.default_rng(seed)
  x = rng.normal(size=[N, WIDTH]).astype(np.float32)
  valid = np.zeros(N, bool)
  valid[rng.permutation(N)[:num_valid]] = True
  for num_clusters in {1, min(3, num_valid), min(BOUND, num_valid)}:
    check(x, valid, num_clusters)


def test_counts_are_data_and_one_program_serves_all():
  x = np.random.default_rng(0).normal(size=[N, WIDTH]).astype(np.float32)
  check(x, np.ones(N, bool), 4)
  before = _compiled()._cache_size()
  check(x, np.arange(N) < 9, 2)
  assert _compiled()._cache_size() == before


def test_points_that_are_not_there_have_no_influence():
  x = np.random.default_rng(1).normal(size=[N, WIDTH]).astype(np.float32)
  valid = np.arange(N) % 3 != 1
  other = np.where(valid[:, None], x, 1e6)
  one, two = (_compiled()(z, valid, 3) for z in (x, other))
  np.testing.assert_array_equal(one[0].centre, two[0].centre)
  np.testing.assert_array_equal(one[0].score, two[0].score)


def test_no_clusters_count_as_one_and_too_many_as_one_each():
  x = np.random.default_rng(2).normal(size=[N, WIDTH]).astype(np.float32)
  valid = np.arange(N) < 5
  found, order, _ = _compiled()(x, valid, 0)
  assert set(np.asarray(found.label[:5]).tolist()) == {0}
  assert (np.asarray(order) < N).sum() == 1
  found, order, _ = _compiled()(x, valid, 6)
  np.testing.assert_array_equal(found.centre[:5], np.arange(5))
  assert sorted(np.asarray(order).tolist()) == [0, 1, 2, 3, 4, N]


@pytest.mark.parametrize("value", [0.0, 3.0])
def test_equal_points_go_to_the_earlier_one(value):
  x = np.full([N, WIDTH], value, np.float32)
  valid = np.arange(N) >= 2
  found, order, means = _compiled()(x, valid, 3)
  np.testing.assert_array_equal(order, [2, 3, 4, N, N, N])
  np.testing.assert_array_equal(found.centre[2:], [2, 3, 4] + [2] * 7)
  assert np.isfinite(means).all()
  np.testing.assert_allclose(means[2], value)


def test_nothing_there_gives_nothing():
  found, order, means = _compiled()(
    np.ones([N, WIDTH], np.float32), np.zeros(N, bool), 2
  )
  assert (np.asarray(found.label) == -1).all()
  assert (np.asarray(order) == N).all()
  assert not np.any(means)


def test_far_points_do_not_lose_their_order():
  # exp(-mean) of these is zero in float32.
  rng = np.random.default_rng(3)
  x = rng.normal(size=[N, WIDTH]).astype(np.float32)
  one = _compiled()(x, np.ones(N, bool), BOUND)[0]
  far = _compiled()(x * 100, np.ones(N, bool), BOUND)[0]
  assert np.isfinite(far.score).all()
  assert len(np.unique(far.score)) == N
  denser = np.argmax(np.asarray(one.score))
  assert one.rank[denser] == 0


def test_sets_are_clustered_on_their_own_from_one_matrix():
  rng = np.random.default_rng(4)
  x = rng.normal(size=[N, WIDTH]).astype(np.float32)
  sets = np.array([0, 1, 0, 2, 1, -1, 0, 1, 0, 0, 1, 0], np.int32)
  counts = np.array([2, 3, 1])
  found = quick.jit(clustering.cluster)(x, counts[sets], sets=sets)
  for s, count in enumerate(counts):
    members = np.flatnonzero(sets == s)
    _, centres, centre = naive.dpc_knn(x, members, count)
    for i in members:
      assert found.centre[i] == centre[i]
      assert found.label[i] == centres.index(centre[i])
  assert found.centre[5] == N


def test_vmap_equals_a_loop():
  rng = np.random.default_rng(5)
  x = rng.normal(size=[3, N, WIDTH]).astype(np.float32)
  valid = rng.random([3, N]) < 0.7
  counts = np.array([1, 2, 4])
  together = quick.jit(jax.vmap(_compiled().__wrapped__))(x, valid, counts)
  for b in range(3):
    alone = _compiled()(x[b], valid[b], int(counts[b]))
    np.testing.assert_array_equal(together[0].centre[b], alone[0].centre)
    np.testing.assert_array_equal(together[1][b], alone[1])


def test_bfloat16_points_are_clustered_in_float32():
  x = jax.random.normal(jax.random.key(0), [N, WIDTH]).astype(jnp.bfloat16)
  check(x.astype(jnp.float32), np.ones(N, bool), 4)
  same = clustering.cluster(x, 4)
  wide = clustering.cluster(x.astype(jnp.float32), 4)
  np.testing.assert_array_equal(same.centre, wide.centre)
