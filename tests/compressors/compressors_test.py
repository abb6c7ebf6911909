"""The first rules against an independent NumPy rule, and at the edges."""

import functools
import math
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cacovid_jax import compressors, errors
from cacovid_jax.compressors import base, cacovid, simple
from cacovid_jax.models import token_grid
from cacovid_jax.policy import selection
from tests.compressors import given, quick, videos

GRID = (5, 2, 3)
NUM_VIDEO = 30
RULES = [
  "cacovid",
  "random",
  "uniform",
  "divprune",
  "last_query",
  "density_peaks",
]
# The two controls share their function with `cacovid`.
ALL = [*RULES, "cacovid_untrained", "cacovid_other_question"]


def scores_of(rng, grid):
  frame_key, token_key = jax.random.split(rng)
  return videos.Scores(
    jax.random.normal(frame_key, [grid[0], 2]),
    jax.random.normal(token_key, [math.prod(grid), 2]),
  )


def features_of(seed, grid=GRID, width=8):
  return jax.random.normal(jax.random.key(seed), [math.prod(grid), width])


@functools.cache
def aux_of(seed, grid=GRID):
  keys = jax.random.split(jax.random.key(seed), 4)
  return given.Aux(
    scores=scores_of(keys[0], grid),
    untrained_scores=scores_of(keys[1], grid),
    other_scores=scores_of(keys[2], grid),
    attention=jax.random.uniform(keys[3], [4, math.prod(grid)]),
  )


def run(name, features, num_keep, grid=GRID, seed=0, **options):
  spec = name, tuple(sorted(options.items()))
  return _compiled(spec, num_keep, grid)(
    features, aux_of(seed + 100, grid), jax.random.key(seed)
  )


@functools.cache
def _compiled(spec, num_keep, grid):
  compressor = compressors.get(spec[0], **dict(spec[1]))

  def compress(features, aux, rng):
    return given.compress(
      compressor, features, grid=grid, num_keep=num_keep, aux=aux, rng=rng
    )

  return quick.jit(compress)


def naive_max_min(features, num_keep):
  """The definition, every distance written out."""
  x = np.asarray(features, np.float64)
  n = len(x)
  unit = [v / max(np.linalg.norm(v), 1e-12) for v in x]
  d = [[1 - float(unit[i] @ unit[j]) for j in range(n)] for i in range(n)]
  first = max(range(n), key=lambda i: min(d[i][j] for j in range(n) if j != i))
  picked = [first]
  while len(picked) < num_keep:
    rest = [i for i in range(n) if i not in picked]
    picked.append(max(rest, key=lambda i: min(d[i][j] for j in picked)))
  return picked


def naive_density_peaks(features, num_keep):
  """METHOD 2.2 token by token, without noise."""
  z = np.asarray(features, np.float64)
  n, width = z.shape
  d = np.array(
    [[np.linalg.norm(a - b) / math.sqrt(width) for b in z] for a in z]
  )
  rho = [math.exp(-np.mean(sorted(d[i] ** 2)[:4])) for i in range(n)]
  value = []
  for i in range(n):
    denser = [d[i][j] for j in range(n) if rho[j] > rho[i]]
    value.append(rho[i] * (min(denser) if denser else d.max()))
  return sorted(sorted(range(n), key=lambda i: -value[i])[:num_keep])


@pytest.mark.parametrize("num_keep", [1, 7, 29])
@pytest.mark.parametrize("name", RULES)
def test_keeps_exactly_k_in_order(name, num_keep):
  features = features_of(1)
  out = run(name, features, num_keep)
  index = np.asarray(out.index)
  assert index.shape == (num_keep,) and index.dtype == np.int32
  assert np.all(np.diff(index) > 0)
  assert 0 <= index[0] and index[-1] < NUM_VIDEO
  np.testing.assert_array_equal(out.features, np.asarray(features)[index])
  assert np.asarray(out.mask).all()
  np.testing.assert_array_equal(out.mass, np.ones(num_keep))
  expected = np.full(NUM_VIDEO, -1)
  expected[index] = np.arange(num_keep)
  np.testing.assert_array_equal(out.assign, expected)


@pytest.mark.parametrize("num_keep", [30, 31])
@pytest.mark.parametrize("name", ALL)
def test_a_budget_of_everything_is_the_identity(name, num_keep):
  features = features_of(2)
  out = run(name, features, num_keep)
  np.testing.assert_array_equal(out.index, np.arange(NUM_VIDEO))
  np.testing.assert_array_equal(out.features, features)


@pytest.mark.parametrize("name", ALL)
def test_a_budget_of_nothing_is_refused(name):
  with pytest.raises(errors.UserError, match=r"keeps nothing; raise"):
    run(name, features_of(3), 0)


@pytest.mark.parametrize(
  "kind", ["zeros", "identical_frames", "identical_tokens", "one_zero"]
)
@pytest.mark.parametrize("name", RULES)
def test_degenerate_videos_still_give_k_distinct_tokens(name, kind):
  frame = jax.random.normal(jax.random.key(4), [6, 8])
  features = {
    "zeros": jnp.zeros([30, 8]),
    "identical_frames": jnp.tile(frame, [5, 1]),
    "identical_tokens": jnp.ones([30, 8]),
    "one_zero": features_of(5).at[3].set(0.0),
  }[kind]
  index = np.asarray(run(name, features, 7).index)
  assert len(set(index.tolist())) == 7
  assert index.max() < NUM_VIDEO


@pytest.mark.parametrize("name", RULES)
def test_one_frame_works(name):
  grid = (1, 3, 4)
  out = run(name, features_of(6, grid), 5, grid=grid)
  assert len(set(np.asarray(out.index).tolist())) == 5


@pytest.mark.parametrize("name", RULES)
def test_vmap_and_jit_equal_a_python_loop(name):
  compressor = compressors.get(name)
  features = jnp.stack([features_of(i) for i in range(3)])
  aux = jax.tree.map(lambda *x: jnp.stack(x), *[aux_of(i) for i in range(3)])
  keys = jax.random.split(jax.random.key(7), 3)

  def one(features, aux, rng):
    return given.compress(
      compressor, features, grid=GRID, num_keep=9, aux=aux, rng=rng
    ).index

  batched = quick.jit(jax.vmap(one))(features, aux, keys)
  for i in range(3):
    single = one(features[i], jax.tree.map(lambda x, i=i: x[i], aux), keys[i])
    np.testing.assert_array_equal(batched[i], single)


@pytest.mark.parametrize("seed", range(20))
def test_divprune_equals_the_naive_loop(seed):
  features = features_of(seed)
  expected = naive_max_min(features, 11)
  np.testing.assert_array_equal(
    run("divprune", features, 11).index, sorted(expected)
  )


def test_divprune_does_not_depend_on_token_order():
  features = features_of(8)
  order = np.random.default_rng(0).permutation(NUM_VIDEO)
  shuffled = run("divprune", features[order], 10).index
  np.testing.assert_array_equal(
    np.sort(order[np.asarray(shuffled)]), run("divprune", features, 10).index
  )


def test_divprune_takes_every_distinct_token_before_a_duplicate():
  frame = jax.random.normal(jax.random.key(9), [6, 8])
  index = run("divprune", jnp.tile(frame, [5, 1]), 6).index
  assert set((np.asarray(index) % 6).tolist()) == set(range(6))


def test_divprune_ranks_bfloat16_features_in_float32():
  features = features_of(10).astype(jnp.bfloat16)
  np.testing.assert_array_equal(
    run("divprune", features, 11).index,
    sorted(naive_max_min(features.astype(jnp.float32), 11)),
  )


@pytest.mark.parametrize("num_keep", [3, 5, 12, 13])
def test_density_peaks_equals_the_naive_loop_frame_by_frame(num_keep):
  features = features_of(11)
  share, rest = divmod(num_keep, 5)
  expected = []
  for t, frame in enumerate(np.asarray(features).reshape(5, 6, 8)):
    kept = naive_density_peaks(frame, share + (t < rest))
    expected += [t * 6 + i for i in kept]
  out = run("density_peaks", features, num_keep)
  np.testing.assert_array_equal(out.index, expected)


def test_density_peaks_over_the_whole_video():
  features = features_of(12)
  out = run("density_peaks", features, 8, scope="video")
  np.testing.assert_array_equal(out.index, naive_density_peaks(features, 8))


def test_divprune_per_frame_splits_the_budget():
  features = features_of(13)
  out = run("divprune", features, 12, scope="frame")
  counts = np.bincount(np.asarray(out.index) // 6, minlength=5)
  np.testing.assert_array_equal(counts, [3, 3, 2, 2, 2])


@pytest.mark.parametrize("name", ["divprune", "density_peaks"])
def test_unknown_scope_is_one_line(name):
  with pytest.raises(errors.UserError, match="'clip'"):
    run(name, features_of(0), 3, scope="clip")


def test_uniform_positions_are_distinct_for_every_budget():
  for num_video in (1, 2, 7, 30, 784):
    for num_keep in range(1, num_video + 1):
      index = simple.even_positions(num_video, num_keep)
      assert len(index) == num_keep
      assert np.all(np.diff(index) > 0)
      assert index[0] == 0 and index[-1] < num_video


def test_uniform_spans_the_video():
  np.testing.assert_array_equal(run("uniform", features_of(0), 3).index,
                                [0, 14, 29])  # fmt: skip


def test_random_follows_its_key_and_takes_each_token_equally_often():
  first = run("random", features_of(0), 6, seed=1).index
  np.testing.assert_array_equal(
    first, run("random", features_of(5), 6, seed=1).index
  )
  compressor = compressors.get("random")
  draw = quick.jit(
    jax.vmap(
      lambda rng: (
        given.compress(
          compressor, features_of(0), grid=GRID, num_keep=6, rng=rng
        ).index
      )
    )
  )
  index = np.asarray(draw(jax.random.split(jax.random.key(0), 3000)))
  share = np.bincount(index.reshape(-1), minlength=30) / 3000
  # Standard error of a share of 0.2 is 0.0073; five of them over 30 tokens.
  np.testing.assert_allclose(share, 0.2, atol=0.037)


def test_random_without_a_key_is_a_mistake_of_the_caller():
  with pytest.raises(ValueError, match="needs rng"):
    given.compress(
      compressors.get("random"), features_of(0), grid=GRID, num_keep=3
    )


@pytest.mark.parametrize("layer", [0, 3, -1])
def test_last_query_takes_the_largest_weights_of_a_layer(layer):
  aux = aux_of(100)
  expected = np.sort(np.argsort(-np.asarray(aux.attention[layer]))[:7])
  out = run("last_query", features_of(0), 7, layer=layer)
  np.testing.assert_array_equal(out.index, expected)


@pytest.mark.parametrize("layer", [4, -5])
def test_last_query_names_the_layers_there_are(layer):
  with pytest.raises(errors.UserError, match="layers 0 to 3"):
    run("last_query", features_of(0), 7, layer=layer)


@pytest.mark.parametrize(
  "name,field",
  [
    ("cacovid", "scores"),
    ("cacovid_untrained", "untrained_scores"),
    ("cacovid_other_question", "other_scores"),
  ],
)
def test_policy_variants_follow_their_own_scores(name, field):
  aux = aux_of(100)
  expected = selection.select(
    getattr(aux, field), selection.budget(GRID, 0.3, importance_ratio=1.0)
  )
  out = run(name, features_of(0), 9, importance_ratio=1.0)
  np.testing.assert_array_equal(out.index, expected)
  drop, keep = np.asarray(getattr(aux, field).token).T
  best = np.argsort(drop - keep, kind="stable")[:9]
  out = run(name, features_of(0), 9, importance_ratio=1.0, budget="clip")
  np.testing.assert_array_equal(out.index, np.sort(best))
  assert set(best) != set(expected.tolist())


def test_cacovid_uses_the_unrounded_ratio_when_given():
  # 0.35 keeps 10 of 30; iota * r * N is 5.25 of them, not 5.
  aux = aux_of(3)
  compressor = compressors.get("cacovid")
  out = given.compress(
    compressor, features_of(0), grid=GRID, num_keep=10, aux=aux, ratio=0.35
  )
  expected = selection.select(aux.scores, selection.budget(GRID, 0.35))
  np.testing.assert_array_equal(out.index, expected)


def test_a_selection_in_a_bucket_is_cacovids_and_marks_the_padding():
  bucket = token_grid.GridBucket(6, 8, 40)
  run = quick.jit(
    lambda features, budget, aux: given.cacovid_in_bucket(
      features, budget, aux=aux
    )
  )
  for seed, (grid, ratio) in enumerate([(GRID, 0.35), ((3, 4, 2), 0.5)]):
    num_video = math.prod(grid)
    features, scores = (
      features_of(seed, grid),
      scores_of(jax.random.key(seed), grid),
    )
    num_keep = selection.num_keep(grid, ratio)
    alone = given.compress(
      compressors.get("cacovid"),
      features,
      grid=grid,
      num_keep=num_keep,
      aux=given.Aux(scores=scores),
      ratio=ratio,
    )
    behind = 40 - num_video
    out = run(
      jnp.pad(features, ((0, behind), (0, 0)), constant_values=jnp.nan),
      selection.budget(grid, ratio, bucket=bucket, num_keep_max=16),
      given.Aux(
        scores=videos.Scores(
          jnp.pad(scores.frame, ((0, 6 - grid[0]), (0, 0))),
          jnp.pad(scores.token, ((0, behind), (0, 0))),
        )
      ),
    )
    np.testing.assert_array_equal(out.index[:num_keep], alone.index)
    np.testing.assert_array_equal(out.features[:num_keep], alone.features)
    np.testing.assert_array_equal(out.assign[:num_video], alone.assign)
    np.testing.assert_array_equal(out.mask, np.arange(16) < num_keep)
    np.testing.assert_array_equal(out.mass, out.mask)
    assert (np.asarray(out.index[num_keep:]) == 40).all()
    assert not np.any(out.features[num_keep:])
    assert (np.asarray(out.assign[num_video:]) == -1).all()


def test_every_budget_has_a_ratio():
  for grid in [(16, 7, 7), (5, 2, 3), (32, 14, 14)]:
    num_video = math.prod(grid)
    for num_keep in range(1, num_video, max(1, num_video // 97)):
      ratio = cacovid.ratio_of(grid, num_keep)
      assert selection.num_keep(grid, ratio) == num_keep


def test_missing_parts_are_named():
  with pytest.raises(ValueError, match="cacovid needs scores"):
    given.compress(
      compressors.get("cacovid"),
      features_of(0),
      grid=GRID,
      num_keep=3,
      aux=given.Aux(),
    )


def test_wrong_grid_is_refused():
  with pytest.raises(ValueError, match="do not fill"):
    run("uniform", features_of(0), 3, grid=(5, 2, 2))


@pytest.mark.parametrize("ratio", [0.0, -0.1, 1.5, float("nan"), "many"])
def test_ratio_outside_0_to_1_is_one_line(ratio):
  with pytest.raises(errors.UserError, match="outside") as caught:
    base.budget(GRID, ratio)
  assert "\n" not in str(caught.value)


def test_ratio_that_keeps_no_token_is_one_line():
  with pytest.raises(errors.UserError, match="keeps no token"):
    base.budget(GRID, 0.03)
  assert base.budget(GRID, 0.1) == 3


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_features_that_are_not_finite_are_refused(bad):
  with pytest.raises(errors.UserError, match="NaN or infinity"):
    base.check_finite(features_of(0).at[2, 3].set(bad))
  base.check_finite(features_of(0))


def test_unknown_names_list_the_known_ones():
  with pytest.raises(errors.UserError, match="did you mean divprune") as caught:
    compressors.get("divprun")
  assert all(name in str(caught.value) for name in compressors.names())


def test_unknown_options_list_the_known_ones():
  with pytest.raises(errors.UserError, match="known options: layer"):
    compressors.get("last_query", layers=3)
  with pytest.raises(errors.UserError, match="known options: none"):
    compressors.get("decisive_boxes", seed=3)


def test_options_in_the_name():
  assert compressors.parse("a?x=1&y=video&z=0.5") == (
    "a",
    {"x": 1, "y": "video", "z": 0.5},
  )
  compressor = compressors.get("density_peaks?scope=video")
  assert compressor.options == {"scope": "video"}
  with pytest.raises(errors.UserError, match="option=value"):
    compressors.parse("density_peaks?scope")


def test_a_users_own_rule_from_a_file(tmp_path):
  path = tmp_path / "mine.py"
  path.write_text(
    textwrap.dedent("""
      import jax.numpy as jnp
      from cacovid_jax.compressors import base

      def loudest(features, *, grid, num_keep, text=None, aux=None, rng=None,
                  power=1):
        norm = jnp.linalg.norm(features, axis=-1) ** power
        return base.take_top(features, norm, num_keep)

      not_a_rule = 3
    """)
  )
  features = features_of(0)
  norms = np.linalg.norm(np.asarray(features), axis=-1)
  out = run(f"{path}:loudest", features, 4)
  np.testing.assert_array_equal(out.index, np.sort(np.argsort(-norms)[:4]))
  out = run(f"{path}:loudest?power=-1", features, 4)
  np.testing.assert_array_equal(out.index, np.sort(np.argsort(norms)[:4]))
  with pytest.raises(errors.UserError, match="no quietest"):
    compressors.get(f"{path}:quietest")
  with pytest.raises(errors.UserError, match="neither"):
    compressors.get(f"{path}:not_a_rule")
  with pytest.raises(errors.UserError, match="no file"):
    compressors.get(f"{tmp_path}/other.py:loudest")
  path.write_text("import nonexistent_module")
  with pytest.raises(errors.UserError, match="ModuleNotFoundError"):
    compressors.get(f"{path}:loudest")


@pytest.mark.parametrize("num_decisive", [0, 1, 4, 7, 20, 30])
def test_decisive_boxes_takes_the_right_tokens_first(num_decisive):
  decisive = np.zeros(NUM_VIDEO, bool)
  order = np.random.default_rng(num_decisive).permutation(NUM_VIDEO)
  decisive[order[:num_decisive]] = True
  out = given.compress(
    compressors.get("decisive_boxes"),
    features_of(0),
    grid=GRID,
    num_keep=7,
    aux=given.Aux(decisive=decisive),
  )
  index = np.asarray(out.index)
  assert len(set(index.tolist())) == 7
  assert decisive[index].sum() == min(num_decisive, 7)


def test_spread_is_even():
  members = jnp.ones(30, bool)
  taken = np.flatnonzero(simple.spread(members, 30, 6))
  np.testing.assert_array_equal(np.diff(taken), 5)


def test_oracles_are_not_listed_as_methods():
  assert "decisive_boxes" not in compressors.names()
  assert compressors.oracles() == ("decisive_boxes",)
