"""UniComp against loops written from its description."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cacovid_jax import compressors, errors
from cacovid_jax.compressors import unicomp
from tests.compressors import given, quick, selections, shares

GRID, NUM_VIDEO = selections.GRID, selections.NUM_VIDEO


@functools.cache
def compressed(num_keep, grid=GRID, **options):
  method = compressors.get("unicomp", **options)
  return quick.jit(
    lambda x: given.compress(method, x, grid=grid, num_keep=num_keep)
  )


def naive_fuse(vectors, threshold, least):
  """Returns the first frame of each frame's group."""
  x = selections.unit(vectors)
  starts, far = [0], [0.0]
  for t in range(1, len(x)):
    far.append(1 - x[t] @ x[starts[-1]])
    if far[t] > threshold:
      starts.append(t)
  others = [t for t in range(len(x)) if t not in starts]
  others.sort(key=lambda t: (-round(far[t], 6), t))
  starts += others[: max(least - len(starts), 0)]
  return [max(s for s in starts if s <= t) for t in range(len(x))]


def naive_uniqueness(x):
  x = selections.unit(x)
  n = len(x)
  return [
    sum(1 - x[i] @ x[j] for j in range(n) if j != i) / max(n - 1, 1)
    for i in range(n)
  ]


def naive_visit(x, count, threshold):
  """Returns (tokens kept in order, {kept: tokens it suppressed})."""
  unique, z = naive_uniqueness(x), selections.unit(x)
  order = sorted(range(len(x)), key=lambda i: (-round(unique[i], 6), i))
  stays, suppressed, by = [], [], {}
  for i in order:
    if i in suppressed:
      continue
    stays.append(i)
    for j in order[order.index(i) + 1 :]:
      if j not in suppressed and 1 - z[i] @ z[j] <= threshold:
        suppressed.append(j)
        by.setdefault(i, []).append(j)
  returned = [i for i in order if i in suppressed]
  kept = (stays + returned)[:count]
  return kept, {i: [j for j in by.get(i, []) if j not in kept] for i in kept}


def naive(features, num_keep, grid=GRID, frame=0.005, token=0.2, heat=1.0):
  """Returns ({index: row}, {index: mass})."""
  T, H, W = grid
  P = H * W
  x = np.asarray(features, np.float64).reshape(T, P, -1)
  head = naive_fuse(x.mean(axis=1), frame, -(-num_keep // P))
  groups = sorted(set(head))
  fused = {
    g: x[[t for t in range(T) if head[t] == g]].mean(axis=0) for g in groups
  }
  unique = naive_uniqueness([fused[g].mean(axis=0) for g in groups])
  weights = np.exp(np.array(unique) / heat)
  counts = shares.largest_remainder(
    list(weights / weights.sum()),
    num_keep,
    low=1 if len(groups) <= num_keep else 0,
    high=P,
  )
  rows, mass = {}, {}
  for g, count in zip(groups, counts, strict=True):
    kept, by = naive_visit(fused[g], count, token)
    for i in kept:
      row = fused[g][i]
      if by[i]:
        row = (row + fused[g][by[i]].mean(axis=0)) / 2
      rows[g * P + i] = row
      mass[g * P + i] = head.count(g) * (1 + len(by[i]))
  return rows, mass


@pytest.mark.parametrize("kind", ["random", "scenes", "one_zero"])
@pytest.mark.parametrize("num_keep", [4, 11])
def test_rows_are_those_of_the_loops(kind, num_keep):
  merged = 0
  for seed in range(6):
    features = selections.video(kind, seed)
    out = compressed(num_keep)(features)
    selections.check(out, NUM_VIDEO, num_keep)
    rows, mass = naive(features, num_keep)
    np.testing.assert_array_equal(out.index, sorted(rows))
    for k, i in enumerate(sorted(rows)):
      np.testing.assert_allclose(out.features[k], rows[i], atol=1e-5)
      assert out.mass[k] == mass[i]
    merged += int(np.asarray(out.mass).max() > 1)
  assert merged > 0 or kind != "scenes"


def test_looser_thresholds_fuse_and_suppress_more():
  # Nothing is near enough in the first, nearly everything in the last.
  masses = []
  for frame, token in [(0.0, 0.0), (0.3, 0.5), (1.2, 1.5)]:
    total = 0.0
    for seed in range(4):
      features = selections.video("random", seed)
      out = compressed(4, frame_threshold=frame, token_threshold=token)(
        features
      )
      rows, mass = naive(features, 4, frame=frame, token=token)
      np.testing.assert_array_equal(out.index, sorted(rows))
      np.testing.assert_array_equal(out.mass, [mass[i] for i in sorted(mass)])
      total += float(out.mass.sum())
    masses.append(total)
  assert masses[0] == 16 and masses[0] < masses[1] < masses[2]


@pytest.mark.parametrize("num_keep", [1, 11, 29])
@pytest.mark.parametrize("kind", selections.KINDS)
def test_selection_of_any_video(kind, num_keep):
  features = selections.video(kind)
  selections.check(compressed(num_keep)(features), NUM_VIDEO, num_keep)


def test_identical_frames_become_one_as_long_as_the_budget_fits():
  features = selections.video("identical_frames")
  frame = np.asarray(features)[:6]
  out = compressed(4)(features)
  assert np.asarray(out.index).max() < 6
  assert np.asarray(out.mass).min() >= 5
  # Of 11 rows six find room in a frame: the first two frames stay apart.
  out = compressed(11)(features)
  assert set(np.asarray(out.index) // 6) == {0, 1}
  single = np.asarray(out.mass) % 4 != 0
  np.testing.assert_allclose(
    np.asarray(out.features)[single & (out.mass == 1)],
    frame[np.asarray(out.index)[single & (out.mass == 1)] % 6],
  )


def test_tokens_alone_stay_bit_by_bit():
  features = selections.video("random", 3).astype(jnp.bfloat16)
  out = compressed(11)(features)
  alone = np.asarray(out.mass) == 1
  assert alone.any() and out.features.dtype == jnp.bfloat16
  np.testing.assert_array_equal(
    np.asarray(out.features)[alone],
    np.asarray(features)[np.asarray(out.index)[alone]],
  )


def test_the_visit_is_one_scan_over_a_frame():
  x = jax.ShapeDtypeStruct([12, 8], jnp.float32)
  program = jax.make_jaxpr(
    jax.vmap(lambda x: unicomp.visit_tokens(x, jnp.int32(3), 0.2))
  )(jax.ShapeDtypeStruct([4, *x.shape], x.dtype))
  scans = [e for e in program.jaxpr.eqns if e.primitive.name == "scan"]
  assert [e.params["length"] for e in scans] == [12]


def test_one_frame():
  features = selections.video("random", 2, (1, 3, 4))
  out = compressed(5, (1, 3, 4))(features)
  selections.check(out, 12, 5)
  np.testing.assert_array_equal(
    out.index, sorted(naive(features, 5, (1, 3, 4))[0])
  )


def test_a_batch_equals_single_videos_in_one_program():
  selections.check_batch_and_compilations(compressors.get("unicomp"), 11)


@pytest.mark.parametrize(
  "options,said",
  [
    ({"frame_threshold": -0.1}, "a number at least 0 and at most 2"),
    ({"token_threshold": 3.0}, "a number at least 0 and at most 2"),
    ({"temperature": 0.0}, "above 0"),
  ],
)
def test_bad_options_are_one_line(options, said):
  with pytest.raises(errors.UserError, match=said) as caught:
    given.compress(
      compressors.get("unicomp", **options),
      selections.video("random"),
      grid=GRID,
      num_keep=3,
    )
  assert "\n" not in str(caught.value)


def test_it_can_be_made_for_a_tpu():
  selections.check_lowers_for_tpu(compressors.get("unicomp"), 11)
