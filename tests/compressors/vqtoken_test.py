"""VQToken's k-means against a loop, and on planted clusters."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn import metrics

from cacovid_jax import compressors, errors
from cacovid_jax.compressors import simple, vqtoken
from cacovid_jax.compressors.math import kmeans
from tests.compressors import given, quick, selections

unit = selections.unit
GRID = (8, 2, 3)


def features_of(seed, num_video=48):
  return (
    np.random.default_rng(seed).normal(size=[num_video, 8]).astype(np.float32)
  )


def planted(seed, num_clusters, noise=0.05, num_video=48):
  rng = np.random.default_rng(seed)
  group = rng.permutation(np.arange(num_video) % num_clusters)
  centres = unit(rng.normal(size=[num_clusters, 24])) * rng.uniform(
    0.5, 4.0, [num_clusters, 1]
  )
  x = centres[group] + noise * rng.normal(size=[num_video, 24])
  return group, x.astype(np.float32)


def naive_lloyd(x, centres, rounds):
  """Spherical k-means, one token at a time; returns centres and inertias."""
  x, centres = np.asarray(x, np.float64), np.asarray(centres, np.float64)
  inertia = []
  for _ in range(rounds):
    direction = unit(centres)
    label = np.array([int(np.argmax(direction @ v)) for v in x])
    inertia.append(sum(1 - x[i] @ direction[label[i]] for i in range(len(x))))
    new = centres.copy()
    for k in set(label.tolist()):
      new[k] = x[label == k].mean(axis=0)
    still = np.abs(new - centres).max() < 1e-4
    centres = new
    if still:
      break
  return centres, inertia


@functools.cache
def program(num_keep, **options):
  compressor = compressors.get("vqtoken", **options)
  return quick.jit(
    lambda x, rng: given.compress(
      compressor, x, grid=GRID, num_keep=num_keep, rng=rng
    )
  )


_seeds = quick.jit(kmeans.seeds, static_argnums=2, static_argnames="per_draw")
_lloyd = quick.jit(kmeans.lloyd, static_argnames="rounds")


@pytest.mark.parametrize("codes", ["raw", "unit"])
def test_rows_equal_the_loop_from_the_same_seeds(codes):
  for seed in range(4):
    features, rng = features_of(seed), jax.random.key(seed)
    x = unit(features)
    chosen = np.asarray(_seeds(rng, x, 9))
    centres, _ = naive_lloyd(x, x[chosen], 20)
    alike = x @ unit(centres).T
    label = alike.argmax(axis=-1)
    # The first of those that are equally close but for rounding.
    closeness = np.round(alike[np.arange(48), label] * 2**16)
    medoid = [
      max(np.flatnonzero(label == k), key=lambda i: (closeness[i], -i))
      for k in range(9)
    ]
    order = np.argsort(medoid)
    members = features if codes == "raw" else x
    out = program(9, codes=codes)(features, rng)
    np.testing.assert_array_equal(out.index, np.array(medoid)[order])
    np.testing.assert_array_equal(np.asarray(order)[out.assign], label)
    np.testing.assert_allclose(
      out.features, [members[label == k].mean(axis=0) for k in order], atol=1e-5
    )


def test_no_round_raises_the_inertia():
  x = unit(features_of(5))
  used = jnp.ones([9], bool)
  inertia = []
  for rounds in range(8):
    centres = _lloyd(x, x[:9], used, rounds=rounds)
    inertia.append(float(np.sum(1 - kmeans.nearest(x, centres, used)[1])))
  assert np.diff(inertia).max() <= 1e-5
  assert inertia[-1] < inertia[0]
  np.testing.assert_allclose(inertia, naive_inertia(x, 8), rtol=1e-4)


def naive_inertia(x, rounds):
  inertia = naive_lloyd(x, x[:9], rounds)[1]
  return inertia + inertia[-1:] * (rounds - len(inertia))


def test_planted_clusters_are_recovered():
  for seed in range(5):
    group, x = planted(seed, 9)
    # k-means++ may miss a cluster; of a few keys one finds them all.
    found = [
      metrics.adjusted_rand_score(
        group, program(9)(x, jax.random.key(k)).assign
      )
      for k in range(4)
    ]
    assert max(found) == 1.0


def test_seeds_are_distinct_and_follow_their_key():
  x = unit(features_of(6))
  for count, per_draw in ((1, 1), (9, 1), (47, 1), (9, 4), (48, 7)):
    drawn = np.asarray(_seeds(jax.random.key(0), x, count, per_draw=per_draw))
    assert len(set(drawn.tolist())) == count == len(drawn)
    again = _seeds(jax.random.key(0), x, count, per_draw=per_draw)
    np.testing.assert_array_equal(drawn, again)


def test_fewer_seeds_are_the_first_of_more():
  x = unit(features_of(6))
  many = _seeds(jax.random.key(1), x, 47)
  np.testing.assert_array_equal(many[:9], _seeds(jax.random.key(1), x, 9))


def test_seeds_are_drawn_by_squared_distance():
  # Token 0 is drawn first in a third of cases; then token 2 is 4 away from
  # both others and these are 0 apart: it must come second or first.
  x = jnp.array([[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]])
  draw = quick.jit(jax.vmap(lambda rng: kmeans.seeds(rng, x, 2)))
  drawn = np.asarray(draw(jax.random.split(jax.random.key(0), 300)))
  assert np.all((drawn == 2).any(axis=1))
  share = np.bincount(drawn[:, 0], minlength=3) / 300
  np.testing.assert_allclose(share, 1 / 3, atol=0.09)


def test_the_bend_of_a_curve_and_the_published_mistake():
  curve = jnp.array([9.0, 8.0, 7.0, 2.0, 1.5, 1.0])  # 12 to 17 clusters.
  assert int(vqtoken.bend(curve, "corrected")) == 15
  assert int(vqtoken.bend(curve, "released")) == 12


def test_an_elbow_finds_the_planted_number_and_pads_the_rest():
  group, x = planted(0, 15, noise=0.01)
  found = []
  for seed in range(4):
    out = program(20, elbow="corrected")(x, jax.random.key(seed))
    num_valid = int(out.mask.sum())
    found.append(num_valid)
    assert 13 <= num_valid <= 19
    assert (np.asarray(out.index[num_valid:]) == 48).all()
    assert not np.any(out.features[num_valid:])
    assert out.mass.sum() == 48
    if num_valid == 15:
      assert metrics.adjusted_rand_score(group, out.assign) > 0.9
  assert 15 in found
  released = program(20, elbow="released")(x, jax.random.key(0))
  assert int(released.mask.sum()) == 12


def test_means_reconstruct_better_than_tokens_that_were_picked():
  """On features with structure, as those of a video."""
  for seed in range(3):
    _, x = planted(seed, 16, noise=0.3)
    means = program(9)(x, jax.random.key(seed)).features
    rng = np.random.default_rng(seed)
    picks = [x[simple.even_positions(48, 9)], x[rng.permutation(48)[:9]]]
    best = [np.max(unit(x) @ unit(np.asarray(rows)).T, axis=-1).mean()
            for rows in (means, *picks)]  # fmt: skip
    assert best[0] > max(best[1:])


@pytest.mark.parametrize(
  "option",
  [
    {"codes": "mean"},
    {"elbow": "sharp"},
    {"elbow": "corrected"},
    {"seeds_per_draw": 0},
  ],
)
def test_options_out_of_range_are_one_line(option):
  with pytest.raises(errors.UserError, match="vqtoken: ") as caught:
    given.compress(
      compressors.get("vqtoken", **option),
      jnp.ones([48, 8]),
      grid=GRID,
      num_keep=9,
      rng=jax.random.key(0),
    )
  assert "\n" not in str(caught.value)
