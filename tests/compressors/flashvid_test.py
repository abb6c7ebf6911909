"""FlashVID before the language model, against loops from its description."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from cacovid_jax import compressors, errors
from cacovid_jax.compressors import flashvid
from cacovid_jax.compressors.math import segments, similarity
from tests.compressors import given, quick, selections, shares

GRID, NUM_VIDEO = selections.GRID, selections.NUM_VIDEO


def aux_of(seed, grid=GRID):
  attention = np.random.default_rng(seed).uniform(0.1, 1, np.prod(grid))
  return given.Aux(vision_attention=jnp.asarray(attention, jnp.float32))


def first_part(**options):
  return compressors.get("flashvid", llm_stage=False, **options)


@functools.cache
def compressed(num_keep, grid=GRID, **options):
  method = first_part(**options)
  return quick.jit(
    lambda x, aux: given.compress(
      method, x, grid=grid, num_keep=num_keep, aux=aux
    )
  )


def naive_diverse(x, attention, num_keep):
  """Farthest first, distances times the attention of the candidate."""
  z = selections.unit(x)
  n = len(z)
  far = [[(1 - z[i] @ z[j]) * attention[i] for j in range(n)] for i in range(n)]
  picked = []
  while len(picked) < num_keep:
    rest = [i for i in range(n) if i not in picked]
    picked.append(
      max(
        rest,
        key=lambda i: min(
          far[i][j] for j in (picked or range(n)) if picked or j != i
        ),
      )
    )
  return picked


def naive_centres(x, num_clusters):
  """Density peaks of x; returns the centre of each point."""
  n, width = x.shape
  d = np.array([[np.linalg.norm(a - b) / width**0.5 for b in x] for a in x])
  near = [sorted(row)[: min(7, n)] for row in d]
  density = [-np.mean(np.square(row)) for row in near]
  denser = [
    [j for j in range(n) if (-density[j], j) < (-density[i], i)]
    for i in range(n)
  ]
  apart = [
    min(d[i][j] for j in denser[i]) if denser[i] else d.max() for i in range(n)
  ]
  score = np.exp(density) * apart
  centres = sorted(range(n), key=lambda i: (-score[i], i))[:num_clusters]
  return [
    i if i in centres else min(sorted(centres), key=lambda c: d[i][c])
    for i in range(n)
  ]


def naive(features, attention, num_keep, grid=GRID, share=0.7, above=0.8,
          segments=8, below=0.9):  # fmt: skip
  """Returns {index of a row: tokens in it}."""
  T, H, W = grid
  P = H * W
  x = np.asarray(features, np.float64).reshape(T, P, -1)
  attention = np.asarray(attention, np.float64).reshape(T, P)
  z = selections.unit(x)
  num_diverse = int(share * num_keep + 1e-9)
  diverse = set()
  for t in range(T):
    count = num_diverse // T + (t < num_diverse % T)
    diverse |= {t * P + i for i in naive_diverse(x[t], attention[t], count)}

  pooled = selections.unit(x.mean(axis=1))
  beside = [pooled[t] @ pooled[t - 1] for t in range(1, T)]
  lowest = sorted(range(T - 1), key=lambda t: beside[t])[: segments - 1]
  cut = {t + 1 for t in range(T - 1) if t in lowest or beside[t] < below}

  links = []
  for t in range(1, T):
    before = [q for q in range(P) if (t - 1) * P + q not in diverse]
    if t in cut or not before:
      continue
    for p in range(P):
      if t * P + p not in diverse:
        q = max(before, key=lambda q: z[t, p] @ z[t - 1, q])
        if z[t, p] @ z[t - 1, q] > above:
          links.append((z[t, p] @ z[t - 1, q], t * P + p, (t - 1) * P + q))
  links.sort(key=lambda link: (-link[0], link[1]))
  parent = {i: q for _, i, q in links[: T * P - num_keep]}

  trees = {}
  for i in range(T * P):
    if i not in diverse:
      root = i
      while root in parent:
        root = parent[root]
      trees.setdefault(root, []).append(i)
  flat = x.reshape(T * P, -1)
  roots = [[r for r in sorted(trees) if r // P == t] for t in range(T)]
  num_trees = [len(r) for r in roots]
  some = sum(n > 0 for n in num_trees)
  num_merged = num_keep - num_diverse
  counts = shares.largest_remainder(
    num_trees,
    num_merged,
    low=[int(n > 0 and some <= num_merged) for n in num_trees],
    high=num_trees,
  )
  rows = {i: [i] for i in diverse}
  for t in range(T):
    if counts[t]:
      means = np.stack([flat[trees[r]].mean(axis=0) for r in roots[t]])
      for r, centre in zip(
        roots[t], naive_centres(means, counts[t]), strict=True
      ):
        rows.setdefault(roots[t][centre], []).extend(trees[r])
  return rows


def assert_rows(out, features, rows):
  flat = np.asarray(features, np.float64)
  np.testing.assert_array_equal(out.index, sorted(rows))
  for k, i in enumerate(sorted(rows)):
    np.testing.assert_array_equal(
      np.flatnonzero(np.asarray(out.assign) == k), sorted(rows[i])
    )
    np.testing.assert_allclose(
      out.features[k], flat[rows[i]].mean(axis=0), atol=1e-5
    )


@pytest.mark.parametrize("kind", ["random", "scenes"])
@pytest.mark.parametrize(
  "num_keep,options",
  [
    (11, {}),
    (11, {"num_segments": 1, "cut_below": -1.0, "link_above": 0.0}),
    (4, {"num_segments": 2, "diverse_share": 0.3}),
    (9, {"num_segments": 1, "diverse_share": 0.0}),
    (9, {"diverse_share": 1.0}),
  ],
  ids=str,
)
def test_rows_are_those_of_the_loops(kind, num_keep, options):
  names = {
    "num_segments": "segments",
    "cut_below": "below",
    "link_above": "above",
    "diverse_share": "share",
  }
  linked = 0
  for seed in range(6):
    features, aux = selections.video(kind, seed), aux_of(seed)
    out = compressed(num_keep, **options)(features, aux)
    selections.check(out, NUM_VIDEO, num_keep)
    rows = naive(
      features,
      aux.vision_attention,
      num_keep,
      **{names[k]: v for k, v in options.items()},
    )
    assert_rows(out, features, rows)
    linked += sum(len({i // 6 for i in row}) > 1 for row in rows.values())
  # Trees that span frames are there where they should be.
  spans = options.get("num_segments", 8) < 8 and kind == "scenes"
  assert linked > 0 if spans else True


def test_attention_draws_the_diverse_tokens():
  features = selections.video("random", 1)
  flat = jnp.full(NUM_VIDEO, 0.01)
  for token in [3, 10, 29]:
    aux = given.Aux(vision_attention=flat.at[token].set(1.0))
    assert token in np.asarray(compressed(8)(features, aux).index)


@pytest.mark.parametrize("num_keep", [1, 11, 29])
@pytest.mark.parametrize("kind", selections.KINDS)
def test_selection_of_any_video(kind, num_keep):
  out = compressed(num_keep)(selections.video(kind), aux_of(0))
  selections.check(out, NUM_VIDEO, num_keep)


def test_no_attention_at_all_still_keeps_distinct_tokens():
  aux = given.Aux(vision_attention=jnp.zeros(NUM_VIDEO))
  out = compressed(11)(selections.video("random"), aux)
  selections.check(out, NUM_VIDEO, 11)


def test_a_still_video_loses_no_token():
  features = selections.video("identical_frames")
  # Without cuts and picks, every token is in one of 11 trees.
  options = {"num_segments": 1, "diverse_share": 0.0}
  out = compressed(11, **options)(features, aux_of(0))
  selections.check(out, NUM_VIDEO, 11)
  assert np.asarray(out.mass).sum() == NUM_VIDEO


def test_one_frame_and_bfloat16():
  grid = (1, 3, 4)
  features = selections.video("random", 2, grid).astype(jnp.bfloat16)
  aux = aux_of(2, grid)
  out = compressed(5, grid)(features, aux)
  selections.check(out, 12, 5)
  assert out.features.dtype == jnp.bfloat16
  rows = naive(features.astype(jnp.float32), aux.vision_attention, 5, grid)
  np.testing.assert_array_equal(out.index, sorted(rows))
  for k, i in enumerate(sorted(rows)):
    if len(rows[i]) == 1:
      np.testing.assert_array_equal(out.features[k], features[i])


@pytest.mark.parametrize("seed", range(3))
def test_segments_start_at_the_lowest_and_below_the_threshold(seed):
  vectors = np.random.default_rng(seed).normal(size=(7, 4)) + 1.5
  z = selections.unit(vectors)
  beside = np.array([z[t] @ z[t - 1] for t in range(1, 7)])
  starts = np.asarray(
    segments.unlike_neighbours(
      similarity.adjacent(jnp.asarray(vectors, jnp.float32)), 3, 0.5
    )
  )
  expected = beside < 0.5
  expected[np.argsort(beside)[:2]] = True
  np.testing.assert_array_equal(starts, [True, *expected])


def test_roots_are_found_through_any_number_of_frames():
  parent = jnp.array([[-1, -1], [1, 0], [0, -1], [0, 1], [1, 1]])
  np.testing.assert_array_equal(
    flashvid.roots_of(parent), [0, 1, 1, 0, 1, 5, 1, 5, 5, 5]
  )


def test_a_batch_equals_single_videos_in_one_program():
  selections.check_batch_and_compilations(first_part(), 11, aux_of)


def test_what_enters_is_more_than_the_budget():
  # 28 layers: 20 see all that enters, 8 see 30 % of it.
  method = compressors.get("flashvid")
  assert (method.llm_layer, method.llm_keep) == (20, 0.3)
  (_, entering), _ = method.plan(28, 6272, 0.25)
  assert entering / 6272 == pytest.approx(1.25 * 0.25)


@pytest.mark.parametrize(
  "options,said",
  [
    ({"diverse_share": 1.5}, "at least 0 and at most 1"),
    ({"num_segments": 0}, "at least 1"),
  ],
)
def test_bad_options_are_one_line(options, said):
  with pytest.raises(errors.UserError, match=said) as caught:
    first_part(**options)
  assert "\n" not in str(caught.value)


def test_missing_attention_is_named():
  method = first_part()
  with pytest.raises(ValueError, match="needs vision_attention"):
    given.compress(method, selections.video("random"), grid=GRID, num_keep=3)


def test_it_can_be_made_for_a_tpu():
  selections.check_lowers_for_tpu(first_part(), 11, aux_of(0))
